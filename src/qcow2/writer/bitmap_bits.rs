//! The bits of persistent bitmaps: what is added to them, and how they follow the size of the disk.

use byteorder::{BigEndian, ByteOrder};

use super::bitmaps::Entry;
use super::refcounts::write;
use super::{Writer, sync};
use crate::qcow2::address::HostOffset;
use crate::qcow2::bitmap::{self, Bitmap, BitmapTableEntry};
use crate::qcow2::error::{Allowed, Error, Invalid, Result};
use crate::qcow2::header::Table;
use crate::qcow2::l1::read_table;
use crate::qcow2::wire::{BITMAP_BYTES_MAX, BITMAP_ENTRY_ONES};
use crate::storage::to_usize;

/// Table entries that wait in memory for the clusters that they lead to.
const LINKS: usize = 1 << 16;

/// The part of a bitmap that one table entry stands for.
#[derive(Debug)]
struct BitmapCluster {
    index: u64,
    bits: BitmapTableEntry,
    bytes: Vec<u8>,
    changed: bool,
}

impl Writer {
    /// Adds what was changed to the bitmaps that record it, and takes the mark away that they are in use.
    pub(super) fn store_bitmaps(&mut self) -> Result<()> {
        let held = |entry: &&Entry| entry.bitmap.auto && entry.bitmap.in_use && !entry.lost;
        let bitmaps: Vec<Bitmap> = self.bitmaps.entries.iter().filter(held).map(|entry| entry.bitmap.clone()).collect();
        if bitmaps.is_empty() {
            return Ok(());
        }
        let dirty = std::mem::take(&mut self.bitmaps.dirty);
        let size = self.header().size;
        let mut links = Vec::new();
        for bitmap in bitmaps {
            let mut part = None;
            for range in dirty.ranges().filter(|range| range.start < size) {
                let bits =
                    range.start >> bitmap.granularity_bits..=(range.end.min(size) - 1) >> bitmap.granularity_bits;
                let each = self.bits_of_entry();
                for index in bits.start() / each..=bits.end() / each {
                    if part.as_ref().is_none_or(|part: &BitmapCluster| part.index != index) {
                        self.close_part(&bitmap, part.take(), &mut links)?;
                        part = Some(self.open_part(&bitmap, index)?);
                    }
                    let (first, last) =
                        (*bits.start().max(&(index * each)), *bits.end().min(&(index * each + each - 1)));
                    if let Some(part) = &mut part {
                        set(&mut part.bytes, first - index * each, last - index * each);
                        part.changed = true;
                    }
                }
                if links.len() > LINKS {
                    self.write_links(&mut links)?;
                }
            }
            self.close_part(&bitmap, part, &mut links)?;
        }
        self.write_links(&mut links)?;
        self.let_go()
    }

    /// The bitmaps of a disk of another size: none may need a table that is too long.
    pub(super) fn check_granules(&self, size: u64) -> Result<()> {
        let kept = self.bitmaps.entries.iter().filter(|entry| !entry.lost).map(|entry| &entry.bitmap);
        let most = BITMAP_BYTES_MAX;
        match bitmap::largest(kept, size, self.header().geometry) {
            Some(0) => {
                Err(Error::NotWritable { reason: "a disk without bytes cannot have bitmaps: remove them first" })
            }
            Some(bytes) if bytes > most => Err(Error::TableTooLarge { what: "a bitmap", bytes, most }),
            _ => Ok(()),
        }
    }

