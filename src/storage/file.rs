//! Files as storage, with their holes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::Errno;

use super::{Storage, WritableStorage};

/// A regular file or a block device, read by `pread`: a file that shrinks under us is an error, never a signal.
#[derive(Debug)]
pub struct FileStorage {
    pub(super) file: File,
    length: AtomicU64,
    /// When it was written to last before it was opened, in seconds and nanoseconds. None of a device.
    modified: Option<(i64, i64)>,
    /// Whether it should have been locked, and the system had no lock.
    pub(super) unlocked: AtomicBool,
}

impl FileStorage {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// `InvalidInput` where the path is neither a regular file nor a block device (opening never waits for the
    /// other end of a FIFO), else what the system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
    }

    /// Opens a regular file for reading and writing.
    ///
    /// # Errors
    /// `InvalidInput` where the path is no regular file, else what the system says.
    pub fn open_writable(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Self::new(file)
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes an open file.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn new(mut file: File) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        // an open file is there, whatever its file system says
        let there = file.metadata().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::other(error),
            _ => error,
        })?;
        let kind = there.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"));
        }
        let length = file.seek(SeekFrom::End(0))?;
        let modified = kind.is_file().then(|| (there.mtime(), there.mtime_nsec()));
        Ok(Self { file, length: AtomicU64::new(length), modified, unlocked: AtomicBool::new(false) })
    }

    /// Whether somebody has written to the file since it was opened, as far as its time and length tell.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn is_changed(&self) -> io::Result<bool> {
        let Some(modified) = self.modified else { return Ok(false) };
        let now = self.file.metadata()?;
        // some file systems forget parts of a second later
        let is_other = (now.mtime(), now.mtime_nsec()) > modified || now.mtime() < modified.0;
        Ok(is_other || now.len() != self.length())
    }

    fn is_cut_short(&self) -> io::Result<bool> {
        Ok(rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))? < self.length())
    }
}

impl Storage for FileStorage {
    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let length = self.length();
        let Some(start) = self.next_data_start(offset)? else { return Ok(None) };
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(start)) {
            Ok(end) => Ok(Some(start..end.min(length))),
            // a block device or a file system that knows no holes
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(start..length)),
            Err(error) => Err(error.into()),
        }
    }

    fn next_data_start(&self, offset: u64) -> io::Result<Option<u64>> {
        let length = self.length();
        if offset >= length {
            return Ok(None);
        }
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => Ok((start < length).then_some(start)),
            // behind the end there is no data, either
            Err(Errno::NXIO) if self.is_cut_short()? => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::NXIO) => Ok(None),
            // as above
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(error) => Err(error.into()),
        }
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

impl WritableStorage for FileStorage {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(&self.file, bytes, offset)?;
        if !bytes.is_empty() {
            self.length.fetch_max(offset.saturating_add(bytes.len() as u64), Ordering::Relaxed);
        }
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)?;
        self.length.store(length, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// An open file as it is, whoever else changes it; of a block device, a [`FileStorage`] knows the length.
impl Storage for File {
    fn length(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn as_file(&self) -> Option<&File> {
        Some(self)
    }
}

impl WritableStorage for File {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behind_the_end_of_a_file_that_was_cut_short_is_no_hole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let storage = FileStorage::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(storage.next_data_start(4096).unwrap(), None);
        file.set_len(1 << 19).unwrap();
        for offset in [0, 4096, 1 << 19, (1 << 20) - 1] {
            assert_eq!(storage.next_data(offset).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{offset}");
        }
        assert_eq!(storage.next_data_start(1 << 20).unwrap(), None);
        file.set_len(1 << 21).unwrap();
        assert_eq!(storage.next_data_start(4096).unwrap(), None);
    }

    #[test]
    fn who_writes_to_a_file_that_is_open_is_noticed() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_500);
        file.set_modified(long_ago).unwrap();
        let storage = FileStorage::new(file.try_clone().unwrap()).unwrap();
        assert!(!storage.is_changed().unwrap());
        FileExt::write_all_at(&file, b"x", 0).unwrap();
        assert!(storage.is_changed().unwrap());
        for (milliseconds, is_changed) in [(1_501, true), (2_000, true), (900, true), (1_000, false), (1_500, false)] {
            let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(milliseconds);
            file.set_modified(time).unwrap();
            assert_eq!(storage.is_changed().unwrap(), is_changed, "{milliseconds}");
        }
        file.set_len(4095).unwrap();
        file.set_modified(long_ago).unwrap();
        assert!(storage.is_changed().unwrap());
    }
}
