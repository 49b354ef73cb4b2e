//! `vm snapshot …`

use std::collections::HashMap;
use std::iter::successors;
use std::process::ExitCode;
use std::rc::Rc;

use catalyst_api::{CreateSnapshot, RestoreSnapshot, Snapshot};

use super::{Context, for_each};
use crate::progress::Board;
use crate::table::{Cell, Table};
use crate::{Outcome, args, output, size, text};

/// The VM's present state in a tree.
const NOW: &str = "(now)";
/// Levels of a tree that are indented: as many as a VM can have snapshots.
const DEEPEST: usize = 256;

/// Runs a `vm snapshot` command.
pub fn run(context: &Context, command: args::Snapshot) -> Outcome {
    match command {
        args::Snapshot::Create { vm, name, description } => create(context, &vm, name, description),
        args::Snapshot::List(asked) => list(context, &asked.vm, asked.as_table()),
        args::Snapshot::Tree { vm } => {
            let all = context.client()?.snapshots(&vm)?;
            if context.json {
                output::json(&all)?;
            } else {
                output::print(&tree(&all))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        args::Snapshot::Restore { vm, name, no_start } => restore(context, &vm, &name, !no_start),
        args::Snapshot::Delete { vm, names } => delete(context, &vm, &names),
    }
}

fn create(context: &Context, vm: &str, name: Option<String>, description: Option<String>) -> Outcome {
    let name = name.unwrap_or_else(|| time_name(text::since(0)));
    let body = CreateSnapshot { name, description: description.unwrap_or_default() };
    let client = context.client()?;
    let line = Board::new().spinner(format!("{vm}: making a snapshot"));
    let made = client.create_snapshot(vm, &body)?;
    drop(line);
    let what = if made.memory { "with its memory" } else { "of its disk" };
    output::info(&format!("Made snapshot '{}' of VM '{vm}', {what}", made.name));
    if context.json {
        output::json(&made)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A name for a moment, in seconds since 1970, that sorts by time.
fn time_name(seconds: u64) -> String {
    text::date(seconds).trim_end_matches(" UTC").replace(' ', "-").replace(':', "")
}

fn list(context: &Context, vm: &str, long: bool) -> Outcome {
    let all = context.client()?.snapshots(vm)?;
    if context.json {
        output::json(&all)?;
    } else if long {
        output::print(&table(&all).render(output::colours()))?;
    } else {
        output::print(&all.iter().map(|one| text::clean(&one.name) + "\n").collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(all: &[Snapshot]) -> Table {
    let mut table = Table::new(&["", "NAME", "CREATED", "MEMORY", "DISK", "PARENT", "DESCRIPTION"]);
    for one in all {
        table.row(vec![
            Cell::from(if one.current { "*" } else { "" }),
            Cell::from(&one.name),
            Cell::from(text::date(one.created)),
            Cell::from(if one.memory { size::human(one.memory_bytes) } else { "no".to_owned() }),
            Cell::from(size::human(one.disk_bytes)),
            Cell::from(one.parent.as_deref().unwrap_or_default()),
            Cell::from(&one.description),
        ]);
    }
    table
}

/// Snapshots below those that they come from, the oldest first, and the VM as it is now.
fn tree(all: &[Snapshot]) -> String {
    // `None` is the VM as it is now.
    let mut below: Vec<Vec<Option<usize>>> = vec![Vec::new(); all.len()];
    let mut roots = Vec::new();
    for (number, parent) in parents(all).into_iter().enumerate() {
        parent.map_or(&mut roots, |parent| &mut below[parent]).push(Some(number));
    }
    let current = all.iter().position(|one| one.current);
    current.map_or(&mut roots, |at| &mut below[at]).push(None);
    draw(all, &roots, &below)
}

/// Which one each comes from; none where that is not among them.
fn parents(all: &[Snapshot]) -> Vec<Option<usize>> {
    let mut numbers = HashMap::new();
    for (number, one) in all.iter().enumerate() {
        numbers.entry(one.name.as_str()).or_insert(number);
    }
    let number = |one: &Snapshot| numbers.get(one.parent.as_deref()?).copied();
    let mut parents: Vec<Option<usize>> = all.iter().map(number).collect();
    // Only a daemon that errs has them come from each other: such a ring is cut above its oldest.
    let mut walks = vec![None; all.len()];
    for walk in 0..all.len() {
        let mut at = Some(walk);
        while let Some(one) = at.filter(|&one| walks[one].is_none()) {
            walks[one] = Some(walk);
            at = parents[one];
        }
        if let Some(end) = at.filter(|&one| walks[one] == Some(walk)) {
            let ring = successors(parents[end], |&one| if one == end { None } else { parents[one] });
            let oldest = ring.min().unwrap_or(end);
            parents[oldest] = None;
        }
    }
    parents
}

/// The lines of a tree. Without recursion: how deep it goes is the daemon's to say.
fn draw(all: &[Snapshot], roots: &[Option<usize>], below: &[Vec<Option<usize>>]) -> String {
    let mut text = String::new();
    let mut levels = vec![(roots.iter(), Rc::<str>::from(""))];
    while let Some((level, indent)) = levels.last_mut() {
        let Some(&one) = level.next() else {
            levels.pop();
            continue;
        };
        let (corner, bar) = if level.len() == 0 { ("└── ", "    ") } else { ("├── ", "│   ") };
        let indent = Rc::clone(indent);
        let name = one.map_or_else(|| NOW.to_owned(), |one| text::clean(&all[one].name));
        text.extend([&indent, corner, &name, "\n"]);
        if let Some(one) = one {
            let deeper = levels.len() <= DEEPEST;
            levels.push((below[one].iter(), if deeper { format!("{indent}{bar}").into() } else { indent }));
        }
    }
    text
}

fn restore(context: &Context, vm: &str, name: &str, start: bool) -> Outcome {
    let client = context.client()?;
    let line = Board::new().spinner(format!("{vm}: going back to a snapshot"));
    let vm = client.restore_snapshot(vm, name, RestoreSnapshot { start })?;
    drop(line);
    output::info(&format!("VM '{}' went back to snapshot '{name}' and is {}", vm.id, vm.state));
    if context.json {
        output::json(&vm)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn delete(context: &Context, vm: &str, names: &[String]) -> Outcome {
    let client = context.client()?;
    let board = Board::new();
    for_each(names, &board, |name| {
        let line = board.spinner(format!("{vm}: deleting snapshot '{}'", text::clean(name)));
        client.delete_snapshot(vm, name)?;
        drop(line);
        board.aside(|| output::info(&format!("Deleted snapshot '{name}' of VM '{vm}'")));
        if context.json {
            let told = serde_json::json!({ "vm": vm, "name": name, "deleted": true });
            board.aside(|| output::json_line(&told))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str, parent: Option<&str>, current: bool) -> Snapshot {
        Snapshot {
            name: name.to_owned(),
            description: String::new(),
            created: 0,
            parent: parent.map(str::to_owned),
            current,
            memory: true,
            memory_bytes: 3 << 20,
            disk_bytes: 0,
        }
    }

    #[test]
    fn the_tree_shows_what_comes_from_what_and_where_the_vm_is() {
        let all = [
            snapshot("a", None, false),
            snapshot("b", Some("a"), true),
            snapshot("c", Some("a"), false),
            snapshot("d", Some("b"), false),
        ];
        assert_eq!(tree(&all), "└── a\n    ├── b\n    │   ├── d\n    │   └── (now)\n    └── c\n");
        assert_eq!(tree(&[]), "└── (now)\n");
        assert_eq!(tree(&[snapshot("a", None, false)]), "├── a\n└── (now)\n");
    }

    #[test]
    fn snapshots_that_come_from_each_other_or_from_nowhere_are_shown_once() {
        let all = [
            snapshot("a", Some("b"), false),
            snapshot("b", Some("a"), false),
            snapshot("self", Some("self"), false),
            snapshot("lost", Some("gone"), true),
            snapshot("evil\x1b[2J", None, false),
        ];
        let text = tree(&all);
        for name in ["a", "b", "self", "lost", "evil [2J"] {
            let lines = text.lines().filter(|line| line.ends_with(&format!("── {name}"))).count();
            assert_eq!(lines, 1, "{name}: {text}");
        }
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn a_ring_is_cut_above_its_oldest_and_keeps_its_branches() {
        let all = [
            snapshot("branch", Some("b"), true),
            snapshot("a", Some("c"), false),
            snapshot("b", Some("a"), false),
            snapshot("c", Some("b"), false),
        ];
        assert_eq!(
            tree(&all),
            "└── a\n    └── b\n        ├── branch\n        │   └── (now)\n        └── c\n"
        );
    }

    #[test]
    fn of_two_with_one_name_both_are_shown() {
        let all = [snapshot("a", None, false), snapshot("a", None, false), snapshot("b", Some("a"), true)];
        assert_eq!(tree(&all), "├── a\n│   └── b\n│       └── (now)\n└── a\n");
    }

    #[test]
    fn a_tree_of_any_depth_is_drawn() {
        let name = |number: u32| format!("s{number}");
        let one = |number: u32| snapshot(&name(number), number.checked_sub(1).map(name).as_deref(), false);
        let all: Vec<Snapshot> = (0..50_000).map(one).collect();
        let text = tree(&all);
        assert_eq!(text.lines().count(), all.len() + 1);
        assert!(text.ends_with("└── s49999\n└── (now)\n"));
    }

    #[test]
    fn hostile_names_stay_on_their_line() {
        let all = [snapshot("a\n└── b\x1b[2J\u{9b}", None, true)];
        assert_eq!(tree(&all), "└── a └── b [2J \n    └── (now)\n");
        assert_eq!(table(&all).render(false).lines().count(), 2);
    }

    #[test]
    fn the_table_marks_the_one_that_the_vm_comes_from() {
        let text = table(&[snapshot("a", None, false), snapshot("b", Some("a"), true)]).render(false);
        assert!(text.lines().nth(2).unwrap().starts_with("*  b "), "{text}");
        assert!(text.contains("3 MiB"), "{text}");
    }

    #[test]
    fn a_moment_is_a_name() {
        assert_eq!(time_name(1_795_852_392), "2026-11-28-075312");
    }
}
