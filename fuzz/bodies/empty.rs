//! Images without data, of all kinds: what QEMU makes when it creates one.

use qmpbackup::qcow2::CompressionType;

use super::input::Input;

/// What an image is like.
#[derive(Debug, Clone)]
pub(super) struct Empty {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) extended_l2: bool,
    pub(super) codec: CompressionType,
    pub(super) size: u64,
}

impl Default for Empty {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            codec: CompressionType::Deflate,
            size: 0,
        }
    }
}

impl Empty {
    /// A kind that there is, of a disk that is neither large nor has many clusters.
    pub(super) fn draw(input: &mut Input<'_>) -> Self {
        let flags = input.byte();
        let version = if flags & 0b11 == 0b11 { 2 } else { 3 };
        let extended_l2 = version == 3 && flags & 0b1100 == 0b1100;
        let codec = if version == 3 && flags & 0x10 != 0 { CompressionType::Zstd } else { CompressionType::Deflate };
        let order = if version == 3 { input.below(7) as u32 } else { 4 };
        // most are small, which is faster
        let cluster_bits = match input.below(16) as u32 {
            _ if extended_l2 => 14 + u32::from(flags >> 6) % 3,
            bits @ 9..=15 => bits + 1,
            bits => 9 + bits % 3,
        };
        // a block of more refcounts takes long to go through
        let refcount_order = order.max((cluster_bits + 3).saturating_sub(15));
        let mut size = 1 + input.below((90_u64 << cluster_bits).min(256 << 10));
        if flags & 0x20 == 0 {
            size = size.next_multiple_of(512);
        }
        Self { version, cluster_bits, refcount_order, extended_l2, codec, size }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The bytes of the image.
    pub(super) fn image(&self) -> Vec<u8> {
        self.make(false).0
    }

    /// The bytes of an image with one empty L2 table, and where that is.
    pub(super) fn with_l2_table(&self) -> (Vec<u8>, usize) {
        self.make(true)
    }

    fn make(&self, l2_table: bool) -> (Vec<u8>, usize) {
        let cluster = 1_usize << self.cluster_bits;
        let entry = if self.extended_l2 { 16 } else { 8 };
        let l1_entries = self.size.div_ceil(self.cluster_size() * (self.cluster_size() / entry));
        let l1_clusters = (l1_entries as usize * 8).div_ceil(cluster);
        // header, refcount table, refcount block, L1 table
        let (table, block, l1) = (cluster, 2 * cluster, 3 * cluster);
        let l2 = l1 + l1_clusters * cluster;
        let clusters = l2 / cluster + usize::from(l2_table);
        assert!(clusters <= (cluster * 8) >> self.refcount_order, "{self:?} wants more refcounts than a block has");
        let mut image = vec![0; clusters * cluster];
        image[table..table + 8].copy_from_slice(&(block as u64).to_be_bytes());
        for index in 0..clusters {
            let bits = index << self.refcount_order;
            match self.refcount_order {
                0..=2 => image[block + bits / 8] |= 1 << (bits % 8),
                order => image[block + bits / 8 + (1 << (order - 3)) - 1] = 1,
            }
        }
        if l2_table {
            image[l1..l1 + 8].copy_from_slice(&(1 << 63 | l2 as u64).to_be_bytes());
        }
        self.put_header(&mut image, l1_entries, [table, l1]);
        (image, l2)
    }

    fn put_header(&self, image: &mut [u8], l1_entries: u64, [table, l1]: [usize; 2]) {
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let zstd = self.codec == CompressionType::Zstd;
        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(l1_entries as u32).to_be_bytes());
        put(40, &(l1 as u64).to_be_bytes());
        put(48, &(table as u64).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        if self.version == 3 {
            put(72, &(u64::from(zstd) << 3 | u64::from(self.extended_l2) << 4).to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &112_u32.to_be_bytes());
            put(104, &[u8::from(zstd)]);
        }
    }
}
