//! catalyst-oci: an OCI runtime with runc's command line, whose containers are VMs (docs/CONTAINERS.md).

fn main() {}
