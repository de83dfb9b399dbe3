//! The directory of persistent bitmaps.

use std::collections::HashSet;

use super::address::HostOffset;
use super::cursor::Cursor;
use super::error::{Allowed, Invalid, Result};
use super::extensions::BitmapsExtension;
use super::features::Features;
use super::geometry::Geometry;
use super::header::{Header, Table};
use super::image::Image;
use super::wire::{self, RawBitmap};
use crate::storage::Storage;

/// A persistent dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// The binary logarithm of the guest bytes that a bit stands for.
    pub granularity_bits: u32,
    /// It was not saved: what it says may be old.
    pub in_use: bool,
    /// It records what is written.
    pub auto: bool,
    /// It may be used in spite of extra data that nobody knows; for QEMU it may not.
    pub extra_data_compatible: bool,
    /// Bytes of extra data; none are defined, and QEMU opens no image with some.
    pub extra_data_size: u32,
    /// The table of clusters that hold its bits.
    pub table: Table,
}

impl Image {
    /// The bitmaps, in the order of their directory.
    ///
    /// Where autoclear bit 0 is not set, some program that knows no bitmaps wrote to the image. As in QEMU there
    /// are none then, whatever the extension says.
    ///
    /// # Errors
    /// What is wrong with the directory: [`Error::Invalid`](super::Error::Invalid), [`Error::Truncated`](super::Error::Truncated), [`Error::Io`](super::Error::Io).
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let mut bitmaps = Vec::new();
        let Some(extension) = consistent(self.header()) else { return Ok(bitmaps) };
        read(self.storage(), self.header(), extension, |entry| {
            let bitmap = entry.bitmap?;
            bitmap.table.check_inside(self.storage(), "a bitmap table")?;
            bitmaps.push(bitmap);
            Ok(())
        })?;
        Ok(bitmaps)
    }

    /// Whether a [`Writer`](super::Writer) could keep the bitmaps on a disk of this size.
    ///
    /// # Errors
    /// As with [`Image::bitmaps`].
    pub(crate) fn bitmaps_fit(&self, size: u64) -> Result<bool> {
        let bitmaps = self.bitmaps()?;
        let kept = bitmaps.iter().filter(|bitmap| !bitmap.in_use);
        Ok(largest(kept, size, self.header().geometry)
            .is_none_or(|bytes| (1..=wire::BITMAP_BYTES_MAX).contains(&bytes)))
    }
}

/// An entry of the directory.
#[derive(Debug)]
pub(super) struct Entry {
    /// Where it is.
    pub(super) offset: HostOffset,
    /// What it says, or which field is out of its range.
    pub(super) bitmap: Result<Bitmap, Invalid>,
    /// For what QEMU does not open the image, although what the entry says can be understood.
    pub(super) refused: Option<Invalid>,
}

/// What an entry of a bitmap table leads to: the bits of as many granules as a cluster has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BitmapTableEntry {
    Zeroes,
    Ones,
    At(HostOffset),
}

impl BitmapTableEntry {
    pub(super) fn decode(value: u64, geometry: Geometry) -> Result<Self, Allowed> {
        let host = value & wire::OFFSET_MASK;
        let known = if host == 0 { wire::BITMAP_ENTRY_ONES } else { wire::OFFSET_MASK };
        match value {
            0 => Ok(Self::Zeroes),
            wire::BITMAP_ENTRY_ONES => Ok(Self::Ones),
            _ if value & !known != 0 => Err(Allowed::Bits(known)),
            _ if geometry.offset_in_cluster(host) != 0 => Err(Allowed::MultipleOf(geometry.cluster_size())),
            _ => Ok(Self::At(HostOffset(host))),
        }
    }

    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => wire::BITMAP_ENTRY_ONES,
            Self::At(host) => host.0,
        }
    }
}

