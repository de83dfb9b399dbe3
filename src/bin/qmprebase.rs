//! Rolls the INC images of a backup folder into their FULL.

use std::ffi::OsString;
use std::process::ExitCode;

use qmpbackup::cli::{Exit, RebaseArguments};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let exit: Exit = match RebaseArguments::read(&words) {
        Ok(arguments) => arguments.run(),
        Err(exit) => exit,
    };
    exit.into()
}
