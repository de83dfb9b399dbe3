//! Files as storage, with their holes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::Errno;

use super::{Storage, WritableStorage};

/// A regular file or a block device, read by `pread`: a file that shrinks under us is an error, never a signal.
#[derive(Debug)]
pub struct FileStorage {
    pub(super) file: File,
    length: AtomicU64,
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
        Ok(Self { file, length: AtomicU64::new(length), unlocked: AtomicBool::new(false) })
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
            Err(Errno::NXIO) => Ok(None),
            // as above
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(error) => Err(error.into()),
        }
    }

    fn length_now(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

impl WritableStorage for FileStorage {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(&self.file, bytes, offset)?;
        self.length.fetch_max(offset.saturating_add(bytes.len() as u64), Ordering::Relaxed);
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

/// An open file as it is, whoever else changes it.
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
