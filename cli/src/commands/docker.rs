//! `docker …`: a Docker daemon whose containers are VMs, a VM's Docker, and the Docker tools of this machine.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use catalyst_api::DockerInfo;

use super::{Context, ssh_config};
use crate::args::{Docker, DockerContext, EnvShell};
use crate::error::{CliError, PlainIo};
use crate::ssh_files::{self, Login};
use crate::table::{Cell, Table, Tone};
use crate::{Outcome, output};

/// What Docker's tools go by.
const HOST: &str = "DOCKER_HOST";
/// What they would go by besides, and is of no use with ssh; docker-machine sets it.
const OF_TLS: [&str; 2] = ["DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"];

/// Why Docker's client did not do it.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// There is no daemon of ours.
    #[error("Docker's daemon is not up{}; start it: catalyst docker up", because(.reason.as_deref()))]
    Down {
        /// Why, where nobody has taken it down.
        reason: Option<String>,
    },
    /// There is none.
    #[error("cannot run docker, which is Docker's client; install it, or use: catalyst docker env {id}")]
    Run {
        /// The VM.
        id: String,
        /// Why.
        #[source]
        source: PlainIo,
    },
    /// It refused.
    #[error("docker made no context '{name}' for VM '{id}': {}", .said.trim())]
    Refused {
        /// The VM.
        id: String,
        /// The context.
        name: String,
        /// In its words.
        said: String,
    },
}

fn because(reason: Option<&str>) -> String {
    reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
}

/// Runs a `docker` command.
pub fn run(context: &Context, command: Docker) -> Outcome {
    match command {
        Docker::Up => up(context),
        Docker::Down => down(context),
        Docker::Status => shown(context, &context.client()?.docker()?),
        Docker::Env { id, shell, unset } => {
            let shell = shell.unwrap_or_else(|| of_user(std::env::var_os("SHELL").as_deref().map(Path::new)));
            if unset {
                output::print(&unset_lines(shell))?;
                return Ok(ExitCode::SUCCESS);
            }
            let (host, command) = match id {
                Some(id) => (of_vm(context, &id)?, format!("catalyst docker env {id}")),
                None => (of_ours(context)?, "catalyst docker env".to_owned()),
            };
            env(context, &host, &command, shell)
        }
        Docker::Context(DockerContext::Create { id, name }) => {
            let name = name.unwrap_or_else(|| id.clone());
            create_context(context, &id, &name)
        }
    }
}

/// Waits for the VM's Docker, and sees to it that ssh finds the VM and asks nothing.
fn reached(context: &Context, id: &str) -> Result<Login, CliError> {
    let (client, daemon) = context.connect()?;
    let login = ssh_config::wait_for_login(context, &client, id, |vm| vm.guest.docker)?;
    ssh_config::write(&client, &daemon, std::slice::from_ref(&login))?;
    Ok(login)
}

