//! A CRC-32 for each block of an image's file: `.qmpbackup/<image>.crc32` beside its manifest.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "QMPBSUMS"
//!      8      4  version, 2
//!     12      4  bytes of a block, 65536; the last one is as long as what is left of the image
//!     16      8  bytes of the image
//!     24      8  the first block that is unsettled
//!     32      8  how many are from there on; 0 where all is settled
//!     40     16  the id of the image, as its manifest has it
//!     56      4  CRC-32 of the list
//!     60      4  CRC-32 of the 60 bytes before
//!     64      4  for each block its CRC-32, and nothing after the last
//! ```
//!
//! Version 1, which is made for images whose manifests have no id, does not have those 16 bytes. Later versions keep what
//! these 64 bytes are, so that they can be told from damage.
//!
//! Numbers are big-endian. The CRC is that of zip and Ethernet (polynomial 0x04c11db7, reflected, as in IEEE 802.3). So any
//! flipped bit of an image is in a block whose sum does not fit, and one of this file is not taken for one of the image.
//!
//! Unsettled are blocks that a program was about to change in place: until it ends, or is run again, what they hold may be
//! the old or the new, and their sums say nothing. See [`Renewal`].
//!
//! Nothing is mapped, and of the list no more is in memory than is asked for.

mod compute;
mod header;
mod known;
mod renew;
#[cfg(test)]
mod tests;

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use byteorder::{BigEndian, ByteOrder};

pub use compute::{SumError, block_sums, create};
pub(crate) use compute::{ZEROES, create_watched};
use header::Header;
pub(crate) use known::KnownSums;
pub(crate) use renew::Renewal;

use super::json_file::is_absent;
use super::manifest::{Manifest, beside};
use super::name::partial_path;
use super::{ImageId, Unfinished};
use crate::storage::{FileStorage, Storage, open_unlinked, to_usize};

/// Bytes of a block.
pub const BLOCK: u64 = 1 << 16;

/// Bytes of a sum.
const SUM: u64 = 4;

/// Bytes of images whose lists are read whatever the image is: those have 64 MiB at most.
const FREE: u64 = 1 << 40;

/// Bytes of the list that are read at once.
const PART: u64 = 1 << 20;

/// The end of the file's name.
const EXTENSION: &str = "crc32";

/// The checksums of an image, open for reading.
#[derive(Debug)]
pub struct Checksums {
    path: PathBuf,
    file: FileStorage,
    header: Header,
}

