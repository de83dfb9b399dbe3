//! A machine that is talked to: each command is told to the observer, and none is sent when the run shall end.

pub(crate) mod abilities;
pub(crate) mod device;
pub(crate) mod devices;
pub(crate) mod file_name;
pub(crate) mod graph;
pub(crate) mod live;
pub(crate) mod nodes;
pub(crate) mod observe;
pub(crate) mod reply;
pub(crate) mod selection;
pub(crate) mod state;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use self::nodes::delete_node;
use self::observe::Observed;
use crate::capture::error::Error;
use crate::capture::event::{Event, Observer};
use crate::qmp::{Command, Features, Monitor};

/// Time between two looks at whether the run shall end.
pub(crate) const GLANCE: Duration = Duration::from_millis(100);

pub(crate) struct Machine<'a> {
    pub(crate) monitor: Monitor,
    pub(crate) observer: &'a dyn Observer,
    pub(crate) features: Features,
}

impl Machine<'_> {
    /// Sends a command, whatever the observer wants.
    pub(crate) async fn send(&self, command: &Command) -> Result<Value, Error> {
        self.observer.event(&Event::Sent(command.clone()));
        Ok(self.monitor.execute(command).await?)
    }

    /// Sends a command unless the run shall end.
    pub(crate) async fn step(&self, command: &Command) -> Result<Value, Error> {
        self.go_on()?;
        self.send(command).await
    }

    pub(crate) fn go_on(&self) -> Result<(), Error> {
        if self.observer.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits until the observer wants no more.
    pub(crate) async fn cancelled(&self) -> Error {
        loop {
            if let Err(error) = self.go_on() {
                return error;
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    pub(crate) fn tell(&self, event: &Event) {
        self.observer.event(event);
    }

    pub(crate) async fn observe(&self) -> Result<Observed, Error> {
        Observed::ask(self).await
    }

    /// QEMU's working directory, where it can be told.
    pub(crate) fn cwd(&self) -> Option<PathBuf> {
        let pid = self.monitor.peer().and_then(|peer| peer.pid)?;
        std::fs::read_link(format!("/proc/{pid}/cwd")).ok()
    }

    /// Sends one after the other, until one is refused.
    pub(crate) async fn send_all(&self, commands: &[Command]) -> Result<(), Error> {
        for command in commands {
            self.send(command).await?;
        }
        Ok(())
    }

    /// Sends a command for a job, which QEMU refuses where the job has ended by itself. Whether it took it comes back.
    pub(crate) async fn send_unless_ended(&self, command: &Command) -> Result<bool, Error> {
        match self.send(command).await {
            Err(Error::Monitor(error)) if error.refused().is_some() => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// Removes a node if it is there.
    pub(crate) async fn remove_node(&self, name: &str) -> Result<(), Error> {
        if self.observe().await?.node(name).is_some() {
            self.send(&delete_node(name)).await?;
        }
        Ok(())
    }
}