fn up(context: &Context) -> Outcome {
    let client = context.client()?;
    let before = client.docker()?;
    let docker = if before.up { before.clone() } else { client.docker_up()? };
    let state = if before.up { "is up already" } else { "is up" };
    output::info(&format!("Docker's daemon {state}; {}", how_to_use_ours()));
    if context.json {
        output::json(&docker)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn down(context: &Context) -> Outcome {
    let client = context.client()?;
    let before = client.docker()?;
    client.docker_down()?;
    let told = if before.up {
        format!("Took Docker's daemon down; its images, containers and volumes stay in {}", before.data)
    } else {
        "Docker's daemon is not up".to_owned()
    };
    output::info(&told);
    if context.json {
        output::json(&client.docker()?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn how_to_use_ours() -> String {
    let shell = of_user(std::env::var_os("SHELL").as_deref().map(Path::new));
    format!("use it in this shell: {}", line_to_run(shell, "catalyst docker env"))
}

fn shown(context: &Context, docker: &DockerInfo) -> Outcome {
    if context.json {
        output::json(docker)?;
    } else {
        output::print(&description(docker).render(output::colours()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn description(docker: &DockerInfo) -> Table {
    let mut pairs = Table::pairs();
    let state = match (docker.up, &docker.reason) {
        (true, _) => Cell::toned("up", Tone::Good),
        (false, None) => Cell::toned("down", Tone::Faint),
        (false, Some(reason)) => Cell::toned(format!("down: {reason}"), Tone::Bad),
    };
    pairs.pair("State", state);
    if let Some(pid) = docker.pid {
        pairs.pair("Pid", pid.to_string());
    }
    pairs.pair("Host", &docker.host);
    pairs.pair("Log", &docker.log);
    pairs.pair("Data", &docker.data);
    pairs
}

/// Where the Docker daemon of `docker up` is.
fn of_ours(context: &Context) -> Result<String, CliError> {
    let docker = context.client()?.docker()?;
    if docker.up { Ok(docker.host) } else { Err(DockerError::Down { reason: docker.reason }.into()) }
}

/// Where a VM's Docker is.
fn of_vm(context: &Context, id: &str) -> Result<String, CliError> {
    let info = reached(context, id)?.info;
    Ok(if info.port == 22 {
        format!("ssh://{}@{}", info.user, info.address)
    } else {
        format!("ssh://{}@{}:{}", info.user, info.address, info.port)
    })
}

fn env(context: &Context, host: &str, command: &str, shell: EnvShell) -> Outcome {
    if context.json {
        output::json(&serde_json::json!({ (HOST): host }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let in_the_way: Vec<_> = OF_TLS.into_iter().filter(set).collect();
    output::print(&set_lines(shell, command, host, &in_the_way))?;
    Ok(ExitCode::SUCCESS)
}

/// The shell of a user whose SHELL is this.
fn of_user(shell: Option<&Path>) -> EnvShell {
    match shell.and_then(Path::file_name).and_then(|name| name.to_str()) {
        Some("fish") => EnvShell::Fish,
        Some("csh" | "tcsh") => EnvShell::Tcsh,
        Some("pwsh") => EnvShell::Powershell,
        _ => EnvShell::Sh,
    }
}

/// What sets the variable, and for people how to use that.
fn set_lines(shell: EnvShell, command: &str, host: &str, in_the_way: &[&str]) -> String {
    let set = match shell {
        EnvShell::Sh => format!("export {HOST}={}\n", one_word(host)),
        EnvShell::Fish => format!("set -gx {HOST} \"{host}\";\n"),
        EnvShell::Tcsh => format!("setenv {HOST} \"{host}\";\n"),
        EnvShell::Powershell => format!("$Env:{HOST} = \"{host}\"\n"),
        EnvShell::Cmd => format!("SET {HOST}={host}\n"),
        EnvShell::Emacs => format!("(setenv \"{HOST}\" \"{host}\")\n"),
    };
    let away: String = in_the_way.iter().map(|name| unset_line(shell, name)).collect();
    away + &set + &how_to_use(shell, command)
}

/// The host as sh takes it for one word: the path of a socket may have anything in it.
fn one_word(host: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/:.@_-+,%".contains(c);
    if host.chars().all(plain) { host.to_owned() } else { format!("'{}'", host.replace('\'', r"'\''")) }
}

fn unset_lines(shell: EnvShell) -> String {
    unset_line(shell, HOST) + &how_to_use(shell, "catalyst docker env --unset")
}

fn unset_line(shell: EnvShell, name: &str) -> String {
    match shell {
        EnvShell::Sh => format!("unset {name}\n"),
        EnvShell::Fish => format!("set -e {name};\n"),
        EnvShell::Tcsh => format!("unsetenv {name};\n"),
        EnvShell::Powershell => format!("Remove-Item Env:\\{name} -ErrorAction SilentlyContinue\n"),
        EnvShell::Cmd => format!("SET {name}=\n"),
        EnvShell::Emacs => format!("(setenv \"{name}\" nil)\n"),
    }
}

/// A comment, with the command as it must be given in that shell.
fn how_to_use(shell: EnvShell, command: &str) -> String {
    let line = line_to_run(shell, command);
    match shell {
        // csh's eval makes one line of all, in which a comment would need quoting.
        EnvShell::Tcsh => format!(": 'Run: {}';\n", line.replace('`', "\"")),
        EnvShell::Cmd => format!("REM Run: {line}\n"),
        EnvShell::Emacs => format!(";; Run: {line}\n"),
        _ => format!("# Run: {line}\n"),
    }
}

/// What has that shell do what the command prints.
fn line_to_run(shell: EnvShell, command: &str) -> String {
    match shell {
        EnvShell::Sh => format!("eval \"$({command})\""),
        EnvShell::Fish => format!("{command} --shell fish | source"),
        EnvShell::Tcsh => format!("eval `{command} --shell tcsh`"),
        EnvShell::Powershell => format!("& {command} --shell powershell | Invoke-Expression"),
        EnvShell::Cmd => format!("@FOR /f \"tokens=*\" %i IN ('{command} --shell cmd') DO @%i"),
        EnvShell::Emacs => format!("(eval what `{command} --shell emacs` prints)"),
    }
}

/// By the VM's name, so that the context stays right when its address changes.
fn create_context(context: &Context, id: &str, name: &str) -> Outcome {
    let login = reached(context, id)?;
    let host = format!("ssh://{}@{}", login.info.user, ssh_files::name(id));
    if context_host(id, name)?.as_deref() == Some(&host) {
        output::info(&format!("The context '{name}' is there already"));
    } else {
        let description = format!("Docker in the Catalyst VM {id}");
        let made = docker(
            id,
            &["context", "create", name, "--description", &description, "--docker", &format!("host={host}")],
        )?;
        if !made.status.success() {
            let said = String::from_utf8_lossy(&made.stderr).into_owned();
            return Err(DockerError::Refused { id: id.to_owned(), name: name.to_owned(), said }.into());
        }
        output::info(&format!("Made the context '{name}'; use it as: docker --context {name} ps"));
    }
    if context.json {
        output::json(&serde_json::json!({ "context": name, "host": host }))?;
    } else {
        output::print(&format!("{name}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The host of a context, if there is that.
fn context_host(id: &str, name: &str) -> Result<Option<String>, CliError> {
    let asked = docker(id, &["context", "inspect", "--format", "{{.Endpoints.docker.Host}}", "--", name])?;
    let said = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    Ok(asked.status.success().then_some(said))
}

/// Docker's client, which is to know of its own files alone.
fn docker(id: &str, args: &[&str]) -> Result<std::process::Output, DockerError> {
    let mut command = Command::new("docker");
    command.args(args).env_remove(HOST).env_remove("DOCKER_CONTEXT").stdin(Stdio::null());
    command.output().map_err(|error| DockerError::Run { id: id.to_owned(), source: PlainIo(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "ssh://catalyst@10.208.0.10";
    const ALL: [EnvShell; 6] =
        [EnvShell::Sh, EnvShell::Fish, EnvShell::Tcsh, EnvShell::Powershell, EnvShell::Cmd, EnvShell::Emacs];

    #[test]
    fn each_shell_is_told_in_its_words() {
        let first = |text: String| text.lines().next().unwrap_or_default().to_owned();
        let said = ALL.map(|shell| first(set_lines(shell, "catalyst docker env web1", URL, &[])));
        assert_eq!(
            said,
            [
                "export DOCKER_HOST=ssh://catalyst@10.208.0.10",
                "set -gx DOCKER_HOST \"ssh://catalyst@10.208.0.10\";",
                "setenv DOCKER_HOST \"ssh://catalyst@10.208.0.10\";",
                "$Env:DOCKER_HOST = \"ssh://catalyst@10.208.0.10\"",
                "SET DOCKER_HOST=ssh://catalyst@10.208.0.10",
                "(setenv \"DOCKER_HOST\" \"ssh://catalyst@10.208.0.10\")",
            ]
        );
        assert_eq!(first(unset_lines(EnvShell::Sh)), "unset DOCKER_HOST");
        assert_eq!(first(unset_lines(EnvShell::Cmd)), "SET DOCKER_HOST=");
    }

    #[test]
    fn a_socket_of_any_path_is_one_word() {
        let lines = set_lines(EnvShell::Sh, "c", "unix:///home/a b'c/docker.sock", &[]);
        let script = format!("{lines}printf %s \"$DOCKER_HOST\"");
        let said = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout), "unix:///home/a b'c/docker.sock");
    }

    #[test]
    fn one_that_is_down_says_why_and_what_to_do() {
        let told = |reason: Option<&str>| DockerError::Down { reason: reason.map(str::to_owned) }.to_string();
        assert_eq!(told(None), "Docker's daemon is not up; start it: catalyst docker up");
        assert!(told(Some("it ended by itself")).contains("(it ended by itself)"));
    }

    #[test]
    fn what_is_of_tls_goes_before_it() {
        let lines = set_lines(EnvShell::Sh, "catalyst docker env web1", URL, &["DOCKER_TLS_VERIFY"]);
        assert!(lines.starts_with("unset DOCKER_TLS_VERIFY\nexport DOCKER_HOST="), "{lines}");
    }

    #[test]
    fn the_shell_is_the_users() {
        for (path, shell) in [
            (None, EnvShell::Sh),
            (Some("/bin/bash"), EnvShell::Sh),
            (Some("/usr/bin/fish"), EnvShell::Fish),
            (Some("/bin/tcsh"), EnvShell::Tcsh),
            (Some("/"), EnvShell::Sh),
        ] {
            assert_eq!(of_user(path.map(Path::new)), shell, "{path:?}");
        }
    }

    #[test]
    fn shells_of_this_machine_do_as_they_are_told() {
        for (program, shell, print) in [
            ("sh", EnvShell::Sh, "echo $DOCKER_HOST"),
            ("bash", EnvShell::Sh, "echo $DOCKER_HOST"),
            ("fish", EnvShell::Fish, "echo $DOCKER_HOST"),
            ("tcsh", EnvShell::Tcsh, "echo $DOCKER_HOST"),
        ] {
            let lines = set_lines(shell, "catalyst docker env web1", URL, &["DOCKER_TLS_VERIFY"]);
            // csh's eval makes one line of them.
            let lines = if shell == EnvShell::Tcsh { lines.replace('\n', " ") } else { lines };
            let script = format!("{lines}\n{print}");
            match Command::new(program).args(["-c", &script]).output() {
                Ok(output) => assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), URL, "{output:?}"),
                Err(error) => println!("SKIPPED: no {program} ({error})"),
            }
        }
    }
}
