//! `template …`

use std::process::ExitCode;

use catalyst_api::{CreateTemplate, TemplateInfo, WarmInfo, WarmRequest};

use super::{Context, for_each};
use crate::args::Template;
use crate::client::Client;
use crate::progress::Board;
use crate::table::{Cell, Table, Tone};
use crate::{Outcome, output, size, tasks, text};

/// Runs a `template` command.
pub fn run(context: &Context, command: Template) -> Outcome {
    let client = context.client()?;
    match command {
        Template::Warm { template, cpus, memory } => {
            warm(context, &client, &template.name, WarmRequest { cpus, memory_mib: memory })
        }
        Template::Create { vm, name } => {
            let body = CreateTemplate { vm, name };
            let task = tasks::follow(&client, || client.create_template(&body))?;
            output::info(&format!("Made template '{}' from VM '{}'", body.name, body.vm));
            if context.json {
                output::json(&task)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Template::Delete { names } => for_each(&names, &Board::new(), |name| {
            client.delete_template(name)?;
            output::info(&format!("Deleted template '{name}'"));
            if context.json {
                output::json_line(&serde_json::json!({ "name": name, "deleted": true }))?;
            }
            Ok(())
        }),
        Template::List => {
            let templates = client.templates()?;
            if context.json {
                output::json(&templates)?;
            } else {
                output::print(&table(&templates).render(output::colours()))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Template::Show(template) => {
            let template = client.template(&template.name)?;
            if context.json {
                output::json(&template)?;
            } else {
                output::print(&description(&template))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn warm(context: &Context, client: &Client, name: &str, request: WarmRequest) -> Outcome {
    let task = tasks::follow(client, || client.warm(name, request))?;
    output::info(&format!("Template '{name}' is warm: {}", task.message));
    if context.json {
        output::json(&task)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn state(warm: &WarmInfo) -> Cell {
    if warm.fits { Cell::toned("fits", Tone::Good) } else { Cell::toned("does not fit", Tone::Warn) }
}

fn table(templates: &[TemplateInfo]) -> Table {
    let mut table =
        Table::new(&["NAME", "VERSION", "WARM", "CPUS", "MEMORY", "ENGINE", "SIZE", "VMS", "CREATED"]);
    for template in templates {
        let head = [Cell::from(&template.name), Cell::from(&template.version)];
        if template.warm.is_empty() {
            let none = std::iter::once(Cell::from("no"));
            table.row(head.into_iter().chain(none).chain((0..6).map(|_| Cell::from(""))).collect());
            continue;
        }
        for warm in &template.warm {
            table.row(vec![
                Cell::from(&template.name),
                Cell::from(&template.version),
                state(warm),
                Cell::from(warm.cpus.to_string()),
                Cell::from(size::human(warm.memory_mib * size::MIB)),
                Cell::from(warm.engine.to_string()),
                Cell::from(size::human(warm.allocated_bytes)),
                Cell::from(warm.used_by.to_string()),
                Cell::from(text::date(warm.created)),
            ]);
        }
    }
    table
}

fn description(template: &TemplateInfo) -> String {
    let mut pairs = Table::pairs();
    pairs.pair("Name", &template.name);
    pairs.pair("Version", &template.version);
    if let Some(from) = &template.made_from {
        pairs.pair("Made from", from);
    }
    pairs.pair("Disk", size::human(template.disk_gib.saturating_mul(size::GIB)));
    pairs.pair("Used by", format!("{} VMs", template.used_by));
    let mut texts = vec![pairs.render(output::colours())];
    if template.warm.is_empty() {
        texts.push(format!("No warm state; make one: catalyst template warm {}\n", template.name));
    }
    for warm in &template.warm {
        let mut pairs = Table::pairs();
        pairs.pair("Warm state", &warm.name);
        pairs.pair("State", state(warm));
        if let Some(reason) = &warm.reason {
            pairs.pair("Reason", reason);
        }
        pairs.pair("For", format!("{} CPUs, {}", warm.cpus, size::human(warm.memory_mib * size::MIB)));
        pairs.pair("Engine", warm.engine.to_string());
        let (all, memory) = (size::human(warm.allocated_bytes), size::human(warm.memory_bytes));
        pairs.pair("Size", format!("{all} on disk, {memory} of memory"));
        pairs.pair("Age", text::duration(text::since(warm.created)));
        pairs.pair("Used by", format!("{} VMs", warm.used_by));
        texts.push(pairs.render(output::colours()));
    }
    texts.join("\n")
}
