//! A client of QEMU's monitor for the tests: it blocks, and it gives up waiting. Not the program's own, which is judged
//! here and must not be its own judge.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longer than anything takes on a machine that is very busy.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Monitor {
    stream: UnixStream,
    /// What came and is no whole line yet.
    received: Vec<u8>,
    sent: u64,
    /// All that came so far.
    pub(crate) events: Vec<Value>,
}

impl Monitor {
    /// Connects to a monitor that may not be there yet.
    pub(crate) fn connect(path: &Path) -> Self {
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < until, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut monitor = Self { stream, received: Vec::new(), sent: 0, events: Vec::new() };
        let greeting = monitor.line(until).unwrap_or_else(|| panic!("no greeting from {}", path.display()));
        assert!(greeting["QMP"].is_object(), "{greeting}");
        monitor.execute("qmp_capabilities", &json!({})).unwrap();
        monitor
    }

    /// Runs a command: what it returns, or the error object.
    pub(crate) fn execute(&mut self, name: &str, arguments: &Value) -> Result<Value, Value> {
        let number = self.send(name, arguments);
        self.reply(number, PATIENCE).unwrap_or_else(|| panic!("no answer to {name} {arguments}"))
    }

    /// Runs a line of the human monitor.
    pub(crate) fn hmp(&mut self, line: &str) -> String {
        let returned = self.execute("human-monitor-command", &json!({ "command-line": line })).unwrap();
        returned.as_str().unwrap().to_owned()
    }

    /// Sends a command; the number is for [`Monitor::reply`].
    pub(crate) fn send(&mut self, name: &str, arguments: &Value) -> u64 {
        self.sent += 1;
        let command = json!({ "execute": name, "arguments": arguments, "id": self.sent });
        self.stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        self.sent
    }

    /// The answer to a command, if it comes in time. What nobody waited for any more is dropped.
    pub(crate) fn reply(&mut self, number: u64, limit: Duration) -> Option<Result<Value, Value>> {
        let until = Instant::now() + limit;
        loop {
            let mut line = self.line(until)?;
            if line.get("event").is_some() {
                self.events.push(line);
            } else if line["id"] == number {
                return Some(match line.get_mut("return") {
                    Some(returned) => Ok(returned.take()),
                    None => Err(line["error"].take()),
                });
            }
        }
    }

    /// The next line, if it comes in time.
    fn line(&mut self, until: Instant) -> Option<Value> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.stream.set_read_timeout(Some(left)).unwrap();
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => panic!("the monitor hung up"),
                Ok(n) => self.received.extend_from_slice(&buffer[..n]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => panic!("the monitor: {error}"),
            }
        }
    }
}