    /// Gives bitmaps tables for the size of the disk, which was another one: new bits are zero, those behind the end are
    /// gone. All are in use since before the size changed.
    pub(super) fn resize_bitmaps(&mut self, before: u64) -> Result<()> {
        let Some(extension) = self.header().extensions.bitmaps else { return Ok(()) };
        if self.bitmaps.entries.iter().all(|entry| entry.lost) {
            return Ok(());
        }
        let mut directory = self.directory(extension)?;
        let mut entries = self.bitmaps.entries.clone();
        let (mut tables, mut data) = (Vec::new(), Vec::new());
        for entry in entries.iter_mut().filter(|entry| !entry.lost) {
            tables.push(entry.bitmap.table);
            entry.bitmap.table = self.resize_table(&entry.bitmap, before, &mut data)?;
            // what a disabled one says is right again
            entry.bitmap.in_use = entry.bitmap.auto;
            let table_size = u32::try_from(entry.bitmap.table.entries).unwrap_or(u32::MAX);
            let fixed = [
                &entry.bitmap.table.offset.0.to_be_bytes()[..],
                &table_size.to_be_bytes(),
                &entry.flags().to_be_bytes(),
            ];
            let at = to_usize(entry.at);
            directory.get_mut(at..at + 16).unwrap_or_default().copy_from_slice(&fixed.concat());
        }
        self.switch_directory(extension, entries, &directory)?;
        for table in tables {
            self.release_run(table.offset, table.bytes());
        }
        for cluster in data {
            self.refcounts.release(cluster);
        }
        Ok(())
    }

    /// Writes a table for the size of the disk beside the old one; `gone` gets the clusters that it does not need.
    fn resize_table(&mut self, bitmap: &Bitmap, before: u64, gone: &mut Vec<u64>) -> Result<Table> {
        let geometry = self.header().geometry;
        let size = self.header().size;
        let entries = bitmap::clusters(size, bitmap.granularity_bits, geometry);
        let kept = before.min(size).div_ceil(1 << bitmap.granularity_bits);
        let each = self.bits_of_entry();
        let mut values = vec![0; to_usize(entries)];
        for (index, bits) in self.parts(bitmap)? {
            let value = if index * each >= kept {
                if let BitmapTableEntry::At(host) = bits {
                    gone.push(host.0 >> geometry.cluster_bits());
                }
                0
            } else if (index + 1) * each > kept {
                self.cut_part(bitmap, index, kept - index * each)?
            } else {
                bits.encode()
            };
            if let Some(entry) = values.get_mut(to_usize(index)) {
                *entry = value;
            }
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value: &u64| value.to_be_bytes()).collect();
        Ok(Table { offset: self.write_beside("a bitmap table", &bytes)?, entries })
    }

    /// Clears the bits of a part from one on, and returns what leads to it then.
    fn cut_part(&mut self, bitmap: &Bitmap, index: u64, from: u64) -> Result<u64> {
        let mut part = self.open_part(bitmap, index)?;
        let before = part.bytes.clone();
        clear(&mut part.bytes, from);
        match part.bits {
            BitmapTableEntry::At(host) if part.bytes != before => {
                self.check_own(host.0 >> self.header().geometry.cluster_bits())?;
                write(&*self.storage, "a bitmap", host.0, &part.bytes)?;
                Ok(host.0)
            }
            BitmapTableEntry::Ones => Ok(self.write_beside("a bitmap", &part.bytes)?.0),
            bits => Ok(bits.encode()),
        }
    }

    /// The clusters that hold the bits of a bitmap.
    pub(super) fn bitmap_clusters(&self, bitmap: &Bitmap) -> Result<Vec<u64>> {
        let cluster = |(_, bits)| match bits {
            BitmapTableEntry::At(host) => Some(host.0 >> self.header().geometry.cluster_bits()),
            BitmapTableEntry::Zeroes | BitmapTableEntry::Ones => None,
        };
        Ok(self.parts(bitmap)?.into_iter().filter_map(cluster).collect())
    }

    /// Bits in a cluster.
    fn bits_of_entry(&self) -> u64 {
        self.header().geometry.cluster_size() * 8
    }

    /// The table entries of a bitmap that are not zero.
    fn parts(&self, bitmap: &Bitmap) -> Result<Vec<(u64, BitmapTableEntry)>> {
        let mut parts = Vec::new();
        read_table(&self.storage, bitmap.table, "a bitmap table", |index, value| {
            parts.push((index, self.decode(HostOffset(bitmap.table.offset.0 + index * 8), value)?));
            Ok(())
        })?;
        Ok(parts)
    }

