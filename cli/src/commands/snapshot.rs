//! `vm snapshot …`

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use catalyst_api::{CreateSnapshot, RestoreSnapshot, Snapshot};

use super::{Context, for_each};
use crate::progress::Board;
use crate::table::{Cell, Table};
use crate::{Outcome, args, output, size, text};

/// The VM's present state in a tree.
const NOW: &str = "(now)";

/// Runs a `vm snapshot` command.
pub fn run(context: &Context, command: args::Snapshot) -> Outcome {
    match command {
        args::Snapshot::Create { vm, name, description } => create(context, &vm, name, description),
        args::Snapshot::List { vm, long, quiet } => {
            list(context, &vm, !quiet && (long || output::on_terminal()))
        }
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
    let made = context.client()?.create_snapshot(vm, &body)?;
    let what = if made.memory { "with its memory" } else { "of its disk" };
    output::info(&format!("Made snapshot '{}' of VM '{vm}', {what}", text::clean(&made.name)));
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

/// Snapshots below those that they come from, and the VM as it is now.
fn tree(all: &[Snapshot]) -> String {
    let known: BTreeSet<&str> = all.iter().map(|one| one.name.as_str()).collect();
    let mut children: BTreeMap<Option<&str>, Vec<&Snapshot>> = BTreeMap::new();
    for one in all {
        let parent = one.parent.as_deref().filter(|parent| known.contains(parent));
        children.entry(parent).or_default().push(one);
    }
    let mut tree = Tree { children, shown: BTreeSet::new(), text: String::new() };
    let no_current = !all.iter().any(|one| one.current);
    tree.level(None, "", no_current);
    // Only a daemon that errs has them come from each other.
    for one in all {
        if !tree.shown.contains(one.name.as_str()) {
            tree.one(one, "", true);
        }
    }
    tree.text
}

struct Tree<'a> {
    children: BTreeMap<Option<&'a str>, Vec<&'a Snapshot>>,
    shown: BTreeSet<&'a str>,
    text: String,
}

impl<'a> Tree<'a> {
    /// All that comes from `parent`, and with `now` the VM as it is.
    fn level(&mut self, parent: Option<&str>, indent: &str, now: bool) {
        let below: Vec<&'a Snapshot> = self
            .children
            .iter()
            .find(|(key, _)| **key == parent)
            .map(|(_, below)| below.clone())
            .unwrap_or_default();
        let count = below.len();
        for (number, one) in below.into_iter().enumerate() {
            self.one(one, indent, number + 1 == count && !now);
        }
        if now {
            self.text.extend([indent, "└── ", NOW, "\n"]);
        }
    }

    fn one(&mut self, one: &'a Snapshot, indent: &str, last: bool) {
        if !self.shown.insert(&one.name) {
            return;
        }
        let (corner, bar) = if last { ("└── ", "    ") } else { ("├── ", "│   ") };
        self.text.extend([indent, corner, &text::clean(&one.name), "\n"]);
        self.level(Some(&one.name), &format!("{indent}{bar}"), one.current);
    }
}

fn restore(context: &Context, vm: &str, name: &str, start: bool) -> Outcome {
    let vm = context.client()?.restore_snapshot(vm, name, RestoreSnapshot { start })?;
    output::info(&format!(
        "VM '{}' went back to snapshot '{}' and is {}",
        vm.id,
        text::clean(name),
        vm.state
    ));
    if context.json {
        output::json(&vm)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn delete(context: &Context, vm: &str, names: &[String]) -> Outcome {
    let client = context.client()?;
    for_each(names, &Board::new(), |name| {
        client.delete_snapshot(vm, name)?;
        output::info(&format!("Deleted snapshot '{}' of VM '{vm}'", text::clean(name)));
        if context.json {
            output::json_line(&serde_json::json!({ "vm": vm, "name": name, "deleted": true }))?;
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
