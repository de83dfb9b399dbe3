//! Where everything goes: pure arithmetic over counts.

use zerocopy::IntoBytes;

use crate::qcow2::address::HostOffset;
use crate::qcow2::codec::CompressionType;
use crate::qcow2::entry::encode_compressed;
use crate::qcow2::features::Features;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::wire::{self, FLAG_COPIED, RawHeader};

/// The places of all parts of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    geometry: Geometry,
    size: u64,
    codec: CompressionType,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_clusters: u64,
    l2_tables: u64,
    data_clusters: u64,
}

/// Why there can be no such image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The L1 table would be longer than QEMU opens.
    #[error("clusters of {cluster_size} bytes cannot map a disk of {size} bytes: take larger clusters")]
    DiskTooLarge {
        /// Bytes in a cluster of the new image.
        cluster_size: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// The refcount table would be longer than QEMU opens.
    #[error("refcounts of {clusters} clusters of {cluster_size} bytes do not fit: take larger clusters")]
    TooManyClusters {
        /// Bytes in a cluster of the new image.
        cluster_size: u64,
        /// Clusters in the file.
        clusters: u64,
    },
    /// The builder makes standard L2 entries only.
    #[error("new images have no subclusters")]
    ExtendedL2,
}

impl Layout {
    /// Bytes in a refcount.
    pub(super) const REFCOUNT_BYTES: u64 = 2;

