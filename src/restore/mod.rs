//! Restoring: a chain of images becomes one disk again.
mod copier;
mod error;
mod format;
mod layer;
mod layers;
mod limiter;
mod merge;
mod observer;
mod output;
mod plan;
mod pool;
mod resolve;
mod sink;
mod slices;
mod survey;

pub use error::{Error, ErrorKind, Result};
pub use layer::{Format, Layer};
pub use layers::{Layers, Source};
pub use merge::{Merge, MergeOptions, Merged, Output, OutputFormat};
pub use observer::{Observer, Phase, Silent, Warning};
pub use plan::Plan;
pub use survey::{Facts, survey};
