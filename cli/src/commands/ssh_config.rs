//! `ssh-config`: what `~/.ssh` says of VMs.

use std::process::ExitCode;

use catalyst_api::{Version, Vm, VmState};
use serde_json::json;

use super::{Context, ssh};
use crate::args::SshConfig;
use crate::client::Client;
use crate::error::{CliError, chain};
use crate::progress::Board;
use crate::ssh_files::{self, Login, SshFiles};
use crate::wait::Wait;
use crate::{Outcome, output};

/// Writes the blocks and prints the names by which ssh knows the VMs.
pub fn run(context: &Context, asked: &SshConfig) -> Outcome {
    if asked.remove {
        return remove(asked);
    }
    let (client, daemon) = context.connect()?;
    let logins = if asked.ids.is_empty() {
        client.vms(None)?.iter().filter_map(|vm| ready(&client, vm)).collect()
    } else {
        let one = |id: &String| wait_for_login(context, &client, id, |_| true);
        asked.ids.iter().map(one).collect::<Result<Vec<_>, _>>()?
    };
    write(&client, &daemon, &logins)?;
    if context.json {
        let shown = logins.iter().map(|login| {
            json!({ "id": login.id, "name": ssh_files::name(&login.id), "address": login.info.address })
        });
        output::json(&shown.collect::<Vec<_>>())?;
    } else {
        let names = logins.iter().map(|login| ssh_files::name(&login.id) + "\n");
        output::print(&names.collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(asked: &SshConfig) -> Outcome {
    let files = SshFiles::of_user("")?;
    let which = if asked.ids.is_empty() { "any VM".to_owned() } else { asked.ids.join(", ") };
    let folder = files.folder().display();
    if files.remove_named(&asked.ids)? {
        output::info(&format!("Nothing of {which} is left in '{folder}'"));
    } else {
        output::info(&format!("There was nothing of {which} in '{folder}'"));
    }
    Ok(ExitCode::SUCCESS)
}

/// How to log in to a VM that answers now; of others it is told that they are left as they are.
fn ready(client: &Client, vm: &Vm) -> Option<Login> {
    let left = |why: &str| output::info(&format!("Left VM '{}' as it was: {why}", vm.id));
    if !vm.state.has_process() {
        left(&format!("it is {}", vm.state));
        return None;
    }
    let login = client.ssh(&vm.id).map_err(CliError::from).and_then(|info| {
        ssh::usable(&vm.id, &info)?;
        Ok(Login { id: vm.id.clone(), info })
    });
    login.map_err(|error| left(&chain(&error))).ok()
}

/// Waits for how to log in to a VM whose guest is as `enough` says.
pub fn wait_for_login(
    context: &Context,
    client: &Client,
    id: &str,
    enough: impl Fn(&Vm) -> bool,
) -> Result<Login, CliError> {
    let wait = Wait { client, id, what: "ssh and docker", limit: context.timeout };
    let info =
        wait.until(&Board::new(), |vm| if enough(vm) { client.ssh(id).map(Some) } else { Ok(None) })?;
    ssh::usable(id, &info)?;
    Ok(Login { id: id.to_owned(), info })
}

/// Writes how to log in to these VMs, and takes away what is left of VMs that are no more.
pub fn write(client: &Client, daemon: &Version, logins: &[Login]) -> Result<(), CliError> {
    let all: Vec<String> = client.vms(None)?.into_iter().map(|vm| vm.id).collect();
    let files = SshFiles::of_user(&daemon.vm_dir)?;
    if files.write(logins, &all)? {
        output::info(&format!("Wrote addresses and keys of VMs to '{}'", files.folder().display()));
    }
    if !files.is_in_home() {
        let folder = files.folder().display();
        output::info(&format!("HOME is another folder: ssh reads '{folder}', docker-compose may not"));
    }
    Ok(())
}

/// Takes away what is said of VMs that were deleted. A failure is told, since they are deleted all the same.
pub fn forget(daemon: &Version, ids: &[String]) {
    // Who has no home has no such files.
    let Ok(files) = SshFiles::of_user(&daemon.vm_dir) else { return };
    if let Err(error) = files.forget(ids) {
        output::info(&chain(&error));
    }
}

/// Puts the address of a VM that was powered on where it has a block. A failure is told, since it is on all the same.
pub fn refresh(client: &Client, vm: &Vm) {
    if vm.state != VmState::PoweredOn {
        return;
    }
    // Most have none, and a daemon is asked for nothing then.
    if !SshFiles::of_user("").is_ok_and(|files| files.has(&vm.id)) {
        return;
    }
    let Ok(daemon) = client.probe() else { return };
    match SshFiles::of_user(&daemon.vm_dir).and_then(|files| files.moved(&vm.id, &vm.address)) {
        Ok(true) => output::info(&format!("{} is {} now", ssh_files::name(&vm.id), vm.address)),
        Ok(false) => {}
        Err(error) => output::info(&chain(&error)),
    }
}
