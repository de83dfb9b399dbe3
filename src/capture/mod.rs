//! One backup of a running machine.

mod device;

pub use device::{Bitmap, Device, Skipped, Why};
