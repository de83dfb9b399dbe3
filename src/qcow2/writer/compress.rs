//! Compressed clusters: byte by byte behind each other in clusters that they share.

use super::Writer;
use super::refcounts;
use crate::qcow2::address::{GuestOffset, HostOffset};
use crate::qcow2::codec::Deflater;
use crate::qcow2::entry::encode_compressed;
use crate::qcow2::error::Result;
use crate::storage::to_usize;

impl Writer {
    /// Writes a guest cluster compressed. What is not one whole cluster, or does not become smaller, is written plain.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write_compressed(&mut self, bytes: &[u8], offset: GuestOffset) -> Result<()> {
        self.relieve()?;
        let end = self.end(offset, bytes.len() as u64)?;
        let (geometry, codec) = (self.header().geometry, self.header().codec);
        let cluster = offset.0 >> geometry.cluster_bits();
        let part = geometry.offset_in_cluster(offset.0)..end.saturating_sub(cluster << geometry.cluster_bits());
        if bytes.is_empty() || !self.is_whole(cluster, &part) || bytes.len() as u64 > geometry.cluster_size() {
            return self.write(bytes, offset);
        }
        let mut whole = bytes.to_vec();
        whole.resize(to_usize(geometry.cluster_size()), 0);
        let deflater = self.deflater.get_or_insert_with(|| Deflater::new(codec, geometry.cluster_size()));
        let Some(stream) = deflater.deflate(&whole).map(<[u8]>::to_vec) else { return self.write(bytes, offset) };
        let old = self.entry(cluster)?;
        let length = stream.len() as u64;
        let placed = self.guarded(|writer| {
            writer.begin_change(offset.0..end)?;
            let host = writer.place_compressed(length)?;
            let Some(entry) = encode_compressed(host, length, geometry) else {
                // too far behind in the file for an entry of this cluster size
                for taken in host.0 >> geometry.cluster_bits()..=(host.0 + length - 1) >> geometry.cluster_bits() {
                    writer.refcounts.release(taken);
                }
                writer.open = 0..0;
                return Ok(false);
            };
            refcounts::write(&*writer.storage, "a compressed cluster", host.0, &stream)?;
            writer.set_entry(cluster, (entry, 0))?;
            writer.release(old);
            Ok(true)
        })?;
        if placed { Ok(()) } else { self.write(bytes, offset) }
    }

    /// A place for a stream, behind the one before it if there is room.
    fn place_compressed(&mut self, length: u64) -> Result<HostOffset> {
        let geometry = self.header().geometry;
        let (bits, unit) = (geometry.cluster_bits(), geometry.cluster_size());
        let shared = self.open.start >> bits;
        if self.open.is_empty() || self.refcounts.is_full(&self.storage, shared)? {
            self.open = 0..0;
        }
        let room = self.open.end - self.open.start;
        let start = if room >= length {
            self.refcounts.share(&self.storage, shared)?;
            self.open.start
        } else {
            let host = self.take()?.0;
            if room > 0 && host == self.open.end {
                self.refcounts.share(&self.storage, shared)?;
                self.open.start
            } else {
                host
            }
        };
        let end = start + length;
        self.open = end..end.next_multiple_of(unit);
        Ok(HostOffset(start))
    }
}