/// Why there are checksums that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChecksumsError {
    /// The file, or what tells whose checksums it has, cannot be read.
    #[error("cannot open or read {}", path.display())]
    Io {
        /// The file that cannot be read.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A later version of this program has made it.
    #[error("{} is of version {version}: this program knows 1 and 2", path.display())]
    Version {
        /// The file with the checksums.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// They were made for another image than the manifest.
    #[error("{} has the checksums of image {id}, and the manifest is of image {expected}", path.display())]
    Foreign {
        /// The file with the checksums.
        path: PathBuf,
        /// The id that it has.
        id: ImageId,
        /// The id that the manifest has.
        expected: ImageId,
    },
    /// The file itself is damaged.
    #[error("{} is damaged: {field} at offset {offset} is {value:#x}, not {expected:#x}", path.display())]
    Damaged {
        /// The file with the checksums.
        path: PathBuf,
        /// Which field tells.
        field: &'static str,
        /// Where it is.
        offset: u64,
        /// What it holds.
        value: u64,
        /// What it should.
        expected: u64,
    },
}

impl ChecksumsError {
    fn damaged(path: &Path, field: &'static str, offset: u64, value: u64, expected: u64) -> Self {
        Self::Damaged { path: path.to_owned(), field, offset, value, expected }
    }
}

impl Checksums {
    /// Where the checksums of an image are, if it has some.
    #[must_use]
    pub fn path(image: &Path) -> PathBuf {
        beside(image, EXTENSION)
    }

    /// Opens the checksums of an image, and checks them; `None` where it has none.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn open(image: &Path) -> Result<Option<Self>, ChecksumsError> {
        let sums = Self::open_any(image, FileStorage::open)?;
        // what is damaged they say also where it cannot be read whose they are
        sums.map(|sums| match sums.foreign_to(image) {
            Ok(Some(foreign)) => Err(foreign),
            Ok(None) | Err(_) => Ok(sums),
        })
        .transpose()
    }

    /// The same for one who will change the header: not over a link, nor where the file has other names.
    ///
    /// # Errors
    /// As with [`open`](Self::open).
    pub(crate) fn open_writable(image: &Path) -> Result<Option<Self>, ChecksumsError> {
        let sums = Self::open_any(image, |path| {
            let file = open_unlinked(OpenOptions::new().read(true).write(true), path)?;
            if file.metadata()?.nlink() > 1 {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "has other names (hard links): copy it first",
                ));
            }
            FileStorage::new(file)
        })?;
        let Some(sums) = sums else { return Ok(None) };
        sums.foreign_to(image)?.map_or(Ok(Some(sums)), Err)
    }

    /// Opens and checks them, whoever's they are.
    fn open_any(
        image: &Path,
        open: impl FnOnce(&Path) -> io::Result<FileStorage>,
    ) -> Result<Option<Self>, ChecksumsError> {
        let path = Self::path(image);
        let file = match open(&path) {
            Ok(file) => file,
            Err(error) if is_absent(&path, &error) => return Ok(None),
            Err(source) => return Err(ChecksumsError::Io { path, source }),
        };
        let header = Header::read(&file, &path)?;
        // a list that is huge must be that of a huge image: it is read here
        let length = image.metadata().map_or(0, |image| image.len());
        if header.length > FREE.max(length.saturating_mul(2)) {
            return Err(ChecksumsError::damaged(&path, "the length of the image", 16, header.length, length));
        }
        let sums = Self { path, file, header };
        sums.check_list()?;
        Ok(Some(sums))
    }

    /// Why they are not those of the image, if the manifests say so.
    fn foreign_to(&self, image: &Path) -> Result<Option<ChecksumsError>, ChecksumsError> {
        let Some((id, expected)) = self.id().zip(id_of(image)?) else { return Ok(None) };
        let is_foreign = id != expected && !was(image, id)?;
        Ok(is_foreign.then(|| ChecksumsError::Foreign { path: self.path.clone(), id, expected }))
    }

    /// How long an image was when its checksums were made, where that is not what it is now. Nothing where it has none that
    /// can be used, or where all of it is unsettled. Where it is, only their header is read.
    #[must_use]
    pub fn other_length(image: &Path, length: u64) -> Option<u64> {
        let path = Self::path(image);
        let header = Header::read(&FileStorage::open(&path).ok()?, &path).ok()?;
        if header.length == length {
            return None;
        }
        let sums = Self::open(image).ok()??;
        let is_settled = sums.unsettled().is_empty() || sums.unsettled().end < sums.blocks();
        (is_settled && sums.length() != length).then_some(sums.length())
    }

    /// The id of the image that the checksums beside it have, whatever else they hold.
    pub(super) fn id_beside(image: &Path) -> Option<ImageId> {
        let path = Self::path(image);
        Header::read(&FileStorage::open(&path).ok()?, &path).ok()?.id
    }

    /// The id that the checksums beside an image have, where they are those of another one than that of this id.
    /// Not where a run was interrupted that gives all of its files new names.
    pub(super) fn id_of_another(image: &Path, id: ImageId) -> Option<ImageId> {
        // mostly that is all there is to read
        Self::id_beside(image).filter(|beside| *beside != id)?;
        let is_replaced = partial_path(image).symlink_metadata().is_ok();
        match Self::open(image) {
            Err(ChecksumsError::Foreign { id, .. }) if !is_replaced => Some(id),
            _ => None,
        }
    }

    /// The id of the image, where it had one when they were made.
    #[must_use]
    pub fn id(&self) -> Option<ImageId> {
        self.header.id
    }

    /// Bytes of the image's file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.header.length
    }

    /// The number of [blocks](BLOCK).
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.header.blocks()
    }

    /// The blocks whose sums say nothing.
    #[must_use]
    pub fn unsettled(&self) -> Range<u64> {
        self.header.unsettled()
    }

    /// The CRC-32 of all sums: it tells the state of one image from that of another.
    #[must_use]
    pub fn list_sum(&self) -> u32 {
        self.header.list
    }

    /// The sums of these blocks, as far as there are any.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn read(&self, blocks: Range<u64>) -> Result<Vec<u32>, ChecksumsError> {
        let [start, end] = [blocks.start, blocks.end].map(|block| block.min(self.blocks()));
        let count = end.saturating_sub(start);
        let mut bytes = vec![0; to_usize(count * SUM)];
        let read = self.file.read_exact_at(&mut bytes, self.header.size() + start * SUM);
        read.map_err(|source| ChecksumsError::Io { path: self.path.clone(), source })?;
        let mut sums = vec![0; to_usize(count)];
        BigEndian::read_u32_into(&bytes, &mut sums);
        Ok(sums)
    }

    /// Whether the list is what was written.
    fn check_list(&self) -> Result<(), ChecksumsError> {
        let damaged =
            |field, offset, value, expected| Err(ChecksumsError::damaged(&self.path, field, offset, value, expected));
        let expected = self.header.size().saturating_add(self.blocks().saturating_mul(SUM));
        if self.file.length() != expected {
            return damaged("the length of the file", 0, self.file.length(), expected);
        }
        let mut hasher = crc32fast::Hasher::new();
        let mut bytes = vec![0; to_usize(PART.min(expected))];
        let mut offset = self.header.size();
        while offset < expected {
            let length = to_usize((expected - offset).min(PART));
            let part = bytes.get_mut(..length).unwrap_or_default();
            let read = self.file.read_exact_at(part, offset);
            read.map_err(|source| ChecksumsError::Io { path: self.path.clone(), source })?;
            hasher.update(part);
            offset += part.len() as u64;
        }
        let sum = hasher.finalize();
        if sum == self.header.list {
            Ok(())
        } else {
            damaged("the CRC-32 of the list", self.header.list_at(), sum.into(), self.header.list.into())
        }
    }
}

/// Whether an image had this id before the work that was begun in it, which has given it another one.
fn was(image: &Path, id: ImageId) -> Result<bool, ChecksumsError> {
    match Unfinished::read(image) {
        Err(source) if source.kind() != io::ErrorKind::InvalidData => {
            Err(ChecksumsError::Io { path: Unfinished::path(image), source })
        }
        begun => Ok(begun.is_ok_and(|begun| begun.is_some_and(|begun| begun.full_id == Some(id)))),
    }
}

/// The id of an image, where it has a manifest that tells it. What cannot be read now may tell one later.
fn id_of(image: &Path) -> Result<Option<ImageId>, ChecksumsError> {
    match Manifest::read_again(image) {
        Ok(manifest) => Ok(manifest.and_then(|manifest| manifest.id)),
        Err(source) => Err(ChecksumsError::Io { path: Manifest::path(image), source }),
    }
}
