//! How each program begins: arguments are read, the console is made, and at the end there is an exit code.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser};
use serde_json::Value;

use super::console::{Console, ConsoleOptions};
use super::exit::Exit;
use super::failure::Failure;
use super::text;

/// What all programs can be asked for.
#[derive(Debug, Args)]
#[command(next_help_heading = "Common options")]
pub(super) struct Global {
    /// Log more
    #[arg(long, global = true)]
    pub(super) debug: bool,
    /// Log only notices, warnings and errors, show no progress
    #[arg(long, global = true)]
    pub(super) quiet: bool,
    /// Append the log to this file, too
    #[arg(short = 'L', long, global = true, value_name = "FILE")]
    pub(super) logfile: Option<PathBuf>,
    /// Print results and events as JSON lines; the log on stderr stays as it is
    #[arg(long, global = true)]
    pub(super) json: bool,
}

impl Global {
    pub(super) fn console(&self) -> ConsoleOptions {
        let Self { debug, quiet, json, .. } = *self;
        ConsoleOptions { debug, quiet, json, ..ConsoleOptions::default() }
    }
}

/// Reads words as the Python tool does: a long option may be cut short as long as it is one, and of one that is there twice
/// the last counts. Lists of names are added up.
///
/// # Errors
/// What is wrong with the words, or the help or version that they ask for.
pub(super) fn parse<T: Parser>(words: &[OsString]) -> Result<T, clap::Error> {
    let mut command = lenient(T::command());
    let mut matches = command.try_get_matches_from_mut(words)?;
    T::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

fn lenient(command: clap::Command) -> clap::Command {
    let command = command.infer_long_args(true).mut_args(|arg| match arg.get_action() {
        ArgAction::Set | ArgAction::SetTrue => {
            let id = arg.get_id().clone();
            arg.overrides_with(id)
        }
        _ => arg,
    });
    command.mut_subcommands(lenient)
}

/// Reads arguments, or says what is wrong with them, or the help or version that they ask for.
///
/// # Errors
/// How the program ends then.
pub(super) fn read<T>(words: &[OsString], parse: impl Fn(&[OsString]) -> Result<T, clap::Error>) -> Result<T, Exit> {
    parse(words).map_err(|error| {
        if !error.use_stderr() {
            // nobody may read it, which does not matter
            let _ = error.print();
            return Exit::Success;
        }
        let message = message(words, &parse, &error);
        let _ = std::io::stderr().write_all(message.as_bytes());
        if words.iter().any(|word| word == "--json") {
            let lines: Vec<&str> = message.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
            let message = lines.join(" ");
            let message = message.strip_prefix("error: ").unwrap_or(&message);
            let fields =
                [("message", message.into()), ("advice", Value::Null), ("exit_code", Exit::Usage.code().into())];
            let line = text::event("error", &fields) + "\n";
            // where the disk is to come to stdout, nothing else does
            let is_out = |word: &OsString| word == "--out" || word == "--targetfile";
            let after_out = words.iter().skip_while(|word| !is_out(word)).nth(1);
            let joined = |word: &OsString| word == "--out=-" || word == "--targetfile=-";
            if after_out.is_some_and(|path| path == "-") || words.iter().any(joined) {
                let _ = std::io::stderr().write_all(line.as_bytes());
            } else {
                let _ = std::io::stdout().write_all(line.as_bytes());
            }
        }
        Exit::Usage
    })
}

/// What is wrong with arguments. The message repeats words of the user: it is made again, of words that are printable; or
/// of ones that are as wrong, where escapes are right.
fn message<T>(
    words: &[OsString],
    parse: impl Fn(&[OsString]) -> Result<T, clap::Error>,
    error: &clap::Error,
) -> String {
    let escaped = |word: &OsString| text::printable(&word.to_string_lossy()).into_owned().into();
    let replaced = |word: &OsString| text::replaced(&word.to_string_lossy()).into();
    let ways: [Vec<OsString>; 2] = [words.iter().map(escaped).collect(), words.iter().map(replaced).collect()];
    let again = ways.iter().find_map(|words| parse(words).err());
    // words that are wrong only as they are stay in one line
    again.map_or_else(|| text::printable(&error.to_string()).into_owned() + "\n", |error| error.to_string())
}

/// Does the work with a console, and says why it fails.
pub(super) fn run(
    global: &Global,
    options: ConsoleOptions,
    work: impl FnOnce(&Console) -> Result<Exit, Failure>,
) -> Exit {
    match Console::new(options, global.logfile.as_deref()) {
        Ok(console) => match work(&console) {
            // the last lines may have been lost
            Ok(Exit::Success) => console.exit(),
            Ok(exit) => exit,
            Err(failure) => {
                console.error(&failure);
                failure.exit()
            }
        },
        Err(failure) => failure.exit(),
    }
}
