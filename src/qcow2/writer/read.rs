//! The disk as the writer sees it: with what is not in the image yet.

use std::ops::Range;

use super::Writer;
use crate::qcow2::address::{GuestOffset, HostOffset};
use crate::qcow2::entry::{CompressedCluster, L2Entry};
use crate::qcow2::error::{Error, Result};
use crate::qcow2::image::read_to_end;
use crate::storage::to_usize;

impl Writer {
    /// Fills `buffer` from a guest offset on.
    ///
    /// # Errors
    /// [`Error::BeyondDisk`], [`Error::NeedsBacking`] where a part of the range is in a backing file, and what is wrong with
    /// the image.
    pub fn read(&mut self, buffer: &mut [u8], offset: GuestOffset) -> Result<()> {
        let end = self.end(offset, buffer.len() as u64)?;
        let mut rest = buffer;
        for (cluster, part) in self.clusters(offset.0..end) {
            let (now, behind) = rest.split_at_mut(to_usize(part.end - part.start));
            let entry = self.entry(cluster)?;
            self.read_entry(entry, cluster, part, now)?;
            rest = behind;
        }
        Ok(())
    }

    /// The clusters that a guest range touches, each with the part of it, in bytes from its start.
    pub(super) fn clusters(&self, guest: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let bits = self.header().geometry.cluster_bits();
        let last = if guest.is_empty() { 0 } else { guest.end.div_ceil(1 << bits) };
        let clusters = guest.start >> bits..last;
        clusters.map(move |cluster| {
            let start = cluster << bits;
            (cluster, guest.start.max(start) - start..guest.end.min(start + (1 << bits)) - start)
        })
    }

    /// The bytes of a part of a cluster.
    pub(super) fn read_entry(
        &mut self,
        entry: L2Entry,
        cluster: u64,
        part: Range<u64>,
        buffer: &mut [u8],
    ) -> Result<()> {
        match entry {
            L2Entry::Unallocated => self.read_below(cluster, &part, buffer),
            L2Entry::Zero { .. } => {
                buffer.fill(0);
                Ok(())
            }
            L2Entry::Data { host, .. } => self.read_host(host, part.start, buffer),
            L2Entry::Compressed(data) => {
                let bytes = self.inflate(cluster, data)?;
                buffer.copy_from_slice(bytes.get(to_usize(part.start)..to_usize(part.end)).unwrap_or_default());
                Ok(())
            }
            L2Entry::Subclusters { host, allocated, zero, .. } => {
                let size = self.header().geometry.subcluster_size();
                let mut rest = buffer;
                let mut start = part.start;
                while start < part.end {
                    let (index, end) = (start / size, part.end.min((start / size + 1) * size));
                    let (now, behind) = rest.split_at_mut(to_usize(end - start));
                    match host {
                        Some(host) if allocated >> index & 1 == 1 => self.read_host(host, start, now)?,
                        _ if zero >> index & 1 == 1 => now.fill(0),
                        _ => self.read_below(cluster, &(start..end), now)?,
                    }
                    rest = behind;
                    start = end;
                }
                Ok(())
            }
        }
    }

    fn read_host(&self, host: HostOffset, start: u64, buffer: &mut [u8]) -> Result<()> {
        read_to_end(&self.storage, buffer, HostOffset(host.0 + start), "guest data")
    }

    /// What no cluster of the image holds.
    fn read_below(&self, cluster: u64, part: &Range<u64>, buffer: &mut [u8]) -> Result<()> {
        if let Some(backing) = &self.header().backing {
            let guest = GuestOffset((cluster << self.header().geometry.cluster_bits()) + part.start);
            return Err(Error::NeedsBacking { name: backing.name.clone(), guest });
        }
        buffer.fill(0);
        Ok(())
    }

    /// The bytes of a compressed cluster.
    fn inflate(&mut self, cluster: u64, data: CompressedCluster) -> Result<&[u8]> {
        let header = self.head.header();
        let guest = GuestOffset(cluster << header.geometry.cluster_bits());
        self.compressed.read_from(&self.storage, header, guest, data)
    }
}
