//! System call filters, one for each kind of thread: what it needs and nothing else. Another call ends the process.
//!
//! Each rule says why it is there. `tests/` has a machine under load that makes no other call, and a thread that
//! makes one and dies of it.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Waits for the end and writes out the last.
    Main,
    /// Serves the control socket.
    Control,
    /// Runs a virtual CPU.
    Vcpu,
    /// Console, ports, random bytes, balloon, vsock.
    Devices,
    /// A NIC.
    Net,
    /// A queue of a disk.
    Block,
    /// The shared file system.
    Share,
    /// The process that serves folders over a port.
    Folders,
    /// The same where files keep their owners.
    Trees,
    /// The process that finds the kernel on a disk.
    BootFiles,
}

/// All of them.
pub const ROLES: [Role; 10] = [
    Role::Main,
    Role::Control,
    Role::Vcpu,
    Role::Devices,
    Role::Net,
    Role::Block,
    Role::Share,
    Role::Folders,
    Role::Trees,
    Role::BootFiles,
];

/// A system call that is allowed: always, or only where an argument has one of these values.
struct Rule {
    call: libc::c_long,
    only: Option<(u8, &'static [u64])>,
}

/// Any arguments. The reason is for the reader.
const fn any(call: libc::c_long, _why: &str) -> Rule {
    Rule { call, only: None }
}

/// Only with the argument numbered `at` being one of `values`.
const fn only(call: libc::c_long, at: u8, values: &'static [u64], _why: &str) -> Rule {
    Rule { call, only: Some((at, values)) }
}

/// ioctl(2) requests of KVM (linux/kvm.h).
mod kvm {
    pub const RUN: u64 = 0xae80;
    pub const KVMCLOCK_CTRL: u64 = 0xaead;
    pub const GET_CLOCK: u64 = 0x8030_ae7c;
    pub const SET_CLOCK: u64 = 0x4030_ae7b;
    pub const GET_REGS: u64 = 0x8090_ae81;
    pub const GET_SREGS: u64 = 0x8138_ae83;
    pub const GET_XCRS: u64 = 0x8188_aea6;
    pub const GET_XSAVE: u64 = 0x9000_aea4;
    pub const GET_DEBUGREGS: u64 = 0x8080_aea1;
    pub const GET_LAPIC: u64 = 0x8400_ae8e;
    pub const GET_MSRS: u64 = 0xc008_ae88;
    pub const GET_CPUID2: u64 = 0xc008_ae91;
    pub const GET_TSC_KHZ: u64 = 0xaea3;
    pub const GET_MP_STATE: u64 = 0x8004_ae98;
    pub const GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
    pub const GET_DEVICE_ATTR: u64 = 0x4018_aee2;
    pub const GET_IRQCHIP: u64 = 0xc208_ae62;
    pub const GET_PIT2: u64 = 0x8070_ae9f;
}
/// `TUNSETOFFLOAD` (linux/if_tun.h).
const TUN_SET_OFFLOAD: u64 = 0x4004_54d0;

/// `FIONBIO` (asm-generic/ioctls.h).
const FIONBIO: u64 = 0x5421;
/// -1 as a user or group: leave it (setresuid(2)).
const UNCHANGED: u64 = 0xffff_ffff;
const F_DUPFD_CLOEXEC: u64 = 1030;
const F_GETFD: u64 = 1;
const F_GETFL: u64 = 3;

/// What every thread needs.
const COMMON: &[Rule] = &[
    any(libc::SYS_futex, "locks and condition variables"),
    any(libc::SYS_read, "eventfds; what a role reads"),
    any(libc::SYS_write, "eventfds; what a role writes; messages on standard error"),
    any(libc::SYS_close, "descriptors that are dropped"),
    any(libc::SYS_mmap, "the allocator; executable memory is not asked for"),
    any(libc::SYS_munmap, "the allocator; stacks of threads that end"),
    any(libc::SYS_mremap, "the allocator, for large blocks that grow"),
    only(
        libc::SYS_madvise,
        2,
        &[4, 8, 9],
        "MADV_DONTNEED, MADV_FREE, MADV_REMOVE: the allocator, the balloon",
    ),
    only(libc::SYS_mprotect, 2, &[0, 1, 3], "the allocator's arenas; never executable"),
    any(libc::SYS_brk, "the allocator"),
    any(libc::SYS_rt_sigprocmask, "ends of threads"),
    any(libc::SYS_rt_sigreturn, "returns from the kick's handler"),
    any(libc::SYS_sigaltstack, "ends of threads"),
    any(libc::SYS_exit, "ends of threads"),
    any(libc::SYS_exit_group, "the end of the process"),
    any(libc::SYS_clock_gettime, "time, where it is not read without a call"),
    any(libc::SYS_clock_nanosleep, "bounded waits"),
    any(libc::SYS_gettid, "abort"),
    any(libc::SYS_getpid, "abort"),
    any(libc::SYS_tgkill, "abort; kicks of virtual CPUs"),
    any(libc::SYS_restart_syscall, "waits that a stop interrupted"),
    any(libc::SYS_sched_yield, "contended locks"),
    any(libc::SYS_getrandom, "keys of hash tables"),
    any(libc::SYS_rseq, "C library"),
];

/// What a thread with a reactor needs.
const REACTOR: &[Rule] = &[
    any(libc::SYS_epoll_wait, "waits for descriptors"),
    any(libc::SYS_epoll_pwait, "the same, as some C libraries call it"),
    any(libc::SYS_epoll_ctl, "watches them"),
];

/// What activating and resetting a device takes, on the thread on which its driver asks for it.
const ACTIVATE: &[Rule] = &[
    any(libc::SYS_epoll_ctl, "watches queues"),
    only(
        libc::SYS_fcntl,
        1,
        &[F_DUPFD_CLOEXEC, F_GETFD],
        "eventfds of queues; the standard library's check on close",
    ),
    any(libc::SYS_eventfd2, "handlers that wake themselves"),
    any(libc::SYS_timerfd_create, "what waits a moment"),
    any(libc::SYS_timerfd_settime, "what waits a moment, the serial port's output among it"),
];

const MAIN: &[Rule] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[kvm::KVMCLOCK_CTRL, kvm::GET_CLOCK, kvm::SET_CLOCK],
        "resume and the last pause",
    ),
    any(libc::SYS_fsync, "images, at the end"),
    any(libc::SYS_fdatasync, "images, at the end"),
    any(libc::SYS_pread64, "images, at the end"),
    any(libc::SYS_preadv, "images, at the end"),
    any(libc::SYS_pwrite64, "images, at the end"),
    any(libc::SYS_pwritev, "images, at the end"),
    any(libc::SYS_ftruncate, "images, at the end"),
    any(libc::SYS_fallocate, "images, at the end"),
    any(libc::SYS_writev, "the console's last bytes"),
    any(libc::SYS_sendto, "the console's last bytes; the last event"),
    any(libc::SYS_epoll_ctl, "clients that go"),
    only(libc::SYS_fcntl, 1, &[F_GETFD], "the standard library's check on close"),
];

