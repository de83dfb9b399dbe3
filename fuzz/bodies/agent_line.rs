//! A guest that says anything to whoever asks its agent: an answer or an error, the same however it is split into reads.
//!
//! A zero byte stands for the return of the number that was asked for last, and the byte 1 for the wait until
//! the client asks for something, or waits itself.

use std::time::Duration;

use qmpbackup::agent::{Agent, Error};
use qmpbackup::qmp::Address;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};

use super::input::Input;

/// Never reached: the guest hangs up when it has no more to say.
const LIMIT: Duration = Duration::from_secs(60);

/// Both sides run in one thread: whoever has done nothing in so many turns waits for the other.
const TURNS: usize = 12;

const NUMBER: u8 = 0;
const WAIT: u8 = 1;

/// Where the two meet.
struct Scene {
    listener: UnixListener,
    address: Address,
    _folder: TempDir,
    runtime: Runtime,
}

pub(super) fn agent_line(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let lengths: Vec<usize> = input.take(2).iter().map(|byte| usize::from(*byte) + 1).collect();
    let script = input.rest();
    let lengths = if lengths.is_empty() { vec![1] } else { lengths };
    let scene = Scene::new();
    let whole = scene.play(script, &[usize::MAX]);
    assert_eq!(whole, scene.play(script, &lengths), "what is heard depends on the reads");
}

impl Scene {
    fn new() -> Self {
        let folder = super::folder();
        let path = folder.path().join("socket");
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(async { UnixListener::bind(&path).unwrap() });
        Self { listener, address: Address::Unix(path), _folder: folder, runtime }
    }

    fn play(&self, script: &[u8], lengths: &[usize]) -> Vec<String> {
        let (heard, ()) = self.runtime.block_on(async {
            tokio::join!(ask(&self.address), async {
                let mut guest =
                    Guest { stream: self.listener.accept().await.unwrap().0, number: None, said: Vec::new() };
                guest.speak(script, lengths).await;
            })
        });
        heard
    }
}

/// What a client hears that asks for everything.
async fn ask(address: &Address) -> Vec<String> {
    let mut agent = match Agent::connect(address, LIMIT).await {
        Ok(agent) => agent,
        Err(error) => return vec![told(&error)],
    };
    let mut heard = Vec::new();
    for _ in 0..2 {
        heard.push(agent.status().await.map_or_else(|error| told(&error), |status| format!("{status:?}")));
        heard.push(agent.supports_freeze().await.map_or_else(|error| told(&error), |yes| yes.to_string()));
        // the number itself differs from time to time
        heard.push(agent.freeze(LIMIT).await.map_or_else(|error| told(&error), |count| (count < 1000).to_string()));
        heard.push(agent.thaw().await.map_or_else(|error| told(&error), |count| (count < 1000).to_string()));
    }
    heard
}

/// The kind of an error; what is said to people is one line.
fn told(error: &Error) -> String {
    let text = error.to_string();
    assert!(!text.contains("NoAnswer") && text.len() < 3000, "{text}");
    let kind = match error {
        Error::Lost { .. } => "lost",
        Error::Refused { desc, .. } => return format!("refused: {desc}"),
        Error::Malformed { .. } => {
            assert!(!text.contains('\n'), "{text:?} is no line for people");
            "malformed"
        }
        other => panic!("{other:?}"),
    };
    kind.to_owned()
}

struct Guest {
    stream: UnixStream,
    /// What was asked for last.
    number: Option<u64>,
    /// What the client has said and nobody has looked at.
    said: Vec<u8>,
}

impl Guest {
    async fn speak(&mut self, script: &[u8], lengths: &[usize]) {
        let mut lengths = lengths.iter().cycle();
        self.wait().await;
        for part in script.split_inclusive(|byte| *byte == WAIT) {
            let words = self.words(part.strip_suffix(&[WAIT]).unwrap_or(part));
            let mut rest = &words[..];
            while !rest.is_empty() {
                let (chunk, later) = rest.split_at(lengths.next().map_or(1, |length| (*length).min(rest.len())));
                rest = later;
                if self.stream.write_all(chunk).await.is_err() {
                    // the client has heard enough
                    return;
                }
                tokio::task::yield_now().await;
            }
            if part.ends_with(&[WAIT]) {
                self.wait().await;
            }
        }
        // the client may still write, and hears what it has not read yet
        let _ = self.stream.shutdown().await;
        let _ = self.stream.read_to_end(&mut self.said).await;
    }

    fn words(&self, part: &[u8]) -> Vec<u8> {
        let number = self.number.map_or_else(String::new, |number| format!("{{\"return\": {number}}}"));
        part.iter()
            .flat_map(|byte| if *byte == NUMBER { number.as_bytes() } else { std::slice::from_ref(byte) })
            .copied()
            .collect()
    }

    /// Listens until the client has said a line, or waits.
    async fn wait(&mut self) {
        let mut idle = 0;
        while idle < TURNS {
            if let Some(end) = self.said.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.said.drain(..=end).collect();
                let json = line.iter().position(|byte| *byte == b'{').unwrap_or_default();
                let command: serde_json::Value = serde_json::from_slice(&line[json..]).unwrap();
                self.number = command["arguments"]["id"].as_u64().or(self.number);
                return;
            }
            let mut chunk = [0; 512];
            match self.stream.try_read(&mut chunk) {
                // the client has given up
                Ok(0) => return,
                Ok(length) => self.said.extend(&chunk[..length]),
                Err(_) => idle += 1,
            }
            tokio::task::yield_now().await;
        }
    }
}
