//! `qmpbackup`: backups of running machines. What is said of them stands here, what is done in [`crate::capture`].

mod args;
mod commands;
mod events;
mod follow;
mod info;
mod plan;
mod request;

use std::ffi::OsString;

use clap::CommandFactory;
use clap::error::ErrorKind;

use self::args::{Command, Words};
use super::console::{Console, ConsoleOptions};
use super::exit::Exit;
use super::failure::Failure;
use super::start;
use super::text::shell_word;
use crate::capture::Connection;

/// The arguments of `qmpbackup`.
#[derive(Debug)]
pub struct Arguments {
    words: Words,
    connection: Connection,
    /// As they were given, for the log.
    given: Vec<OsString>,
}

impl Arguments {
    /// Reads the arguments of `qmpbackup`, or says what is wrong with them, or the help or version that they ask for.
    ///
    /// # Errors
    /// How the program ends then.
    pub fn read(words: &[OsString]) -> Result<Self, Exit> {
        start::read(words, Self::parse)
    }

    fn parse(given: &[OsString]) -> Result<Self, clap::Error> {
        let words: Words = start::parse(given)?;
        let connection = words.machine.connection().ok_or_else(|| {
            let message = "the following required arguments were not provided:\n  --socket <PATH|tcp:HOST:PORT>";
            Words::command().error(ErrorKind::MissingRequiredArgument, message)
        })?;
        Ok(Self { words, connection, given: given.to_owned() })
    }

    /// Does what the arguments say.
    #[must_use]
    pub fn run(&self) -> Exit {
        let Words { global, syslog, .. } = &self.words;
        let options = ConsoleOptions { syslog: syslog.then_some("qmpbackup"), ..global.console() };
        start::run(global, options, |console| self.run_with(console))
    }

    fn run_with(&self, console: &Console) -> Result<Exit, Failure> {
        let given: Vec<String> = self.given.iter().skip(1).map(|word| shell_word(word)).collect();
        console.info(&format!("qmpbackup {}, called with: {}", env!("CARGO_PKG_VERSION"), given.join(" ")));
        let connection = &self.connection;
        match &self.words.command {
            Command::Backup(backup) if backup.dry_run => plan::run(backup, connection, console),
            Command::Backup(backup) => commands::backup(backup, connection, console),
            Command::Cleanup(cleanup) => commands::cleanup(cleanup, connection, console),
            Command::Info(info) => info::run(info, connection, console),
            Command::Recover(recover) => commands::recover(recover, connection, console),
        }
    }
}