/// What saving takes. The virtual CPUs stand meanwhile, so this thread may ask KVM for their state; only the build, before
/// there are filters, sets any.
const SAVE: &[Rule] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[
            kvm::GET_MP_STATE,
            kvm::GET_CPUID2,
            kvm::GET_MSRS,
            kvm::GET_TSC_KHZ,
            kvm::GET_DEVICE_ATTR,
            kvm::GET_REGS,
            kvm::GET_SREGS,
            kvm::GET_XCRS,
            kvm::GET_XSAVE,
            kvm::GET_DEBUGREGS,
            kvm::GET_LAPIC,
            kvm::GET_VCPU_EVENTS,
        ],
        "each virtual CPU",
    ),
    only(libc::SYS_ioctl, 1, &[kvm::GET_IRQCHIP, kvm::GET_PIT2], "interrupt controllers and timer"),
    any(libc::SYS_fsync, "images must be whole"),
    any(libc::SYS_fdatasync, "images must be whole"),
    any(libc::SYS_preadv, "tables of images"),
    any(libc::SYS_pwrite64, "tables of images"),
    any(libc::SYS_pwritev, "tables of images"),
    any(libc::SYS_ftruncate, "images that grow by tables"),
    any(libc::SYS_fallocate, "images that grow by tables"),
];

/// What another file for a disk takes; its chain is opened anew, by descriptors.
const SWITCH: &[Rule] = &[
    any(libc::SYS_fstat, "which files they are"),
    any(libc::SYS_statx, "which files they are"),
    only(
        libc::SYS_fcntl,
        1,
        &[F_DUPFD_CLOEXEC, F_GETFD, F_GETFL],
        "descriptors of the files below; how each is open",
    ),
    any(libc::SYS_fstatfs, "what file systems they are on"),
    any(libc::SYS_lseek, "how long they are"),
];

