//! The header, before and after it was checked: [`Header`] exists only where every field is in its range.

use zerocopy::FromBytes;

use super::address::HostOffset;
use super::codec::CompressionType;
use super::error::{Allowed, Error, Invalid, Result};
use super::extensions::Extensions;
use super::features::Features;
use super::geometry::Geometry;
use super::refcount;
use super::wire::{self, RawHeader};
use crate::storage::{Storage, to_usize};

/// The header of an image, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size and kind of L2 entries.
    pub geometry: Geometry,
    /// The size of the virtual disk in bytes, any number.
    pub size: u64,
    /// Feature bits.
    pub features: Features,
    /// How compressed clusters are compressed.
    pub codec: CompressionType,
    /// The name of the backing file and its format.
    pub backing: Option<Backing>,
    /// The active L1 table.
    pub l1_table: Table,
    /// The refcount table; entries are eight bytes. It has none where it is not known.
    pub refcount_table: Table,
    /// The binary logarithm of the width of a refcount in bits.
    pub refcount_order: u32,
    /// The number of internal snapshots.
    pub nb_snapshots: u32,
    /// Where the snapshot table starts; 0 where there is none.
    pub snapshots_offset: HostOffset,
    /// Bytes of the header, behind which its extensions start.
    pub header_length: u64,
    /// What stands behind the header.
    pub extensions: Extensions,
    /// Where all this ends: what comes behind it in the first cluster means nothing.
    pub end: HostOffset,
}

/// A table of eight-byte entries that is aligned to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Where it starts.
    pub offset: HostOffset,
    /// How many entries it has.
    pub entries: u64,
}

impl Table {
    /// No table.
    const NONE: Self = Self { offset: HostOffset(0), entries: 0 };

    /// Bytes of the table.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.entries.saturating_mul(8)
    }

    /// A table that is to be read must be in the file.
    pub(super) fn check_inside(self, storage: &dyn Storage, what: &'static str) -> Result<()> {
        let (offset, length, file_length) = (self.offset, self.bytes(), storage.length());
        if offset.0.checked_add(length).is_none_or(|end| end > file_length) {
            return Err(Error::Truncated { what, offset, length, file_length });
        }
        Ok(())
    }
}

/// What the header says of a backing file. The name is data: nothing opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name as it stands in the image.
    pub name: String,
    /// The format as it stands in the image.
    pub format: Option<String>,
}