    /// Places an image of a disk of `size` bytes, with so many L2 tables and room for so many data clusters.
    ///
    /// # Errors
    /// Where QEMU could not open such an image.
    pub fn new(
        geometry: Geometry,
        size: u64,
        codec: CompressionType,
        l2_tables: u64,
        data_clusters: u64,
    ) -> Result<Self, LayoutError> {
        if geometry.extended_l2() {
            return Err(LayoutError::ExtendedL2);
        }
        let cluster_size = geometry.cluster_size();
        // as many as the largest refcount table counts
        let most = wire::REFCOUNT_TABLE_BYTES_MAX / 8 * (cluster_size / Self::REFCOUNT_BYTES);
        let clusters = l2_tables.saturating_add(data_clusters);
        if clusters > most {
            return Err(LayoutError::TooManyClusters { cluster_size, clusters });
        }
        let l1_bytes = geometry.l1_entries(size) * 8;
        if l1_bytes > wire::L1_BYTES_MAX {
            return Err(LayoutError::DiskTooLarge { cluster_size, size });
        }
        let l1_clusters = geometry.clusters(l1_bytes);
        let mut layout = Self {
            geometry,
            size,
            codec,
            refcount_table_clusters: 1,
            refcount_blocks: 1,
            l1_clusters,
            l2_tables,
            data_clusters,
        };
        // refcounts count themselves, so their number grows until it is enough; each round adds a fraction of the
        // round before
        loop {
            let blocks = layout.end_cluster().div_ceil(cluster_size / Self::REFCOUNT_BYTES);
            let table = geometry.clusters(blocks * 8);
            if table * cluster_size > wire::REFCOUNT_TABLE_BYTES_MAX {
                let clusters = layout.end_cluster();
                return Err(LayoutError::TooManyClusters { cluster_size, clusters });
            }
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table_clusters) {
                return Ok(layout);
            }
            (layout.refcount_blocks, layout.refcount_table_clusters) = (blocks, table);
        }
    }

    /// Cluster size and kind of L2 entries.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What its clusters are compressed with, where they are.
    #[must_use]
    pub fn codec(&self) -> CompressionType {
        self.codec
    }

    /// Bytes of the file when all data clusters are used.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.end_cluster() * self.geometry.cluster_size()
    }

    /// Where the refcount table starts.
    #[must_use]
    pub fn refcount_table(&self) -> HostOffset {
        self.cluster(1)
    }

    /// Where the refcount blocks start, one behind the other.
    #[must_use]
    pub fn refcount_block(&self, index: u64) -> HostOffset {
        self.cluster((1 + self.refcount_table_clusters).saturating_add(index))
    }

    /// The number of refcount blocks.
    #[must_use]
    pub fn refcount_blocks(&self) -> u64 {
        self.refcount_blocks
    }

    /// Where an entry of the L1 table is.
    #[must_use]
    pub fn l1_entry(&self, index: u64) -> HostOffset {
        HostOffset(self.refcount_block(self.refcount_blocks).0.saturating_add(index.saturating_mul(8)))
    }

    /// Where an L2 table starts; tables are numbered in guest order.
    #[must_use]
    pub fn l2_table(&self, number: u64) -> HostOffset {
        let front = 1 + self.refcount_table_clusters + self.refcount_blocks + self.l1_clusters;
        self.cluster(front.saturating_add(number))
    }

    /// Where a data cluster starts. Which one is for what is the caller's choice.
    #[must_use]
    pub fn data_cluster(&self, number: u64) -> HostOffset {
        self.l2_table(self.l2_tables.saturating_add(number))
    }

    /// The bytes of the header; what follows in its cluster is zero.
    #[must_use]
    pub fn header(&self) -> Vec<u8> {
        let zstd = self.codec == CompressionType::Zstd;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).into();
        RawHeader {
            magic: wire::MAGIC.into(),
            version: 3.into(),
            backing_file_offset: 0.into(),
            backing_file_size: 0.into(),
            cluster_bits: self.geometry.cluster_bits().into(),
            size: self.size.into(),
            crypt_method: 0.into(),
            l1_size: narrow(self.geometry.l1_entries(self.size)),
            l1_table_offset: self.l1_entry(0).0.into(),
            refcount_table_offset: self.refcount_table().0.into(),
            refcount_table_clusters: narrow(self.refcount_table_clusters),
            nb_snapshots: 0.into(),
            snapshots_offset: 0.into(),
            incompatible_features: if zstd { Features::COMPRESSION_TYPE } else { 0 }.into(),
            compatible_features: 0.into(),
            autoclear_features: 0.into(),
            refcount_order: 4.into(),
            header_length: narrow(wire::V3_HEADER_LENGTH),
            compression_type: u8::from(zstd),
            padding: [0; 7],
        }
        .as_bytes()
        .to_vec()
    }

    /// The entry for a table or a cluster that nothing else refers to.
    #[must_use]
    pub fn entry(host: HostOffset) -> u64 {
        host.0 | FLAG_COPIED
    }

    /// The entry of a compressed cluster of `length` bytes, or `None` where the file is too long for it.
    #[must_use]
    pub fn compressed_entry(&self, host: HostOffset, length: u64) -> Option<u64> {
        encode_compressed(host, length, self.geometry)
    }

    fn cluster(&self, index: u64) -> HostOffset {
        HostOffset(index.saturating_mul(self.geometry.cluster_size()))
    }

    fn end_cluster(&self) -> u64 {
        self.data_cluster(self.data_clusters).0 / self.geometry.cluster_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Header;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_layout_has_room_for_its_refcounts_and_a_header_that_parses(
            bits in 9u32..=21, size in 0u64..1 << 44, tables in 0u64..5000, data in 0u64..1 << 24, zstd: bool,
        ) {
            let geometry = Geometry::new(bits, false).unwrap();
            let codec = if zstd { CompressionType::Zstd } else { CompressionType::Deflate };
            let Ok(layout) = Layout::new(geometry, size, codec, tables, data) else { return Ok(()) };
            let clusters = layout.length() / geometry.cluster_size();
            prop_assert!(layout.refcount_blocks() * geometry.cluster_size() / 2 >= clusters);
            prop_assert!(layout.l1_entry(geometry.l1_entries(size)).0 <= layout.l2_table(0).0);
            prop_assert_eq!(layout.l2_table(tables), layout.data_cluster(0));
            let mut cluster = layout.header();
            cluster.resize(512, 0);
            let header = Header::parse(&cluster).unwrap();
            prop_assert_eq!((header.version, header.size, header.codec), (3, size, codec));
            prop_assert_eq!(header.l1_table.offset, layout.l1_entry(0));
        }
    }

    #[test]
    fn what_qemu_could_not_open_is_refused() {
        let small = Geometry::new(9, false).unwrap();
        assert!(matches!(
            Layout::new(small, 1 << 40, CompressionType::Deflate, 0, 0),
            Err(LayoutError::DiskTooLarge { .. })
        ));
        let many = Layout::new(small, 1 << 37, CompressionType::Deflate, 1 << 22, 1 << 28);
        assert!(matches!(many, Err(LayoutError::TooManyClusters { .. })));
        for (tables, data) in [(u64::MAX, 0), (0, u64::MAX), (0, 1 << 60), (u64::MAX, u64::MAX)] {
            let many = Layout::new(small, 512, CompressionType::Deflate, tables, data);
            assert!(matches!(many, Err(LayoutError::TooManyClusters { .. })));
        }
    }
}