const CONTROL: &[Rule] = &[
    any(libc::SYS_accept4, "clients"),
    only(
        libc::SYS_ioctl,
        1,
        &[kvm::KVMCLOCK_CTRL, kvm::GET_CLOCK, kvm::SET_CLOCK, FIONBIO],
        "pause and resume; clients do not block",
    ),
    any(libc::SYS_recvmsg, "requests, and descriptors that come with them"),
    any(libc::SYS_recvfrom, "requests"),
    any(libc::SYS_sendto, "replies"),
    any(libc::SYS_mincore, "statistics: resident memory"),
    any(libc::SYS_pread64, "statistics: /proc/self/statm; tables of images"),
    only(libc::SYS_fcntl, 1, &[F_GETFD], "the standard library's check on close"),
    any(libc::SYS_poll, "whether a terminal's client has gone"),
];

const VCPU: &[Rule] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[kvm::RUN, kvm::GET_REGS, TUN_SET_OFFLOAD],
        "the guest; failures; NIC features",
    ),
    any(libc::SYS_sendto, "the serial port's output"),
    any(libc::SYS_recvfrom, "the serial port's input"),
];

const DEVICES: &[Rule] = &[
    any(libc::SYS_accept4, "clients of consoles, ports and vsock"),
    only(libc::SYS_ioctl, 1, &[FIONBIO], "clients do not block"),
    any(libc::SYS_poll, "whether a client has gone"),
    any(libc::SYS_readv, "from clients into guest memory"),
    any(libc::SYS_writev, "from guest memory to clients"),
    any(libc::SYS_recvfrom, "from clients"),
    any(libc::SYS_sendto, "to clients"),
    any(libc::SYS_sendmsg, "to clients; connections to whoever serves the guest's"),
    any(libc::SYS_socketpair, "connections of the guest"),
    any(libc::SYS_shutdown, "connections that end one way"),
    only(
        libc::SYS_fcntl,
        1,
        &[F_DUPFD_CLOEXEC, F_GETFD],
        "a spare descriptor; the standard library's check on close",
    ),
    any(libc::SYS_timerfd_settime, "random bytes within their rate, the serial port's output"),
];

const NET: &[Rule] = &[
    any(libc::SYS_readv, "frames into guest memory"),
    any(libc::SYS_writev, "frames from guest memory"),
    any(libc::SYS_timerfd_settime, "what waits a moment"),
    only(libc::SYS_ioctl, 1, &[TUN_SET_OFFLOAD], "NIC features"),
];

const BLOCK: &[Rule] = &[
    any(libc::SYS_pread64, "image metadata"),
    any(libc::SYS_preadv, "data into guest memory"),
    any(libc::SYS_pwrite64, "image metadata"),
    any(libc::SYS_pwritev, "data from guest memory"),
    any(libc::SYS_fdatasync, "the guest's flush"),
    any(libc::SYS_fsync, "the guest's flush"),
    any(libc::SYS_fallocate, "discard and zeroes"),
    any(libc::SYS_ftruncate, "images that grow"),
    only(libc::SYS_fcntl, 1, &[F_GETFD], "the standard library's check on close"),
];

/// What a file system does. Where it reaches is the business of the mount namespace and of Landlock.
const SHARE: &[Rule] = &[
    any(libc::SYS_openat, "files below the shared folder"),
    any(libc::SYS_newfstatat, "attributes"),
    any(libc::SYS_statx, "attributes"),
    any(libc::SYS_fstat, "attributes"),
    any(libc::SYS_fstatfs, "free space"),
    any(libc::SYS_fcntl, "flags of open files"),
    any(libc::SYS_pread64, "content"),
    any(libc::SYS_preadv, "content"),
    any(libc::SYS_pwrite64, "content"),
    any(libc::SYS_pwritev, "content"),
    any(libc::SYS_getdents64, "folders"),
    any(libc::SYS_lseek, "folders and holes"),
    any(libc::SYS_mkdirat, "new folders"),
    any(libc::SYS_mknodat, "new files, pipes and sockets"),
    any(libc::SYS_symlinkat, "new links"),
    any(libc::SYS_linkat, "new names"),
    any(libc::SYS_renameat2, "other names"),
    any(libc::SYS_unlinkat, "names that go"),
    any(libc::SYS_readlinkat, "where links lead"),
    any(libc::SYS_fchmodat, "modes"),
    any(libc::SYS_fchmod, "modes"),
    any(libc::SYS_fchownat, "owners"),
    any(libc::SYS_utimensat, "times"),
    any(libc::SYS_ftruncate, "lengths"),
    any(libc::SYS_fallocate, "room"),
    any(libc::SYS_fsync, "the guest's fsync"),
    any(libc::SYS_fdatasync, "the guest's fdatasync"),
];

