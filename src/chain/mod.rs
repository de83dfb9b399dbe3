//! What lies in a backup folder: names, order, restore points.

mod name;

pub use name::{ImageName, Level};
