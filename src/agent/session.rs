//! One command after the other, and both sides in step.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::error::Error;
use crate::qmp::{Address, Command, Lines, Message, OpenError, Socket, Stream, nonce};

/// The most bytes of an answer: `guest-info` is the longest one, with 10 kB.
const LIMIT: usize = 1 << 20;

/// Resets the agent's parser, and stands before its answer to `guest-sync-delimited`.
const DELIMITER: u8 = 0xff;

/// A connection, and whether the next line is the answer to the next command.
pub(super) struct Session {
    stream: Box<dyn Stream>,
    lines: Lines,
    limit: Duration,
    in_step: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("limit", &self.limit).field("in_step", &self.in_step).finish_non_exhaustive()
    }
}

/// What ends the wait for an answer, before the command's name is put to it.
enum Failure {
    Lost(Option<io::Error>),
    Refused(String),
    Malformed(String),
}

impl Session {
    /// Connects and gets in step, within the time limit of each later command.
    pub(super) async fn open(address: &Address, limit: Duration) -> Result<Self, Error> {
        let begun = Instant::now();
        let socket = Socket::open_within(address, limit).await.map_err(|error| match error {
            OpenError::Io(source) => Error::Connect { address: address.clone(), source },
            OpenError::Silent => no_answer(&sync_command(0), limit),
        });
        let mut session = Self { stream: socket?.stream, lines: Lines::new(LIMIT), limit, in_step: false };
        match timeout(limit.saturating_sub(begun.elapsed()), session.sync(None)).await {
            Ok(Ok(())) => Ok(session),
            Ok(Err(failure)) => Err(failure.of(&sync_command(0))),
            Err(_) => Err(no_answer(&sync_command(0), limit)),
        }
    }

    /// Sends a command and waits for its answer, within the time limit. It may be dropped at any time.
    pub(super) async fn execute(&mut self, command: &Command) -> Result<Value, Error> {
        self.run(command, self.limit, false).await
    }

    /// As that, within another time limit.
    pub(super) async fn execute_within(&mut self, command: &Command, limit: Duration) -> Result<Value, Error> {
        self.run(command, limit, false).await
    }

    /// As [that](Self::execute), but sent in any case: an agent that is at work with an earlier command finds it after that,
    /// also when nobody waits for the answer any more.
    pub(super) async fn queue(&mut self, command: &Command) -> Result<Value, Error> {
        self.run(command, self.limit, true).await
    }

    async fn run(&mut self, command: &Command, limit: Duration, queued: bool) -> Result<Value, Error> {
        match timeout(limit, self.converse(command, queued)).await {
            Ok(answer) => answer.map_err(|failure| failure.of(command)),
            Err(_) => Err(no_answer(command, limit)),
        }
    }

    async fn converse(&mut self, command: &Command, queued: bool) -> Result<Value, Failure> {
        let sent = queued && !self.in_step;
        if !self.in_step {
            self.sync(sent.then_some(command)).await?;
        }
        // until the answer is here, it may come at any time
        self.in_step = false;
        if !sent {
            self.send(command, &[]).await?;
        }
        let line = self.line().await?;
        let message = Message::parse(&line).map_err(|error| Failure::Malformed(error.to_string()))?;
        self.in_step = true;
        match message {
            Message::Return { value, .. } => Ok(value),
            Message::Error { desc, .. } => Err(Failure::Refused(desc)),
            Message::Greeting(_) => Err(Failure::Malformed("it is a monitor's greeting".to_owned())),
            Message::Event(_) => Err(Failure::Malformed("it is a monitor's event".to_owned())),
        }
    }

    /// Makes the next line the answer to the next command, whatever was said before. That command may be sent at once.
    async fn sync(&mut self, next: Option<&Command>) -> Result<(), Failure> {
        let id = nonce();
        self.send(&sync_command(id), &[DELIMITER]).await?;
        if let Some(next) = next {
            self.send(next, &[]).await?;
        }
        let mut delimited = false;
        loop {
            let line = match self.line().await {
                // what is too long is not for us
                Err(Failure::Malformed(_)) => continue,
                line => line?,
            };
            // before the delimiter there may be half a line, or the agent's opinion of the one that we sent
            let answer = line.rsplit(|byte| *byte == DELIMITER).next().unwrap_or_default();
            delimited |= answer.len() < line.len();
            let ours = |message| matches!(message, Message::Return { value, .. } if value == id);
            if delimited && Message::parse(answer).is_ok_and(ours) {
                self.in_step = true;
                return Ok(());
            }
        }
    }

    async fn send(&mut self, command: &Command, before: &[u8]) -> Result<(), Failure> {
        let mut bytes = before.to_vec();
        bytes.extend_from_slice(command.to_json().to_string().as_bytes());
        bytes.push(b'\n');
        self.stream.write_all(&bytes).await.map_err(|error| Failure::Lost(Some(error)))
    }

    /// The next line with something in it.
    async fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut chunk = Vec::with_capacity(4096);
        loop {
            match self.lines.next() {
                Ok(Some(line)) if line.iter().all(u8::is_ascii_whitespace) => continue,
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(too_long) => {
                    // what follows can be understood again after the next delimiter
                    self.lines = Lines::new(LIMIT);
                    return Err(Failure::Malformed(format!("it has more than {} bytes", too_long.limit)));
                }
            }
            match self.stream.read_buf(&mut chunk).await {
                Ok(0) => return Err(Failure::Lost(None)),
                Ok(_) => self.lines.feed(&chunk),
                Err(error) => return Err(Failure::Lost(Some(error))),
            }
            chunk.clear();
        }
    }
}

fn sync_command(id: u64) -> Command {
    Command::new("guest-sync-delimited").with("id", id)
}

fn no_answer(command: &Command, waited: Duration) -> Error {
    Error::NoAnswer { command: command.name().to_owned(), waited }
}

impl Failure {
    fn of(self, command: &Command) -> Error {
        let command = command.name().to_owned();
        match self {
            Self::Lost(source) => Error::Lost { command, source },
            Self::Refused(desc) => Error::Refused { command, desc },
            Self::Malformed(reason) => Error::Malformed { command, reason },
        }
    }
}
