//! All arithmetic that depends on the cluster size and the kind of L2 entries.

use super::address::GuestOffset;
use super::wire;

/// Subclusters in a cluster of an image with extended L2 entries.
pub(crate) const SUBCLUSTERS: u32 = 32;

/// Cluster size and kind of L2 entries: what turns an address into indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
}

impl Geometry {
    /// Supported `cluster_bits`: 512 bytes to 2 MiB, as QEMU has it.
    pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
    /// The smallest `cluster_bits` with extended L2 entries: subclusters are whole sectors.
    pub const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;

    /// `None` where the cluster size is out of range for this kind of L2 entries.
    #[must_use]
    pub fn new(cluster_bits: u32, extended_l2: bool) -> Option<Self> {
        let smallest = if extended_l2 { Self::EXTENDED_CLUSTER_BITS_MIN } else { *Self::CLUSTER_BITS.start() };
        (smallest..=*Self::CLUSTER_BITS.end()).contains(&cluster_bits).then_some(Self { cluster_bits, extended_l2 })
    }

    /// The binary logarithm of the cluster size.
    #[must_use]
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    #[must_use]
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries carry a subcluster bitmap.
    #[must_use]
    pub fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Bytes in a subcluster; the whole cluster without extended L2 entries.
    #[must_use]
    pub fn subcluster_size(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / u64::from(SUBCLUSTERS) } else { self.cluster_size() }
    }

    /// Bytes in an L2 entry.
    #[must_use]
    pub fn l2_entry_size(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in an L2 table, which fills a cluster.
    #[must_use]
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Guest bytes that one L2 table maps.
    #[must_use]
    pub fn l2_coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of so many bytes needs.
    #[must_use]
    pub fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Whether an L1 table as long as QEMU takes it maps a disk of so many bytes.
    #[must_use]
    pub fn can_map(self, size: u64) -> bool {
        self.l1_entries(size) <= wire::L1_BYTES_MAX / 8
    }

    /// Clusters that hold this many bytes.
    #[must_use]
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The index of a guest address in the L1 table.
    #[must_use]
    pub fn l1_index(self, guest: GuestOffset) -> u64 {
        guest.0 / self.l2_coverage()
    }

    /// The index of a guest address in its L2 table.
    #[must_use]
    pub fn l2_index(self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) % self.l2_entries()
    }

    /// The distance of an offset from the start of its cluster.
    #[must_use]
    pub fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Bits of the host offset in the L2 entry of a compressed cluster; the bits above count sectors.
    #[must_use]
    pub fn compressed_offset_bits(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}
