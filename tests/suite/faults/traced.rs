//! A program whose system calls are counted, and one of which fails.
//!
//! Only calls count that are about something below one folder, by all threads in the order in which they come; what the
//! loader does and what goes to the terminal is left alone.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use libc::c_int;
use rustix::process::{Pid, Signal, kill_process};

use super::call::{About, Call, Fault, arguments, kind_of_system};
use super::ptrace::{self, Registers, Stop, Tid};

/// A program that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(30);

/// A file system whose files can share blocks; it begins the answer of `fstatfs`.
const XFS: i64 = 0x5846_5342;

/// A call that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) call: Call,
    /// What it is about, below the folder; what has no name or another one each time is `*`.
    pub(super) about: Vec<String>,
}

/// Where a program is disturbed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Plan {
    /// The fault, and the number of the call.
    pub(super) fault: Option<(usize, Fault)>,
    /// Whether the file system knows no files without a name.
    pub(super) all_are_named: bool,
    /// Whether the file system says that files can share blocks, so that copies are left to the kernel.
    pub(super) shares_blocks: bool,
}

/// What a program did.
pub(super) struct Traced {
    /// The calls, up to the fault.
    pub(super) positions: Vec<Position>,
    pub(super) output: Output,
}

/// Runs a program in a folder.
pub(super) fn run(command: &mut Command, folder: &Path, plan: Plan) -> Traced {
    ptrace::trace(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    #[expect(clippy::zombie_processes, reason = "whoever traces it waits for it")]
    let mut child = command.spawn().unwrap_or_else(|error| panic!("this test has to trace a program: {error}"));
    // what it says may be more than a pipe holds
    let stdout = read_all(child.stdout.take().unwrap());
    let stderr = read_all(child.stderr.take().unwrap());
    let tracer = Tracer::new(&child, folder, plan);
    let (ended, end) = mpsc::channel::<()>();
    let pid = Pid::from_child(&child);
    let watch = std::thread::spawn(move || {
        let hangs = end.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout);
        hangs.then(|| kill_process(pid, Signal::KILL)).transpose().map(drop)
    });
    let (positions, status) = tracer.trace();
    drop(ended);
    watch.join().unwrap().unwrap();
    let [stdout, stderr] = [stdout, stderr].map(|said| said.join().unwrap());
    Traced { positions, output: Output { status, stdout, stderr } }
}

fn read_all(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        pipe.read_to_end(&mut all).unwrap();
        all
    })
}

struct Tracer<'a> {
    pid: Tid,
    memory: File,
    folder: &'a Path,
    plan: Plan,
    positions: Vec<Position>,
    /// The thread whose call fails, and its registers at the beginning.
    pending: Option<(Tid, Fault, Registers)>,
    struck: bool,
}

impl<'a> Tracer<'a> {
    fn new(child: &Child, folder: &'a Path, plan: Plan) -> Self {
        let pid = Tid::try_from(child.id()).unwrap();
        assert_eq!(ptrace::wait().unwrap(), (pid, Stop::Signal(libc::SIGTRAP)), "is tracing permitted?");
        ptrace::follow(pid).unwrap();
        ptrace::resume(pid, true, 0).unwrap();
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        Self { pid, memory, folder, plan, positions: Vec::new(), pending: None, struck: false }
    }

    /// To its end.
    fn trace(mut self) -> (Vec<Position>, ExitStatus) {
        use std::os::unix::process::ExitStatusExt;
        loop {
            let (tid, stop) = ptrace::wait().unwrap();
            let mut signal = 0;
            match stop {
                Stop::Ended(code) if tid == self.pid => return (self.positions, ExitStatus::from_raw(code << 8)),
                Stop::Killed(signal) if tid == self.pid => return (self.positions, ExitStatus::from_raw(signal)),
                Stop::Ended(_) | Stop::Killed(_) => continue,
                Stop::Entry => self.entry(tid),
                Stop::Exit => self.exit(tid),
                // the first of a new thread
                Stop::Thread | Stop::Signal(libc::SIGSTOP) => {}
                Stop::Signal(other) => signal = other,
            }
            // whoever is about to end may be gone
            let follow = !self.struck || self.plan.all_are_named || self.plan.shares_blocks || self.pending.is_some();
            let _ = ptrace::resume(tid, follow, signal);
        }
    }

