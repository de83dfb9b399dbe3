//! The outside of the programs: arguments, log lines, progress, listings, JSON lines, exit codes. Only this prints.
//!
//! # Streams
//!
//! Results (listings, plans) go to stdout, log lines and progress to stderr. With `merge --out -` stdout is the disk,
//! and what would go there goes to stderr. Control characters in names are escaped wherever they are printed.
//!
//! # JSON lines
//!
//! With `--json` each line of stdout (of stderr with `merge --out -`) is an object with an `event`. Times are seconds
//! since 1970, sizes bytes; what is unknown is `null`. Fields and events may be added.
//!
//! | event | fields |
//! |---|---|
//! | `plan` | `disk`, `restore_point`, `time`, `images` (each `path`, `level`, `time`, `format`, `size`, `cluster_size`, `file_length`), `output` (`path`, `format`, `cluster_size`, `compression`, `length`, where compressed the most it can be), `size` of the disk, `bytes` to move, `dry_run`, `commands` for a shell |
//! | `phase` | `phase`: `checking`, `planning`, `copying`, `syncing` |
//! | `progress` | `phase`, `done` and `total` bytes, `rate` in a second, `eta` in seconds |
//! | `warning` | `message` |
//! | `restore_point` | `disk`, `chain`, `name`, `path`, `level`, `time`, `rfc3339`, `size`, `allocated`, `file_length`, `file_usage`, `state` (`ok`, `doubtful`, `marked corrupt`, `broken`), `reason` |
//! | `partial` | `disk`, `path` of what a failed run left |
//! | `check` | `path`, `verdict` (`clean`, `leaks`, `dirty`, `marked corrupt`, `damaged`, `unreadable`, `raw`), `reason` where unreadable, `file_length`, of qcow2 images also `version`, `size`, `cluster_size`, `compression`, `snapshots`, `bitmaps`, `features`, `backing`, `clusters` (`total`, `allocated`, `compressed`, `fragmented`), `leaks`, `refcount_errors`, `structure_errors`, `findings` (each `severity`, `message`), `findings_dropped` |
//! | `done` | `exit_code`; of a merge that is no dry run also `output`, `size`, `bytes`, `length`, `seconds`, `rate` |
//! | `error` | `message`, `advice`, `exit_code`: the last line where the program fails |
//!
//! # Exit codes
//!
//! [`Exit`] lists them. Any warning makes a success 3.

mod args;
mod by_hand;
mod check;
mod console;
mod exit;
mod failure;
mod list;
mod merge;
mod place;
mod progress;
mod signals;
mod table;
mod text;
mod units;

use std::ffi::OsString;
use std::io::Write;

use clap::Parser;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::Value;

pub use args::Arguments;
pub use exit::Exit;

use self::args::Command;
use self::console::{Console, Wanted};

impl Arguments {
    /// Reads the arguments of `qmprestore`, or says what is wrong with them, or the help or version that they ask for.
    ///
    /// # Errors
    /// How the program ends then.
    pub fn read(words: &[OsString]) -> Result<Self, Exit> {
        Self::try_parse_from(words).map_err(|error| {
            if !error.use_stderr() {
                // nobody may read it, which does not matter
                let _ = error.print();
                return Exit::Success;
            }
            // the message repeats words of the user: it is made again, of words that are printable
            let printable = |word: &OsString| text::printable(&word.to_string_lossy()).into_owned();
            let again = Self::try_parse_from(words.iter().map(printable));
            let message = again.err().unwrap_or(error).to_string();
            let _ = std::io::stderr().write_all(message.as_bytes());
            if words.iter().any(|word| word == "--json") {
                let lines: Vec<&str> = message.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
                let message = lines.join(" ");
                let message = message.strip_prefix("error: ").unwrap_or(&message);
                let fields =
                    [("message", message.into()), ("advice", Value::Null), ("exit_code", Exit::Usage.code().into())];
                let _ = std::io::stdout().write_all((text::event("error", &fields) + "\n").as_bytes());
            }
            Exit::Usage
        })
    }

    /// Does what the arguments say.
    #[must_use]
    pub fn run(&self) -> Exit {
        raise_file_limit();
        let stdout_is_data = match &self.command {
            Command::Merge(merge) => merge.streams(),
            Command::List(_) | Command::Check(_) => false,
        };
        let args::Global { debug, quiet, json, ref logfile } = self.global;
        let wanted = Wanted { debug, quiet, json, stdout_is_data };
        let console = match Console::new(wanted, logfile.as_deref()) {
            Ok(console) => console,
            Err(failure) => return failure.exit(),
        };
        let result = match &self.command {
            Command::Merge(merge) => merge::run(merge, &console),
            Command::List(list) => list::run(list, &console),
            Command::Check(images) => check::run(images, &console),
        };
        result.unwrap_or_else(|failure| {
            console.error(&failure);
            failure.exit()
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