impl Header {
    /// Reads and checks the header of an image.
    ///
    /// # Errors
    /// As [`Header::parse`], or [`Error::Io`].
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        Self::parse(&read_cluster(storage)?)
    }

    /// Reads the header of an image that is to be checked or repaired: where there is no refcount table, it has no entries.
    pub(crate) fn read_to_check(storage: &dyn Storage) -> Result<Self> {
        Self::parse_to_check(&mut read_cluster(storage)?)
    }

    /// As [`Header::parse`]. In bytes that say that there is no refcount table, they say now that it has one cluster: they can
    /// be parsed when other fields are changed, until there is a new one.
    pub(super) fn parse_to_check(cluster: &mut [u8]) -> Result<Self> {
        if whole(cluster)?.refcount_table_clusters.get() > 0 {
            return Self::parse(cluster);
        }
        put(cluster, REFCOUNT_TABLE_CLUSTERS, &1_u32.to_be_bytes());
        Ok(Self { refcount_table: Table::NONE, ..Self::parse(cluster)? })
    }

    /// QEMU opens no image without a refcount table, but to repair it.
    pub(super) fn check_refcount_table(&self) -> Result<(), Invalid> {
        let offset = HostOffset(REFCOUNT_TABLE_CLUSTERS as u64);
        let allowed = Allowed::Range(1, wire::REFCOUNT_TABLE_BYTES_MAX / self.geometry.cluster_size());
        let invalid = Invalid { field: "refcount_table_clusters", offset, value: 0, allowed };
        if self.refcount_table.entries > 0 { Ok(()) } else { Err(invalid) }
    }

    /// Reads the header of an image of which parts may be damaged, and tells what is wrong with it, if anything is. What cannot
    /// be read behind the first page is zeroes. Where the size of the disk is known from elsewhere, that is taken; and where a
    /// field is wrong that no read needs, it is as if the image had nothing of that kind: a refcount table without entries
    /// tells nothing. Where it is certain that some bit of it is wrong, the image is none of another format or version, or of
    /// features that nobody knows.
    ///
    /// # Errors
    /// As [`Header::read`], about what no read can do without.
    pub(crate) fn read_damaged(
        storage: &dyn Storage,
        size: Option<u64>,
        known: Option<KnownDamage>,
    ) -> Result<(Self, Option<String>)> {
        let mut cluster = first_cluster(storage)?;
        let wrong = match (Self::parse(&cluster), size) {
            (Ok(header), Some(size)) if header.size != size => {
                format!("its header says that the disk has {} bytes, but its manifest says {size}", header.size)
            }
            (Ok(header), _) => return Ok((header, None)),
            (Err(error), _) => error.to_string(),
        };
        if let Some(size) = size {
            put(&mut cluster, 24, &size.to_be_bytes());
        }
        if let Some(known) = known {
            take_for_known(&mut cluster, known);
        }
        let header = Self::parse(&cluster).or_else(|_| Self::parse_without_damage(cluster, size))?;
        Ok((header, Some(wrong)))
    }

    /// The header without what no read needs: the one part that is damaged, or all of it.
    fn parse_without_damage(mut cluster: Vec<u8>, size: Option<u64>) -> Result<Self> {
        for part in [BACKING_FILE, SNAPSHOTS_OFFSET] {
            let mut rest = cluster.clone();
            // where there are snapshots, refcounts count them, too
            if part == BACKING_FILE || whole(&rest)?.nb_snapshots.get() == 0 {
                rest.get_mut(part).unwrap_or_default().fill(0);
            }
            if let Ok(header) = Self::parse(&rest) {
                return Ok(header);
            }
        }
        leave_out(&mut cluster, size);
        Ok(Self { refcount_table: Table::NONE, ..Self::parse(&cluster)? })
    }

    /// Checks the header in the first cluster of an image.
    ///
    /// # Errors
    /// [`Error::Invalid`] with field, offset, value and range; [`Error::Encrypted`]; [`Error::UnknownFeatures`];
    /// [`Error::Truncated`] where the bytes end before the header does.
    pub fn parse(cluster: &[u8]) -> Result<Self> {
        let raw = whole(cluster)?;
        check("magic", 0, raw.magic.get(), raw.magic.get() == wire::MAGIC, Allowed::Exactly(u64::from(wire::MAGIC)))?;
        let version = raw.version.get();
        check("version", 4, version, (2..=3).contains(&version), Allowed::Range(2, 3))?;
        let length = if version == 2 { wire::V2_HEADER_LENGTH } else { wire::V3_HEADER_LENGTH_MIN };
        if (cluster.len() as u64) < length {
            return Err(truncated(length, cluster));
        }
        let raw = if version == 2 { without_v3_fields(&raw) } else { raw };
        let cluster_bits = raw.cluster_bits.get();
        let extended_l2 = raw.incompatible_features.get() & Features::EXTENDED_L2 != 0;
        // unknown features are named before anything that they may change is judged, but their names stand behind
        // the header, whose place is known only with a sane cluster size and header length
        let (least, most) = Geometry::CLUSTER_BITS.into_inner();
        check_range("cluster_bits", 20, cluster_bits, least.into(), most.into())?;
        let header_length = header_length(&raw, version)?;
        let (extensions, extensions_end) = Extensions::parse(cluster, header_length, raw.backing_file_offset.get())?;
        let features = Features {
            incompatible: raw.incompatible_features.get(),
            compatible: raw.compatible_features.get(),
            autoclear: raw.autoclear_features.get(),
        };
        features.refuse_unknown(&extensions.feature_names)?;
        refuse_encrypted(raw.crypt_method.get())?;
        let geometry = Geometry::new(cluster_bits, extended_l2).ok_or(Invalid {
            field: "cluster_bits",
            offset: HostOffset(20),
            value: u64::from(cluster_bits),
            allowed: Allowed::Because("extended L2 entries need at least 14"),
        })?;
        check_range("refcount_order", 96, raw.refcount_order.get(), 0, 6)?;
        let codec = codec(&raw, header_length, features)?;
        let backing = backing(&raw, cluster, geometry, &extensions)?;
        let name_end = backing.as_ref().map_or(0, |backing| raw.backing_file_offset.get() + backing.name.len() as u64);
        Ok(Self {
            version,
            geometry,
            size: raw.size.get(),
            features,
            codec,
            backing,
            l1_table: l1_table(&raw, geometry)?,
            refcount_table: refcount_table(&raw, geometry)?,
            refcount_order: raw.refcount_order.get(),
            nb_snapshots: nb_snapshots(&raw, geometry)?,
            snapshots_offset: HostOffset(if raw.nb_snapshots.get() > 0 { raw.snapshots_offset.get() } else { 0 }),
            header_length,
            extensions,
            end: HostOffset(extensions_end.max(name_end)),
        })
    }

    /// Refcounts may be wrong: a program with lazy refcounts did not close the image.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.features.has(Features::DIRTY)
    }

    /// Some program found the image damaged and marked it.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.features.has(Features::CORRUPT)
    }

    /// Guest clusters lie in another file.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.features.has(Features::DATA_FILE)
    }

    /// Bits in a refcount.
    #[must_use]
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The highest refcount that fits.
    pub(crate) fn most_references(&self) -> u64 {
        refcount::most(self.refcount_order)
    }

    /// The clusters that one refcount block counts.
    pub(crate) fn refcounts_per_block(&self) -> u64 {
        (self.geometry.cluster_size() * 8) >> self.refcount_order
    }

    /// The longest file in bytes whose clusters all can have a refcount.
    pub(crate) fn most_counted(&self) -> u64 {
        let counted = self.refcounts_per_block().saturating_mul(self.geometry.cluster_size());
        (wire::REFCOUNT_TABLE_BYTES_MAX / 8).saturating_mul(counted)
    }
}

