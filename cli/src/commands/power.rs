//! `vmpower …`, also as `vm power …`.

use std::process::ExitCode;

use catalyst_api::{PowerOp, PowerRequest, Vm};

use super::{Context, for_each, ssh_config, vm};
use crate::Outcome;
use crate::args::Power;
use crate::client::Client;
use crate::error::CliError;
use crate::output;
use crate::progress::Board;
use crate::wait::Wait;

/// Runs a `vmpower` command.
pub fn run(context: &Context, command: Power) -> Outcome {
    match command {
        Power::List => list(context),
        Power::On { ids, wait, cold } => {
            change(context, &ids.ids, PowerRequest { op: PowerOp::On, cold }, wait)
        }
        Power::Off(ids) => change(context, &ids.ids, plain(PowerOp::Off), false),
        Power::Shutdown(ids) => change(context, &ids.ids, plain(PowerOp::Shutdown), false),
        Power::Suspend(ids) => change(context, &ids.ids, plain(PowerOp::Suspend), false),
        Power::Pause(ids) => change(context, &ids.ids, plain(PowerOp::Pause), false),
        Power::Unpause(ids) => change(context, &ids.ids, plain(PowerOp::Unpause), false),
    }
}

/// An operation about which there is nothing more to say.
pub fn plain(op: PowerOp) -> PowerRequest {
    PowerRequest { op, cold: false }
}

fn list(context: &Context) -> Outcome {
    let mut vms = context.client()?.vms(None)?;
    vms.retain(|vm| vm.state.has_process());
    if context.json {
        output::json(&vms)?;
    } else {
        output::print(&vm::ids(&vms))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn change(context: &Context, ids: &[String], request: PowerRequest, wait: bool) -> Outcome {
    let client = context.client()?;
    let board = Board::new();
    for_each(ids, &board, |id| {
        let mut vm = apply(&client, id, request, &board)?;
        if wait {
            vm = wait_until_up(context, &client, &vm, &board)?;
        }
        if context.json {
            board.aside(|| output::json_line(&vm))?;
        }
        Ok(())
    })
}

/// Does the operation, says so in AppCatalyst's words, and returns the VM as it is then.
pub fn apply(client: &Client, id: &str, request: PowerRequest, board: &Board) -> Result<Vm, CliError> {
    let op = request.op;
    let line = board.spinner(format!("{id}: {op}"));
    let vm = client.power(id, request)?;
    drop(line);
    board.aside(|| output::info(&format!("Completed power op '{op}' for VM at '{}'", vm.vmx)));
    board.aside(|| ssh_config::refresh(client, &vm));
    Ok(vm)
}

/// Waits until ssh and docker answer in the VM.
pub fn wait_until_up(context: &Context, client: &Client, vm: &Vm, board: &Board) -> Result<Vm, CliError> {
    let id = &vm.id;
    if vm.foreign {
        // Nothing in its guest tells more.
        let wait = Wait { client, id, what: "its address", limit: context.timeout };
        return wait.until(board, |vm| client.address(id).map(|_| Some(vm.clone())));
    }
    let wait = Wait { client, id, what: "ssh and docker", limit: context.timeout };
    wait.until(board, |vm| Ok((vm.guest.ssh && vm.guest.docker).then(|| vm.clone())))
}