    fn entry(&mut self, tid: Tid) {
        // one that was killed meanwhile
        let Ok(registers) = ptrace::registers(tid) else { return };
        let Some(position) = self.position(&registers) else { return };
        let unnamed = position.call == Call::OpenUnnamed && self.plan.all_are_named;
        let mut fault = unnamed.then_some(Fault::Fails(libc::EOPNOTSUPP));
        if !self.struck {
            let strikes = self.plan.fault.filter(|(at, _)| *at == self.positions.len());
            self.struck = strikes.is_some();
            fault = strikes.map(|(_, fault)| fault).or(fault);
            self.positions.push(position);
        }
        if let Some(fault) = fault {
            ptrace::set_registers(tid, fault.begin(&registers)).unwrap();
            self.pending = Some((tid, fault, registers));
        }
    }

    fn exit(&mut self, tid: Tid) {
        if let Some((_, fault, before)) = self.pending.take_if(|(waiting, ..)| *waiting == tid) {
            let Ok(after) = ptrace::registers(tid) else { return };
            ptrace::set_registers(tid, fault.end(&before, &after)).unwrap();
        } else if self.plan.shares_blocks {
            let Some(answer) = ptrace::registers(tid).ok().and_then(|after| kind_of_system(&after)) else { return };
            self.memory.write_all_at(&XFS.to_ne_bytes(), answer).unwrap();
        }
    }

    /// The call, if it is about something in the folder.
    fn position(&self, registers: &Registers) -> Option<Position> {
        let (call, about) = Call::of(registers)?;
        let arguments = arguments(registers);
        let paths: Vec<PathBuf> = about.into_iter().filter_map(|about| self.path(about, &arguments)).collect();
        let inside = |path: &PathBuf| path.starts_with(self.folder);
        paths.iter().any(inside).then(|| Position { call, about: paths.iter().map(|path| self.shown(path)).collect() })
    }

    fn path(&self, about: About, arguments: &[u64; 6]) -> Option<PathBuf> {
        let open = |number: u64| {
            let link = std::fs::read_link(format!("/proc/{}/fd/{number}", self.pid)).ok();
            // pipes and sockets have no path
            link.filter(|path| path.is_absolute())
        };
        let path = match about {
            About::File(at) => open(arguments[at])?,
            About::Path(at) => self.text(arguments[at])?,
            About::At(at) => {
                let path = self.text(arguments[at])?;
                match c_int::from_ne_bytes((arguments[at - 1] as u32).to_ne_bytes()) {
                    libc::AT_FDCWD => path,
                    number if path.as_os_str().is_empty() => open(u64::try_from(number).ok()?)?,
                    number => open(u64::try_from(number).ok()?)?.join(path),
                }
            }
        };
        match path.strip_prefix("/proc/self/fd").ok().and_then(Path::to_str) {
            Some(number) => open(number.parse().ok()?),
            None => Some(self.folder.join(path)),
        }
    }

    fn text(&self, address: u64) -> Option<PathBuf> {
        let mut bytes = [0; libc::PATH_MAX as usize];
        let length = self.memory.read_at(&mut bytes, address).ok()?;
        let end = bytes[..length].iter().position(|byte| *byte == 0)?;
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes[..end])))
    }

    fn shown(&self, path: &Path) -> String {
        let shown = path.strip_prefix(self.folder).unwrap_or(path).to_string_lossy();
        let hidden = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b".qmpbackup-"));
        if hidden || shown.ends_with(" (deleted)") { "*".to_owned() } else { shown.into_owned() }
    }
}