fn read(storage: &dyn Storage, buffer: &mut [u8]) -> Result<()> {
    let io = |source| Error::Io { what: "the header", offset: HostOffset(0), source };
    storage.read_exact_at(buffer, 0).map_err(io)
}

/// The first cluster of an image, or as much of it as the file has.
pub(super) fn read_cluster(storage: &dyn Storage) -> Result<Vec<u8>> {
    let mut start = [0; size_of::<RawHeader>()];
    let length = storage.length().min(start.len() as u64);
    read(storage, start.get_mut(..to_usize(length)).unwrap_or_default())?;
    let cluster_bits = RawHeader::read_from_bytes(&start).map_or(0, |raw| raw.cluster_bits.get());
    let cluster_size = 1 << cluster_bits.clamp(*Geometry::CLUSTER_BITS.start(), *Geometry::CLUSTER_BITS.end());
    let mut cluster = vec![0; to_usize(storage.length().min(cluster_size))];
    read(storage, &mut cluster)?;
    Ok(cluster)
}

/// The first cluster of an image; zeroes behind the first page where it cannot be read.
fn first_cluster(storage: &dyn Storage) -> Result<Vec<u8>> {
    const PAGE: usize = 4096;
    let mut cluster = vec![0; PAGE.min(to_usize(storage.length().min(PAGE as u64)))];
    read(storage, &mut cluster)?;
    let bits = whole(&cluster).map_or(0, |raw| raw.cluster_bits.get());
    let size = 1 << bits.clamp(*Geometry::CLUSTER_BITS.start(), *Geometry::CLUSTER_BITS.end());
    cluster.resize(to_usize(storage.length().min(size)), 0);
    for (page, offset) in cluster.chunks_mut(PAGE).zip((0..).step_by(PAGE)).skip(1) {
        if storage.read_exact_at(page, offset).is_err() {
            page.fill(0);
        }
    }
    Ok(cluster)
}

