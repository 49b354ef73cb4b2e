//! `folder …`

use clap::Subcommand;

use super::NamesOf;
use crate::names;

/// `folder …`
#[derive(Debug, Subcommand)]
pub enum Folder {
    /// Show a folder of this machine in a VM's guest, also while it runs
    Add {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The folder here
        path: std::path::PathBuf,
        /// Where it is to be in the guest [default: /mnt/hgfs/NAME]
        guest_path: Option<String>,
        /// Its name [default: that of the folder]
        #[arg(long)]
        name: Option<String>,
        /// Let the guest only read
        #[arg(long)]
        read_only: bool,
        /// The guest's user to whom its files belong there [default: 1000]
        #[arg(long)]
        uid: Option<u32>,
        /// The guest's group [default: 1000]
        #[arg(long)]
        gid: Option<u32>,
    },
    /// List a VM's folders: a table on a terminal, names alone in a pipe
    #[command(visible_alias = "ls")]
    List(NamesOf),
    /// Take folders away from a VM; one that a program in the guest uses stays
    #[command(visible_alias = "rm")]
    Remove {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The folders
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}
