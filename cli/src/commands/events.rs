//! `events`: what happens, as it happens.

use catalyst_api::{Event, EventKind, TaskState};

use super::Context;
use crate::error::CliError;
use crate::events::EventsError;
use crate::{Outcome, output, text};

/// Prints events until the user or the daemon ends it.
pub fn run(context: &Context, vm: Option<&str>) -> Outcome {
    let client = context.client()?;
    let mut events = client.events(vm, None)?;
    loop {
        let event = events.next().map_err(|error| match error {
            EventsError::Client(error) => CliError::from(error),
            EventsError::TimeOver => CliError::Told,
        })?;
        if context.json {
            output::json_line(&event)?;
        } else {
            output::print(&line(&event))?;
        }
    }
}

fn line(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::VmCreated { id } => format!("{id}: created"),
        EventKind::VmDeleted { id } => format!("{id}: deleted"),
        EventKind::VmState { id, state, reason: None } => format!("{id}: {state}"),
        EventKind::VmState { id, state, reason: Some(reason) } => format!("{id}: {state}, {reason}"),
        EventKind::VmChanged { id } => format!("{id}: changed"),
        EventKind::VmUsage { id, cpu_ms, memory } => {
            format!("{id}: {cpu_ms} ms of CPU, {} private", crate::size::human(memory.private))
        }
        EventKind::VmSetUp { id, set_up } => format!("{id}: {}", super::vm::set_up_line(set_up)),
        EventKind::VmGuest { id, guest } => format!("{id}: {}", crate::wait::stage(guest)),
        EventKind::Task { task } => match task.state {
            TaskState::Running => format!("{}: {} %, {}", task.title, task.percent, task.message),
            TaskState::Done => format!("{}: done", task.title),
            TaskState::Failed => format!("{}: failed, {}", task.title, task.message),
        },
        EventKind::Lost { count } => format!("{count} events were lost"),
    };
    format!("{}  {}\n", text::date(event.at_ms / 1000), text::clean(&what))
}

#[cfg(test)]
mod tests {
    use catalyst_api::VmState;

    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let kind = EventKind::VmState {
            id: "web1".to_owned(),
            state: VmState::PoweredOff,
            reason: Some("killed\nby hand".to_owned()),
        };
        assert_eq!(
            line(&Event { at_ms: 86_400_999, kind }),
            "1970-01-02 00:00:00 UTC  web1: powered off, killed by hand\n"
        );
    }
}
