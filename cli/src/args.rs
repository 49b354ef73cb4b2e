//! The command line's grammar.

mod create;
mod docker;
mod folder;
mod image;
mod port;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

pub use self::create::{Create, ProxyFrom, Set};
pub use self::docker::{Docker, DockerContext, Shell as EnvShell};
pub use self::folder::Folder;
pub use self::image::{Image, Template};
pub use self::port::Port;
use crate::{names, output, size};

/// Virtual machines for developers: cloned in milliseconds, driven from here or by REST.
#[derive(Debug, Parser)]
#[command(name = "catalyst", version, arg_required_else_help = true, max_term_width = 100)]
#[command(after_help = "Exit codes: 0, 1 for a failed operation, 2 for wrong use; \
                        `ssh` and `guest exec` pass on the code of their command.")]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// The daemon to speak to [default: localhost:8080; one is started if none answers there]
    #[arg(long, global = true, env = "CATALYST_HOST", hide_env_values = true, value_name = "URL|HOST:PORT")]
    pub host: Option<String>,
    /// Print JSON on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// How long to wait for a VM that is still starting
    #[arg(long, global = true, value_name = "SECONDS", default_value = "120", value_parser = size::seconds)]
    pub timeout: u64,
}

/// How a port is written.
const PORT: &str = "[ADDRESS:]HOST:GUEST[/PROTOCOL]";

/// The domains, as AppCatalyst named them, and what came since.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, change and delete VMs
    #[command(subcommand)]
    Vm(Vm),
    /// Switch VMs on and off
    #[command(subcommand)]
    Vmpower(Power),
    /// Ask and drive the guest of a VM
    #[command(subcommand)]
    Guest(Guest),
    /// Log in to a VM, or run a command in it, with the system's ssh
    Ssh(Ssh),
    /// Let plain ssh, and what uses it, reach VMs by name: `ssh web1.catalyst`
    SshConfig(SshConfig),
    /// Run containers as VMs by a Docker daemon of your own, or use a VM's Docker
    #[command(subcommand)]
    Docker(Docker),
    /// Attach to a VM's serial console; Ctrl-] leaves
    Console(OneId),
    /// Print the log of a VM's serial console
    Logs(Logs),
    /// Show folders of this machine in guests
    #[command(subcommand)]
    Folder(Folder),
    /// Build, list and check the images that VMs are made from; import and export disks
    #[command(subcommand)]
    Image(Image),
    /// Make, show and delete templates, and make them warm: new VMs go on from there instead of booting
    #[command(subcommand)]
    Template(Template),
    /// Publish ports of guests on this machine
    #[command(subcommand)]
    Port(Port),
    /// Show or take down the network of the VMs
    #[command(subcommand)]
    Network(Network),
    /// Check what this machine offers, and what to do where something is missing
    Doctor,
    /// Start, stop and ask the daemon
    #[command(subcommand)]
    Daemon(Daemon),
    /// Follow what happens, one line per event
    Events {
        /// Only events of this VM
        #[arg(long, value_name = "ID", value_parser = names::vm_id)]
        vm: Option<String>,
    },
    /// Print the completion script of a shell
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Print the version of this program and of the daemon
    Version,
}

