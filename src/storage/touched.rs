//! Which blocks of a storage were written to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{BlockSet, FileStorage, Storage, WritableStorage};

/// A file that remembers which of its blocks were written to, a bit for each.
///
/// Copies that stay in the kernel go around it, and are told by [`WritableStorage::will_be_written`].
#[derive(Debug)]
pub(crate) struct Touched {
    inner: Arc<FileStorage>,
    block: u64,
    blocks: BlockSet,
}

impl Touched {
    /// Watches a file in blocks of this size.
    #[must_use]
    pub(crate) fn new(inner: Arc<FileStorage>, block: u64) -> Self {
        Self { inner, block: block.max(1), blocks: BlockSet::default() }
    }

    /// Whether a block was written to.
    #[must_use]
    pub(crate) fn contains(&self, block: u64) -> bool {
        self.blocks.contains(block)
    }

    fn touch(&self, range: Range<u64>) {
        if !range.is_empty() {
            self.blocks.insert(range.start / self.block..range.end.div_ceil(self.block));
        }
    }
}

impl Storage for Touched {
    fn length(&self) -> u64 {
        self.inner.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(offset)
    }

    fn next_data_start(&self, offset: u64) -> io::Result<Option<u64>> {
        self.inner.next_data_start(offset)
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file()
    }
}

impl WritableStorage for Touched {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.will_be_written(offset..offset.saturating_add(bytes.len() as u64))?;
        self.inner.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        // what is behind the end now, and what the last block holds
        let (old, new) = (self.inner.length(), length);
        self.touch(old.min(new)..old.max(new));
        self.inner.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn will_be_written(&self, range: Range<u64>) -> io::Result<()> {
        self.touch(range);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_remembered_that_were_written_to_in_any_way() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        let touched = Touched::new(Arc::new(FileStorage::new(file).unwrap()), 1000);
        let seen = || (0..12).filter(|block| touched.contains(*block)).collect::<Vec<_>>();
        touched.write_all_at(&[1; 2], 999).unwrap();
        assert_eq!(seen(), [0, 1]);
        touched.will_be_written(3000..3000).unwrap();
        touched.will_be_written(3000..4000).unwrap();
        assert_eq!(seen(), [0, 1, 3]);
        touched.write_all_at(&[1], 9000).unwrap();
        assert_eq!(seen(), [0, 1, 3, 9]);
        touched.set_length(10_500).unwrap();
        assert_eq!(seen(), [0, 1, 3, 9, 10]);
        touched.set_length(7500).unwrap();
        assert_eq!(seen(), [0, 1, 3, 7, 8, 9, 10]);
    }
}
