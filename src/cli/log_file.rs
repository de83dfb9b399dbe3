//! The file that the log is appended to, as well.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::failure::Failure;
use crate::chain::{BOOKKEEPING, ImageName, Manifest};
use crate::qcow2::MAGIC;
use crate::storage;

/// Opens a log, which need not be a file: a terminal will do, and a pipe that somebody reads.
pub(super) fn open(path: &Path) -> Result<File, Failure> {
    if is_of_backup(path) {
        return Err(Failure::LogOfBackup { path: path.to_owned() });
    }
    open_to_append(path).map_err(|source| Failure::LogFile { path: path.to_owned(), source })
}

fn open_to_append(path: &Path) -> io::Result<File> {
    // opening says what is wrong
    let _ = std::fs::create_dir_all(storage::parent(path));
    // else a pipe waits for somebody to read it
    let file = File::options().append(true).create(true).mode(0o644).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a block device"));
    }
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// Whether it is an image, or what is known of one; also where a link leads to it.
fn is_of_backup(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    let real = path.canonicalize().or_else(|_| Ok::<_, io::Error>(storage::parent(path).canonicalize()?.join(name)));
    let real = real.unwrap_or_else(|_| path.to_owned());
    real.iter().any(|name| name == BOOKKEEPING)
        || real.file_name().is_some_and(|name| ImageName::parse(name).is_some())
        || Manifest::path(&real).exists()
        || starts_as_image(&real)
}

fn starts_as_image(path: &Path) -> bool {
    let mut start = [0; 4];
    let is_file = path.metadata().is_ok_and(|there| there.is_file());
    is_file
        && File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok()
        && u32::from_be_bytes(start) == MAGIC
}
