//! What may stand between the header and the backing file name.

use zerocopy::FromBytes;

use super::address::HostOffset;
use super::error::{Allowed, Error, Invalid, Result};
use super::features::FeatureName;
use super::header::text;
use super::wire::{self, RawBitmapsExtension, RawExtension, RawFeatureName};
use crate::storage::to_usize;

/// The header extensions that this program knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extensions {
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// The name of the external data file.
    pub data_file: Option<String>,
    /// Names of feature bits.
    pub feature_names: Vec<FeatureName>,
    /// Where the bitmap directory is.
    pub bitmaps: Option<BitmapsExtension>,
    /// Types of extensions that this program does not know.
    pub unknown: Vec<u32>,
    /// For what QEMU does not open the image, although all of this can be understood.
    pub refused: Option<Invalid>,
}

/// Where the bitmap directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Where the data of the extension starts.
    pub offset: HostOffset,
    /// The number of bitmaps.
    pub nb_bitmaps: u32,
    /// Zero: QEMU does not open an image where it is something else.
    pub reserved: u32,
    /// Bytes in the directory.
    pub directory_size: u64,
    /// Where the directory starts.
    pub directory_offset: HostOffset,
}

impl Extensions {
    /// The extensions, and where their area ends.
    pub(super) fn parse(cluster: &[u8], start: u64, backing_file_offset: u64) -> Result<(Self, u64)> {
        let mut extensions = Self::default();
        let end = walk(cluster, start, backing_file_offset, |kind, data, offset| extensions.add(kind, data, offset))?;
        Ok((extensions, end))
    }

    fn add(&mut self, kind: u32, data: &[u8], offset: u64) -> Result<()> {
        match kind {
            wire::EXTENSION_BACKING_FORMAT => {
                self.backing_format = Some(text("the backing file format", offset, data)?);
                self.refused = check_backing_format(data, offset).err();
            }
            wire::EXTENSION_DATA_FILE => self.data_file = Some(text("the data file name", offset, data)?),
            wire::EXTENSION_FEATURE_NAMES => self.feature_names = feature_names(data),
            wire::EXTENSION_BITMAPS => self.bitmaps = Some(bitmaps(data, offset)?),
            wire::EXTENSION_CRYPTO => return Err(Error::Encrypted { method: "LUKS" }),
            other => self.unknown.push(other),
        }
        Ok(())
    }
}

/// Also where there is no backing file.
fn check_backing_format(data: &[u8], offset: u64) -> Result<(), Invalid> {
    let (value, most) = (data.len() as u64, wire::BACKING_FORMAT_MAX);
    let (field, offset, allowed) = ("backing format length", HostOffset(offset - 4), Allowed::Range(0, most));
    if value <= most { Ok(()) } else { Err(Invalid { field, offset, value, allowed }) }
}

/// Calls `each` with type, data and the data's offset of the extensions. Their area ends at the end marker, the backing
/// file name or the end of the cluster; returns where. Where that name begins in the header itself, there are none, as QEMU
/// sees it.
pub(super) fn walk<'a>(
    cluster: &'a [u8],
    start: u64,
    backing_file_offset: u64,
    mut each: impl FnMut(u32, &'a [u8], u64) -> Result<()>,
) -> Result<u64> {
    let limit = cluster.len() as u64;
    let end = if backing_file_offset == 0 { limit } else { limit.min(backing_file_offset) };
    let mut offset = start;
    while let Some(raw) = bytes(cluster, offset, 8, end).and_then(|bytes| RawExtension::read_from_bytes(bytes).ok()) {
        let (kind, length) = (raw.kind.get(), u64::from(raw.length.get()));
        let data = bytes(cluster, offset + 8, length, end).ok_or(Invalid {
            field: "header extension length",
            offset: HostOffset(offset + 4),
            value: length,
            allowed: Allowed::Range(0, end - offset - 8),
        })?;
        if kind == wire::EXTENSION_END {
            return Ok(offset + 8);
        }
        each(kind, data, offset + 8)?;
        offset += 8 + length.next_multiple_of(8);
    }
    Ok(end)
}

fn bytes(cluster: &[u8], offset: u64, length: u64, end: u64) -> Option<&[u8]> {
    let last = offset.checked_add(length).filter(|last| *last <= end)?;
    cluster.get(to_usize(offset)..to_usize(last))
}

fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let entries = data.chunks_exact(size_of::<RawFeatureName>());
    entries
        .filter_map(|bytes| RawFeatureName::read_from_bytes(bytes).ok())
        .map(|raw| {
            let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
            FeatureName { kind: raw.kind, bit: raw.bit, name: String::from_utf8_lossy(name).into_owned() }
        })
        .collect()
}

fn bitmaps(data: &[u8], offset: u64) -> Result<BitmapsExtension> {
    let raw = RawBitmapsExtension::read_from_bytes(data).map_err(|_| Invalid {
        field: "bitmaps extension length",
        offset: HostOffset(offset - 4),
        value: data.len() as u64,
        allowed: Allowed::Exactly(size_of::<RawBitmapsExtension>() as u64),
    })?;
    Ok(BitmapsExtension {
        offset: HostOffset(offset),
        nb_bitmaps: raw.nb_bitmaps.get(),
        reserved: raw.reserved.get(),
        directory_size: raw.directory_size.get(),
        directory_offset: HostOffset(raw.directory_offset.get()),
    })
}
