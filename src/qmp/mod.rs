//! QEMU's monitor: one connection, commands with time limits, events.
//!
//! [`Monitor`] is what callers hold. One task owns the socket, and [`Decoder`] and [`encode`] say what the bytes on it
//! mean, without a socket. What the commands do is not known here, nor is which of them a backup needs; only
//! [`Features`] knows some names, of things that not every QEMU can do. It needs a tokio runtime with IO and time.

mod address;
mod codec;
mod command;
mod error;
mod event;
#[cfg(test)]
pub(crate) mod fake;
mod features;
mod lines;
mod monitor;
mod nonce;
mod schema;
mod socket;
mod task;
#[cfg(test)]
mod tests;
mod version;

pub use address::{Address, AddressError};
pub use codec::{Decoder, Message, encode};
pub use command::Command;
pub use error::{DecodeError, Error};
pub use event::{Event, Events, EventsError};
pub use features::Features;
pub use monitor::{Limits, Monitor};
pub use socket::Peer;
pub use version::Version;

pub(crate) use codec::excerpt;
pub(crate) use lines::Lines;
pub(crate) use nonce::nonce;
pub(crate) use socket::{OpenError, Socket, Stream};
