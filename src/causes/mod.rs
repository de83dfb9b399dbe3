//! Errors in words, where they have to be told in one line.

use std::error::Error;
use std::fmt::Write;

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
