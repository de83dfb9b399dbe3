//! The first 48 bytes of a file with checksums.

use std::io;
use std::ops::Range;
use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{BLOCK, ChecksumsError};
use crate::storage::Storage;

const MAGIC: [u8; 8] = *b"QMPBSUMS";
const VERSION: u32 = 1;

/// As it stands in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: U32,
    block: U32,
    length: U64,
    unsettled_first: U64,
    unsettled_count: U64,
    list: U32,
    header: U32,
}

const _: () = assert!(size_of::<Wire>() == 48, "the header has 48 bytes");

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the image.
    pub(super) length: u64,
    /// The first block that is unsettled, and how many are.
    pub(super) unsettled: (u64, u64),
    /// The CRC-32 of the list.
    pub(super) list: u32,
}

impl Header {
    /// How long it is.
    pub(super) const BYTES: u64 = size_of::<Wire>() as u64;
    /// Where the CRC-32 of the list is.
    pub(super) const LIST_AT: u64 = 40;

    /// Reads and checks it.
    pub(super) fn read(file: &dyn Storage, path: &Path) -> Result<Self, ChecksumsError> {
        let mut bytes = [0; size_of::<Wire>()];
        let length = file.length();
        if length < Self::BYTES {
            return Err(ChecksumsError::damaged(path, "the length of the file", 0, length, Self::BYTES));
        }
        let read = file.read_exact_at(&mut bytes, 0);
        read.map_err(|source| ChecksumsError::Io { path: path.to_owned(), source })?;
        Self::parse(&bytes, path)
    }

    fn parse(bytes: &[u8; size_of::<Wire>()], path: &Path) -> Result<Self, ChecksumsError> {
        let wire: Wire = zerocopy::transmute!(*bytes);
        let damaged =
            |field, offset, value, expected| Err(ChecksumsError::damaged(path, field, offset, value, expected));
        if wire.magic != MAGIC {
            return damaged("the magic", 0, u64::from_be_bytes(wire.magic), u64::from_be_bytes(MAGIC));
        }
        let sum = Self::sum(bytes);
        if wire.header.get() != sum {
            return damaged("the CRC-32 of the header", 44, wire.header.get().into(), sum.into());
        }
        if wire.version.get() != VERSION {
            return Err(ChecksumsError::Version { path: path.to_owned(), version: wire.version.get() });
        }
        if u64::from(wire.block.get()) != BLOCK {
            return damaged("the size of a block", 12, wire.block.get().into(), BLOCK);
        }
        let unsettled = (wire.unsettled_first.get(), wire.unsettled_count.get());
        Ok(Self { length: wire.length.get(), unsettled, list: wire.list.get() })
    }

    /// As it stands in the file.
    pub(super) fn bytes(&self) -> [u8; size_of::<Wire>()] {
        let mut wire = Wire {
            magic: MAGIC,
            version: VERSION.into(),
            block: u32::try_from(BLOCK).unwrap_or(u32::MAX).into(),
            length: self.length.into(),
            unsettled_first: self.unsettled.0.into(),
            unsettled_count: self.unsettled.1.into(),
            list: self.list.into(),
            header: 0.into(),
        };
        wire.header = Self::sum(wire.as_bytes()).into();
        zerocopy::transmute!(wire)
    }

    /// The CRC-32 of all before it.
    fn sum(bytes: &[u8]) -> u32 {
        crc32fast::hash(bytes.get(..44).unwrap_or_default())
    }

    pub(super) fn blocks(&self) -> u64 {
        self.length.div_ceil(BLOCK)
    }

    pub(super) fn unsettled(&self) -> Range<u64> {
        let (first, count) = self.unsettled;
        first.min(self.blocks())..first.saturating_add(count).min(self.blocks())
    }

    /// Writes it over the one that is there, in one sector.
    pub(super) fn overwrite(&self, file: &std::fs::File) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(file, &self.bytes(), 0)?;
        file.sync_all()
    }
}