/// What the process that serves folders does besides.
const FOLDERS: &[Rule] = &[
    any(libc::SYS_poll, "waits for descriptors"),
    any(libc::SYS_accept4, "the daemon"),
    any(libc::SYS_recvfrom, "the port and the daemon"),
    any(libc::SYS_sendto, "the port and the daemon"),
    any(libc::SYS_writev, "answers"),
    only(libc::SYS_ioctl, 1, &[FIONBIO], "clients do not block"),
];

/// What it does besides where files keep their owners.
const TREES: &[Rule] = &[
    only(libc::SYS_setresuid, 0, &[UNCHANGED], "acts as another user, and remains root"),
    only(libc::SYS_setresgid, 0, &[UNCHANGED], "acts as another group"),
    any(libc::SYS_capget, "what it may not while it takes bits of a mode away"),
    any(libc::SYS_capset, "the same"),
    any(libc::SYS_fgetxattr, "extended attributes"),
    any(libc::SYS_flistxattr, "extended attributes"),
    any(libc::SYS_fsetxattr, "extended attributes"),
    any(libc::SYS_fremovexattr, "extended attributes"),
];

/// What reading a disk's images takes.
const READ: &[Rule] =
    &[any(libc::SYS_pread64, "tables of images"), any(libc::SYS_preadv, "data of images and their tables")];

fn rules(role: Role) -> Vec<&'static [Rule]> {
    match role {
        Role::Main => vec![COMMON, MAIN],
        Role::Control => vec![COMMON, REACTOR, CONTROL, SAVE, SWITCH],
        Role::Vcpu => vec![COMMON, ACTIVATE, VCPU],
        Role::Devices => vec![COMMON, REACTOR, DEVICES],
        Role::Net => vec![COMMON, REACTOR, NET],
        Role::Block => vec![COMMON, REACTOR, BLOCK],
        Role::Share => vec![COMMON, REACTOR, SHARE],
        Role::Folders => vec![COMMON, SHARE, FOLDERS],
        Role::Trees => vec![COMMON, SHARE, FOLDERS, TREES],
        Role::BootFiles => vec![COMMON, SWITCH, READ],
    }
}

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// It could not be compiled.
    #[error("Cannot compile the system call filter of the thread role {0:?}")]
    Compile(Role, #[source] seccompiler::BackendError),
    /// The kernel did not take it.
    #[error("Cannot install the system call filter of the thread role {0:?}")]
    Install(Role, #[source] seccompiler::Error),
}

/// The compiled filters.
#[derive(Debug)]
pub struct Filters(BTreeMap<Role, BpfProgram>);

impl Filters {
    /// Compiles all.
    pub fn compile() -> Result<Self, SeccompError> {
        ROLES.iter().map(|&role| Ok((role, compile(role)?))).collect::<Result<_, _>>().map(Self)
    }

    /// Puts the filter of `role` on the calling thread, for good.
    pub fn install(&self, role: Role) -> Result<(), SeccompError> {
        let Some(program) = self.0.get(&role) else { return Ok(()) };
        seccompiler::apply_filter(program).map_err(|error| SeccompError::Install(role, error))
    }
}

fn compile(role: Role) -> Result<BpfProgram, SeccompError> {
    let error = |error| SeccompError::Compile(role, error);
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut whole = Vec::new();
    for rule in rules(role).into_iter().flatten() {
        let chains = calls.entry(rule.call).or_default();
        let Some((argument, values)) = rule.only else {
            whole.push(rule.call);
            continue;
        };
        for &value in values {
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
                .map_err(error)?;
            chains.push(SeccompRule::new(vec![condition]).map_err(error)?);
        }
    }
    // A call that is allowed with any arguments has no condition left.
    for call in whole {
        calls.insert(call, Vec::new());
    }
    let filter =
        SeccompFilter::new(calls, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
            .map_err(error)?;
    filter.try_into().map_err(error)
}
