//! The bits on disk, as the specification lays them out. All numbers are big-endian.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");

pub(crate) const V2_HEADER_LENGTH: u64 = 72;
pub(crate) const V3_HEADER_LENGTH_MIN: u64 = 104;
/// With the compression type: what QEMU writes since 5.1.
pub(crate) const V3_HEADER_LENGTH: u64 = 112;

/// The longest backing name.
pub(crate) const BACKING_NAME_MAX: u64 = 1023;
/// QEMU's limit for the name of the backing file's format.
pub(crate) const BACKING_FORMAT_MAX: u64 = 15;
/// QEMU's limit for an L1 table: 4 Mi entries.
pub(crate) const L1_BYTES_MAX: u64 = 32 << 20;
/// QEMU's limit for a refcount table.
pub(crate) const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// QEMU's limits for snapshots.
pub(crate) const SNAPSHOTS_MAX: u32 = 65_536;
pub(crate) const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
pub(crate) const SNAPSHOT_EXTRA_MAX: u32 = 1024;
/// Extra data that snapshots of version 3 must have: VM state size and disk size.
pub(crate) const SNAPSHOT_EXTRA_MIN_V3: u32 = 16;
/// QEMU's limits for bitmaps.
pub(crate) const BITMAPS_MAX: u32 = 65_535;
pub(crate) const BITMAP_DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// The most bytes that the data of one bitmap may have.
pub(crate) const BITMAP_BYTES_MAX: u64 = 512 << 20;
pub(crate) const BITMAP_NAME_MAX: u16 = 1023;
pub(crate) const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The only type of bitmap that there is: dirty tracking.
pub(crate) const BITMAP_TYPE_DIRTY: u8 = 1;
pub(crate) const BITMAP_FLAG_IN_USE: u32 = 1 << 0;
pub(crate) const BITMAP_FLAG_AUTO: u32 = 1 << 1;
pub(crate) const BITMAP_FLAG_EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;

pub(crate) const EXTENSION_END: u32 = 0;
pub(crate) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const EXTENSION_BITMAPS: u32 = 0x2385_2875;
pub(crate) const EXTENSION_CRYPTO: u32 = 0x0537_be77;
pub(crate) const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Offset bits of L1 and L2 entries.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of the cluster is exactly one.
pub(crate) const FLAG_COPIED: u64 = 1 << 63;
pub(crate) const FLAG_COMPRESSED: u64 = 1 << 62;
/// Without an offset, a bitmap table entry with this bit stands for ones.
pub(crate) const BITMAP_ENTRY_ONES: u64 = 1;
/// The cluster reads as zeroes; version 3 without subclusters.
pub(crate) const FLAG_ZERO: u64 = 1;

/// Offset bits of refcount table entries.
pub(crate) const REFCOUNT_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;

/// The header with all fields that QEMU knows; version 2 ends before `incompatible_features`.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: U32,
    pub(crate) version: U32,
    pub(crate) backing_file_offset: U64,
    pub(crate) backing_file_size: U32,
    pub(crate) cluster_bits: U32,
    pub(crate) size: U64,
    pub(crate) crypt_method: U32,
    pub(crate) l1_size: U32,
    pub(crate) l1_table_offset: U64,
    pub(crate) refcount_table_offset: U64,
    pub(crate) refcount_table_clusters: U32,
    pub(crate) nb_snapshots: U32,
    pub(crate) snapshots_offset: U64,
    pub(crate) incompatible_features: U64,
    pub(crate) compatible_features: U64,
    pub(crate) autoclear_features: U64,
    pub(crate) refcount_order: U32,
    pub(crate) header_length: U32,
    pub(crate) compression_type: u8,
    pub(crate) padding: [u8; 7],
}

/// What stands before the data of a header extension.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawExtension {
    pub(crate) kind: U32,
    pub(crate) length: U32,
}

/// An entry of the feature name table.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawFeatureName {
    pub(crate) kind: u8,
    pub(crate) bit: u8,
    pub(crate) name: [u8; 46],
}

/// The data of the bitmaps extension.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawBitmapsExtension {
    pub(crate) nb_bitmaps: U32,
    pub(crate) reserved: U32,
    pub(crate) directory_size: U64,
    pub(crate) directory_offset: U64,
}

/// The fixed part of an entry of the bitmap directory.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawBitmap {
    pub(crate) table_offset: U64,
    pub(crate) table_size: U32,
    pub(crate) flags: U32,
    pub(crate) kind: u8,
    pub(crate) granularity_bits: u8,
    pub(crate) name_size: U16,
    pub(crate) extra_data_size: U32,
}

/// The fixed part of an entry of the snapshot table.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSnapshot {
    pub(crate) l1_table_offset: U64,
    pub(crate) l1_size: U32,
    pub(crate) id_size: U16,
    pub(crate) name_size: U16,
    pub(crate) date_seconds: U32,
    pub(crate) date_nanoseconds: U32,
    pub(crate) vm_clock_nanoseconds: U64,
    pub(crate) vm_state_size: U32,
    pub(crate) extra_data_size: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() as u64 == V3_HEADER_LENGTH);
    assert!(size_of::<RawExtension>() == 8);
    assert!(size_of::<RawFeatureName>() == 48);
    assert!(size_of::<RawBitmapsExtension>() == 24);
    assert!(size_of::<RawBitmap>() == 24);
    assert!(size_of::<RawSnapshot>() == 40);
};
