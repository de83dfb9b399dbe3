//! Bytes in memory as storage.

use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Storage, WritableStorage, to_usize};

/// An image that lies in memory: for tests, fuzzing and images that never were files.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStorage {
    /// Takes the bytes of an image.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    /// A copy of the bytes as they are now.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.read().clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for MemoryStorage {
    fn clone(&self) -> Self {
        Self::new(self.to_vec())
    }
}

impl Storage for MemoryStorage {
    fn length(&self) -> u64 {
        self.read().len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.read();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let source = start
            .checked_add(buffer.len())
            .and_then(|end| bytes.get(start..end))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(source);
        Ok(())
    }
}

impl WritableStorage for MemoryStorage {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mut all = self.write();
        if bytes.is_empty() {
            return Ok(());
        }
        if end > all.len() as u64 {
            grow(&mut all, end)?;
        }
        all.get_mut(to_usize(offset)..to_usize(end)).unwrap_or_default().copy_from_slice(bytes);
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let mut all = self.write();
        if length > all.len() as u64 {
            return grow(&mut all, length);
        }
        all.truncate(to_usize(length));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Memory that the system does not have is a full disk.
fn grow(bytes: &mut Vec<u8>, length: u64) -> io::Result<()> {
    let more = to_usize(length).saturating_sub(bytes.len());
    bytes.try_reserve(more).map_err(|_| io::ErrorKind::StorageFull)?;
    bytes.resize(to_usize(length), 0);
    Ok(())
}