/// The bytes of the largest of these bitmaps for a disk of this size: none for a disk without bytes.
pub(super) fn largest<'a>(bitmaps: impl Iterator<Item = &'a Bitmap>, size: u64, geometry: Geometry) -> Option<u64> {
    let clusters = bitmaps.map(|bitmap| clusters(size, bitmap.granularity_bits, geometry)).max()?;
    Some(clusters.saturating_mul(geometry.cluster_size()))
}

/// The bitmaps extension, where it can be believed.
pub(super) fn consistent(header: &Header) -> Option<&BitmapsExtension> {
    header.extensions.bitmaps.as_ref().filter(|_| header.features.autoclear & Features::BITMAPS != 0)
}

/// Clusters of bits for a disk of this size: entries in the table of a bitmap.
pub(super) fn clusters(size: u64, granularity_bits: u32, geometry: Geometry) -> u64 {
    geometry.clusters(size.div_ceil(1 << granularity_bits).div_ceil(8))
}

/// Calls `each` for every entry of the directory, also for one that has a field out of its range.
pub(super) fn read(
    storage: &dyn Storage,
    header: &Header,
    extension: &BitmapsExtension,
    mut each: impl FnMut(Entry) -> Result<()>,
) -> Result<()> {
    check_extension(header, extension)?;
    let limit = (extension.directory_size, "bytes of the bitmap directory");
    let mut cursor = Cursor::new(storage, "the bitmap directory", extension.directory_offset, limit);
    let mut names = HashSet::new();
    for _ in 0..extension.nb_bitmaps {
        cursor.pad();
        each(entry(&mut cursor, header, &mut names)?)?;
    }
    // QEMU counts the padding of the last entry as a part of the directory
    cursor.pad();
    let (value, allowed) = (extension.directory_size, Allowed::Exactly(cursor.done()));
    let offset = HostOffset(extension.offset.0 + 8);
    if value != cursor.done() {
        return Err(Invalid { field: "bitmap_directory_size", offset, value, allowed }.into());
    }
    Ok(())
}

fn check_extension(header: &Header, extension: &BitmapsExtension) -> Result<(), Invalid> {
    let unit = header.geometry.cluster_size();
    let check = |field, at, value, right, allowed| {
        let offset = HostOffset(extension.offset.0 + at);
        if right { Ok(()) } else { Err(Invalid { field, offset, value, allowed }) }
    };
    let (count, size, offset) = (extension.nb_bitmaps, extension.directory_size, extension.directory_offset.0);
    let most = wire::BITMAPS_MAX;
    let counts = Allowed::Range(1, u64::from(most));
    check("nb_bitmaps", 0, u64::from(count), (1..=most).contains(&count), counts)?;
    let reserved = u64::from(extension.reserved);
    check("the reserved field of the bitmaps extension", 4, reserved, reserved == 0, Allowed::Exactly(0))?;
    let most = wire::BITMAP_DIRECTORY_BYTES_MAX;
    check("bitmap_directory_size", 8, size, (1..=most).contains(&size), Allowed::Range(1, most))?;
    check("bitmap_directory_offset", 16, offset, offset % unit == 0, Allowed::MultipleOf(unit))
}

/// Reads the next entry; `names` are those of the entries before it.
fn entry(cursor: &mut Cursor<'_>, header: &Header, names: &mut HashSet<Vec<u8>>) -> Result<Entry> {
    let offset = cursor.offset();
    let raw: RawBitmap = zerocopy::transmute!(cursor.take_array::<{ size_of::<RawBitmap>() }>()?);
    cursor.skip(u64::from(raw.extra_data_size.get()))?;
    let place = cursor.offset();
    let name = cursor.take(u64::from(raw.name_size.get()))?;
    // for QEMU it ends at a NUL
    let is_new = names.insert(name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec());
    let name = String::from_utf8_lossy(name).into_owned();
    let flag = |flag| raw.flags.get() & flag != 0;
    let bitmap = Bitmap {
        name,
        granularity_bits: u32::from(raw.granularity_bits),
        in_use: flag(wire::BITMAP_FLAG_IN_USE),
        auto: flag(wire::BITMAP_FLAG_AUTO),
        extra_data_compatible: flag(wire::BITMAP_FLAG_EXTRA_DATA_COMPATIBLE),
        extra_data_size: raw.extra_data_size.get(),
        table: Table { offset: HostOffset(raw.table_offset.get()), entries: u64::from(raw.table_size.get()) },
    };
    let bitmap = check_entry(&raw, offset, header).map(|()| bitmap);
    let refused = check_extra_data(&raw, offset).and_then(|()| check_name(is_new, place)).err();
    Ok(Entry { offset, bitmap, refused })
}

