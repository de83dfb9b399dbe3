//! Another size of the virtual disk.
//!
//! What would be wrong at the new size is put right while the old one holds: behind the end of the disk nobody looks. Then
//! one write of the header changes the size, and with it the place of an L1 table that had to become longer.

use std::ops::Range;

use super::{Writer, sync};
use crate::qcow2::address::{GuestOffset, HostOffset};
use crate::qcow2::entry::L2Entry;
use crate::qcow2::error::{Error, Result};
use crate::qcow2::header::Table;
use crate::qcow2::wire::L1_BYTES_MAX;
use crate::storage::to_usize;

impl Writer {
    /// Changes the size of the disk to any number of bytes; QEMU wants a multiple of 512. All is on stable storage then.
    ///
    /// New space reads as zeroes. Where the image has a backing file, which may be longer, new space gets zero
    /// clusters. What is behind a smaller size is discarded. Persistent bitmaps get the new size too, as in QEMU: the
    /// bits of new space are not set. Bitmaps that are in use stay as they are.
    ///
    /// # Errors
    /// [`Error::TableTooLarge`] where the L1 table or a bitmap would be longer than QEMU takes; [`Error::NotWritable`] for
    /// what version 2 cannot say: the old size in internal snapshots, and zeroes over a backing file;
    /// [`Error::NeedsBacking`] where the disk ends within a cluster that is in the backing file. Nothing is changed then.
    /// Else what is wrong with the image, and what the system says.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        let before = self.header().size;
        if size == before {
            return self.flush();
        }
        self.check_resize(size)?;
        self.guarded(|writer| {
            writer.begin_change(if size < before { size..before } else { 0..0 })?;
            writer.hold(|_| true)?;
            if size < before { writer.shrink(size) } else { writer.grow(size) }?;
            writer.resize_bitmaps(before)?;
            writer.flush()
        })
    }

    /// What can be said before anything is changed.
    fn check_resize(&mut self, size: u64) -> Result<()> {
        let (header, before) = (self.header(), self.header().size);
        let refuse = |reason| Err(Error::NotWritable { reason });
        let (bytes, most) = (header.geometry.l1_entries(size).saturating_mul(8), L1_BYTES_MAX);
        if bytes > most {
            return Err(Error::TableTooLarge { what: "the L1 table", bytes, most });
        }
        if header.version == 2 && header.nb_snapshots > 0 {
            return refuse("snapshots of version 2 do not hold the size of the disk");
        }
        if header.version == 2 && header.backing.is_some() && size > before {
            return refuse("version 2 has no zero clusters that would hide a longer backing file");
        }
        self.check_granules(size)?;
        let end = before.min(size);
        let Some(name) = self.header().backing.as_ref().map(|backing| backing.name.clone()) else { return Ok(()) };
        let unit = self.header().geometry.subcluster_size();
        if size > before && end % unit != 0 {
            let cluster = end >> self.header().geometry.cluster_bits();
            let entry = self.entry(cluster)?;
            if self.shows_backing(entry, self.header().geometry.offset_in_cluster(end)) {
                return Err(Error::NeedsBacking { name, guest: GuestOffset(end / unit * unit) });
            }
        }
        Ok(())
    }

    fn shrink(&mut self, size: u64) -> Result<()> {
        let before = self.header().size;
        let geometry = self.header().geometry;
        let end = geometry.clusters(size);
        let behind = end..geometry.l1_entries(before).saturating_mul(geometry.l2_entries());
        // a backing file would show there as long as the disk has its old size
        let has_backing = self.header().backing.is_some();
        self.zero_behind(size, false)?;
        if !has_backing {
            self.unmap(behind.clone())?;
        }
        self.flush()?;
        self.head.update(&*self.storage, |raw| raw.size = size.into())?;
        sync(&*self.storage)?;
        if has_backing { self.unmap(behind) } else { Ok(()) }
    }

    fn grow(&mut self, size: u64) -> Result<()> {
        let before = self.header().size;
        let geometry = self.header().geometry;
        let (first, end) = (geometry.clusters(before), geometry.clusters(size));
        self.zero_behind(before, true)?;
        if self.header().backing.is_some() {
            self.flush()?;
            self.lengthen(size, before)?;
            for cluster in first..end {
                self.relieve()?;
                let entry = self.entry(cluster)?;
                if !matches!(entry, L2Entry::Zero { .. }) {
                    self.set_entry(cluster, self.zero_entry())?;
                    self.release(entry);
                }
            }
        } else {
            // what was behind the end: the VM state of a snapshot, whose own tables have it too
            self.unmap(first..end.next_multiple_of(geometry.l2_entries()))?;
        }
        self.flush()?;
        self.lengthen(size, size)
    }

    /// Makes the L1 table long enough for a size, and at once the disk as large as `now`. All tables are flushed.
    fn lengthen(&mut self, size: u64, now: u64) -> Result<()> {
        let geometry = self.header().geometry;
        let old = self.tables.l1_table();
        let entries = geometry.l1_entries(size);
        if entries <= old.entries {
            self.head.update(&*self.storage, |raw| raw.size = now.into())?;
            return sync(&*self.storage);
        }
        let offset = self.write_beside("the L1 table", &self.tables.l1_bytes(entries))?;
        self.flush()?;
        self.head.update(&*self.storage, |raw| {
            raw.size = now.into();
            raw.l1_table_offset = offset.0.into();
            raw.l1_size = u32::try_from(entries).unwrap_or(u32::MAX).into();
        })?;
        sync(&*self.storage)?;
        self.tables.move_l1(Table { offset, entries });
        self.release_run(old.offset, old.bytes());
        Ok(())
    }

    /// Makes what is behind `end` in the last cluster zeroes, where the cluster says anything else; what the backing file
    /// says there is of interest only when the disk grows.
    fn zero_behind(&mut self, end: u64, hide_backing: bool) -> Result<()> {
        let geometry = self.header().geometry;
        let (cluster, from) = (end >> geometry.cluster_bits(), geometry.offset_in_cluster(end));
        if from == 0 {
            return Ok(());
        }
        let unit = geometry.subcluster_size();
        let mut start = from;
        while start < geometry.cluster_size() {
            let part = start..(start / unit + 1) * unit;
            start = part.end;
            let entry = self.entry(cluster)?;
            let reads_zero = if self.shows_backing(entry, part.start) {
                !hide_backing || self.header().backing.is_none()
            } else {
                let mut bytes = vec![0; to_usize(part.end - part.start)];
                self.read_entry(entry, cluster, part.clone(), &mut bytes)?;
                bytes.iter().all(|byte| *byte == 0)
            };
            if !reads_zero {
                let host = self.place(cluster, &part)?.0 + part.start;
                let bytes = vec![0; to_usize(part.end - part.start)];
                super::refcounts::write(&*self.storage, "guest data", host, &bytes)?;
            }
        }
        Ok(())
    }

    /// Gives back what guest clusters refer to, also behind the end of the disk, and the L2 tables of those where none is
    /// left.
    fn unmap(&mut self, clusters: Range<u64>) -> Result<()> {
        let geometry = self.header().geometry;
        let each = geometry.l2_entries();
        let end = clusters.end.min(self.tables.l1_table().entries * each);
        let mut start = clusters.start;
        while start < end {
            let next = (start / each + 1) * each;
            if self.tables.has_table(start) {
                self.relieve()?;
                self.unmap_part(start..next.min(end))?;
            }
            start = next;
        }
        Ok(())
    }

    /// As [`Writer::unmap`], for clusters of one table.
    fn unmap_part(&mut self, clusters: Range<u64>) -> Result<()> {
        let each = self.header().geometry.l2_entries();
        let start = clusters.start;
        let is_whole = clusters.end - start == each;
        for cluster in clusters {
            let entry = self.entry(cluster)?;
            if entry != L2Entry::Unallocated {
                if !is_whole {
                    self.set_entry(cluster, (0, 0))?;
                }
                self.release(entry);
            }
        }
        if is_whole {
            let bits = self.header().geometry.cluster_bits();
            if let Some(HostOffset(host)) = self.tables.drop_table(start) {
                self.refcounts.release(host >> bits);
            }
        }
        Ok(())
    }
}
