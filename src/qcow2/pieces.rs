//! Tables read piece by piece. Holes are left out: they cost nothing, however long they claim to be.

use std::ops::Range;

use super::address::HostOffset;
use super::error::{Error, Result};
use super::image::read_to_end;
use crate::storage::{Storage, to_usize};

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// Where pieces begin and end: no entry of a table is in two of them.
const SECTOR: u64 = 512;

/// Calls `each` for the parts of a range that may hold anything but zeroes, with where they begin. Behind the end of the
/// file there are zeroes.
pub(super) fn read_pieces(
    storage: &dyn Storage,
    range: Range<u64>,
    what: &'static str,
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut start = range.start;
    loop {
        let failed = |source| Error::Io { what, offset: HostOffset(start), source };
        let Some(data) = storage.next_data_within(start..range.end).map_err(failed)? else { return Ok(()) };
        start += data.saturating_sub(start) / SECTOR * SECTOR;
        let end = start.saturating_add(PIECE).min(range.end);
        buffer.resize(to_usize(end - start), 0);
        read_to_end(storage, buffer, HostOffset(start), what)?;
        each(start, buffer)?;
        start = end;
    }
}
