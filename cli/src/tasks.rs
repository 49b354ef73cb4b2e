//! Following a long task of the daemon to its end.

use catalyst_api::{EventKind, Task, TaskState};

use crate::client::{Client, ClientError};
use crate::error::CliError;
use crate::events::EventsError;
use crate::output;
use crate::progress::{Board, Line};

/// How a task can fail.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The task says why.
    #[error("{title} failed: {message}")]
    Failed {
        /// What it did.
        title: String,
        /// Why it failed.
        message: String,
    },
    /// The daemon is gone; what became of the task is unknown.
    #[error("cannot see how the task goes on; see catalyst image list")]
    OutOfSight(#[source] EventsError),
}

/// Starts a task by `start` and follows it. On a terminal it is a bar, else each step is a
/// line on stderr.
pub fn follow(client: &Client, start: impl FnOnce() -> Result<Task, ClientError>) -> Result<Task, CliError> {
    // The subscription comes first: a short task might be over before a later one.
    let mut events = client.events(None, None)?;
    let first = start()?;
    let board = Board::new();
    let mut shown =
        Shown { line: board.bar(first.title.clone()), last: String::new(), on_terminal: board.is_shown() };
    // Events are told to whoever listens; the task as it is now is asked for once.
    let mut task = client.task(first.id)?;
    loop {
        shown.update(&task);
        match task.state {
            TaskState::Running => {}
            TaskState::Done => return Ok(task),
            TaskState::Failed => {
                return Err(TaskError::Failed { title: task.title, message: task.message }.into());
            }
        }
        task = next(client, &mut events, task)?;
    }
}

fn next(client: &Client, events: &mut crate::events::Events, task: Task) -> Result<Task, TaskError> {
    let event = events.next().map_err(TaskError::OutOfSight)?;
    match event.kind {
        EventKind::Task { task: news } if news.id == task.id => Ok(news),
        EventKind::Lost { .. } => client.task(task.id).map_err(|error| TaskError::OutOfSight(error.into())),
        _ => Ok(task),
    }
}

struct Shown {
    line: Line,
    last: String,
    on_terminal: bool,
}

impl Shown {
    fn update(&mut self, task: &Task) {
        self.line.at(task.percent);
        if task.state == TaskState::Running && task.message != self.last {
            self.last.clone_from(&task.message);
            self.line.say(&task.message);
            if !self.on_terminal && !task.message.is_empty() {
                output::info(&task.message);
            }
        }
    }
}
