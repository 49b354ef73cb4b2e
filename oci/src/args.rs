//! The command line: runc's, and where the daemon is.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use liboci_cli::{
    Create, Delete, Events, Exec, Features, GlobalOpts, Kill, List, Pause, Ps, Resume, Run, Spec, Start,
    State, Update,
};

/// Version of the runtime specification that documents are written by.
pub const OCI_VERSION: &str = "1.0.2";
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.0.2");

/// The arguments.
#[derive(Debug, Parser)]
#[command(name = "catalyst-oci", version = VERSION, about = "An OCI runtime whose containers are VMs", max_term_width = 100)]
pub struct Arguments {
    /// The Unix socket of catalyst-daemon, by default that of the user's own one
    #[arg(long, env = "CATALYST_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// What all commands have.
    #[command(flatten)]
    pub global: GlobalOpts,
    /// Which.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a container ready to start
    Create(Create),
    /// Start the program of a container
    Start(Start),
    /// Tell how a container is, as JSON
    State(State),
    /// Send a signal to a container
    Kill(Kill),
    /// Delete a container that has ended
    Delete(Delete),
    /// Show what a container uses
    Events(Events),
    /// Run another program in a container
    Exec(Exec),
    /// Tell what this runtime can, as JSON
    Features(Features),
    /// List containers
    List(List),
    /// Have a container stand still
    Pause(Pause),
    /// List the processes of a container
    Ps(Ps),
    /// Have a container go on
    Resume(Resume),
    /// Create a container, start it, and delete it when it has ended
    Run(Run),
    /// Write an example of a specification
    Spec(Spec),
    /// Change what a container may use
    Update(Update),
}

/// Where the daemon listens where nothing else is said: in the state folder that it has by default
/// (XDG Base Directory Specification).
pub fn default_socket() -> PathBuf {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = absolute("XDG_DATA_HOME")
        .unwrap_or_else(|| absolute("HOME").unwrap_or_else(|| PathBuf::from("/root")).join(".local/share"));
    data.join("catalyst/catalyst.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Arguments {
        Arguments::try_parse_from([&["catalyst-oci"], words].concat()).unwrap()
    }

    #[test]
    fn what_containerd_calls_is_understood() {
        let global = ["--socket", "/s", "--root", "/r", "--log", "/l", "--log-format", "json"];
        let words = |rest: &[&'static str]| [&global[..], rest].concat();
        let create =
            parsed(&words(&["create", "--bundle", "/b", "--pid-file", "/p", "--console-socket", "/c", "id"]));
        assert_eq!(create.socket, Some(PathBuf::from("/s")));
        let Command::Create(create) = create.command else { panic!() };
        assert_eq!((create.container_id.as_str(), create.bundle.to_str()), ("id", Some("/b")));
        let kill = parsed(&words(&["kill", "--all", "id", "9"])).command;
        assert!(matches!(kill, Command::Kill(Kill { all: true, signal, .. }) if signal == "9"));
        let exec = ["exec", "--process", "/j", "--detach", "--pid-file", "/p", "id"];
        assert!(matches!(parsed(&words(&exec)).command, Command::Exec(Exec { detach: true, .. })));
        assert!(matches!(
            parsed(&words(&["delete", "--force", "id"])).command,
            Command::Delete(Delete { force: true, .. })
        ));
        assert!(matches!(parsed(&words(&["ps", "--format", "json", "id"])).command, Command::Ps(_)));
        assert!(matches!(parsed(&words(&["update", "--resources=-", "id"])).command, Command::Update(_)));
        assert!(matches!(parsed(&["--systemd-cgroup", "--debug", "list", "-q"]).command, Command::List(_)));
    }

    #[test]
    fn the_version_is_told_in_the_form_that_engines_read() {
        let told = Arguments::try_parse_from(["catalyst-oci", "--version"]).unwrap_err().to_string();
        assert!(told.starts_with("catalyst-oci version ") && told.contains("\nspec: 1.0.2"), "{told}");
    }
}