/// QEMU knows neither extra data nor the flag that makes it no matter.
fn check_extra_data(raw: &RawBitmap, entry: HostOffset) -> Result<(), Invalid> {
    let (flags, size) = (raw.flags.get(), raw.extra_data_size.get());
    let known = wire::BITMAP_FLAG_IN_USE | wire::BITMAP_FLAG_AUTO;
    let invalid = |field, at, value: u32, allowed| {
        Err(Invalid { field, offset: HostOffset(entry.0 + at), value: value.into(), allowed })
    };
    if flags & !known != 0 {
        return invalid("bitmap flags", 12, flags, Allowed::Bits(known.into()));
    }
    if size > 0 { invalid("bitmap extra_data_size", 20, size, Allowed::Exactly(0)) } else { Ok(()) }
}

fn check_name(is_new: bool, name: HostOffset) -> Result<(), Invalid> {
    let allowed = Allowed::Because("but each needs a name of its own");
    let field = "the number of bitmaps with this name";
    if is_new { Ok(()) } else { Err(Invalid { field, offset: name, value: 2, allowed }) }
}

fn check_entry(raw: &RawBitmap, entry: HostOffset, header: &Header) -> Result<(), Invalid> {
    let check = |field, at, value, right, allowed| {
        let offset = HostOffset(entry.0 + at);
        if right { Ok(()) } else { Err(Invalid { field, offset, value, allowed }) }
    };
    let unit = header.geometry.cluster_size();
    let (table, entries) = (raw.table_offset.get(), u64::from(raw.table_size.get()));
    check("bitmap_table_offset", 0, table, table % unit == 0, Allowed::MultipleOf(unit))?;
    check("bitmap_table_offset", 0, table, table != 0, Allowed::BehindHeader(unit))?;
    let most = wire::BITMAP_BYTES_MAX / unit;
    check("bitmap_table_size", 8, entries, (1..=most).contains(&entries), Allowed::Range(1, most))?;
    let flags = u64::from(raw.flags.get());
    let known = wire::BITMAP_FLAG_IN_USE | wire::BITMAP_FLAG_AUTO | wire::BITMAP_FLAG_EXTRA_DATA_COMPATIBLE;
    check("bitmap flags", 12, flags, flags & !u64::from(known) == 0, Allowed::Bits(u64::from(known)))?;
    let kind = Allowed::Exactly(u64::from(wire::BITMAP_TYPE_DIRTY));
    check("bitmap type", 16, u64::from(raw.kind), raw.kind == wire::BITMAP_TYPE_DIRTY, kind)?;
    let (bits, range) = (raw.granularity_bits, wire::BITMAP_GRANULARITY_BITS);
    let granularities = Allowed::Range(u64::from(*range.start()), u64::from(*range.end()));
    check("bitmap granularity_bits", 17, u64::from(bits), range.contains(&bits), granularities)?;
    let (name, most) = (raw.name_size.get(), wire::BITMAP_NAME_MAX);
    let names = Allowed::Range(1, u64::from(most));
    check("bitmap name_size", 18, u64::from(name), (1..=most).contains(&name), names)?;
    // one that was not saved may be of another size: the disk was resized since
    let needed = clusters(header.size, u32::from(bits), header.geometry);
    let fits = flags & u64::from(wire::BITMAP_FLAG_IN_USE) != 0 || entries == needed;
    check("bitmap_table_size", 8, entries, fits, Allowed::Exactly(needed))
}