/// `vm …`
#[derive(Debug, Subcommand)]
pub enum Vm {
    /// Create a VM from a template
    Create(Create),
    /// Clone a VM with its disk, and one that runs with its memory too: its clones run
    Clone {
        /// The VM to clone
        #[arg(value_parser = names::vm_id)]
        parent: String,
        /// Id of the new VM
        #[arg(value_parser = names::vm_id)]
        id: String,
        /// Make so many, ID-1, ID-2 and so on
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
        count: Option<u32>,
    },
    /// List VMs: a table on a terminal, ids alone in a pipe
    #[command(visible_alias = "ls")]
    List {
        /// Only VMs with this tag
        #[arg(long)]
        tag: Option<String>,
        /// A table, in a pipe too
        #[arg(short, long, conflicts_with = "quiet")]
        long: bool,
        /// Ids alone, on a terminal too
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show all that is known of a VM
    Show(OneId),
    /// Delete VMs with their disks
    #[command(visible_alias = "rm")]
    Delete {
        /// The VMs
        #[arg(required = true, value_name = "ID", value_parser = names::vm_id)]
        ids: Vec<String>,
        /// Power off a running VM first
        #[arg(short, long)]
        force: bool,
    },
    /// Change a VM; CPUs and memory take effect at its next power-on
    Set(Set),
    /// Keep a VM as it is, disk and memory, and go back to that
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Switch VMs on and off (same as `vmpower`)
    #[command(subcommand)]
    Power(Power),
    /// Print a VM's address (same as `guest getip`)
    Getip(GetIp),
}

/// A list of what a VM has, by name.
#[derive(Debug, Args)]
pub struct NamesOf {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub vm: String,
    /// A table, in a pipe too
    #[arg(short, long, conflicts_with = "quiet")]
    long: bool,
    /// Names alone, on a terminal too
    #[arg(short, long)]
    quiet: bool,
}

impl NamesOf {
    /// Whether it is to be a table.
    pub fn as_table(&self) -> bool {
        !self.quiet && (self.long || output::on_terminal())
    }
}

/// `vm snapshot …`
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Make a snapshot: of disk and memory, or of the disk where the VM is off
    Create {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// Its name [default: the time]
        #[arg(value_parser = names::snapshot)]
        name: Option<String>,
        /// What there is to say of it, in one line
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// List snapshots: a table on a terminal, names alone in a pipe
    #[command(visible_alias = "ls")]
    List(NamesOf),
    /// Show which snapshot comes from which
    Tree {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
    },
    /// Go back to a snapshot; what the VM is now is lost
    Restore {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The snapshot
        #[arg(value_parser = names::snapshot)]
        name: String,
        /// Leave a VM that ran suspended there
        #[arg(long)]
        no_start: bool,
    },
    /// Delete snapshots and give their space back
    #[command(visible_alias = "rm")]
    Delete {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The snapshots
        #[arg(required = true, value_name = "NAME", value_parser = names::snapshot)]
        names: Vec<String>,
    },
}

/// `vmpower …`
#[derive(Debug, Subcommand)]
pub enum Power {
    /// List the ids of the VMs that are not off: running, paused or on the way
    List,
    /// Start VMs, or resume them where suspended
    On {
        /// The VMs
        #[command(flatten)]
        ids: Ids,
        /// Wait until ssh and docker answer in them
        #[arg(long)]
        wait: bool,
        /// Boot, also where a VM could go on from a warm state of its template
        #[arg(long)]
        cold: bool,
    },
    /// Pull the plug
    Off(Ids),
    /// Ask the guests to shut down, and wait until they have
    Shutdown(Ids),
    /// Write memory and devices to disk and stop
    Suspend(Ids),
    /// Stop the virtual CPUs, keep the memory
    Pause(Ids),
    /// Let the virtual CPUs go on
    Unpause(Ids),
}

/// One or more VMs.
#[derive(Debug, Args)]
pub struct Ids {
    /// The VMs
    #[arg(required = true, value_name = "ID", value_parser = names::vm_id)]
    pub ids: Vec<String>,
}

/// One VM.
#[derive(Debug, Args)]
pub struct OneId {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub id: String,
}

/// `guest …`
#[derive(Debug, Subcommand)]
pub enum Guest {
    /// Print the VM's address, once the guest holds it
    Getip(GetIp),
    /// Run a command in the guest; needs no network
    Exec(Exec),
}

/// `guest getip`
#[derive(Debug, Args)]
pub struct GetIp {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub id: String,
    /// Wait until the guest holds the address
    #[arg(long)]
    pub wait: bool,
}

/// `guest exec`
#[derive(Debug, Args)]
pub struct Exec {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub id: String,
    /// User in the guest [default: root]
    #[arg(short, long)]
    pub user: Option<String>,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Pass standard input on, also where it is a terminal
    #[arg(short, long)]
    pub interactive: bool,
    /// Working directory [default: the user's home]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Set a variable; may be given several times
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = names::variable)]
    pub env: Vec<String>,
    /// The command and its arguments; no shell is involved
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `ssh`
#[derive(Debug, Args)]
pub struct Ssh {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub id: String,
    /// Options for ssh, such as `-L 8000:localhost:80`
    #[arg(allow_hyphen_values = true, value_name = "SSH-OPTION")]
    pub options: Vec<OsString>,
    /// The command to run [default: a login shell]
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `ssh-config`
#[derive(Debug, Args)]
pub struct SshConfig {
    /// The VMs [default: all]
    #[arg(value_name = "ID", value_parser = names::vm_id)]
    pub ids: Vec<String>,
    /// Take away what ~/.ssh has of them; asks no daemon
    #[arg(long)]
    pub remove: bool,
}

/// `logs`
#[derive(Debug, Args)]
pub struct Logs {
    /// The VM
    #[arg(value_parser = names::vm_id)]
    pub id: String,
    /// Go on printing what comes
    #[arg(short, long)]
    pub follow: bool,
    /// The log of the VM's process instead
    #[arg(long)]
    pub engine: bool,
}

/// `network …`
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Network {
    /// Show the network of the VMs
    Show,
    /// Undo the bridge, NAT and DHCP; the next power-on sets them up again
    Down,
}

/// `daemon …`
#[derive(Debug, Subcommand)]
pub enum Daemon {
    /// Start a daemon in the background
    Start(DaemonStart),
    /// Stop the daemon; VMs and Docker's daemon keep running
    Stop {
        /// Take Docker's daemon down and shut the guests down first, and take down the network
        #[arg(long)]
        vms: bool,
    },
    /// Say whether a daemon runs, and which
    Status,
}

/// `daemon start`
#[derive(Debug, Args)]
pub struct DaemonStart {
    /// Where VMs and their state lie
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<OsString>,
    /// Where to listen
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// The user whom the daemon and the VMs belong to
    #[arg(long, value_name = "USER")]
    pub owner: Option<String>,
    /// More options for catalyst-daemon
    #[arg(last = true, value_name = "DAEMON-OPTION")]
    pub more: Vec<OsString>,
}

/// Prints what clap has to say: help and version as they are, wrong use as one line.
/// Returns the exit code.
pub fn report(error: &clap::Error) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nothing can be said to a reader that has gone.
            let _ = error.print();
            0
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            2
        }
        _ => {
            output::error(&wrong_use(&error.render().to_string()));
            2
        }
    }
}

