//! The guest agent, as far as a backup needs it: the guest's file systems stand still while a snapshot is taken.
//!
//! An agent sends no greeting and knows no ids. It may be absent while its socket is there, and what it says may be meant
//! for a client before us. So each connection begins with `guest-sync-delimited`, whose answer bears a number of ours
//! after a byte that JSON cannot contain, and after a command without an answer the next one begins like that again.
//!
//! What comes from an agent comes from the guest, and is not trusted: lines are bounded, and numbers are only reported.

mod error;
mod session;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde_json::Value;

pub use error::Error;

use crate::qmp::{Address, Command};
use session::Session;

/// Whether the guest's file systems can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsStatus {
    /// They can.
    Thawed,
    /// They cannot: somebody has frozen them.
    Frozen,
}

/// A connection to a guest agent that has answered.
#[derive(Debug)]
pub struct Agent {
    session: Session,
}

impl Agent {
    /// Connects and finds out whether somebody answers. All of that, and each command after it but for the freeze, has this
    /// time limit.
    ///
    /// # Errors
    /// [`Error::Connect`] where nothing listens, [`Error::NoAnswer`] where no agent runs in the guest, and
    /// [`Error::Lost`].
    pub async fn connect(address: &Address, limit: Duration) -> Result<Self, Error> {
        Ok(Self { session: Session::open(address, limit).await? })
    }

    /// Whether the file systems are frozen, by whomever. This is permitted while they are.
    ///
    /// # Errors
    /// [`Error::NoAnswer`], [`Error::Refused`], [`Error::Lost`], [`Error::Malformed`]; so it is with all commands.
    pub async fn status(&mut self) -> Result<FsStatus, Error> {
        let command = Command::new("guest-fsfreeze-status");
        let value = self.session.execute(&command).await?;
        match value.as_str() {
            Some("thawed") => Ok(FsStatus::Thawed),
            Some("frozen") => Ok(FsStatus::Frozen),
            _ => Err(Error::unexpected(&command, &value)),
        }
    }

    /// Freezes all file systems that can be, and returns how many. What is in the guest's memory is written before, which may
    /// take longer than any other answer: it has a time limit of its own.
    ///
    /// When the future was dropped, and after [`Error::NoAnswer`] or [`Error::Lost`] they may be frozen, or be so later: thaw
    /// them in any case.
    ///
    /// # Errors
    /// As with [`Agent::status`]; refused where they are frozen already.
    pub async fn freeze(&mut self, limit: Duration) -> Result<u64, Error> {
        let command = Command::new("guest-fsfreeze-freeze");
        count(&command, &self.session.execute_within(&command, limit).await?)
    }

    /// Thaws what is frozen, and returns how many file systems were. An agent that is still at work with a freeze finds this
    /// after it, also when the time limit is over.
    ///
    /// # Errors
    /// As with [`Agent::status`].
    pub async fn thaw(&mut self) -> Result<u64, Error> {
        let command = Command::new("guest-fsfreeze-thaw");
        count(&command, &self.session.queue(&command).await?)
    }

    /// Whether the agent has what [`Agent::freeze`] and [`Agent::thaw`] need, and its administrator permits it. Only while the
    /// file systems are thawed that is the answer: an agent disables all other commands as long as they are frozen.
    ///
    /// # Errors
    /// As with [`Agent::status`].
    pub async fn supports_freeze(&mut self) -> Result<bool, Error> {
        let command = Command::new("guest-info");
        let info = self.session.execute(&command).await?;
        let commands = info.get("supported_commands").and_then(Value::as_array);
        let commands = commands.ok_or_else(|| Error::unexpected(&command, &info))?;
        let enabled = |name: &str| {
            let mut named = commands.iter().filter(|entry| entry.get("name").is_some_and(|other| other == name));
            named.any(|entry| entry.get("enabled").and_then(Value::as_bool).unwrap_or(false))
        };
        Ok(["guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"].into_iter().all(enabled))
    }
}

/// How many file systems it was.
fn count(command: &Command, answer: &Value) -> Result<u64, Error> {
    answer.as_u64().ok_or_else(|| Error::unexpected(command, answer))
}
