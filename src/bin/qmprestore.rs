//! Restores disk images from backup folders.

use std::ffi::OsString;
use std::process::ExitCode;

use qmpbackup::cli::{Exit, RestoreArguments};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let exit: Exit = match RestoreArguments::read(&words) {
        Ok(arguments) => arguments.run(),
        Err(exit) => exit,
    };
    exit.into()
}
