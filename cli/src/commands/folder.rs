//! `folder …`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use catalyst_api::{CreateFolder, Folder};

use super::{Context, for_each};
use crate::error::CliError;
use crate::progress::Board;
use crate::table::{Cell, Table};
use crate::{Outcome, args, output, text};

/// Runs a `folder` command.
pub fn run(context: &Context, command: args::Folder) -> Outcome {
    match command {
        args::Folder::Add { vm, path, guest_path, name, read_only, uid, gid } => {
            let host_path = absolute(&path)?;
            let name = name.map_or_else(|| name_of(&path, &host_path), Ok)?;
            let host_path = host_path.into_os_string().into_string().map_err(|_| not_text(&path))?;
            let body = CreateFolder { name, host_path, guest_path, read_only, uid, gid };
            add(context, &vm, &body)
        }
        args::Folder::List(asked) => {
            let all = context.client()?.folders(&asked.vm)?;
            if context.json {
                output::json(&all)?;
            } else if asked.as_table() {
                output::print(&table(&all).render(output::colours()))?;
            } else {
                output::print(&all.iter().map(|one| text::clean(&one.name) + "\n").collect::<String>())?;
            }
            Ok(ExitCode::SUCCESS)
        }
        args::Folder::Remove { vm, names } => {
            let client = context.client()?;
            let board = Board::new();
            for_each(&names, &board, |name| {
                client.remove_folder(&vm, name)?;
                board.aside(|| output::info(&format!("VM '{vm}' has folder '{name}' no more")));
                Ok(())
            })
        }
    }
}

fn add(context: &Context, vm: &str, body: &CreateFolder) -> Outcome {
    let folder = context.client()?.add_folder(vm, body)?;
    let when = if folder.mounted { "is" } else { "will be" };
    output::info(&format!("{} {when} at {} in VM '{vm}'", folder.host_path, place(&folder)));
    if context.json {
        output::json(&folder)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Where a folder is in the guest.
fn place(folder: &Folder) -> String {
    folder.guest_path.clone().unwrap_or_else(|| format!("/mnt/hgfs/{}", folder.name))
}

/// The daemon has another working folder. Links stay: they may lead elsewhere tomorrow.
fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path)
        .map_err(|error| CliError::Use(format!("The path '{}' cannot be used: {error}", path.display())))
}

fn name_of(path: &Path, absolute: &Path) -> Result<String, CliError> {
    // A dot stands for the folder that one is in.
    let real = if path.file_name().is_none() { path.canonicalize().ok() } else { None };
    let name = real.as_deref().unwrap_or(absolute).file_name().and_then(|name| name.to_str());
    name.map(str::to_owned)
        .ok_or_else(|| CliError::Use(format!("The folder '{}' needs a name: --name NAME", path.display())))
}

fn not_text(path: &Path) -> CliError {
    CliError::Use(format!("The path '{}' is no text in UTF-8, and cannot be sent", path.display()))
}

fn table(all: &[Folder]) -> Table {
    let mut table = Table::new(&["NAME", "HERE", "IN THE GUEST", "ACCESS", "STATE"]);
    for one in all {
        let state = match &one.problem {
            Some(problem) => problem.as_str(),
            None if one.mounted => "mounted",
            None => "",
        };
        table.row(vec![
            Cell::from(&one.name),
            Cell::from(&one.host_path),
            Cell::from(place(one)),
            Cell::from(if one.read_only { "read" } else { "read and write" }),
            Cell::from(state),
        ]);
    }
    table
}