    fn decode(&self, offset: HostOffset, value: u64) -> Result<BitmapTableEntry> {
        let (geometry, end) = (self.header().geometry, self.storage.length());
        let allowed = match BitmapTableEntry::decode(value, geometry) {
            Ok(BitmapTableEntry::At(host)) if host.0 + geometry.cluster_size() > end => Allowed::BeforeEnd(end),
            Ok(bits) => return Ok(bits),
            Err(allowed) => allowed,
        };
        Err(Invalid { field: "bitmap table entry", offset, value, allowed }.into())
    }

    fn open_part(&self, bitmap: &Bitmap, index: u64) -> Result<BitmapCluster> {
        let offset = HostOffset(bitmap.table.offset.0 + index * 8);
        let mut value = [0; 8];
        let io = |source| Error::Io { what: "a bitmap table", offset, source };
        self.storage.read_exact_at(&mut value, offset.0).map_err(io)?;
        let bits = self.decode(offset, BigEndian::read_u64(&value))?;
        let mut bytes = vec![
            if bits == BitmapTableEntry::Ones { u8::MAX } else { 0 };
            to_usize(self.header().geometry.cluster_size())
        ];
        if let BitmapTableEntry::At(host) = bits {
            let io = |source| Error::Io { what: "a bitmap", offset: host, source };
            self.storage.read_exact_at(&mut bytes, host.0).map_err(io)?;
        }
        Ok(BitmapCluster { index, bits, bytes, changed: false })
    }

    /// Writes the bits of a part; a cluster of their own they get where they had none, and `links` what leads to it.
    fn close_part(&mut self, bitmap: &Bitmap, part: Option<BitmapCluster>, links: &mut Vec<(u64, u64)>) -> Result<()> {
        let Some(part) = part.filter(|part| part.changed) else { return Ok(()) };
        match part.bits {
            BitmapTableEntry::Ones => {}
            BitmapTableEntry::At(host) => {
                self.check_own(host.0 >> self.header().geometry.cluster_bits())?;
                write(&*self.storage, "a bitmap", host.0, &part.bytes)?;
            }
            BitmapTableEntry::Zeroes => {
                let all = self.header().size.div_ceil(1 << bitmap.granularity_bits) - part.index * self.bits_of_entry();
                let ones: u64 = part.bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
                let value = if ones >= all.min(self.bits_of_entry()) {
                    BITMAP_ENTRY_ONES
                } else {
                    self.write_beside("a bitmap", &part.bytes)?.0
                };
                links.push((bitmap.table.offset.0 + part.index * 8, value));
            }
        }
        Ok(())
    }

    /// Makes tables lead to what was written, when it is on stable storage.
    fn write_links(&mut self, links: &mut Vec<(u64, u64)>) -> Result<()> {
        self.flush()?;
        let bits = self.header().geometry.cluster_bits();
        for (offset, value) in links.drain(..) {
            self.check_own(offset >> bits)?;
            write(&*self.storage, "a bitmap table", offset, &value.to_be_bytes())?;
        }
        sync(&*self.storage)
    }
}

/// Sets the bits `first..=last`, counted from the lowest of each byte.
fn set(bytes: &mut [u8], first: u64, last: u64) {
    for (index, byte) in (0..).zip(bytes).take(to_usize(last / 8 + 1)).skip(to_usize(first / 8)) {
        let (from, to) = (first.max(index * 8) - index * 8, last.min(index * 8 + 7) - index * 8);
        *byte |= u8::MAX << from & u8::MAX >> (7 - to);
    }
}

/// Clears the bits from one on.
fn clear(bytes: &mut [u8], from: u64) {
    for (index, byte) in (0..).zip(bytes).skip(to_usize(from / 8)) {
        let kept = from.saturating_sub(index * 8);
        *byte &= !(u8::MAX << kept);
    }
}
