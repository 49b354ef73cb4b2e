//! `vm create` and `vm set`

use std::path::PathBuf;

use catalyst_api::PublishPort;
use clap::Args;

use super::PORT;
use crate::{names, size};

/// `vm create`
#[derive(Debug, Args)]
pub struct Create {
    /// Id of the new VM: also its folder, its host name and its name in DNS
    #[arg(value_parser = names::vm_id)]
    pub id: String,
    /// Display name [default: the id]
    #[arg(long)]
    pub name: Option<String>,
    /// Virtual CPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = size::count)]
    pub cpus: Option<u32>,
    /// Memory in MiB, or with a unit: 512M, 1.5G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
    pub memory: Option<u64>,
    /// Disk size in GiB, or with a unit: 80G, 1T; only what is written occupies space [default: 64G]
    #[arg(long, value_name = "SIZE", value_parser = size::disk_gib)]
    pub disk: Option<u64>,
    /// Register this .vmx where it is, instead of cloning; deleting the VM deletes its files there
    #[arg(long, value_name = "FILE.vmx", conflicts_with_all = ["cpus", "memory", "disk", "template"])]
    pub from: Option<PathBuf>,
    /// The image to clone [default: lumen]
    #[arg(long, value_parser = names::image)]
    pub template: Option<String>,
    /// A tag; may be given several times
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Vec<String>,
    /// Publish a port of the guest on this machine, for example 8080:80; may be given several times
    #[arg(long, value_name = PORT)]
    pub publish: Vec<PublishPort>,
    /// Set the guest up with this `#cloud-config` or script when it is on for the first time; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    pub user_data: Option<PathBuf>,
    /// Pass this shell's HTTP_PROXY, HTTPS_PROXY and NO_PROXY on to the guest, or not [default: `proxy` of config.toml, or none]
    #[arg(long, value_name = "host|none", value_enum, num_args = 0..=1, default_missing_value = "host", require_equals = true)]
    pub proxy: Option<ProxyFrom>,
    /// Let the guest trust the authorities in this file of PEM; may be given several times
    #[arg(long = "ca", value_name = "FILE", conflicts_with = "from")]
    pub ca: Vec<PathBuf>,
    /// Power it on too
    #[arg(long)]
    pub on: bool,
    /// Wait until ssh and docker answer in it
    #[arg(long, requires = "on")]
    pub wait: bool,
}

/// Where a guest's proxies are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProxyFrom {
    /// The environment.
    Host,
    /// It has none.
    None,
}

/// `vm set`
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)
    .args(["name", "cpus", "memory", "tags", "no_tags", "autostart"])))]
pub struct Set {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub id: String,
    /// Display name
    #[arg(long)]
    pub name: Option<String>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", value_parser = size::count)]
    pub cpus: Option<u32>,
    /// Memory in MiB, or with a unit: 512M, 1.5G
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
    pub memory: Option<u64>,
    /// A tag; those given replace all it had
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Vec<String>,
    /// Take all tags off
    #[arg(long, conflicts_with = "tags")]
    pub no_tags: bool,
    /// Power it on when the host has started
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub autostart: Option<bool>,
}
