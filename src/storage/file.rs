use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Storage;

/// A regular file or a block device, read by `pread`: a file that shrinks under us is an error, never a signal.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    length: u64,
}

impl FileStorage {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// `InvalidInput` where the path is neither a regular file nor a block device (opening never waits for the
    /// other end of a FIFO), else what the system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        Self::new(File::options().read(true).custom_flags(nonblock).open(path)?)
    }

    /// Takes an open file.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn new(mut file: File) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"));
        }
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, length })
    }
}

impl Storage for FileStorage {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= self.length {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // a block device or a file system that knows no holes
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..self.length)),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(start))?;
        Ok((start < self.length).then(|| start..end.min(self.length)))
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
