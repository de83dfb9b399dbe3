//! Tables read piece by piece. Holes are left out: they cost nothing, however long they claim to be.

use std::ops::Range;

use super::address::HostOffset;
use super::entry::SECTOR;
use super::error::{Error, Result};
use super::image::read_to_end;
use crate::storage::{LastHole, Storage, to_usize};

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// Room for a piece, and what is known of the storage: many tables may lie in one hole.
#[derive(Default)]
pub(super) struct Pieces {
    buffer: Vec<u8>,
    hole: LastHole,
}

impl Pieces {
    /// Calls `each` for the parts of a range that may hold anything but zeroes, with where they begin. Behind the end of the
    /// file there are zeroes.
    pub(super) fn read(
        &mut self,
        storage: &dyn Storage,
        range: Range<u64>,
        what: &'static str,
        mut each: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut start = range.start;
        loop {
            let failed = |source| Error::Io { what, offset: HostOffset(start), source };
            let data = self.hole.next_data_within(storage, start..range.end).map_err(failed)?;
            let Some(data) = data else { return Ok(()) };
            // no entry of a table is in two of them
            start += data.saturating_sub(start) / SECTOR * SECTOR;
            let end = start.saturating_add(PIECE).min(range.end);
            self.buffer.resize(to_usize(end - start), 0);
            read_to_end(storage, &mut self.buffer, HostOffset(start), what)?;
            each(start, &self.buffer)?;
            start = end;
        }
    }
}
