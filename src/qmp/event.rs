//! What QEMU tells unasked.

use serde_json::{Map, Value};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

/// Something that happened, whether its name is known here or not.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The name in QMP's schema: `JOB_STATUS_CHANGE`, …
    pub name: String,
    /// What the schema says of it; `null` where there is nothing.
    pub data: Value,
    /// When: seconds since 1970 by the host's clock; -1 where that is not known.
    pub seconds: i64,
    /// When: microseconds within the second; -1 where that is not known.
    pub microseconds: i64,
}

impl Event {
    pub(super) fn read(name: &str, object: &Map<String, Value>) -> Self {
        let time = |unit: &str| object.get("timestamp").and_then(|time| time.get(unit)?.as_i64()).unwrap_or(-1);
        Self {
            name: name.to_owned(),
            data: object.get("data").cloned().unwrap_or_default(),
            seconds: time("seconds"),
            microseconds: time("microseconds"),
        }
    }
}

/// A subscription: all events since it began. It does not keep the connection open.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
}

/// Why there is no next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventsError {
    /// So many events were not fetched in time and are gone. The later ones come; what the lost ones told has to be
    /// asked for.
    #[error("{0} events of QEMU were missed: they came faster than they were read")]
    Lagged(u64),
    /// The connection has ended, and all its events were fetched.
    #[error("the connection to QEMU has ended: there are no more events")]
    Closed,
}

impl Events {
    pub(super) fn new(receiver: broadcast::Receiver<Event>) -> Self {
        Self { receiver }
    }

    /// Waits for the next event. No event is lost when the future is dropped.
    ///
    /// # Errors
    /// [`EventsError::Lagged`] once for all events that are gone, [`EventsError::Closed`] from the end on.
    pub async fn next(&mut self) -> Result<Event, EventsError> {
        self.receiver.recv().await.map_err(|error| match error {
            RecvError::Lagged(count) => EventsError::Lagged(count),
            RecvError::Closed => EventsError::Closed,
        })
    }

    /// The next event that is here already, if there is one.
    ///
    /// # Errors
    /// As with [`Events::next`].
    pub fn try_next(&mut self) -> Result<Option<Event>, EventsError> {
        match self.receiver.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Lagged(count)) => Err(EventsError::Lagged(count)),
            Err(TryRecvError::Closed) => Err(EventsError::Closed),
        }
    }
}
