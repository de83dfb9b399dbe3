//! Bytes at offsets: where images are read from, so that a layer need not be a local file.
//!
//! This layer knows nothing of formats.

mod file;
mod memory;
mod publish;
mod writeback;

use std::fs::File;
use std::io;
use std::ops::Range;

pub use file::FileStorage;
pub use memory::MemoryStorage;
pub use publish::NewFile;
pub(crate) use writeback::start_writeback;

/// A source of bytes with random access, shared by threads.
///
/// The length is the one that was found when the storage was opened.
pub trait Storage: Send + Sync {
    /// The number of bytes that can be read.
    fn length(&self) -> u64;

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` where the storage ends before the buffer is full, else what the system says.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first range at or after `offset` that may hold anything but holes, or `None` where only holes follow.
    ///
    /// A storage that knows nothing of holes says that all of it is data.
    ///
    /// # Errors
    /// What the system says.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.length()).then(|| offset..self.length()))
    }

    /// The open file behind this storage, if there is one, for copies that stay in the kernel.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// A length or an offset as an index; [the crate](crate) is for 64-bit hosts.
#[expect(clippy::cast_possible_truncation, reason = "usize has at least 64 bits: asserted at the top of the crate")]
pub(crate) fn to_usize(value: u64) -> usize {
    value as usize
}
