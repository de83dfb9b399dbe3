//! A backup folder, as a run reads and writes it.

pub(crate) mod files;
pub(crate) mod history;
pub(crate) mod image;
pub(crate) mod journal;
pub(crate) mod lock;
pub(crate) mod place;
pub(crate) mod target;
