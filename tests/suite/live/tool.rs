//! Runs the built programs against a machine, never for longer than a limit.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::proxy::Victim;
use crate::support::program::{Ended, qmprestore};
use crate::support::tools;

/// A program, the proxy's victim while it runs.
pub(crate) struct Tool {
    program: PathBuf,
    limit: Duration,
    pub(crate) victim: Victim,
}

impl Tool {
    /// One of this package.
    pub(crate) fn built(name: &str) -> Self {
        Self::of(&Path::new(env!("CARGO_BIN_EXE_qmprestore")).with_file_name(name))
    }

    pub(crate) fn of(program: &Path) -> Self {
        Self { program: program.to_owned(), limit: Duration::from_secs(120), victim: Victim::default() }
    }

    pub(crate) fn limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Runs it with the words of a command line. Fails the test if it does not end in time.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("TZ", "UTC").env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = spawned.unwrap_or_else(|error| panic!("{}: {error}", tools::line(&command)));
        let pid = Pid::from_child(&child);
        *self.victim.lock().unwrap() = Some(pid);
        let waits = std::thread::spawn(move || child.wait_with_output().unwrap());
        let until = Instant::now() + self.limit;
        while !waits.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let late = !waits.is_finished();
        if late {
            kill_process(pid, Signal::KILL).unwrap();
        }
        // The number may be somebody else's from now on
        *self.victim.lock().unwrap() = None;
        let ended = Ended::new(waits.join().unwrap());
        assert!(!late, "{} took more than {:?}: {ended:#?}", tools::line(&command), self.limit);
        ended
    }
}

/// The content of a restore point of one disk.
pub(crate) fn restore(dir: &Path, until: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::read(restore_to(dir, until, &folder.path().join("raw"))).unwrap()
}

/// The same as a raw file.
pub(crate) fn restore_to(dir: &Path, until: &str, raw: &Path) -> PathBuf {
    let mut command = qmprestore(["merge", "--format", "raw", "--until", until]);
    tools::run(command.arg("--dir").arg(dir).arg("--out").arg(raw));
    raw.to_owned()
}

#[test]
fn a_program_that_takes_no_end_is_ended() {
    let tool = Tool::of(Path::new("sleep")).limit(Duration::from_millis(100));
    let started = Instant::now();
    let panic = std::panic::catch_unwind(|| tool.run(&["60"])).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().starts_with("sleep 60 took more than 100ms"));
    assert!(started.elapsed() < Duration::from_secs(30));
    Tool::built("qmprestore").run(&["--version"]).with(0).says("qmprestore ");
}
