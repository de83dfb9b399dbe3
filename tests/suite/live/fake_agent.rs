//! A guest agent without a guest: as good as a real one, but for what a test tells it to do otherwise.
//!
//! As behind QEMU's socket, one client is served at a time. It freezes nothing, and knows whether it would have.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::{Value, json};

const DELIMITER: u8 = 0xff;
const COMMANDS: [&str; 4] = ["guest-info", "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];

/// What becomes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Say {
    /// It is done and answered.
    Usual,
    /// It is answered otherwise, and not done.
    Other(Value),
    /// It is done, and nobody hears of it.
    Nothing,
    /// The connection ends, the command with it.
    HangUp,
}

/// Called with the name of each command, and with `connect` for each client.
pub(crate) type Mood = Box<dyn FnMut(&str) -> Say + Send>;

pub(crate) struct FakeAgent {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    /// What stands in the socket for whoever comes.
    noise: Vec<u8>,
    mood: Mutex<Mood>,
    frozen: AtomicBool,
    heard: Mutex<Vec<(String, Instant)>>,
    ended: AtomicBool,
    client: Mutex<Option<UnixStream>>,
}

pub(crate) fn refusal(why: &str) -> Say {
    Say::Other(json!({ "error": { "class": "GenericError", "desc": why } }))
}

impl FakeAgent {
    pub(crate) fn start(path: &Path, mood: Mood) -> Self {
        Self::start_noisy(path, b"", mood)
    }

    pub(crate) fn start_noisy(path: &Path, noise: &[u8], mood: Mood) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            noise: noise.to_owned(),
            mood: Mutex::new(mood),
            frozen: AtomicBool::new(false),
            heard: Mutex::default(),
            ended: AtomicBool::new(false),
            client: Mutex::new(None),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while let Ok((client, _)) = listener.accept() {
                    if shared.ended.load(Ordering::Relaxed) {
                        break;
                    }
                    *shared.client.lock().unwrap() = Some(client.try_clone().unwrap());
                    // One that is gone hears nothing
                    let _ = shared.serve(&client);
                    let _ = client.shutdown(Shutdown::Both);
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// From now on it does otherwise.
    pub(crate) fn set_mood(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.shared.frozen.load(Ordering::Relaxed)
    }

    /// The commands, without those that bring both sides in step.
    pub(crate) fn heard(&self) -> Vec<String> {
        self.shared.heard.lock().unwrap().iter().map(|(name, _)| name.clone()).collect()
    }

    /// When it heard a command for the last time.
    pub(crate) fn last(&self, name: &str) -> Instant {
        let heard = self.shared.heard.lock().unwrap();
        heard.iter().rev().find(|(other, _)| other == name).unwrap_or_else(|| panic!("no {name} in {heard:?}")).1
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Ok(Some(client)) = self.shared.client.lock().as_deref() {
            let _ = client.shutdown(Shutdown::Both);
        }
        let _ = UnixStream::connect(&self.shared.path);
        let _ = thread.join();
    }
}

impl Shared {
    fn serve(&self, mut client: &UnixStream) -> std::io::Result<()> {
        client.write_all(&self.noise)?;
        let silent = self.mood.lock().unwrap()("connect") == Say::Nothing;
        for line in BufReader::new(client).split(b'\n') {
            let line = line?;
            let line = line.strip_prefix(&[DELIMITER]).unwrap_or(&line);
            let command: Value = serde_json::from_slice(line).unwrap();
            let name = command["execute"].as_str().unwrap();
            if silent {
                continue;
            }
            if name == "guest-sync-delimited" {
                let answer = json!({ "return": command["arguments"]["id"] }).to_string();
                // what one that is gone has sent is done all the same
                let _ = client.write_all(&[&[DELIMITER], answer.as_bytes(), b"\n"].concat());
                continue;
            }
            self.heard.lock().unwrap().push((name.to_owned(), Instant::now()));
            let say = self.mood.lock().unwrap()(name);
            let answer = match say {
                Say::Usual => self.execute(name),
                Say::Other(answer) => answer,
                Say::Nothing => {
                    self.execute(name);
                    continue;
                }
                Say::HangUp => return Ok(()),
            };
            let _ = client.write_all(format!("{answer}\n").as_bytes());
        }
        Ok(())
    }

    fn execute(&self, name: &str) -> Value {
        let frozen = self.frozen.load(Ordering::Relaxed);
        match name {
            "guest-info" => {
                let commands: Vec<Value> =
                    COMMANDS.iter().map(|name| json!({ "name": name, "enabled": !frozen })).collect();
                json!({ "return": { "version": "10.0.2", "supported_commands": commands } })
            }
            "guest-fsfreeze-status" => json!({ "return": if frozen { "frozen" } else { "thawed" } }),
            "guest-fsfreeze-freeze" => {
                self.frozen.store(true, Ordering::Relaxed);
                json!({ "return": 2 })
            }
            "guest-fsfreeze-thaw" => {
                self.frozen.store(false, Ordering::Relaxed);
                json!({ "return": if frozen { 2 } else { 0 } })
            }
            other => json!({ "error": { "class": "CommandNotFound", "desc": format!("no {other} here") } }),
        }
    }
}