fn put(cluster: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(place) = cluster.get_mut(offset..offset + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// What is certain of a header of which some bit is wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KnownDamage {
    /// The image is not encrypted, whatever [the field](CRYPT_METHOD) says.
    pub(crate) is_plain: bool,
}

/// Where a header says whether the image is encrypted: not, where it is zero.
pub(crate) const CRYPT_METHOD: std::ops::Range<u64> = 32..36;

/// Makes a header one of an image that can be read, as far as magic, version, features and encryption go.
fn take_for_known(cluster: &mut [u8], known: KnownDamage) {
    let Ok(raw) = whole(cluster) else { return };
    put(cluster, 0, &wire::MAGIC.to_be_bytes());
    let is_known = (2..=3).contains(&raw.version.get());
    // the first version has other things there
    let version =
        if is_known { raw.version.get() } else { 2 + u32::from([104, 112].contains(&raw.header_length.get())) };
    put(cluster, 4, &version.to_be_bytes());
    if version > 2 {
        put(cluster, 72, &(raw.incompatible_features.get() & Features::KNOWN).to_be_bytes());
    }
    if known.is_plain || raw.crypt_method.get() > 2 {
        put(cluster, to_usize(CRYPT_METHOD.start), &[0; 4]);
    }
}

/// Offset and length of the backing file name.
const BACKING_FILE: std::ops::Range<usize> = 8..20;
/// Where the length of the refcount table is.
const REFCOUNT_TABLE_CLUSTERS: usize = 56;
/// Where the snapshot table starts.
const SNAPSHOTS_OFFSET: std::ops::Range<usize> = 64..72;

/// Takes all out of a header that no read needs: backing name, refcounts, snapshots, extensions. The L1 table has the length
/// that a disk of a known size needs.
fn leave_out(cluster: &mut [u8], size: Option<u64>) {
    let Ok(raw) = whole(cluster) else { return };
    put(cluster, BACKING_FILE.start, &[0; 12]);
    put(cluster, 48, &[0; 24]);
    put(cluster, REFCOUNT_TABLE_CLUSTERS, &1_u32.to_be_bytes());
    let mut behind = to_usize(wire::V2_HEADER_LENGTH);
    if raw.version.get() > 2 {
        let features = raw.incompatible_features.get();
        let length = if features & Features::COMPRESSION_TYPE == 0 { 104_u32 } else { 112 };
        put(cluster, 96, &[4, length].map(u32::to_be_bytes).concat());
        behind = to_usize(length.into());
    }
    cluster.get_mut(behind..).unwrap_or_default().fill(0);
    let extended = raw.version.get() > 2 && raw.incompatible_features.get() & Features::EXTENDED_L2 != 0;
    if let (Some(size), Some(geometry)) = (size, Geometry::new(raw.cluster_bits.get(), extended)) {
        let entries = u32::try_from(geometry.l1_entries(size)).unwrap_or(u32::MAX);
        put(cluster, 36, &entries.to_be_bytes());
    }
}

fn truncated(length: u64, cluster: &[u8]) -> Error {
    Error::Truncated { what: "the header", offset: HostOffset(0), length, file_length: cluster.len() as u64 }
}

/// The fields of the longest header; zeroes where a short file has none.
fn whole(cluster: &[u8]) -> Result<RawHeader> {
    let mut start = [0; size_of::<RawHeader>()];
    let length = start.len().min(cluster.len());
    start.iter_mut().zip(cluster).for_each(|(to, from)| *to = *from);
    match RawHeader::read_from_bytes(&start) {
        Ok(raw) if length >= 8 => Ok(raw),
        _ => Err(truncated(wire::V2_HEADER_LENGTH, cluster)),
    }
}

fn without_v3_fields(raw: &RawHeader) -> RawHeader {
    RawHeader {
        incompatible_features: 0.into(),
        compatible_features: 0.into(),
        autoclear_features: 0.into(),
        refcount_order: 4.into(),
        header_length: 72.into(),
        compression_type: 0,
        ..raw.clone()
    }
}

fn check(field: &'static str, offset: u64, value: impl Into<u64>, right: bool, allowed: Allowed) -> Result<()> {
    if right { Ok(()) } else { Err(Invalid { field, offset: HostOffset(offset), value: value.into(), allowed }.into()) }
}

fn check_range(field: &'static str, offset: u64, value: impl Into<u64>, least: u64, most: u64) -> Result<()> {
    let value = value.into();
    check(field, offset, value, (least..=most).contains(&value), Allowed::Range(least, most))
}

/// The offset of a table, also of one without entries: QEMU does not open an image where one is wrong.
fn check_table(field: &'static str, offset: u64, value: u64, geometry: Geometry) -> Result<()> {
    let unit = geometry.cluster_size();
    check(field, offset, value, value % unit == 0, Allowed::MultipleOf(unit))?;
    check_range(field, offset, value, 0, i64::MAX.unsigned_abs())
}

fn header_length(raw: &RawHeader, version: u32) -> Result<u64> {
    let length = u64::from(raw.header_length.get());
    if version > 2 {
        check_range("header_length", 100, length, wire::V3_HEADER_LENGTH_MIN, 1 << raw.cluster_bits.get())?;
        check("header_length", 100, length, length % 8 == 0, Allowed::MultipleOf(8))?;
    }
    Ok(length)
}

fn refuse_encrypted(method: u32) -> Result<()> {
    match method {
        0 => Ok(()),
        1 => Err(Error::Encrypted { method: "AES" }),
        2 => Err(Error::Encrypted { method: "LUKS" }),
        _ => check_range("crypt_method", 32, method, 0, 2),
    }
}

fn codec(raw: &RawHeader, header_length: u64, features: Features) -> Result<CompressionType> {
    let compression_type = if header_length > 104 { raw.compression_type } else { 0 };
    let flagged = features.has(Features::COMPRESSION_TYPE);
    let because = Allowed::Because(if flagged {
        "but the compression type feature (incompatible bit 3) is set"
    } else {
        "but the compression type feature (incompatible bit 3) is not set"
    });
    check("compression_type", 104, compression_type, flagged == (compression_type != 0), because)?;
    match compression_type {
        0 => Ok(CompressionType::Deflate),
        1 => Ok(CompressionType::Zstd),
        _ => check_range("compression_type", 104, compression_type, 0, 1).map(|()| CompressionType::Deflate),
    }
}

fn backing(raw: &RawHeader, cluster: &[u8], geometry: Geometry, extensions: &Extensions) -> Result<Option<Backing>> {
    let (start, length) = (raw.backing_file_offset.get(), u64::from(raw.backing_file_size.get()));
    if start == 0 {
        return Ok(None);
    }
    // that it is in the first cluster, QEMU wants also where there is no name
    let least = if length == 0 { 0 } else { u64::from(raw.header_length.get()) };
    check_range("backing_file_offset", 8, start, least, geometry.cluster_size())?;
    if length == 0 {
        return Ok(None);
    }
    let most = wire::BACKING_NAME_MAX.min(geometry.cluster_size() - start);
    check_range("backing_file_size", 16, length, 0, most)?;
    let bytes =
        cluster.get(to_usize(start)..to_usize(start + length)).ok_or_else(|| truncated(start + length, cluster))?;
    let name = text("the backing file name", start, bytes)?;
    Ok(Some(Backing { name, format: extensions.backing_format.clone() }))
}

/// A text of the header: UTF-8 without NUL.
pub(super) fn text(what: &'static str, offset: u64, bytes: &[u8]) -> Result<String> {
    let wrong = |reason: String| Error::Text { what, offset: HostOffset(offset), reason };
    if let Some(index) = bytes.iter().position(|byte| *byte == 0) {
        return Err(wrong(format!("has a NUL at byte {index}")));
    }
    String::from_utf8(bytes.to_vec()).map_err(|error| wrong(format!("is not UTF-8: {error}")))
}

fn l1_table(raw: &RawHeader, geometry: Geometry) -> Result<Table> {
    let (offset, entries) = (raw.l1_table_offset.get(), u64::from(raw.l1_size.get()));
    check_table("l1_table_offset", 40, offset, geometry)?;
    let needed = geometry.l1_entries(raw.size.get());
    let most = wire::L1_BYTES_MAX / 8;
    let too_large = Allowed::Because("more than L1 tables of this cluster size can map");
    check("size", 24, raw.size.get(), needed <= most, too_large)?;
    check_range("l1_size", 36, entries, needed, most)?;
    Ok(Table { offset: HostOffset(offset), entries })
}

fn refcount_table(raw: &RawHeader, geometry: Geometry) -> Result<Table> {
    let (offset, clusters) = (raw.refcount_table_offset.get(), u64::from(raw.refcount_table_clusters.get()));
    check_table("refcount_table_offset", 48, offset, geometry)?;
    let most = wire::REFCOUNT_TABLE_BYTES_MAX / geometry.cluster_size();
    check_range("refcount_table_clusters", 56, clusters, 1, most)?;
    Ok(Table { offset: HostOffset(offset), entries: clusters * geometry.cluster_size() / 8 })
}

fn nb_snapshots(raw: &RawHeader, geometry: Geometry) -> Result<u32> {
    check_range("nb_snapshots", 60, raw.nb_snapshots.get(), 0, u64::from(wire::SNAPSHOTS_MAX))?;
    check_table("snapshots_offset", 64, raw.snapshots_offset.get(), geometry)?;
    Ok(raw.nb_snapshots.get())
}
