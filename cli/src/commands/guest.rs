//! `guest getip`, also as `vm getip`.

use std::process::ExitCode;

use catalyst_api::{Address, ErrorCode};

use super::Context;
use crate::Outcome;
use crate::args::GetIp;
use crate::client::Client;
use crate::error::CliError;
use crate::progress::Board;
use crate::wait::{self, Wait, WaitError};
use crate::{output, text};

/// Prints the address alone.
pub fn getip(context: &Context, asked: &GetIp) -> Outcome {
    let client = context.client()?;
    let address = if asked.wait {
        let wait = Wait { client: &client, id: &asked.id, what: "its address", limit: context.timeout };
        wait.until(&Board::new(), |_| client.address(&asked.id).map(Some))?
    } else {
        now(&client, &asked.id)?
    };
    if context.json {
        output::json(&address)?;
    } else {
        output::print(&(text::clean(&address.address) + "\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The address if the guest holds it now; else what it waits for.
fn now(client: &Client, id: &str) -> Result<Address, CliError> {
    match client.address(id) {
        Err(error) if error.is(ErrorCode::GuestNotReady) || error.is(ErrorCode::WrongState) => {
            let vm = client.vm(id)?;
            wait::running(&vm)?;
            Err(WaitError::NotYet { id: id.to_owned(), known: wait::stage(&vm.guest) }.into())
        }
        other => Ok(other?),
    }
}
