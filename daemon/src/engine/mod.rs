//! Engines: how a VM process is started and spoken to (design decision 2).
//!
//! An engine knows nothing of the store, of REST or of names; it gets paths and descriptors
//! and answers with a [`VmProcess`]. Below this line the two engines may differ as they like,
//! above it there are no special cases.

pub mod capture;
pub mod cgroup;
pub mod choice;
pub mod fit;
pub mod folder;
pub mod kvm;
pub mod pc;
pub mod process;
pub mod qemu;
pub mod sockets;

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use catalyst_api::EngineName;
pub use catalyst_vmm::description::MAX_NICS;
use catalyst_vmm::description::{DescriptionError, Format};
use futures_util::future::BoxFuture;
use thiserror::Error;

use crate::store::VmDir;
use capture::Extent;
pub use choice::Engines;
pub use fit::Fit;
pub use pc::PcSpec;
pub use process::Exit;

/// Everything a VM process is made of.
#[derive(Debug)]
pub struct StartSpec {
    /// The VM's folder: logs go there, sockets into `run/` below it.
    pub dir: VmDir,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel image with a PVH entry point, read-only.
    pub kernel: OwnedFd,
    /// Initial RAM disk, read-only.
    pub initrd: OwnedFd,
    /// Kernel command line.
    pub command_line: String,
    /// What is added to it where the CPU is emulated in software.
    pub command_line_software_cpu: String,
    /// Timer interrupts a second that the guest's kernel is built for; 0 if unknown.
    pub kernel_hz: u32,
    /// The disk: the VM's own qcow2, for reading and writing, and below it what it stands on, read-only. Empty for a VM without
    /// a disk.
    pub layers: Vec<Layer>,
    /// NICs in the guest's order, at most [`MAX_NICS`]; the first is the VM's own.
    pub nics: Vec<Nic>,
    /// Whether it has the port of containers, [`sockets::CONTAINER`].
    pub container: bool,
    /// User and group the process runs as.
    pub user: u32,
    /// Context ID of its vsock.
    pub cid: u32,
    /// What it goes on from; else it boots.
    pub from: Option<Saved>,
    /// A process in whose cgroups it is from its first instruction on; else in the daemon's.
    pub cgroup_of: Option<u32>,
}

/// A NIC.
#[derive(Debug)]
pub struct Nic {
    /// The tap, with `IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// MAC address.
    pub mac: [u8; 6],
}

/// A file of a disk.
#[derive(Debug)]
pub struct Layer {
    /// It, open.
    pub file: OwnedFd,
    /// What is in it.
    pub format: Format,
}

/// A machine that was saved, open.
#[derive(Debug)]
pub struct Saved {
    /// Its RAM, as [`capture`] writes it.
    pub memory: File,
    /// Whether others may go on from the same memory: then nobody writes it, and each pays for what it changes.
    pub frozen: bool,
    /// What [`VmProcess::save`] wrote.
    pub state: OwnedFd,
}

/// The low bits of a VM's address, which tell the VMs of a network apart.
fn low_bits(address: Ipv4Addr) -> u32 {
    u32::from(address) & 0x000f_ffff
}

/// The user a VM process runs as: one for each address (its low 20 bits), so that no two VMs of a
/// network share one. Daemons in network namespaces of their own can have equal addresses. Above
/// the ranges that adduser, subuid(5) and systemd's container users take.
pub fn vm_user(address: Ipv4Addr) -> u32 {
    FIRST_USER + low_bits(address)
}

/// Whether it is the user of some VM.
pub fn is_vm_user(user: u32) -> bool {
    (FIRST_USER..=FIRST_USER + low_bits(Ipv4Addr::BROADCAST)).contains(&user)
}

/// The first user of [`vm_user`].
const FIRST_USER: u32 = 1_879_113_728;

/// The context ID of a VM's vsock: one for each address, as with [`vm_user`]. Below 3 are the hypervisor's and the
/// host's (vsock(7)).
pub fn vm_cid(address: Ipv4Addr) -> u32 {
    3 + low_bits(address)
}

