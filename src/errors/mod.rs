//! What all errors have in common: which kind they are of, and how they are told in one line.

use std::error::Error;
use std::fmt::Write;

/// What an error asks of the caller. The programs have an exit code for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Ask for something else: what was asked for makes no sense here, or not exactly one thing fits it.
    Usage,
    /// The chain is broken, cannot be continued, or an image is damaged: the request was right, but cannot be fulfilled.
    Damaged,
    /// The output does not hold what was written to it.
    ReadBack,
    /// The machine cannot be reached.
    Unreachable,
    /// Somebody else is at it.
    Locked,
    /// There is no room, or a quota is used up.
    Full,
    /// The observer wanted no more.
    Cancelled,
    /// Anything else; most often the system refused.
    Other,
}

/// An error and its causes in one line.
pub(crate) fn line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let _ = write!(line, ": {cause}");
        next = cause.source();
    }
    line
}
