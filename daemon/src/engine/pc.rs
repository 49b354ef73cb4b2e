//! What a VM is made of that was made for another machine. Its guest starts by its own loader on a machine like that one, or
//! by its own kernel where the engine has no firmware.

use std::os::fd::OwnedFd;

use crate::store::VmDir;
use crate::store::foreign::hardware::{Bus, Nic};
use crate::store::foreign::image::Parts;

/// Everything that its process is made of.
#[derive(Debug)]
pub struct PcSpec {
    /// The VM's folder: logs go there, sockets into `run/` below it.
    pub dir: VmDir,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// UEFI; else a BIOS.
    pub efi: Option<Efi>,
    /// Its disks, the one that it starts from first.
    pub disks: Vec<PcDisk>,
    /// Its network card, with the tap that has `IFF_VNET_HDR`.
    pub nic: Option<(Nic, OwnedFd)>,
    /// The number of that card's slot, if it has one.
    pub slot: Option<u16>,
    /// MAC address of that.
    pub mac: [u8; 6],
    /// User and group the process runs as.
    pub user: u32,
}

/// UEFI firmware.
#[derive(Debug)]
pub struct Efi {
    /// Its code, read-only.
    pub code: OwnedFd,
    /// The VM's own variables, for reading and writing.
    pub variables: OwnedFd,
}

/// A disk.
#[derive(Debug)]
pub struct PcDisk {
    /// Kind of its controller.
    pub bus: Bus,
    /// Number of that.
    pub controller: u8,
    /// Number of the disk on it.
    pub unit: u8,
    /// A qcow2, for what is written.
    pub overlay: OwnedFd,
    /// What is only read.
    pub parts: Parts,
}
