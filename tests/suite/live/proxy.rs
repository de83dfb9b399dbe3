//! A man in the middle between a client and QEMU's monitor. Before each command goes on, a hook may do what it likes, and
//! says what becomes of the command.
//!
//! Clients come one after the other; each gets a connection to QEMU of its own. Commands are lines: the proxy is for the
//! program and for the clients here, not for anything that speaks QMP.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::transcript::{Entry, Transcript};

/// What becomes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Forward,
    /// It never comes to QEMU, and never gets an answer.
    Stall,
    /// QEMU does it, but the answer is lost.
    LoseReply,
    /// The connection ends, the command with it.
    Close,
    /// It never comes to QEMU, and gets this error.
    Fail(String),
    /// It never comes to QEMU, and gets this answer.
    Answer(Value),
    /// It never comes to QEMU, and gets these bytes.
    Say(Vec<u8>),
    /// It never comes to QEMU, and gets a line of a gibibyte.
    Flood,
    /// The client gets a signal before QEMU gets the command. With SIGKILL QEMU gets nothing.
    KillBefore(Signal),
    /// The client gets a signal when QEMU has done the command, and before the answer.
    KillAfter(Signal),
}

/// Called with each command and its number, from 0 for each client: the first is `qmp_capabilities`.
pub(crate) type Hook = Box<dyn FnMut(&Value, usize) -> Action + Send>;

/// The process that gets the signals.
pub(crate) type Victim = Arc<Mutex<Option<Pid>>>;

pub(crate) struct Proxy {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    qemu: PathBuf,
    victim: Victim,
    hook: Mutex<Hook>,
    transcript: Mutex<Transcript>,
    ended: AtomicBool,
    client: Mutex<Option<UnixStream>>,
}

impl Proxy {
    /// Listens on `path` for clients of the monitor `qemu`.
    pub(crate) fn start(path: &Path, qemu: &Path, victim: &Victim, hook: Hook) -> Self {
        // A proxy that ended has left its socket
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        // So that the thread sees the end also when no client comes any more
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            qemu: qemu.to_owned(),
            victim: Arc::clone(victim),
            hook: Mutex::new(hook),
            transcript: Mutex::default(),
            ended: AtomicBool::new(false),
            client: Mutex::new(None),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while !shared.ended.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((client, _)) => shared.serve(&client),
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.shared.path
    }

    /// From now on another hook decides.
    pub(crate) fn set_hook(&self, hook: Hook) {
        *self.shared.hook.lock().unwrap() = hook;
    }

    pub(crate) fn transcript(&self) -> MutexGuard<'_, Transcript> {
        self.shared.transcript.lock().unwrap()
    }

    /// Ends, and fails if a hook has failed.
    pub(crate) fn end(mut self) {
        self.stop().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }

    fn stop(&mut self) -> std::thread::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Ok(Some(client)) = self.shared.client.lock().as_deref() {
            let _ = client.shutdown(Shutdown::Both);
        }
        thread.join()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// A command that QEMU has got.
struct Sent {
    id: Option<Value>,
    lose: bool,
    kill: Option<Signal>,
}

impl Shared {
    /// One client until one of the sides leaves.
    fn serve(&self, client: &UnixStream) {
        self.note(Entry::Connected);
        // Without QEMU there is no greeting
        let Ok(qemu) = UnixStream::connect(&self.qemu) else { return };
        *self.client.lock().unwrap() = Some(client.try_clone().unwrap());
        let sent = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let answers = scope.spawn(|| {
                self.answers(&qemu, client, &sent);
                let _ = client.shutdown(Shutdown::Both);
            });
            let hang_up = HangUp(&qemu, client);
            self.commands(client, &qemu, &sent);
            drop(hang_up);
            answers.join().unwrap();
        });
        *self.client.lock().unwrap() = None;
    }

    fn commands(&self, client: &UnixStream, mut qemu: &UnixStream, sent: &Mutex<Vec<Sent>>) {
        let mut answer = client;
        for (number, line) in BufReader::new(client).lines().map_while(Result::ok).enumerate() {
            let command: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            self.note(Entry::Command(command.clone()));
            let id = command.get("id").cloned();
            let action = self.hook.lock().unwrap()(&command, number);
            let mut entry = Sent { id: id.clone(), lose: false, kill: None };
            match action {
                Action::Forward => {}
                Action::Stall => continue,
                Action::Close => return,
                Action::LoseReply => entry.lose = true,
                Action::KillAfter(signal) => entry.kill = Some(signal),
                Action::KillBefore(signal) => {
                    self.signal(signal);
                    if signal == Signal::KILL {
                        return;
                    }
                }
                Action::Fail(why) => {
                    self.reply(answer, id, json!({ "error": { "class": "GenericError", "desc": why } }));
                    continue;
                }
                Action::Answer(value) => {
                    self.reply(answer, id, json!({ "return": value }));
                    continue;
                }
                Action::Say(bytes) => {
                    let _ = answer.write_all(&bytes);
                    continue;
                }
                Action::Flood => {
                    let chunk = vec![b' '; 1 << 20];
                    let _ = (0..1024).try_for_each(|_| answer.write_all(&chunk));
                    continue;
                }
            }
            sent.lock().unwrap().push(entry);
            if qemu.write_all(format!("{line}\n").as_bytes()).is_err() {
                return;
            }
        }
    }

    /// Answers in QEMU's place.
    fn reply(&self, mut client: &UnixStream, id: Option<Value>, mut reply: Value) {
        if let Some(id) = id {
            reply["id"] = id;
        }
        self.note(Entry::Reply(reply.clone()));
        let _ = client.write_all(format!("{reply}\r\n").as_bytes());
    }

    fn answers(&self, qemu: &UnixStream, mut client: &UnixStream, sent: &Mutex<Vec<Sent>>) {
        for line in BufReader::new(qemu).lines().map_while(Result::ok) {
            let said: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            if said.get("return").is_some() || said.get("error").is_some() {
                self.note(Entry::Reply(said.clone()));
                let mut sent = sent.lock().unwrap();
                let place = sent.iter().position(|command| command.id.as_ref() == said.get("id"));
                let command = place.map(|place| sent.remove(place));
                if let Some(signal) = command.as_ref().and_then(|command| command.kill) {
                    self.signal(signal);
                }
                if command.is_some_and(|command| command.lose) {
                    continue;
                }
            } else if said.get("event").is_some() {
                self.note(Entry::Event(said));
            }
            // One that is gone still wants its commands done
            let _ = client.write_all(format!("{line}\r\n").as_bytes());
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = *self.victim.lock().unwrap() {
            kill_process(pid, signal).unwrap();
        }
    }

    fn note(&self, entry: Entry) {
        self.transcript.lock().unwrap().0.push(entry);
    }
}

/// Closes both sides, also when a hook fails: else the other thread would wait forever.
struct HangUp<'a>(&'a UnixStream, &'a UnixStream);

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
        let _ = self.1.shutdown(Shutdown::Both);
    }
}
