//! What goes wrong with a guest agent.

use std::io;
use std::time::Duration;

use serde_json::Value;

use crate::qmp::{Address, Command, excerpt};

/// Why an agent has not done what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing listens there, or it may not be used.
    #[error("{address}: cannot connect to the guest agent's socket")]
    Connect {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody answers. The command may yet be carried out.
    #[error(
        "{command}: the guest agent has not answered within {waited:?}: it may not run in the guest, or another client is \
         connected to its socket"
    )]
    NoAnswer {
        /// The command.
        command: String,
        /// How long.
        waited: Duration,
    },
    /// The agent's error reply.
    #[error("{command}: the guest agent refuses: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// Why, in the agent's words.
        desc: String,
    },
    /// The connection has ended.
    #[error("{command}: the connection to the guest agent is lost: QEMU has ended or has closed it")]
    Lost {
        /// The command that waited or was to be sent.
        command: String,
        /// What the system said, unless it was a regular end.
        source: Option<io::Error>,
    },
    /// The answer is none.
    #[error("{command}: the guest agent's answer makes no sense: {reason}")]
    Malformed {
        /// The command.
        command: String,
        /// What is wrong with the answer, and how it begins.
        reason: String,
    },
}

impl Error {
    /// A reply of another shape than that of the command's answers.
    pub(super) fn unexpected(command: &Command, value: &Value) -> Self {
        let reason = format!("it returns {}", excerpt(value.to_string().as_bytes()));
        Self::Malformed { command: command.name().to_owned(), reason }
    }
}
