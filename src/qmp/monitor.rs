//! The handle of a connection, and how it begins.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::timeout;

use super::address::Address;
use super::codec::{Decoder, Message, encode, excerpt};
use super::command::Command;
use super::error::{End, Error};
use super::event::{Event, Events};
use super::nonce::nonce;
use super::socket::{OpenError, Peer, Socket, Stream};
use super::task::{Reply, Request, State, Task};
use super::version::Version;

/// Events that a subscriber may be behind.
const BEHIND: usize = 1024;

/// How long QEMU is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From the connect to the end of the negotiation.
    pub connect: Duration,
    /// From the sending of a command to its reply.
    pub command: Duration,
}

impl Default for Limits {
    /// 10 s, and 60 s.
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), command: Duration::from_secs(60) }
    }
}

/// A connection to QEMU. Clones are the same connection, which is closed with the last of them.
#[derive(Debug, Clone)]
pub struct Monitor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    version: Version,
    peer: Option<Peer>,
    limits: Limits,
    /// QEMU may answer what a client before us asked: its ids must not be ours.
    nonce: u64,
    sent: AtomicU64,
    requests: mpsc::UnboundedSender<Request>,
    /// The task has the strong one: with it, the subscriptions end.
    events: broadcast::WeakSender<Event>,
    state: Arc<State>,
}

impl Monitor {
    /// Connects, reads the greeting and leaves the negotiation mode, within `limits.connect`. Wants to be called in a
    /// tokio runtime, and spawns a task there.
    ///
    /// # Errors
    /// [`Error::Connect`] where nothing listens, [`Error::NoGreeting`] where another client is served,
    /// [`Error::NotQmp`] where the socket is another one, and what [`Monitor::execute`] says.
    pub async fn connect(address: &Address, limits: Limits) -> Result<Self, Error> {
        let begun = Instant::now();
        let left = || limits.connect.saturating_sub(begun.elapsed());
        let silent = || Error::NoGreeting { address: address.clone(), waited: limits.connect };
        let opened = Socket::open_within(address, left()).await.map_err(|error| match error {
            OpenError::Io(source) => Error::Connect { address: address.clone(), source },
            OpenError::Silent => silent(),
        });
        let Socket { mut stream, peer } = opened?;
        let mut decoder = Decoder::new();
        let version = match timeout(left(), greeting(&mut stream, &mut decoder, address)).await {
            Ok(version) => version?,
            Err(_) if decoder.partial().is_empty() => return Err(silent()),
            Err(_) => return Err(not_qmp(address, format!("it says {}, and no more", excerpt(decoder.partial())))),
        };
        let (requests, receiver) = mpsc::unbounded_channel();
        let (events, _) = broadcast::channel(BEHIND);
        let state = Arc::new(State::default());
        let inner = Inner {
            version,
            peer,
            limits,
            nonce: nonce(),
            sent: AtomicU64::new(0),
            requests,
            events: events.downgrade(),
            state: Arc::clone(&state),
        };
        tokio::spawn(Task { stream, decoder, requests: receiver, events, state }.serve());
        let monitor = Self { inner: Arc::new(inner) };
        monitor.execute_within(&Command::new("qmp_capabilities"), left()).await?;
        Ok(monitor)
    }

    /// Which QEMU it is, by its greeting.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.inner.version
    }

    /// The process at the other end; `None` over TCP.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        self.inner.peer.as_ref()
    }

    /// Sends a command and waits for its reply, `limits.command` at most. Several may wait at a time; QEMU carries them
    /// out one after the other.
    ///
    /// A command whose future is dropped is not sent any more, if it was not sent yet; else QEMU carries it out.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Timeout`], after which the connection can still be used, and what makes
    /// [`Error::is_lost`] true.
    pub async fn execute(&self, command: &Command) -> Result<Value, Error> {
        self.execute_within(command, self.inner.limits.command).await
    }

    /// [`Monitor::execute`] with another time limit.
    ///
    /// # Errors
    /// The same.
    pub async fn execute_within(&self, command: &Command, limit: Duration) -> Result<Value, Error> {
        let inner = &self.inner;
        let name = || command.name().to_owned();
        let lost = || inner.state.end.get().unwrap_or(&End::Lost(None)).error(Some(command.name()));
        let id = format!("{:x}-{}", inner.nonce, inner.sent.fetch_add(1, Ordering::Relaxed));
        let line = encode(&id, command);
        let (reply, answer) = oneshot::channel();
        inner.requests.send(Request { id, line, reply }).map_err(|_| lost())?;
        match timeout(limit, answer).await {
            Ok(Ok(Reply::Return(value))) => Ok(value),
            Ok(Ok(Reply::Error { class, desc })) => Err(Error::Refused { command: name(), class, desc }),
            Ok(Err(_)) => Err(lost()),
            Err(_) => Err(Error::Timeout { command: name(), waited: limit }),
        }
    }

    /// Subscribes to what happens from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        let closed = || broadcast::channel(1).1;
        Events::new(self.inner.events.upgrade().map_or_else(closed, |events| events.subscribe()))
    }

    /// How many replies came that nobody waited for: late ones, and answers to what an earlier client asked.
    #[cfg(test)]
    pub(super) fn unclaimed(&self) -> u64 {
        self.inner.state.unclaimed.load(Ordering::Relaxed)
    }
}

fn not_qmp(address: &Address, what: String) -> Error {
    Error::NotQmp { address: address.clone(), what }
}

/// Reads up to the greeting, and no message after it.
async fn greeting(stream: &mut Box<dyn Stream>, decoder: &mut Decoder, address: &Address) -> Result<Version, Error> {
    let mut chunk = Vec::with_capacity(4096);
    loop {
        match decoder.next_message() {
            Ok(Some(Message::Greeting(version))) => return Ok(version),
            // what was meant for a client before us
            Ok(Some(_)) => {}
            Ok(None) => match stream.read_buf(&mut chunk).await {
                Ok(0) => return Err(End::Lost(None).error(None)),
                Ok(_) => {
                    decoder.feed(&chunk);
                    chunk.clear();
                }
                Err(source) => return Err(End::Lost(Some(Arc::new(source))).error(None)),
            },
            Err(error) => return Err(not_qmp(address, error.to_string())),
        }
    }
}
