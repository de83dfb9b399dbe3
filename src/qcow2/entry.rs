//! L1 and L2 entries: the bits decoded once into values that can be matched.

use super::address::HostOffset;
use super::error::Allowed;
use super::geometry::Geometry;
use super::header::Header;
use super::wire::{FLAG_COMPRESSED, FLAG_COPIED, FLAG_ZERO, OFFSET_MASK};

/// Bytes that the length of compressed data is counted in.
pub(crate) const SECTOR: u64 = 512;

/// What an L1 entry says: where the L2 table is, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct L1Entry {
    /// Where the L2 table starts.
    pub(crate) table: HostOffset,
    /// The table belongs to this L1 table alone.
    pub(crate) copied: bool,
}

impl L1Entry {
    /// `None` for an entry without a table.
    pub(crate) fn decode(value: u64, geometry: Geometry) -> Result<Option<Self>, Allowed> {
        let table = value & OFFSET_MASK;
        if value & !(OFFSET_MASK | FLAG_COPIED) != 0 {
            return Err(Allowed::Bits(OFFSET_MASK | FLAG_COPIED));
        }
        if table % geometry.cluster_size() != 0 {
            return Err(Allowed::MultipleOf(geometry.cluster_size()));
        }
        Ok((table != 0).then_some(Self { table: HostOffset(table), copied: value & FLAG_COPIED != 0 }))
    }
}

/// What an L2 entry says of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// Nothing: the backing file shows through.
    Unallocated,
    /// Zeroes; the host cluster, where there is one, is only reserved.
    Zero {
        /// The reserved cluster.
        host: Option<HostOffset>,
        /// That cluster belongs to this table alone.
        copied: bool,
    },
    /// Data, uncompressed.
    Data {
        /// Where the cluster starts.
        host: HostOffset,
        /// The cluster belongs to this table alone.
        copied: bool,
    },
    /// Data, compressed.
    Compressed(CompressedCluster),
    /// Some of everything, for each subcluster by itself.
    Subclusters {
        /// The cluster that holds the subclusters with data; `None` where there are none.
        host: Option<HostOffset>,
        /// That cluster belongs to this table alone.
        copied: bool,
        /// Bit x: subcluster x is data.
        allocated: u32,
        /// Bit x: subcluster x is zeroes.
        zero: u32,
    },
}

/// Where the bytes of a compressed cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedCluster {
    /// The first byte, not aligned.
    pub host: HostOffset,
    /// Bytes up to the end of the last sector; the stream may end before, and so may the file.
    pub length: u64,
}

/// What decides about the meaning of an entry, beside its bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EntryRules {
    pub(crate) geometry: Geometry,
    /// Version 2 has no zero flag.
    pub(crate) zero_flag: bool,
    pub(crate) data_file: bool,
}

impl EntryRules {
    pub(crate) fn of(header: &Header) -> Self {
        Self { geometry: header.geometry, zero_flag: header.version > 2, data_file: header.has_data_file() }
    }
}

impl L2Entry {
    /// Decodes an entry; `bitmap` is zero without extended L2 entries.
    pub(crate) fn decode(value: u64, bitmap: u64, rules: EntryRules) -> Result<Self, Allowed> {
        // the compressed bit first: it changes the meaning of all others
        if value & FLAG_COMPRESSED != 0 {
            return Self::decode_compressed(value, bitmap, rules);
        }
        let zero_flag = if rules.zero_flag && !rules.geometry.extended_l2() { FLAG_ZERO } else { 0 };
        let known = OFFSET_MASK | FLAG_COPIED | zero_flag;
        if value & !known != 0 {
            return Err(Allowed::Bits(known));
        }
        let (offset, copied) = (value & OFFSET_MASK, value & FLAG_COPIED != 0);
        if offset % rules.geometry.cluster_size() != 0 {
            return Err(Allowed::MultipleOf(rules.geometry.cluster_size()));
        }
        // in an external data file the first cluster is as good as any other
        let host = (offset != 0 || (rules.data_file && copied)).then_some(HostOffset(offset));
        if rules.geometry.extended_l2() {
            return Self::decode_subclusters(host, copied, bitmap);
        }
        Ok(match host {
            host if value & zero_flag != 0 => Self::Zero { host, copied },
            Some(host) => Self::Data { host, copied },
            None => Self::Unallocated,
        })
    }

