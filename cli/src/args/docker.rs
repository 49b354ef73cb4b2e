//! `docker …`

use clap::{Subcommand, ValueEnum};

use crate::names;

/// `docker …`
#[derive(Debug, Subcommand)]
pub enum Docker {
    /// Start a Docker daemon of your own, whose containers are VMs
    Up,
    /// End that Docker daemon with its containers; images and volumes stay
    Down,
    /// Show whether that Docker daemon is up, its socket and its log
    Status,
    /// Print what makes a shell's Docker tools use that Docker daemon, or a VM's: eval "$(catalyst docker env)"
    Env {
        /// The VM whose Docker it is [default: the Docker daemon of `docker up`]
        #[arg(value_parser = names::vm_id, conflicts_with = "unset")]
        id: Option<String>,
        /// The shell to write for [default: that of SHELL, else sh]
        #[arg(long, value_name = "SHELL")]
        shell: Option<Shell>,
        /// Print what undoes it
        #[arg(short, long)]
        unset: bool,
    },
    /// Make contexts of Docker's client
    #[command(subcommand)]
    Context(DockerContext),
}

/// `docker context …`
#[derive(Debug, Subcommand)]
pub enum DockerContext {
    /// Make a context for a VM, to use as: docker --context web1 ps
    Create {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        id: String,
        /// The context's name [default: the VM's id]
        #[arg(long)]
        name: Option<String>,
    },
}

/// A shell, or what else reads such lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// sh, bash, zsh and their like
    #[value(aliases = ["bash", "zsh", "dash", "ksh"])]
    Sh,
    /// fish
    Fish,
    /// csh and tcsh
    #[value(alias = "csh")]
    Tcsh,
    /// PowerShell
    #[value(alias = "pwsh")]
    Powershell,
    /// Windows' cmd
    Cmd,
    /// Emacs Lisp
    Emacs,
}
