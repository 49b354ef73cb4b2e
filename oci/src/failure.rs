//! Why a command was not done, as one sentence with its causes.

use std::io;

use catalyst_agent_link::AgentError;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The whole sentence.
    #[error("{0}")]
    Said(String),
    /// The system said no.
    #[error("cannot {what}")]
    System {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A document makes no sense.
    #[error("cannot read {what}")]
    Document {
        /// Which.
        what: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The agent said no, or nothing.
    #[error("the agent in the container's VM did not {what}")]
    Agent {
        /// What it was asked.
        what: &'static str,
        /// What it said.
        #[source]
        source: AgentError,
    },
}

/// What a step comes to.
pub type Outcome<T = ()> = Result<T, Failure>;

/// A failure that is one sentence.
pub fn said<T>(sentence: impl Into<String>) -> Outcome<T> {
    Err(Failure::Said(sentence.into()))
}

/// Tells what was tried.
pub trait Tried<T> {
    /// Names it, where it failed.
    fn tried(self, what: impl FnOnce() -> String) -> Outcome<T>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, what: impl FnOnce() -> String) -> Outcome<T> {
        self.map_err(|error| Failure::System { what: what(), source: error.into() })
    }
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = text + ": " + &cause_text;
        }
        next = cause.source();
    }
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_in_one_line_and_once() {
        let failed: Result<(), io::Error> = Err(io::Error::other("no\nroom"));
        let failure = failed.tried(|| "write x".to_owned()).unwrap_err();
        assert_eq!(chain(&failure), "cannot write x: no room");
        assert_eq!(chain(&Failure::Said("It is so".to_owned())), "It is so");
    }
}
