//! `qmprestore`: disk images out of backup folders. No machine is talked to here.

mod args;
mod by_hand;
mod check;
pub(super) mod commit;
mod list;
mod manifest;
mod merge;
mod place;
mod progress;
mod rebase;
mod refuse;
mod salvage;
mod verify;

use std::ffi::OsString;

use rustix::process::{Resource, getrlimit, setrlimit};

pub use args::Arguments;
pub(super) use args::{Commit as CommitArguments, Place, Progress};

use self::args::Command;
use super::console::ConsoleOptions;
use super::exit::Exit;
use super::start;
use crate::chain::Work;

impl Arguments {
    /// Reads the arguments of `qmprestore`, or says what is wrong with them, or the help or version that they ask for.
    ///
    /// # Errors
    /// How the program ends then.
    pub fn read(words: &[OsString]) -> Result<Self, Exit> {
        let mut arguments = start::read(words, start::parse::<Self>)?;
        if arguments.skip_check {
            arguments.command.skip_check();
        }
        Ok(arguments)
    }

    /// Does what the arguments say.
    #[must_use]
    pub fn run(&self) -> Exit {
        raise_file_limit();
        let stdout_is_data = match &self.command {
            Command::Merge(merge) => merge.streams(),
            Command::Rebase(_)
            | Command::Commit(_)
            | Command::Snapshotrebase(_)
            | Command::List(_)
            | Command::Check(_)
            | Command::Verify(_)
            | Command::Manifest(_) => false,
        };
        let options = ConsoleOptions { stdout_is_data, ..self.global.console() };
        start::run(&self.global, options, |console| match &self.command {
            Command::Merge(merge) => merge::run(merge, console),
            Command::Commit(arguments) => commit::command(arguments, Work::Commit, console),
            Command::Snapshotrebase(arguments) => commit::command(arguments, Work::SnapshotRebase, console),
            Command::List(list) => list::run(list, console),
            Command::Check(images) => check::run(images, console),
            Command::Verify(arguments) => verify::run(arguments, console),
            Command::Rebase(rebase) => rebase::run(rebase, console),
            Command::Manifest(arguments) => manifest::run(arguments, console),
        })
    }
}

/// A chain may have more images than the usual limit of open files allows.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // opening files will say it where they are too many
    let _ = setrlimit(Resource::Nofile, limit);
}
