//! Bytes at offsets: where images are read from, so that a layer need not be a local file.
//!
//! This layer knows nothing of formats.

mod acl;
mod blocks;
mod file;
mod folder;
mod inside;
mod leftover;
mod link;
mod lock;
mod memory;
mod offload;
mod publish;
mod ranges;
mod removable;
mod touched;
mod writeback;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub(crate) use acl::access_list;
pub(crate) use blocks::BlockSet;
pub use file::FileStorage;
#[cfg(feature = "capture")]
pub(crate) use folder::sync_folder;
pub(crate) use folder::{create_folders, give_to_owner, parent, read_folder, sync_names};
pub(crate) use inside::{check_inside, is_trusted};
pub(crate) use link::{open_unlinked, set_link};
pub use lock::Access;
pub use memory::MemoryStorage;
pub(crate) use offload::{moved_block, offload_min, shares_blocks};
pub(crate) use publish::write_whole;
pub use publish::{NewFile, Undurable};
pub(crate) use ranges::{joined, push_joined};
pub(crate) use removable::why_unremovable;
pub(crate) use touched::Touched;
pub(crate) use writeback::{forget, start_writeback};

/// Bytes that file systems can leave out, at multiples of it.
pub(crate) const HOLE_MIN: usize = 4096;

/// Whether an error says that there is no room, or that a quota is used up.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A source of bytes with random access, shared by threads.
pub trait Storage: Send + Sync {
    /// The number of bytes that can be read: as it was found when the storage was opened, or as writes have made it.
    fn length(&self) -> u64;

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` where the storage ends before the buffer is full, else what the system says.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first range at or after `offset` that may hold anything but holes, or `None` where only holes follow. It is not
    /// empty, and begins no earlier.
    ///
    /// A storage that knows nothing of holes says that all of it is data.
    ///
    /// # Errors
    /// What the system says.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.length()).then(|| offset..self.length()))
    }

    /// Where the first range of [`next_data`](Storage::next_data) begins. Its end is not looked for, which some file systems
    /// do page by page.
    ///
    /// # Errors
    /// What the system says.
    fn next_data_start(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(self.next_data(offset)?.map(|data| data.start.max(offset)))
    }

    /// Where data begins in a range of which not all is holes. What is before it, or all of the range, reads as zeroes and need
    /// not be read.
    ///
    /// # Errors
    /// What the system says.
    fn next_data_within(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        Ok(self.next_data_start(range.start)?.filter(|start| *start < range.end))
    }

    /// The open file behind this storage, if there is one, for copies that stay in the kernel.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// The hole that was found last: where many small ranges lie in one, the system is asked once.
///
/// It is of one storage, and is not for one whose holes are being filled.
#[derive(Debug, Default)]
pub(crate) struct LastHole(Range<u64>);

impl LastHole {
    /// As [`Storage::next_data_within`].
    pub(crate) fn next_data_within(&mut self, storage: &dyn Storage, range: Range<u64>) -> io::Result<Option<u64>> {
        if !self.0.contains(&range.start) {
            let data = storage.next_data_within(range.start..storage.length().max(range.end))?;
            self.0 = range.start..data.unwrap_or(u64::MAX);
        }
        Ok(Some(self.0.end).filter(|data| *data < range.end))
    }
}

/// A storage whose bytes can be changed, by threads that keep out of each other's way.
///
/// What was written is on stable storage after the next [`sync`](WritableStorage::sync). Until then a power cut may keep
/// any of the writes and lose any other; of a single one, sectors of 512 bytes stay whole.
pub trait WritableStorage: Storage {
    /// Writes all of `bytes` from `offset` on; a storage that ends before that grows. Where there are none, nothing changes.
    ///
    /// # Errors
    /// What the system says; any part of the bytes may have been written then.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the storage longer, by zeroes, or shorter.
    ///
    /// # Errors
    /// What the system says.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Returns when all that was written is on stable storage.
    ///
    /// # Errors
    /// What the system says; nobody knows then what is there.
    fn sync(&self) -> io::Result<()>;

    /// Hears of bytes that are about to get into the [file](Storage::as_file) by other ways than these.
    ///
    /// # Errors
    /// Why they must not.
    fn will_be_written(&self, range: Range<u64>) -> io::Result<()> {
        let _ = range;
        Ok(())
    }
}

impl<S: Storage + ?Sized> Storage for &S {
    fn length(&self) -> u64 {
        (**self).length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        (**self).next_data(offset)
    }

    fn next_data_start(&self, offset: u64) -> io::Result<Option<u64>> {
        (**self).next_data_start(offset)
    }

    fn next_data_within(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        (**self).next_data_within(range)
    }

    fn as_file(&self) -> Option<&File> {
        (**self).as_file()
    }
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn length(&self) -> u64 {
        self.as_ref().length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_ref().read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.as_ref().next_data(offset)
    }

    fn next_data_start(&self, offset: u64) -> io::Result<Option<u64>> {
        self.as_ref().next_data_start(offset)
    }

    fn next_data_within(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        self.as_ref().next_data_within(range)
    }

    fn as_file(&self) -> Option<&File> {
        self.as_ref().as_file()
    }
}

/// A length or an offset as an index; [the crate](crate) is for 64-bit hosts.
#[expect(clippy::cast_possible_truncation, reason = "usize has at least 64 bits: asserted at the top of the crate")]
pub(crate) fn to_usize(value: u64) -> usize {
    value as usize
}
