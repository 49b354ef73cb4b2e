//! catalyst-vmm: the monitor; today the probe of /dev/kvm.

pub mod probe;
