//! catalyst-vmm: one process is one VM on KVM. This library is the monitor; the binary only reads its arguments.
//!
//! From outside in: [`description`] says what a VM is made of; [`machine`] builds it from that and runs it; [`boot`]
//! puts a kernel and tables into guest memory; [`vcpu`] runs it; [`bus`] leads its accesses to [`devices`], most of
//! which speak [`virtio`]; [`reactor`] is the threads on which they work; [`control`] is how the caller speaks to
//! it all; [`snapshot`] is what is saved of it; [`confine`] takes away what none of it needs. Three stand apart: [`folders`] serves folders
//! of the host to a guest of either engine, [`boot_files`] finds the kernel on a guest's disk, and [`probe`] says what this
//! machine's KVM is worth.

pub mod boot;
pub mod boot_files;
pub mod bus;
pub mod confine;
pub mod console;
pub mod control;
pub mod description;
pub mod devices;
pub mod folders;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod reactor;
pub mod run;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
pub mod vm;

/// An error and its causes, each once, from outside in.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut parts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        next = cause.source();
    }
    parts.join(": ")
}
