//! Reads a table whose entries have lengths of their own, front to back.

use super::address::HostOffset;
use super::error::{Allowed, Error, Invalid, Result};
use crate::storage::{Storage, to_usize};

/// Bytes that are read at once.
const CHUNK: u64 = 64 << 10;

/// A place in a table. Memory is one chunk or one text, whichever is longer.
pub(super) struct Cursor<'a> {
    storage: &'a dyn Storage,
    what: &'static str,
    start: u64,
    next: u64,
    /// How long the table may be, and the field that is wrong where it is longer.
    limit: (u64, &'static str),
    chunk: Vec<u8>,
    chunk_start: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(
        storage: &'a dyn Storage,
        what: &'static str,
        start: HostOffset,
        limit: (u64, &'static str),
    ) -> Self {
        Self { storage, what, start: start.0, next: start.0, limit, chunk: Vec::new(), chunk_start: start.0 }
    }

    /// Where the next byte is.
    pub(super) fn offset(&self) -> HostOffset {
        HostOffset(self.next)
    }

    /// Bytes between the start of the table and the next byte.
    pub(super) fn done(&self) -> u64 {
        self.next - self.start
    }

    /// The next bytes.
    pub(super) fn take(&mut self, length: u64) -> Result<&[u8]> {
        let from = self.next;
        let end = self.step(length)?;
        if from < self.chunk_start || end > self.chunk_start + self.chunk.len() as u64 {
            self.fill(from, length)?;
        }
        let first = to_usize(from - self.chunk_start);
        Ok(self.chunk.get(first..first + to_usize(length)).unwrap_or_default())
    }

    /// The next bytes as a fixed number of them.
    pub(super) fn take_array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    /// The next bytes as a text; what is not UTF-8 is replaced: names need not be.
    pub(super) fn take_text(&mut self, length: u16) -> Result<String> {
        Ok(String::from_utf8_lossy(self.take(u64::from(length))?).into_owned())
    }

    /// Goes on to a multiple of eight bytes from the start of the table.
    pub(super) fn pad(&mut self) {
        self.next = self.start + self.done().next_multiple_of(8);
    }

    /// Goes on without reading.
    pub(super) fn skip(&mut self, length: u64) -> Result<()> {
        self.step(length).map(drop)
    }

    fn step(&mut self, length: u64) -> Result<u64> {
        let (limit, field) = self.limit;
        let (offset, file_length) = (HostOffset(self.start), self.storage.length());
        let value = self.done().saturating_add(length);
        if value > limit {
            return Err(Invalid { field, offset, value, allowed: Allowed::Range(0, limit) }.into());
        }
        match self.start.checked_add(value).filter(|end| *end <= file_length) {
            Some(end) => self.next = end,
            None => return Err(Error::Truncated { what: self.what, offset, length: value, file_length }),
        }
        Ok(self.next)
    }

    fn fill(&mut self, from: u64, length: u64) -> Result<()> {
        let there = self.storage.length() - from;
        self.chunk.resize(to_usize(length.max(CHUNK).min(there)), 0);
        self.chunk_start = from;
        let io = |source| Error::Io { what: self.what, offset: HostOffset(from), source };
        self.storage.read_exact_at(&mut self.chunk, from).map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn a_table_ends_at_its_limit_and_at_the_end_of_the_file() {
        let storage = MemoryStorage::new((0..100).collect());
        let mut cursor = Cursor::new(&storage, "a table", HostOffset(10), (50, "size"));
        assert_eq!(cursor.take_array::<3>().unwrap(), [10, 11, 12]);
        cursor.pad();
        assert_eq!(cursor.take(2).unwrap(), [18, 19]);
        assert!(matches!(cursor.take(41), Err(Error::Invalid(_))));
        assert_eq!(cursor.take(40).unwrap().len(), 40);
        let mut cursor = Cursor::new(&storage, "a table", HostOffset(90), (50, "size"));
        assert!(matches!(cursor.skip(11), Err(Error::Truncated { length: 11, .. })));
        assert_eq!(cursor.take(10).unwrap().last(), Some(&99));
    }
}