/// Clap's paragraphs as one line, without its usage text.
fn wrong_use(rendered: &str) -> String {
    let kept: Vec<String> = rendered
        .trim()
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|paragraph| {
            !paragraph.starts_with("Usage:") && !paragraph.starts_with("For more information")
        })
        .collect();
    let line = kept.join("; ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{}; see --help", line.trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("catalyst").chain(words.iter().copied()))
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_use_is_one_line() {
        for words in [
            &["vm", "create"][..],
            &["vm", "creat", "x"],
            &["vm", "create", "web1", "--cpus", "many"],
            &["vm", "create", "../x"],
            &["vm", "set", "web1"],
            &["vm", "create", "web1", "--wait"],
            &["vm", "create", "web1", "--publish", "80"],
            &["port", "add", "web1", "8000-8010:80"],
            &["port", "remove", "web1", "http"],
            &["port", "remove", "web1"],
            &["guest", "exec", "web1"],
        ] {
            let error = parse(words).unwrap_err();
            let line = wrong_use(&error.render().to_string());
            assert!(!line.contains('\n') && !line.contains("Usage:"), "{line}");
            assert!(line.len() > 20, "{line}");
        }
    }

    fn ssh(words: &[&str]) -> (Global, Ssh) {
        let cli = parse(words).unwrap();
        let Command::Ssh(ssh) = cli.command else { panic!("not ssh") };
        (cli.global, ssh)
    }

    #[test]
    fn ssh_leaves_everything_after_its_own_options_to_ssh() {
        let (global, plain) = ssh(&["ssh", "web1", "--timeout", "5", "--", "ls", "--json", "-v"]);
        assert_eq!((global.timeout, global.json), (5, false));
        assert_eq!(
            (plain.options.len(), plain.command),
            (0, ["ls", "--json", "-v"].map(Into::into).to_vec())
        );
        let (global, forward) = ssh(&["ssh", "web1", "-L", "1:localhost:2", "-v", "--", "ls", "--host", "x"]);
        assert_eq!(global.host, None);
        assert_eq!(forward.options, ["-L", "1:localhost:2", "-v", "--", "ls", "--host", "x"]);
        let (_, bare) = ssh(&["ssh", "web1", "uname", "-a"]);
        assert_eq!(bare.options, ["uname", "-a"]);
    }

    #[test]
    fn exec_leaves_the_commands_options_alone() {
        let cli =
            parse(&["guest", "exec", "web1", "-u", "catalyst", "-it", "--", "ls", "--json", "-t"]).unwrap();
        let Command::Guest(Guest::Exec(exec)) = cli.command else { panic!("not exec") };
        assert_eq!(exec.command, ["ls", "--json", "-t"]);
        assert!(exec.tty && exec.interactive);
        let cli = parse(&["guest", "exec", "web1", "uname", "-a"]).unwrap();
        let Command::Guest(Guest::Exec(exec)) = cli.command else { panic!("not exec") };
        assert_eq!(exec.command, ["uname", "-a"]);
    }

    #[test]
    fn both_ways_to_power_parse_alike() {
        let one = parse(&["vmpower", "on", "a", "b", "--wait"]).unwrap();
        let Command::Vmpower(Power::On { ids, wait: true, cold: false }) = one.command else {
            panic!("not on")
        };
        assert_eq!(ids.ids, ["a", "b"]);
        let two = parse(&["vm", "power", "shutdown", "a"]).unwrap();
        assert!(matches!(two.command, Command::Vm(Vm::Power(Power::Shutdown(_)))));
    }
}
