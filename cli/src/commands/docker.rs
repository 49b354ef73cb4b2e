//! `docker …`: the Docker tools of this machine, and a VM's Docker.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use super::{Context, ssh_config};
use crate::args::{Docker, DockerContext, EnvShell};
use crate::error::{CliError, PlainIo};
use crate::ssh_files::{self, Login};
use crate::{Outcome, output};

/// What Docker's tools go by.
const HOST: &str = "DOCKER_HOST";
/// What they would go by besides, and is of no use with ssh; docker-machine sets it.
const OF_TLS: [&str; 2] = ["DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"];

/// Why Docker's client did not do it.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
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

/// Runs a `docker` command.
pub fn run(context: &Context, command: Docker) -> Outcome {
    match command {
        Docker::Env { id, shell, unset } => {
            let shell = shell.unwrap_or_else(|| of_user(std::env::var_os("SHELL").as_deref().map(Path::new)));
            match id {
                Some(id) if !unset => env(context, &id, shell),
                _ => {
                    output::print(&unset_lines(shell))?;
                    Ok(ExitCode::SUCCESS)
                }
            }
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

fn env(context: &Context, id: &str, shell: EnvShell) -> Outcome {
    let info = reached(context, id)?.info;
    let host = if info.port == 22 {
        format!("ssh://{}@{}", info.user, info.address)
    } else {
        format!("ssh://{}@{}:{}", info.user, info.address, info.port)
    };
    if context.json {
        output::json(&serde_json::json!({ (HOST): host }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let in_the_way: Vec<_> = OF_TLS.into_iter().filter(set).collect();
    output::print(&set_lines(shell, id, &host, &in_the_way))?;
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
fn set_lines(shell: EnvShell, id: &str, host: &str, in_the_way: &[&str]) -> String {
    let set = match shell {
        EnvShell::Sh => format!("export {HOST}={host}\n"),
        EnvShell::Fish => format!("set -gx {HOST} \"{host}\";\n"),
        EnvShell::Tcsh => format!("setenv {HOST} \"{host}\";\n"),
        EnvShell::Powershell => format!("$Env:{HOST} = \"{host}\"\n"),
        EnvShell::Cmd => format!("SET {HOST}={host}\n"),
        EnvShell::Emacs => format!("(setenv \"{HOST}\" \"{host}\")\n"),
    };
    let away: String = in_the_way.iter().map(|name| unset_line(shell, name)).collect();
    away + &set + &how_to_use(shell, &format!("catalyst docker env {id}"))
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
    let (comment, line) = match shell {
        EnvShell::Sh => ("#", format!("eval \"$({command})\"")),
        EnvShell::Fish => ("#", format!("{command} --shell fish | source")),
        EnvShell::Tcsh => (":", format!("eval `{command} --shell tcsh`")),
        EnvShell::Powershell => ("#", format!("& {command} --shell powershell | Invoke-Expression")),
        EnvShell::Cmd => ("REM", format!("@FOR /f \"tokens=*\" %i IN ('{command} --shell cmd') DO @%i")),
        EnvShell::Emacs => (";;", format!("(eval what `{command} --shell emacs` prints)")),
    };
    match shell {
        // csh's eval makes one line of all, in which a comment would need quoting.
        EnvShell::Tcsh => format!("{comment} 'Run: {}';\n", line.replace('`', "\"")),
        _ => format!("{comment} Run: {line}\n"),
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
        let said = ALL.map(|shell| first(set_lines(shell, "web1", URL, &[])));
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
    fn what_is_of_tls_goes_before_it() {
        let lines = set_lines(EnvShell::Sh, "web1", URL, &["DOCKER_TLS_VERIFY"]);
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
            let lines = set_lines(shell, "web1", URL, &["DOCKER_TLS_VERIFY"]);
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
