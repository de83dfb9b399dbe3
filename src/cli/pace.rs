//! How far some work is and how fast it goes, for a bar, for a log line and for JSON.

use std::fmt;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::units;

/// How far some work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pace {
    done: u64,
    total: u64,
    /// Bytes in a second.
    rate: u64,
    /// Seconds that are left, where that can be told.
    left: Option<u64>,
}

impl Pace {
    pub(super) fn new(done: u64, total: u64, elapsed: Duration) -> Self {
        let rate = units::rate(done, elapsed);
        Self { done, total, rate, left: total.saturating_sub(done).checked_div(rate) }
    }

    /// `done`, `total`, `rate` and `eta` of a JSON line.
    pub(super) fn fields(&self) -> [(&'static str, Value); 4] {
        [
            ("done", self.done.into()),
            ("total", self.total.into()),
            ("rate", self.rate.into()),
            ("eta", self.left.into()),
        ]
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}/s", part(self.done, self.total), units::size(self.rate))?;
        match self.left {
            Some(seconds) if seconds > 0 => write!(f, ", {} left", units::duration(Duration::from_secs(seconds))),
            _ => Ok(()),
        }
    }
}

/// `45.3 %, 1.2 GiB of 2.6 GiB`.
pub(super) fn part(done: u64, total: u64) -> String {
    format!("{}, {} of {}", units::percent(done, total), units::size(done), units::size(total))
}

/// A bar that is not drawn before the console has it.
pub(super) fn bar(message: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
    bar.with_message(message).with_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "),
    )
}
