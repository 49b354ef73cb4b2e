//! `catalyst doctor`: what the host has and lacks, each with its figure and the remedy.

use std::path::Path;
use std::process::Stdio;

use catalyst_api::{Check, CheckStatus, Doctor, EngineName};
use catalyst_vmm::probe::{ProbeReport, Verdict};
use tokio::process::Command;

use crate::engine::{Engines, qemu};
use crate::http::error::chain;
use crate::machines::Context;
use crate::privilege::as_root_blocking;
use crate::settings::Settings;
use crate::store::config::{DEFAULT_MEMORY_MIB, DEFAULT_TEMPLATE, host_memory_mib};

const GIB: u64 = 1 << 30;
/// Less room than this is worth a word: a template and some VMs want it.
const ROOM: u64 = 5 * GIB;

/// Looks at everything.
pub async fn examine(settings: &Settings, context: &Context) -> Doctor {
    let engines = &context.engines;
    let (probe, qemu, qemu_img, dnsmasq, nft) = tokio::join!(
        crate::probe::run(),
        version_of(qemu::PROGRAM, "--version"),
        version_of("qemu-img", "--version"),
        version_of("dnsmasq", "--version"),
        version_of("nft", "--version"),
    );
    let mut checks = vec![
        kvm(&probe, engines),
        emulator(qemu, engines.name()),
        program("qemu-img", qemu_img, "sudo apt-get install qemu-system-x86 qemu-utils"),
        tun(),
        program("nftables", nft, "sudo apt-get install nftables"),
        program("dnsmasq", dnsmasq, "sudo apt-get install dnsmasq-base"),
        network(context).await,
        port(settings),
        image(context).await,
        memory(),
    ];
    checks.push(room("room for VMs", &settings.state_dir));
    checks.push(room("room for images", &settings.image_dir));
    Doctor { engine: engines.name(), engine_reason: engines.why().to_owned(), checks }
}

fn check(name: &str, status: CheckStatus, found: impl Into<String>, remedy: Option<&str>) -> Check {
    Check { name: name.to_owned(), status, found: found.into(), remedy: remedy.map(str::to_owned) }
}

/// KVM as it is now; the engine was chosen when the daemon started.
fn kvm(probe: &Result<ProbeReport, String>, engines: &Engines) -> Check {
    let report = match probe {
        Ok(report) => report,
        Err(why) => {
            let remedy = "make build, or make install: catalyst-vmm belongs beside catalyst-daemon";
            return check("KVM", CheckStatus::Degraded, why, Some(remedy));
        }
    };
    let waits = engines.name() == EngineName::Qemu && !engines.is_named();
    let (status, remedy) = match report.verdict {
        Verdict::Usable if waits => (
            CheckStatus::Degraded,
            Some("VMs run on qemu, since KVM was not usable when the daemon started: catalyst daemon stop"),
        ),
        Verdict::Usable => (CheckStatus::Ok, None),
        Verdict::Absent => (
            CheckStatus::Degraded,
            Some(
                "switch on virtualization in the firmware, then: sudo modprobe kvm_intel || sudo modprobe kvm_amd",
            ),
        ),
        Verdict::Slow { .. } | Verdict::Unusable { .. } => (
            CheckStatus::Degraded,
            Some(
                "use a machine with hardware virtualization (nested, if this is a VM); qemu serves until then",
            ),
        ),
    };
    check("KVM", status, report.summary.clone(), remedy)
}

fn emulator(version: Option<String>, engine: EngineName) -> Check {
    match (version, engine) {
        (None, EngineName::Kvm) => {
            check("QEMU", CheckStatus::Ok, "not installed; VMs run on kvm without it", None)
        }
        (version, _) => program("QEMU", version, "sudo apt-get install qemu-system-x86 qemu-utils"),
    }
}

/// The first line a program says of its version.
async fn version_of(program: &str, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).stdin(Stdio::null()).output().await.ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(|line| line.chars().take(120).collect())
}

fn program(name: &str, version: Option<String>, remedy: &str) -> Check {
    match version {
        Some(version) => check(name, CheckStatus::Ok, version, None),
        None => check(name, CheckStatus::Missing, "not installed", Some(remedy)),
    }
}