    fn decode_compressed(value: u64, bitmap: u64, rules: EntryRules) -> Result<Self, Allowed> {
        if rules.data_file {
            return Err(Allowed::Otherwise("images with an external data file have no compressed clusters"));
        }
        if value & FLAG_COPIED != 0 {
            return Err(Allowed::Otherwise("compressed clusters have no COPIED flag"));
        }
        if bitmap != 0 {
            return Err(Allowed::Otherwise("compressed clusters have no subclusters"));
        }
        let bits = rules.geometry.compressed_offset_bits();
        let host = value & ((1 << bits) - 1);
        let sectors = ((value & !FLAG_COMPRESSED) >> bits) + 1;
        Ok(Self::Compressed(CompressedCluster { host: HostOffset(host), length: sectors * SECTOR - host % SECTOR }))
    }

    fn decode_subclusters(host: Option<HostOffset>, copied: bool, bitmap: u64) -> Result<Self, Allowed> {
        let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default();
        let (zero, allocated) = (half(bitmap >> 32), half(bitmap));
        if zero & allocated != 0 {
            return Err(Allowed::Otherwise("a subcluster is either allocated or zero"));
        }
        if host.is_none() && allocated != 0 {
            return Err(Allowed::Otherwise("allocated subclusters need an offset"));
        }
        Ok(match (host, allocated, zero) {
            (None, 0, 0) => Self::Unallocated,
            (Some(host), u32::MAX, 0) => Self::Data { host, copied },
            (host, 0, u32::MAX) => Self::Zero { host, copied },
            _ => Self::Subclusters { host, copied, allocated, zero },
        })
    }
}

/// Encodes the entry of a compressed cluster; `None` where it is empty, or the offset beyond what the entry can hold.
pub(crate) fn encode_compressed(host: HostOffset, length: u64, geometry: Geometry) -> Option<u64> {
    let bits = geometry.compressed_offset_bits();
    let last = host.0.checked_add(length.checked_sub(1)?)?;
    let sectors = last / SECTOR - host.0 / SECTOR;
    (last >> bits == 0 && sectors >> (62 - bits) == 0).then_some(FLAG_COMPRESSED | sectors << bits | host.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules(cluster_bits: u32, extended: bool) -> EntryRules {
        EntryRules { geometry: Geometry::new(cluster_bits, extended).unwrap(), zero_flag: true, data_file: false }
    }

    #[test]
    fn the_compressed_bit_is_tested_before_the_zero_bit() {
        let entry = L2Entry::decode(FLAG_COMPRESSED | 0x20001, 0, rules(16, false)).unwrap();
        let cluster = CompressedCluster { host: HostOffset(0x20001), length: 511 };
        assert_eq!(entry, L2Entry::Compressed(cluster));
    }

    #[test]
    fn the_zero_bit_is_a_reserved_bit_in_version_2() {
        let version_2 = EntryRules { zero_flag: false, ..rules(16, false) };
        assert!(L2Entry::decode(FLAG_ZERO, 0, version_2).is_err());
        assert_eq!(L2Entry::decode(FLAG_ZERO, 0, rules(16, false)), Ok(L2Entry::Zero { host: None, copied: false }));
    }

    #[test]
    fn a_subcluster_that_is_both_data_and_zero_is_refused() {
        assert!(L2Entry::decode(0x20000, 1 << 32 | 1, rules(16, true)).is_err());
        assert!(L2Entry::decode(0, 1, rules(16, true)).is_err());
    }

    proptest! {
        #[test]
        fn decoding_never_panics(value: u64, bitmap: u64, bits in 9u32..=21, extended: bool, zero_flag: bool, data_file: bool) {
            if let Some(geometry) = Geometry::new(bits, extended) {
                let _ = L2Entry::decode(value, bitmap, EntryRules { geometry, zero_flag, data_file });
                let _ = L1Entry::decode(value, geometry);
            }
        }

        #[test]
        fn a_compressed_entry_says_where_and_covers_all_bytes(bits in 9u32..=21, host in 512u64..1 << 40, length in 1u64..1 << 21) {
            let geometry = Geometry::new(bits, false).unwrap();
            let length = length.min(geometry.cluster_size());
            let entry = encode_compressed(HostOffset(host), length, geometry).unwrap();
            let L2Entry::Compressed(cluster) = L2Entry::decode(entry, 0, rules(bits, false)).unwrap() else { panic!() };
            prop_assert_eq!(cluster.host.0, host);
            prop_assert!(cluster.length >= length && cluster.length < length + 512);
        }
    }
}
