//! Where the words go: results to stdout, log lines to stderr, to a file and to syslog, JSON lines instead of results.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;
use serde_json::Value;

use super::exit::Exit;
use super::failure::Failure;
use super::log_file;
use super::syslog::{self, Syslog};
use super::text::{self, printable};
use crate::chain::Clock;

/// How much a log line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Debug,
    Info,
    Notice,
    Warning,
    Error,
}

impl Level {
    const fn name(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Notice => "NOTICE",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
        }
    }

    /// The colour of the name on a terminal.
    const fn colour(self) -> Option<&'static str> {
        match self {
            Self::Debug | Self::Info => None,
            Self::Notice => Some("\x1b[36m"),
            Self::Warning => Some("\x1b[33m"),
            Self::Error => Some("\x1b[31m"),
        }
    }
}

/// What is wanted of a console.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches on a command line, independent of each other")]
pub(super) struct ConsoleOptions {
    pub(super) debug: bool,
    pub(super) quiet: bool,
    pub(super) json: bool,
    /// Stdout is the disk: results go to stderr, and JSON lines are alone there.
    pub(super) stdout_is_data: bool,
    /// The name under which the log goes to syslog, too.
    pub(super) syslog: Option<&'static str>,
}

/// The only place that prints.
pub(super) struct Console {
    options: ConsoleOptions,
    /// Stderr is a terminal that understands more than lines.
    terminal: bool,
    colours: bool,
    log_file: Option<File>,
    syslog: Option<Syslog>,
    /// The progress bar that stands in the last line of the terminal.
    bar: Mutex<Option<ProgressBar>>,
    warned: AtomicBool,
    /// JSON lines could not be written.
    lost: AtomicBool,
    /// Lines of the log file could not be written.
    log_lost: AtomicBool,
}

impl Console {
    /// # Errors
    /// The log file cannot be opened.
    pub(super) fn new(options: ConsoleOptions, log_file: Option<&Path>) -> Result<Self, Failure> {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        let terminal = io::stderr().is_terminal() && !dumb;
        let mut console = Self {
            options,
            terminal,
            colours: terminal && !set("NO_COLOR"),
            log_file: None,
            syslog: None,
            bar: Mutex::new(None),
            warned: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            log_lost: AtomicBool::new(false),
        };
        if let Some(path) = log_file {
            console.log_file = Some(log_file::open(path).inspect_err(|failure| console.error(failure))?);
        }
        if let Some(program) = options.syslog {
            match Syslog::open(Path::new(syslog::SOCKET), program) {
                Ok(syslog) => console.syslog = Some(syslog),
                Err(error) => console.warning(&format!("{}: no log goes to syslog: {error}", syslog::SOCKET)),
            }
        }
        Ok(console)
    }

    pub(super) fn debug(&self, message: &str) {
        if self.options.debug {
            self.log(Level::Debug, message);
        }
    }

    pub(super) fn info(&self, message: &str) {
        self.log(Level::Info, message);
    }

    /// Says what one should know though nothing is wrong.
    pub(super) fn notice(&self, message: &str) {
        self.log(Level::Notice, message);
        self.event("notice", &[("message", message.into())]);
    }

    /// Says a warning, which the exit code will tell.
    pub(super) fn warning(&self, message: &str) {
        self.warned.store(true, Ordering::Relaxed);
        self.log(Level::Warning, message);
        self.event("warning", &[("message", message.into())]);
    }

    /// Says why the program fails.
    pub(super) fn error(&self, failure: &Failure) {
        let message = failure.message();
        let advice = failure.advice();
        let both = advice.map_or_else(|| message.clone(), |advice| format!("{message}; {advice}"));
        self.log(Level::Error, &both);
        self.event(
            "error",
            &[("message", message.into()), ("advice", advice.into()), ("exit_code", failure.exit().code().into())],
        );
    }

    pub(super) fn has_warned(&self) -> bool {
        self.warned.load(Ordering::Relaxed)
    }

    /// How a program ends that does not fail.
    pub(super) fn exit(&self) -> Exit {
        if self.has_warned() { Exit::Warnings } else { Exit::Success }
    }

    /// Says the last JSON line of a program that does not fail, and how it ends.
    pub(super) fn done(&self, fields: &[(&str, Value)]) -> Exit {
        self.done_with(self.exit(), fields)
    }

    /// The same where more than warnings decide how it ends.
    pub(super) fn done_with(&self, exit: Exit, fields: &[(&str, Value)]) -> Exit {
        let fields: Vec<(&str, Value)> =
            [("exit_code", exit.code().into())].into_iter().chain(fields.iter().cloned()).collect();
        self.event("done", &fields);
        exit
    }

    pub(super) fn is_json(&self) -> bool {
        self.options.json
    }

    /// Whether progress is drawn as a bar.
    pub(super) fn draws(&self) -> bool {
        self.terminal && !self.options.json && !self.options.quiet
    }

    /// Puts another progress bar, or none, into the last line.
    pub(super) fn set_bar(&self, bar: Option<ProgressBar>) {
        if let Some(before) = std::mem::replace(&mut *self.bar(), bar) {
            before.finish_and_clear();
        }
    }

    /// Says a JSON line, where they are wanted. Nobody may read them, which does not matter; but that of a file some are
    /// missing is a warning, said once.
    pub(super) fn event(&self, name: &str, fields: &[(&str, Value)]) {
        if !self.options.json {
            return;
        }
        match self.write_result(&(text::event(name, fields) + "\n")) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                self.warned.store(true, Ordering::Relaxed);
                if !self.lost.swap(true, Ordering::Relaxed) {
                    self.log(Level::Warning, &format!("JSON lines are missing, cannot print them: {error}"));
                }
            }
            _ => {}
        }
    }

    /// Says lines of a result; a name in one cannot begin another.
    ///
    /// # Errors
    /// What the system says; but not that nobody reads on, as `head` does.
    pub(super) fn result(&self, lines: &[String]) -> Result<(), Failure> {
        let text: String = lines.iter().flat_map(|line| [printable(line), "\n".into()]).collect();
        match self.write_result(&text) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(|source| Failure::Print { source }),
        }
    }

    fn write_result(&self, lines: &str) -> io::Result<()> {
        if self.options.stdout_is_data {
            self.write_stderr(lines)
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(lines.as_bytes())?;
            stdout.flush()
        }
    }

    fn log(&self, level: Level, message: &str) {
        let time = Clock::system().local().strftime("%Y-%m-%d %H:%M:%S,%3f").to_string();
        let message = printable(message);
        let line = format!("[{time}] {:>7}  {message}\n", level.name());
        if let Some(Err(error)) = self.log_file.as_ref().map(|mut file| file.write_all(line.as_bytes())) {
            self.warned.store(true, Ordering::Relaxed);
            if !self.log_lost.swap(true, Ordering::Relaxed) {
                self.log(Level::Warning, &format!("lines of the log file are missing, cannot write them: {error}"));
            }
        }
        if let Some(syslog) = &self.syslog {
            syslog.log(level, &message);
        }
        let json_alone = self.options.json && self.options.stdout_is_data;
        if json_alone || (self.options.quiet && level < Level::Notice) {
            return;
        }
        let _ = match level.colour().filter(|_| self.colours) {
            Some(colour) => self.write_stderr(&format!("[{time}] {colour}{:>7}\x1b[0m  {message}\n", level.name())),
            None => self.write_stderr(&line),
        };
    }

    fn write_stderr(&self, text: &str) -> io::Result<()> {
        let write = || io::stderr().lock().write_all(text.as_bytes());
        match &*self.bar() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn bar(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
