//! The first bytes of a file with checksums.

use std::io;
use std::ops::Range;
use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{BLOCK, ChecksumsError};
use crate::chain::ImageId;
use crate::storage::{Storage, to_usize};

const MAGIC: [u8; 8] = *b"QMPBSUMS";

/// Bytes of the CRC-32 that ends a header.
const SUM: usize = 4;

/// What both versions begin with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct Start {
    magic: [u8; 8],
    version: U32,
    block: U32,
    length: U64,
    unsettled_first: U64,
    unsettled_count: U64,
}

/// Version 1, of images without an id.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire1 {
    start: Start,
    list: U32,
    header: U32,
}

/// Version 2.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire2 {
    start: Start,
    id: [u8; 16],
    list: U32,
    header: U32,
}

const _: () = assert!(size_of::<Wire1>() == 48 && size_of::<Wire2>() == 64, "headers have 48 and 64 bytes");

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the image.
    pub(super) length: u64,
    /// The first block that is unsettled, and how many are.
    pub(super) unsettled: (u64, u64),
    /// The image's; none in version 1.
    pub(super) id: Option<ImageId>,
    /// The CRC-32 of the list.
    pub(super) list: u32,
}

impl Header {
    /// Bytes of the shortest.
    const LEAST: usize = size_of::<Wire1>();

    /// Reads and checks it.
    pub(super) fn read(file: &dyn Storage, path: &Path) -> Result<Self, ChecksumsError> {
        let mut bytes = [0; size_of::<Wire2>()];
        let length = file.length().min(bytes.len() as u64);
        let least = Self::LEAST as u64;
        if length < least {
            return Err(ChecksumsError::damaged(path, "the length of the file", 0, length, least));
        }
        let start = bytes.get_mut(..to_usize(length)).unwrap_or_default();
        let read = file.read_exact_at(start, 0);
        read.map_err(|source| ChecksumsError::Io { path: path.to_owned(), source })?;
        Self::parse(&bytes, path)
    }

    /// What lies behind the end of the file is zeroes.
    fn parse(bytes: &[u8; size_of::<Wire2>()], path: &Path) -> Result<Self, ChecksumsError> {
        let wire: Wire2 = zerocopy::transmute!(*bytes);
        let Start { magic, version, block, length, unsettled_first, unsettled_count } = wire.start;
        let damaged =
            |field, offset, value, expected| Err(ChecksumsError::damaged(path, field, offset, value, expected));
        if magic != MAGIC {
            return damaged("the magic", 0, u64::from_be_bytes(magic), u64::from_be_bytes(MAGIC));
        }
        let (id, list, header, header_at) = match (version.get(), Wire1::read_from_prefix(bytes)) {
            (1, Ok((wire, _))) => (None, wire.list, wire.header, size_of::<Wire1>() - SUM),
            // of later versions, too, this much stays as it is
            _ => (Some(ImageId::from_bytes(wire.id)), wire.list, wire.header, size_of::<Wire2>() - SUM),
        };
        let sum = crc32fast::hash(bytes.get(..header_at).unwrap_or_default());
        if header.get() != sum {
            return damaged("the CRC-32 of the header", header_at as u64, header.get().into(), sum.into());
        }
        if !(1..=2).contains(&version.get()) {
            return Err(ChecksumsError::Version { path: path.to_owned(), version: version.get() });
        }
        if u64::from(block.get()) != BLOCK {
            return damaged("the size of a block", 12, block.get().into(), BLOCK);
        }
        let unsettled = (unsettled_first.get(), unsettled_count.get());
        Ok(Self { length: length.get(), unsettled, id, list: list.get() })
    }

    /// As it stands in the file.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let start = Start {
            magic: MAGIC,
            version: if self.id.is_some() { 2 } else { 1 }.into(),
            block: u32::try_from(BLOCK).unwrap_or(u32::MAX).into(),
            length: self.length.into(),
            unsettled_first: self.unsettled.0.into(),
            unsettled_count: self.unsettled.1.into(),
        };
        let mut bytes = start.as_bytes().to_vec();
        if let Some(id) = self.id {
            bytes.extend(id.to_bytes());
        }
        bytes.extend(self.list.to_be_bytes());
        bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
        bytes
    }

    /// How long it is, which is where the list begins.
    pub(super) fn size(&self) -> u64 {
        (if self.id.is_some() { size_of::<Wire2>() } else { size_of::<Wire1>() }) as u64
    }

    /// Where the CRC-32 of the list is.
    pub(super) fn list_at(&self) -> u64 {
        self.size() - 8
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
