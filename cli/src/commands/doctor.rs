//! `doctor`: what this machine offers.

use std::fmt::Write as _;
use std::process::ExitCode;

use catalyst_api::{CheckStatus, Doctor};

use super::Context;
use crate::Outcome;
use crate::output;
use crate::table::{Cell, Table, Tone};
use crate::text::clean;

/// Prints the report; exit code 1 if anything needed is missing.
pub fn run(context: &Context) -> Outcome {
    let report = context.client()?.doctor()?;
    if context.json {
        output::json(&report)?;
    } else {
        output::print(&text(&report, output::colours()))?;
    }
    let missing = report.checks.iter().any(|check| check.status == CheckStatus::Missing);
    Ok(if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(report: &Doctor, colours: bool) -> String {
    let mut table = Table::pairs();
    for check in &report.checks {
        let (word, tone) = match check.status {
            CheckStatus::Ok => ("OK", Tone::Good),
            CheckStatus::Degraded => ("degraded", Tone::Warn),
            CheckStatus::Missing => ("missing", Tone::Bad),
        };
        table.row(vec![Cell::toned(word, tone), Cell::from(&check.name), Cell::from(&check.found)]);
        if let Some(remedy) = &check.remedy {
            table.row(vec![Cell::default(), Cell::default(), Cell::from(format!("remedy: {remedy}"))]);
        }
    }
    let mut text = table.render(colours);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\nVMs run on engine {}: {}", report.engine, clean(&report.engine_reason));
    text
}

#[cfg(test)]
mod tests {
    use catalyst_api::{Check, EngineName};

    use super::*;

    #[test]
    fn remedies_stand_below_what_they_cure() {
        let report = Doctor {
            engine: EngineName::Qemu,
            engine_reason: "KVM interprets kernel code".to_owned(),
            checks: vec![
                Check {
                    name: "TUN".to_owned(),
                    status: CheckStatus::Ok,
                    found: "opens".to_owned(),
                    remedy: None,
                },
                Check {
                    name: "QEMU".to_owned(),
                    status: CheckStatus::Missing,
                    found: "not found".to_owned(),
                    remedy: Some("apt install qemu-system-x86".to_owned()),
                },
            ],
        };
        assert_eq!(
            text(&report, false),
            "OK       TUN   opens\n\
             missing  QEMU  not found\n               remedy: apt install qemu-system-x86\n\
             \nVMs run on engine qemu: KVM interprets kernel code\n"
        );
    }
}