/// Why an engine could not do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The program is not there, or may not be run.
    #[error("Cannot run {program}; {remedy}")]
    Program {
        /// The program.
        program: String,
        /// What to do.
        remedy: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A device of the host does not open.
    #[error("Cannot open {path}; {remedy}")]
    Device {
        /// The device.
        path: &'static str,
        /// What to do.
        remedy: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file, socket or system call failed.
    #[error("Cannot {what}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VM cannot be described to its monitor.
    #[error("The monitor has no such VM")]
    Description(#[from] DescriptionError),
    /// The process ended while it was being started.
    #[error("The VM process ended while starting: {0}")]
    Died(String),
    /// The process does not answer, or with an error.
    #[error("The VM process did not {what}: {why}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its answer.
        why: String,
    },
    /// The engine has no firmware, and the guest's own kernel cannot be started.
    #[error("Engine kvm starts such a VM by its own kernel, but {0}; start the daemon with --engine qemu")]
    Kernel(String),
    /// Another process of this VM lives.
    #[error("A process of this VM is running already (pid {0})")]
    Running(u32),
}

impl EngineError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Starts VM processes and finds them again.
pub trait Engine: Send + Sync {
    /// Which one this is.
    fn name(&self) -> EngineName;

    /// What a machine that is saved here can go on with: equal, or the other must not be tried.
    fn fit(&self) -> BoxFuture<'_, Result<Fit, EngineError>>;

    /// Starts a VM; its virtual CPUs stand until [`VmProcess::resume`].
    fn start(&self, spec: StartSpec) -> BoxFuture<'_, Result<Arc<dyn VmProcess>, EngineError>>;

    /// Whether it has firmware, which starts a guest by its own loader, and reads disks of every kind. Else a guest is started by
    /// the kernel on its first disk, and each of its disks stands on a qcow2 or on the disk as it is, and its header says so.
    fn has_firmware(&self) -> bool;

    /// The same for a VM that was made for another machine.
    fn start_pc(&self, spec: PcSpec) -> BoxFuture<'_, Result<Arc<dyn VmProcess>, EngineError>>;

    /// Finds the process that an earlier daemon started for the VM in `dir` and that runs as
    /// `user`; `None` where there is none.
    fn adopt(&self, dir: VmDir, user: u32) -> BoxFuture<'_, Result<Option<Arc<dyn VmProcess>>, EngineError>>;
}

/// A running VM process. Its agent and console sockets are `agent.sock` and `console.sock` in
/// the VM's `run/` folder, whatever the engine.
pub trait VmProcess: Send + Sync {
    /// Whose it is.
    fn engine(&self) -> EngineName;

    /// Process id.
    fn pid(&self) -> u32;

    /// When it was started, in seconds since 1970.
    fn started(&self) -> u64;

    /// Whether the virtual CPUs run.
    fn is_running(&self) -> BoxFuture<'_, Result<bool, EngineError>>;

    /// Where its RAM lies.
    fn ram(&self) -> BoxFuture<'_, Result<Vec<Extent>, EngineError>>;

    /// Writes processors and devices, all but memory, to `state`; the virtual CPUs must stand.
    fn save(&self, state: File) -> BoxFuture<'_, Result<(), EngineError>>;

    /// The disk goes on in another file, an empty overlay on what it was; the virtual CPUs must stand. `below`, if there is any, takes
    /// the place of what its file until now lies on, the uppermost first, and holds the same.
    fn switch_disk(&self, overlay: Layer, below: Vec<Layer>) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Stops the virtual CPUs.
    fn pause(&self) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Lets the virtual CPUs go on.
    fn resume(&self) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Presses the power button.
    fn power_button(&self) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Ends the process at once.
    fn kill(&self) -> Result<(), EngineError>;

    /// Waits until the process has stopped the virtual CPUs by itself since a disk's file found no room; made to go on, it
    /// tries again what did not fit. May come late: ask [`VmProcess::is_running`]. May be called again after it was dropped
    /// unfinished.
    fn no_room(&self) -> BoxFuture<'_, ()>;

    /// Waits for the end of the process. May be called again after it was dropped unfinished.
    fn exited(&self) -> BoxFuture<'_, Exit>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_context_ids_differ_with_the_address_and_are_nobody_elses() {
        let (one, two) = (Ipv4Addr::new(10, 208, 0, 0), Ipv4Addr::new(10, 223, 255, 255));
        assert_eq!((vm_cid(one), vm_cid(two)), (3, 0x000f_ffff + 3));
        assert_ne!(vm_user(one), vm_user(two));
        assert_ne!(vm_cid(Ipv4Addr::new(10, 208, 0, 10)), vm_cid(Ipv4Addr::new(10, 208, 0, 11)));
    }
}
