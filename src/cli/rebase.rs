//! `qmprebase`: the name under which the oldest users know how to roll a chain into its FULL. What it says is what they
//! know; what it does is `qmprestore commit`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::console::Console;
use super::exit::Exit;
use super::failure::Failure;
use super::restore::{CommitArguments, Place, Progress, commit};
use super::start::{self, Global};
use super::text::shell_word;
use crate::chain::{RestorePoint, When, Work};

/// Rolls INC images into their FULL
///
/// `qmprestore commit` does the same and knows more options.
#[derive(Debug, Parser)]
#[command(name = "qmprebase", version, propagate_version = true, after_help = Exit::table())]
struct Words {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Rebase(Rebase),
}

/// Write the INC images of a folder into their FULL, and remove them
#[derive(Debug, Args)]
#[command(after_help = Exit::table())]
struct Rebase {
    /// The folder of a disk's images
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The last restore point to write: a time, or the name of an image or its beginning
    #[arg(long, value_name = "WHEN", default_value = "latest", allow_hyphen_values = true, value_parser = When::from_str)]
    until: When,
    /// The disk: its label, folder or file name
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Change nothing, only show the commands that do the same
    #[arg(long)]
    dry_run: bool,
}

/// The arguments of `qmprebase`.
#[derive(Debug)]
pub struct Arguments {
    words: Words,
    /// As they were given, for the log.
    given: Vec<OsString>,
}

impl Arguments {
    /// Reads the arguments of `qmprebase`, or says what is wrong with them, or the help or version that they ask for.
    ///
    /// # Errors
    /// How the program ends then.
    pub fn read(words: &[OsString]) -> Result<Self, Exit> {
        start::read(words, |given| Ok(Self { words: start::parse(given)?, given: given.to_owned() }))
    }

    /// Does what the arguments say.
    #[must_use]
    pub fn run(self) -> Exit {
        let Words { global, command: Command::Rebase(rebase) } = self.words;
        start::run(&global, global.console(), |console| {
            let given: Vec<String> = self.given.iter().map(|word| shell_word(word)).collect();
            console.info(&format!("Version: {} Arguments: {}", env!("CARGO_PKG_VERSION"), given.join(" ")));
            rebase.run(console)
        })
    }
}

impl Rebase {
    fn run(self, console: &Console) -> Result<Exit, Failure> {
        if self.dry_run {
            console.info("Dry run activated, not applying any changes");
        }
        let arguments = CommitArguments {
            place: Place { dir: self.dir, filter: self.filter },
            until: self.until,
            rate_limit: 0,
            threads: None,
            skip_check: false,
            allow_partial: false,
            dry_run: self.dry_run,
            progress: Progress { progress_interval: Duration::from_secs(10) },
        };
        let exit = commit::run(&arguments, Work::Commit, console, |point, _, commands, console| {
            show(point, &commands, console);
            Ok(())
        })?;
        if !arguments.dry_run {
            console.info("Rollback of latest [FULL]<-[INC] chain complete, ignoring older chains");
            console.info("Image files rollback successful.");
        }
        Ok(exit)
    }
}

/// The commands for the same by hand.
fn show(point: &RestorePoint, commands: &[String], console: &Console) {
    for image in point.later.iter().rev() {
        console.info(&format!("Skipping checkpoint: {} as requested with --until option", image.path.display()));
    }
    for command in commands {
        console.info(command);
    }
    if console.is_json() {
        console.done(&[]);
    }
}
