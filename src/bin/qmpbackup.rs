//! Backs up the disks of a running virtual machine.

use std::ffi::OsString;
use std::process::ExitCode;

use qmpbackup::cli::{BackupArguments, Exit};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let exit: Exit = match BackupArguments::read(&words) {
        Ok(arguments) => arguments.run(),
        Err(exit) => exit,
    };
    exit.into()
}
