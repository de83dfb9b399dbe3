//! Connecting, to a UNIX socket or over TCP, without a time limit: callers have one.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::address::Address;

/// How often a socket is tried whose queue of clients is full.
const RETRY: Duration = Duration::from_millis(50);

/// Bytes both ways.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl Stream for UnixStream {}
impl Stream for TcpStream {}

/// The process that listened on a UNIX socket when it was connected to: QEMU, or who handed it the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its process, where the system knows it and it is in our PID namespace.
    pub pid: Option<i32>,
}

impl Peer {
    /// Who it is now: with `-run-with user=` or `-runas` QEMU listens as root and becomes another user then.
    fn now(self) -> Self {
        let status =
            self.pid.filter(|_| self.uid == 0).and_then(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
        let status = status.unwrap_or_default();
        let id = |field: &str| {
            let ids = status.lines().find_map(|line| line.strip_prefix(field));
            // real, effective, saved, and the one that counts for files
            ids.and_then(|ids| ids.split_whitespace().nth(3)?.parse().ok())
        };
        Self { uid: id("Uid:").unwrap_or(self.uid), gid: id("Gid:").unwrap_or(self.gid), ..self }
    }
}

/// A connection.
pub(crate) struct Socket {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) peer: Option<Peer>,
}

impl Socket {
    /// Connects within a time limit.
    pub(crate) async fn open_within(address: &Address, limit: Duration) -> Result<Self, OpenError> {
        match (timeout(limit, Self::open(address)).await, address) {
            (Ok(opened), _) => opened.map_err(OpenError::Io),
            (Err(_), Address::Unix(_)) => Err(OpenError::Silent),
            (Err(_), Address::Tcp { .. }) => Err(OpenError::Io(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn open(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let stream = queue_up(path).await?;
                let peer = stream.peer_cred().ok();
                let peer = peer.map(|peer| Peer { uid: peer.uid(), gid: peer.gid(), pid: peer.pid() }.now());
                Ok(Self { stream: Box::new(stream), peer })
            }
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                Ok(Self { stream: Box::new(stream), peer: None })
            }
        }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// What the system says.
    Io(io::Error),
    /// It listens, for others are in the queue.
    Silent,
}

/// QEMU lets one client in and one or two wait. Where others wait already, the kernel says so at once.
async fn queue_up(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(RETRY).await,
            done => return done,
        }
    }
}
