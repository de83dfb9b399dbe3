//! A raw image: the disk's bytes, with holes.
//!
//! Data extents of the file, zeroes included, hide what is below; holes show it. The format cannot say more: where a
//! guest's zeroes became a hole, the older bytes come back.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::qcow2::{Content, Extent, HostOffset};
use crate::storage::{Storage, push_joined};

/// A raw image and where its data is.
///
/// File systems may answer differently when they are asked again, so they are asked once.
pub(super) struct RawImage {
    storage: Arc<dyn Storage>,
    data: Vec<Range<u64>>,
}

impl fmt::Debug for RawImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawImage").field("length", &self.storage.length()).finish_non_exhaustive()
    }
}

impl RawImage {
    /// Finds the data extents.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn open(storage: Arc<dyn Storage>) -> io::Result<Self> {
        let mut data: Vec<Range<u64>> = Vec::new();
        let mut offset = 0;
        while let Some(range) = storage.next_data(offset)? {
            offset = range.end;
            push_joined(&mut data, range);
        }
        Ok(Self { storage, data })
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// The data extents, in order.
    pub(super) fn occupied(&self) -> &[Range<u64>] {
        &self.data
    }

    /// Calls `each` for the extents of a range that ends in the disk, in order and without gaps.
    pub(super) fn map(&self, guest: Range<u64>, each: &mut dyn FnMut(Extent)) {
        let first = self.data.partition_point(|data| data.end <= guest.start);
        let mut start = guest.start;
        for data in self.data.iter().skip(first).take_while(|data| data.start < guest.end) {
            let data = data.start.max(guest.start)..data.end.min(guest.end);
            if start < data.start {
                each(Extent { guest: start..data.start, content: Content::Unallocated });
            }
            start = data.end;
            each(Extent { content: Content::Data(HostOffset(data.start)), guest: data });
        }
        if start < guest.end {
            each(Extent { guest: start..guest.end, content: Content::Unallocated });
        }
    }
}
