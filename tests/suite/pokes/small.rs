//! An image in memory on a disk that is soon full: what makes a file long costs nothing here and fails.

use std::io;

use qmpbackup::storage::{MemoryStorage, Storage, WritableStorage};

/// The most that an image may grow.
const ROOM: u64 = 16 << 20;

pub(super) struct Small {
    image: MemoryStorage,
    most: u64,
}

impl Small {
    pub(super) fn new(image: &[u8]) -> Self {
        Self { image: MemoryStorage::new(image.to_vec()), most: image.len() as u64 + ROOM }
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        self.image.to_vec()
    }

    fn check(&self, end: Option<u64>) -> io::Result<()> {
        if end.is_none_or(|end| end > self.most) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Storage for Small {
    fn length(&self) -> u64 {
        self.image.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.image.read_exact_at(buffer, offset)
    }
}

impl WritableStorage for Small {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset.checked_add(bytes.len() as u64))?;
        self.image.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.check(Some(length))?;
        self.image.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
