//! Long tasks, told step by step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalyst_api::{ErrorCode, EventKind, Task, TaskState};

use crate::events::Events;
use crate::http::error::Refusal;

/// Ended tasks that are remembered.
const REMEMBERED: usize = 64;

/// The tasks of this daemon.
#[derive(Clone, Debug)]
pub struct Tasks {
    events: Events,
    list: Arc<Mutex<Vec<Task>>>,
}

/// A task under way; dropped unfinished, it has failed.
#[derive(Debug)]
pub struct Running {
    tasks: Tasks,
    id: u64,
    ended: bool,
}

impl Tasks {
    /// None yet.
    pub fn new(events: Events) -> Self {
        Self { events, list: Arc::default() }
    }

    /// Where they are told.
    pub fn events(&self) -> &Events {
        &self.events
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Task>> {
        // Nothing panics while it holds the lock; if it did, the list would still be whole.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that are remembered, the newest last.
    pub fn list(&self) -> Vec<Task> {
        self.lock().clone()
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<Task> {
        self.lock().iter().find(|task| task.id == id).cloned()
    }

    /// Begins a task, unless one of this title is under way: then its number is the error.
    pub fn begin(&self, title: &str) -> Result<Running, u64> {
        let mut list = self.lock();
        if let Some(task) = list.iter().find(|task| task.title == title && task.state == TaskState::Running) {
            return Err(task.id);
        }
        let id = list.last().map_or(1, |task| task.id + 1);
        let ended = list.iter().filter(|task| task.state != TaskState::Running).count();
        if ended >= REMEMBERED
            && let Some(oldest) = list.iter().position(|task| task.state != TaskState::Running)
        {
            list.remove(oldest);
        }
        let state = TaskState::Running;
        list.push(Task { id, title: title.to_owned(), state, percent: 0, message: "begun".to_owned() });
        drop(list);
        Ok(Running { tasks: self.clone(), id, ended: false })
    }

    /// Begins a task that a client asks for, with what it is told of it.
    pub fn begin_told(&self, title: &str) -> Result<(Running, Task), Refusal> {
        let under_way = |id| format!("'{title}' is under way already, as task {id}");
        let task = self.begin(title).map_err(|id| Refusal::new(ErrorCode::InUse, under_way(id)))?;
        let id = task.id();
        let gone = || Refusal::new(ErrorCode::TaskNotFound, format!("There is no task {id} in this daemon"));
        let told = self.get(id).ok_or_else(gone)?;
        Ok((task, told))
    }
}

impl Running {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// It has come this far.
    pub fn step(&self, percent: u8, message: impl Into<String>) {
        self.change(TaskState::Running, Some(percent), message.into());
    }

    /// It has ended.
    pub fn end(mut self, result: Result<String, String>) {
        self.ended = true;
        match result {
            Ok(message) => self.change(TaskState::Done, Some(100), message),
            Err(message) => self.change(TaskState::Failed, None, message),
        }
    }

    fn change(&self, state: TaskState, percent: Option<u8>, message: String) {
        let mut list = self.tasks.lock();
        let Some(task) = list.iter_mut().find(|task| task.id == self.id) else { return };
        task.state = state;
        task.percent = percent.unwrap_or(task.percent).min(100);
        task.message = message;
        let task = task.clone();
        drop(list);
        self.tasks.events.send(EventKind::Task { task });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.change(TaskState::Failed, None, "it was interrupted".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_task_of_a_title_at_a_time_and_a_dropped_one_has_failed() {
        let tasks = Tasks::new(Events::default());
        let first = tasks.begin("build").unwrap();
        assert_eq!(tasks.begin("build").unwrap_err(), first.id());
        first.step(50, "half");
        assert_eq!(tasks.get(first.id()).unwrap().percent, 50);
        drop(first);
        assert_eq!(tasks.list()[0].state, TaskState::Failed);
        tasks.begin("build").unwrap().end(Ok("built".into()));
        assert_eq!(tasks.list()[1].state, TaskState::Done);
    }

    #[test]
    fn old_tasks_are_forgotten() {
        let tasks = Tasks::new(Events::default());
        for _ in 0..200 {
            tasks.begin("x").unwrap().end(Ok(String::new()));
        }
        assert!(tasks.list().len() <= REMEMBERED + 1);
    }
}
