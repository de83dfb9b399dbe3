//! What goes wrong with a monitor.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::address::Address;

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A line that QMP does not know.
    #[error("{reason}")]
    Malformed {
        /// What it is, and how it begins.
        reason: String,
    },
    /// A line without end.
    #[error("a line of more than {limit} bytes")]
    TooLong {
        /// The most bytes that are read.
        limit: usize,
    },
}

/// Why a command has no answer, or there is no monitor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing listens there, or it may not be used.
    #[error("{address}: cannot connect to the monitor")]
    Connect {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// Something listens, but says nothing.
    #[error(
        "{address}: no greeting within {waited:?}: somebody else is probably connected, a monitor serves one client at a \
         time; give the VM a second monitor for backups: -qmp unix:PATH,server=on,wait=off"
    )]
    NoGreeting {
        /// Where.
        address: Address,
        /// How long.
        waited: Duration,
    },
    /// What listens there is something else.
    #[error("{address}: this is no QMP monitor: {what}")]
    NotQmp {
        /// Where.
        address: Address,
        /// What came instead of a greeting.
        what: String,
    },
    /// QEMU does not answer. It may yet carry out the command; the next one can be sent.
    #[error("{command}: QEMU has not answered within {waited:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long.
        waited: Duration,
    },
    /// QEMU's error reply.
    #[error("{command}: QEMU refuses: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// `GenericError`, `CommandNotFound`, …
        class: String,
        /// Why, in QEMU's words.
        desc: String,
    },
    /// The connection has ended.
    #[error("{}the connection to the monitor is lost: QEMU has ended or has closed it", prefix(.command.as_ref()))]
    Lost {
        /// The command that waited or was to be sent.
        command: Option<String>,
        /// What the system said, unless it was a regular end.
        source: Option<Arc<io::Error>>,
    },
    /// Something came that is no QMP. The connection was given up.
    #[error("what the monitor sent is no QMP: {reason}")]
    Malformed {
        /// What it is, and how it begins.
        reason: String,
    },
    /// A message without end. The connection was given up.
    #[error("the monitor sent a message of more than {limit} bytes")]
    TooLong {
        /// The most bytes that are read.
        limit: usize,
    },
}

fn prefix(command: Option<&String>) -> String {
    command.map(|command| format!("{command}: ")).unwrap_or_default()
}

impl Error {
    /// Whether the connection is of no use any more: each later command fails, too.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Refused { .. } => false,
            Self::Connect { .. }
            | Self::NoGreeting { .. }
            | Self::NotQmp { .. }
            | Self::Lost { .. }
            | Self::Malformed { .. }
            | Self::TooLong { .. } => true,
        }
    }

    /// Class and description of QEMU's error reply, if it is one.
    #[must_use]
    pub fn refused(&self) -> Option<(&str, &str)> {
        match self {
            Self::Refused { class, desc, .. } => Some((class, desc)),
            _ => None,
        }
    }
}

/// How a connection ended: told to each command from then on.
#[derive(Debug, Clone)]
pub(super) enum End {
    /// The other side closed it, or the system says that it did.
    Lost(Option<Arc<io::Error>>),
    /// Nothing that follows can be understood.
    Undecodable(DecodeError),
}

impl End {
    pub(super) fn error(&self, command: Option<&str>) -> Error {
        match self {
            Self::Lost(source) => Error::Lost { command: command.map(str::to_owned), source: source.clone() },
            Self::Undecodable(DecodeError::Malformed { reason }) => Error::Malformed { reason: reason.clone() },
            Self::Undecodable(DecodeError::TooLong { limit }) => Error::TooLong { limit: *limit },
        }
    }
}
