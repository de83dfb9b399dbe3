//! QEMU's monitor.

mod address;
mod command;

pub use address::{Address, AddressError};
pub use command::Command;
