//! A program's specification in the words of the guest's agent (OCI runtime specification, "Process").

use std::collections::HashSet;

use catalyst_agent_link::Terminal;
use catalyst_agent_protocol::container::{Capabilities, Process, Rlimit};
use oci_spec::runtime::{self, Capability, LinuxCapabilities, PosixRlimitType};

use crate::failure::{Outcome, said};

/// Numbers of capabilities, `include/uapi/linux/capability.h`.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

fn mask(set: Option<&HashSet<Capability>>) -> u64 {
    set.into_iter().flatten().fold(0, |mask, capability| mask | 1 << number(*capability))
}

fn capabilities(sets: &LinuxCapabilities) -> Capabilities {
    Capabilities {
        bounding: mask(sets.bounding().as_ref()),
        effective: mask(sets.effective().as_ref()),
        inheritable: mask(sets.inheritable().as_ref()),
        permitted: mask(sets.permitted().as_ref()),
        ambient: mask(sets.ambient().as_ref()),
    }
}

/// The capability of that name, with or without `CAP_`, as a mask.
pub fn capability_named(name: &str) -> Outcome<u64> {
    let upper = name.to_uppercase();
    let upper = upper.strip_prefix("CAP_").unwrap_or(&upper);
    match upper.parse::<Capability>() {
        Ok(capability) => Ok(1 << number(capability)),
        Err(_) => said(format!("{name} is no capability")),
    }
}

/// Numbers of limits, `include/uapi/asm-generic/resource.h`.
fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

/// The program. `stdin` says whether input will come.
pub fn convert(process: &runtime::Process, stdin: bool) -> Outcome<Process> {
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return said("The specification names no program: process.args is empty");
    }
    let cwd = process.cwd().to_string_lossy().into_owned();
    if !cwd.starts_with('/') {
        return said(format!("The working directory {cwd:?} is not absolute"));
    }
    let rlimits = process.rlimits().as_deref().unwrap_or_default().iter();
    let user = process.user();
    let size = process.console_size();
    let short = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
    let terminal = process.terminal().unwrap_or_default().then(|| match size {
        Some(size) if size.height() > 0 && size.width() > 0 => {
            Terminal { rows: short(size.height()), cols: short(size.width()), term: None }
        }
        _ => Terminal { rows: 24, cols: 80, term: None },
    });
    Ok(Process {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        capabilities: process.capabilities().as_ref().map(capabilities).unwrap_or_default(),
        rlimits: rlimits
            .map(|limit| Rlimit { resource: resource(limit.typ()), soft: limit.soft(), hard: limit.hard() })
            .collect(),
        no_new_privileges: process.no_new_privileges().unwrap_or_default(),
        oom_score_adj: process.oom_score_adj(),
        terminal,
        stdin,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(document: serde_json::Value) -> runtime::Process {
        serde_json::from_value(document).unwrap()
    }

    #[test]
    fn all_of_a_program_s_specification_comes_over() {
        let process = read(json!({
            "terminal": true, "consoleSize": {"height": 30, "width": 100},
            "user": {"uid": 1, "gid": 2, "umask": 63, "additionalGids": [3, 4]},
            "args": ["sh", "-c", "x"], "env": ["A=b"], "cwd": "/w", "noNewPrivileges": true, "oomScoreAdj": 5,
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "ambient": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 18_446_744_073_709_551_615_u64, "soft": 7}],
        }));
        let converted = convert(&process, true).unwrap();
        let capabilities = Capabilities { bounding: 1 | 1 << 40, ambient: 1 << 5, ..Capabilities::default() };
        assert_eq!(converted.capabilities, capabilities);
        assert_eq!(converted.rlimits, [Rlimit { resource: 7, soft: 7, hard: u64::MAX }]);
        assert_eq!(converted.terminal, Some(Terminal { rows: 30, cols: 100, term: None }));
        assert_eq!((converted.uid, converted.gid, converted.umask), (1, 2, Some(63)));
        assert_eq!(converted.additional_gids, [3, 4]);
        assert!(converted.no_new_privileges && converted.stdin && converted.oom_score_adj == Some(5));
        assert_eq!((converted.cwd.as_str(), converted.env.len(), converted.args.len()), ("/w", 1, 3));
    }

    #[test]
    fn a_terminal_without_a_size_has_the_usual_one() {
        let process = json!({"terminal": true, "user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"});
        let terminal = convert(&read(process), false).unwrap().terminal.unwrap();
        assert_eq!((terminal.rows, terminal.cols), (24, 80));
    }

    #[test]
    fn no_program_and_no_absolute_folder_are_refused() {
        let user = json!({"uid": 0, "gid": 0});
        assert!(convert(&read(json!({"user": user, "args": [], "cwd": "/"})), false).is_err());
        assert!(convert(&read(json!({"user": user, "args": ["x"], "cwd": "w"})), false).is_err());
    }

    #[test]
    fn capabilities_are_known_by_name() {
        assert_eq!(capability_named("cap_net_raw").unwrap(), 1 << 13);
        assert_eq!(capability_named("SYS_ADMIN").unwrap(), 1 << 21);
        assert!(capability_named("CAP_FLY").is_err());
    }
}
