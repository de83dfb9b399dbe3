//! One body for each target: any bytes are right or refused, but nothing panics, hangs, or grows without bound.

use std::path::Path;

use tempfile::TempDir;

mod agent_line;
mod compressed;
mod empty;
mod input;
mod manifest;
mod merge_chain;
mod names;
mod qmp_line;
mod read_image;
mod writer_model;

type Body = fn(&[u8]);

/// The names of the targets, and what each does with its bytes.
pub(crate) const TARGETS: [(&str, Body); 8] = [
    ("agent_line", agent_line::agent_line),
    ("compressed", compressed::compressed),
    ("manifest", manifest::manifest),
    ("merge_chain", merge_chain::merge_chain),
    ("names", names::names),
    ("qmp_line", qmp_line::qmp_line),
    ("read_image", read_image::read_image),
    ("writer_model", writer_model::writer_model),
];

/// A folder for what must be a file, in memory where the system has such a place.
fn folder() -> TempDir {
    let memory = Some(Path::new("/dev/shm")).filter(|folder| folder.is_dir());
    let place = memory.map_or_else(std::env::temp_dir, Path::to_owned);
    tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir_in(place).unwrap()
}
