//! What a running monitor may do: next to nothing.

use std::fs;

use catalyst_vmm::confine::{Filters, ROLES, Role};
use catalyst_vmm::description::Share;

use crate::machine::{Plan, USER};

fn is_root() -> bool {
    // SAFETY: it only answers.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn every_thread_has_a_filter_no_capability_and_no_way_to_new_ones() {
    let Some(mut plan) = Plan::new() else { return };
    if !is_root() {
        println!("SKIPPED: needs root to start a monitor as another user");
        return;
    }
    plan.as_user = true;
    plan.description.rng = true;
    plan.description.share = Some(Share { tag: "catalyst".into(), folder: None });
    let machine = plan.start();
    let pid = machine.child.id();
    let tasks: Vec<_> = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().collect();
    assert!(tasks.len() >= 5, "{tasks:?}");
    for task in tasks {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
            line.split_once(':').unwrap().1.trim().to_owned()
        };
        let user = USER.to_string();
        assert!(field("Uid").split_whitespace().all(|uid| uid == user), "{status}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{status}");
        }
        assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".into(), "2".into()), "{status}");
    }
    // It sees an empty folder, and nothing else of this machine.
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0);
}

#[test]
fn a_share_without_a_namespace_is_refused_with_the_remedy() {
    let Some(mut plan) = Plan::new() else { return };
    if !is_root() {
        println!("SKIPPED: needs root to start a monitor as another user");
        return;
    }
    plan.description.confine = false;
    plan.description.share = Some(Share { tag: "catalyst".into(), folder: None });
    let text = serde_json::to_vec(&plan.description).unwrap();
    let (status, said) = plan.start_text(&text).wait();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("CAP_SYS_ADMIN"), "{said}");
}

/// Runs `act` in a process with one thread, under the filter of `role`; how that process ended.
fn under_filter(role: Role, act: fn()) -> i32 {
    let filters = Filters::compile().unwrap();
    // SAFETY: the child only makes system calls and ends; it takes no lock that another thread may hold.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            if filters.install(role).is_err() {
                libc::_exit(99);
            }
            act();
            libc::_exit(7);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        status
    }
}

/// Makes a system call that fails or does nothing, where it is not forbidden.
fn call(number: libc::c_long, arguments: [libc::c_long; 4]) {
    let [first, second, third, fourth] = arguments;
    // SAFETY: no argument is a pointer that leads anywhere.
    unsafe { libc::syscall(number, first, second, third, fourth) };
}

#[test]
fn a_forbidden_call_ends_the_process_whatever_the_thread_is_for() {
    let allowed = || call(libc::SYS_write, [-1, 0, 0, 0]);
    let forbidden: [fn(); 4] = [
        || call(libc::SYS_socket, [2, 1, 0, 0]),
        || call(libc::SYS_execve, [0, 0, 0, 0]),
        // PTRACE_TRACEME.
        || call(libc::SYS_ptrace, [0, 0, 0, 0]),
        // Executable memory.
        || call(libc::SYS_mprotect, [0, 4096, 4, 0]),
    ];
    for role in ROLES {
        let status = under_filter(role, allowed);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{role:?}: {status:#x}");
        for act in forbidden {
            let status = under_filter(role, act);
            assert!(
                libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS,
                "{role:?}: {status:#x}"
            );
        }
    }
    // Only what serves shared files opens any.
    let open: fn() = || call(libc::SYS_openat, [-1, 0, 0, 0]);
    for role in ROLES {
        let died = libc::WIFSIGNALED(under_filter(role, open));
        assert_eq!(died, !matches!(role, Role::Share | Role::Folders | Role::Trees), "{role:?}");
    }
}
