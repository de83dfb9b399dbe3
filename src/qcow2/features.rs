//! Feature bits of the header, by name.

use super::error::{Error, Result};

/// The feature bits of a version 3 header; all zero in version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// A program that does not know one of these must not open the image.
    pub incompatible: u64,
    /// A program may ignore these.
    pub compatible: u64,
    /// A program that writes must clear those that it does not know.
    pub autoclear: u64,
}

impl Features {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Any structure may be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters lie in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not deflate.
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    /// L2 entries have subcluster bitmaps.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// The incompatible features that this program knows.
    pub const KNOWN: u64 = Self::DIRTY | Self::CORRUPT | Self::DATA_FILE | Self::COMPRESSION_TYPE | Self::EXTENDED_L2;
    /// Compatible: refcounts may be updated late.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
    /// Autoclear: the bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// Autoclear: the external data file is a raw image by itself.
    pub const DATA_FILE_RAW: u64 = 1 << 1;

    /// Whether all of these incompatible bits are set.
    #[must_use]
    pub fn has(self, incompatible: u64) -> bool {
        self.incompatible & incompatible == incompatible
    }

    pub(crate) fn refuse_unknown(self, names: &[FeatureName]) -> Result<()> {
        let bits = self.incompatible & !Self::KNOWN;
        if bits == 0 {
            return Ok(());
        }
        let names = (0..64)
            .filter(|bit| bits & (1 << bit) != 0)
            .map(|bit| {
                let known = names.iter().find(|name| name.kind == 0 && u32::from(name.bit) == bit);
                known.map_or_else(|| format!("bit {bit}"), |name| format!("{:?} (bit {bit})", name.name))
            })
            .collect();
        Err(Error::UnknownFeatures { bits, names })
    }
}

/// An entry of the image's feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// The number of the bit.
    pub bit: u8,
    /// What the feature is called.
    pub name: String,
}