fn tun() -> Check {
    match Path::new("/dev/net/tun").metadata() {
        Ok(_) => check("TUN", CheckStatus::Ok, "/dev/net/tun is there", None),
        Err(error) => {
            check("TUN", CheckStatus::Missing, format!("/dev/net/tun: {error}"), Some("sudo modprobe tun"))
        }
    }
}

async fn network(context: &Context) -> Check {
    let status = context.network.status().await;
    let up = if status.up { "up" } else { "down until the first VM starts" };
    let found =
        format!("bridge {} with {}, {up}; {} leases", status.bridge, status.subnet, status.leases.len());
    let admitted = status.admitted_by.iter().map(|place| format!("; let through by {place}"));
    let unmanaged = if status.unmanaged { "; left alone by NetworkManager" } else { "" };
    let found = found + &admitted.collect::<String>() + unmanaged;
    match status.warnings.as_slice() {
        [] => check("network", CheckStatus::Ok, found, None),
        warnings => {
            check("network", CheckStatus::Degraded, format!("{found}; {}", warnings.join("; ")), None)
        }
    }
}

fn port(settings: &Settings) -> Check {
    let found = format!("this daemon listens on {}", settings.listen);
    let default = settings.listen.ends_with(&format!(":{}", catalyst_api::DEFAULT_PORT));
    if default {
        check("port", CheckStatus::Ok, found, None)
    } else {
        let remedy = format!("export CATALYST_HOST={}", settings.listen);
        check("port", CheckStatus::Degraded, format!("{found}, not where clients look first"), Some(&remedy))
    }
}

async fn image(context: &Context) -> Check {
    let store = context.images.clone();
    let image = as_root_blocking(move || store.current(DEFAULT_TEMPLATE)).await;
    match image {
        Ok(image) => {
            let found = format!("{} {}, kernel {}", image.name, image.version, image.manifest.kernel);
            check("image", CheckStatus::Ok, found, None)
        }
        Err(error) => {
            check("image", CheckStatus::Missing, chain(&error).join(": "), Some("catalyst image build"))
        }
    }
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib >> 10);
    let found = format!("{available} MiB of {} MiB available", host_memory_mib());
    if available >= 2 * DEFAULT_MEMORY_MIB {
        check("memory", CheckStatus::Ok, found, None)
    } else {
        check("memory", CheckStatus::Degraded, found, Some("end other programs, or give VMs less memory"))
    }
}

fn room(name: &str, folder: &Path) -> Check {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let free = rustix::fs::statvfs(existing).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let found = format!("{} GiB free in {}", free / GIB, folder.display());
    if free >= ROOM {
        check(name, CheckStatus::Ok, found, None)
    } else {
        check(name, CheckStatus::Degraded, found, Some("free some disk space"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use catalyst_vmm::probe::Device;

    use super::*;
    use crate::engine::kvm::KvmEngine;
    use crate::engine::qemu::QemuEngine;

    fn engines(chosen: EngineName, named: bool) -> Engines {
        let kvm = KvmEngine::new("/no/such/program".into());
        Engines::new(chosen, String::new(), named, Arc::new(kvm), Arc::new(QemuEngine::default()))
    }

    fn usable() -> ProbeReport {
        ProbeReport {
            device: Device::Opened,
            api_version: Some(12),
            instructions_per_second: Some(1 << 30),
            checks: Vec::new(),
            verdict: Verdict::Usable,
            out_of_time: false,
            summary: "KVM is usable".to_owned(),
        }
    }

    #[test]
    fn a_usable_kvm_is_well_unless_the_daemon_chose_before_it_was() {
        assert_eq!(kvm(&Ok(usable()), &engines(EngineName::Kvm, false)).status, CheckStatus::Ok);
        assert_eq!(kvm(&Ok(usable()), &engines(EngineName::Qemu, true)).status, CheckStatus::Ok);
        let late = kvm(&Ok(usable()), &engines(EngineName::Qemu, false));
        assert_eq!(late.status, CheckStatus::Degraded);
        assert!(late.remedy.unwrap().contains("catalyst daemon stop"));
    }

    #[test]
    fn qemu_is_missed_only_where_vms_run_on_it() {
        assert_eq!(emulator(None, EngineName::Qemu).status, CheckStatus::Missing);
        assert_eq!(emulator(None, EngineName::Kvm).status, CheckStatus::Ok);
    }
}
