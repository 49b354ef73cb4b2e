//! Progress on a terminal, silence in a pipe.

use std::borrow::Cow;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::text::clean;

/// The lines of all that goes on at once.
#[derive(Clone, Debug)]
pub struct Board {
    lines: MultiProgress,
}

impl Board {
    /// Lines on stderr; nothing is shown where that is no terminal.
    pub fn new() -> Self {
        Self { lines: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()) }
    }

    /// Whether anything is shown.
    pub fn is_shown(&self) -> bool {
        !self.lines.is_hidden()
    }

    /// A line for something of unknown length; it goes when it is dropped.
    pub fn spinner(&self, text: impl Into<Cow<'static, str>>) -> Line {
        self.line(ProgressBar::new_spinner(), "{spinner} {msg} ({elapsed})", text.into())
    }

    /// A line for something that goes from 0 to 100 %.
    pub fn bar(&self, text: impl Into<Cow<'static, str>>) -> Line {
        self.line(ProgressBar::new(100), "{spinner} [{bar:24}] {percent:>3} % {msg} ({elapsed})", text.into())
    }

    fn line(&self, bar: ProgressBar, template: &str, text: Cow<'static, str>) -> Line {
        if !self.is_shown() {
            return Line { bar: ProgressBar::hidden() };
        }
        let bar = self.lines.add(bar);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(text);
        bar.enable_steady_tick(Duration::from_millis(120));
        Line { bar }
    }

    /// Prints through `print` without disturbing the lines.
    pub fn aside<R>(&self, print: impl FnOnce() -> R) -> R {
        self.lines.suspend(print)
    }
}

/// One line of progress.
#[derive(Debug)]
pub struct Line {
    bar: ProgressBar,
}

impl Line {
    /// Says something else on it.
    pub fn say(&self, text: &str) {
        self.bar.set_message(clean(text));
    }

    /// Moves it, to 0 to 100 %.
    pub fn at(&self, percent: u8) {
        self.bar.set_position(u64::from(percent.min(100)));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
