//! Where the fields of an image are, and what is put there. This reads the format by itself, not with the engine.

use std::collections::BTreeSet;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// How many entries of a table are damaged; more would say nothing new.
const ENTRIES: usize = 6;

/// A number in an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) at: usize,
    /// 1, 2, 4 or 8 bytes.
    pub(super) width: usize,
}

pub(super) fn number(image: &[u8], at: usize, width: usize) -> u64 {
    let bytes = image.get(at..at + width).unwrap_or_default();
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The bytes of a number of this width.
pub(super) fn bytes(value: u64, width: usize) -> Vec<u8> {
    value.to_be_bytes()[8 - width..].to_vec()
}

/// A sound image as it is read here.
pub(super) struct Map<'a> {
    image: &'a [u8],
    fields: Vec<Field>,
    /// Where the tables are: places that nothing else may point to.
    tables: BTreeSet<u64>,
}

impl<'a> Map<'a> {
    pub(super) fn of(image: &'a [u8]) -> Self {
        let mut map = Self { image, fields: Vec::new(), tables: BTreeSet::from([0]) };
        map.header();
        map.extensions();
        map.l1(map.at(40), map.read(36, 4), true);
        map.refcounts();
        map.snapshots();
        map.fields.sort_by_key(|field| field.at);
        map.fields.dedup_by_key(|field| field.at);
        map.fields.retain(|field| field.at + field.width <= image.len());
        map
    }

    pub(super) fn fields(&self) -> &[Field] {
        &self.fields
    }

    fn read(&self, at: usize, width: usize) -> u64 {
        number(self.image, at, width)
    }

    /// An offset that stands in the image.
    fn at(&self, at: usize) -> usize {
        (self.read(at, 8) & OFFSET) as usize
    }

    fn cluster(&self) -> usize {
        1 << self.read(20, 4)
    }

    fn extended(&self) -> bool {
        self.read(4, 4) > 2 && self.read(72, 8) & 16 != 0
    }

    fn put(&mut self, at: usize, parts: &[(&'static str, usize)]) -> usize {
        parts.iter().fold(at, |at, (name, width)| {
            self.fields.push(Field { name, at, width: *width });
            at + width
        })
    }

    fn header(&mut self) {
        self.put(
            0,
            &[
                ("magic", 4),
                ("version", 4),
                ("backing_file_offset", 8),
                ("backing_file_size", 4),
                ("cluster_bits", 4),
                ("size", 8),
                ("crypt_method", 4),
                ("l1_size", 4),
                ("l1_table_offset", 8),
                ("refcount_table_offset", 8),
                ("refcount_table_clusters", 4),
                ("nb_snapshots", 4),
                ("snapshots_offset", 8),
            ],
        );
        if self.read(4, 4) > 2 {
            self.put(
                72,
                &[
                    ("incompatible_features", 8),
                    ("compatible_features", 8),
                    ("autoclear_features", 8),
                    ("refcount_order", 4),
                    ("header_length", 4),
                    ("compression_type", 1),
                    ("padding", 1),
                ],
            );
        }
        if self.read(8, 8) != 0 {
            self.put(self.read(8, 8) as usize, &[("backing name", 1), ("backing name", 4)]);
        }
    }

    fn extensions(&mut self) {
        let mut at = if self.read(4, 4) > 2 { self.read(100, 4) as usize } else { 72 };
        loop {
            let (kind, length) = (self.read(at, 4), self.read(at + 4, 4) as usize);
            let data = self.put(at, &[("extension type", 4), ("extension length", 4)]);
            match kind {
                0 => return,
                0x2385_2875 => {
                    let parts = [
                        ("nb_bitmaps", 4),
                        ("bitmaps reserved", 4),
                        ("bitmap_directory_size", 8),
                        ("bitmap_directory_offset", 8),
                    ];
                    self.put(data, &parts);
                    self.bitmaps(self.at(data + 16), self.read(data, 4));
                }
                0x6803_f857 => {
                    self.put(data, &[("feature name type", 1), ("feature name bit", 1), ("feature name", 8)]);
                }
                0x0537_be77 => {
                    self.put(data, &[("crypto offset", 8), ("crypto length", 8)]);
                }
                _ => {
                    self.put(data, &[("extension text", 1), ("extension text", 4)]);
                }
            }
            at = data + length.next_multiple_of(8);
        }
    }

    /// A table of eight-byte entries: some that are used and one that is not.
    fn entries(&mut self, name: &'static str, table: usize, count: u64) -> Vec<usize> {
        self.tables.insert(table as u64);
        let places: Vec<usize> = (0..count as usize).map(|index| table + index * 8).collect();
        let (used, unused): (Vec<usize>, Vec<usize>) = places.into_iter().partition(|at| self.read(*at, 8) != 0);
        let used: Vec<usize> = used.into_iter().take(ENTRIES).collect();
        self.fields.extend(used.iter().chain(unused.first()).map(|at| Field { name, at: *at, width: 8 }));
        used
    }

    fn l1(&mut self, table: usize, count: u64, is_active: bool) {
        let name = if is_active { "L1 entry" } else { "snapshot's L1 entry" };
        for entry in self.entries(name, table, count) {
            let table = self.at(entry);
            self.tables.insert(table as u64);
            if is_active {
                self.l2(table);
            }
        }
    }

    /// Two entries of each sort.
    fn l2(&mut self, table: usize) {
        let size = if self.extended() { 16 } else { 8 };
        let mut seen = Vec::new();
        for at in (table..table + self.cluster()).step_by(size) {
            let (entry, bitmap) = (self.read(at, 8), if size == 16 { self.read(at + 8, 8) } else { 0 });
            let sort = (entry & COMPRESSED, entry & OFFSET != 0, entry & 1, bitmap & 0xffff_ffff, bitmap >> 32);
            if seen.iter().filter(|other| **other == sort).count() < 2 {
                seen.push(sort);
                let parts = [("L2 entry", 8), ("subcluster bitmap", 8)];
                self.put(at, &parts[..size / 8]);
            }
        }
    }

    fn refcounts(&mut self) {
        let count = self.read(56, 4) * self.cluster() as u64 / 8;
        for entry in self.entries("refcount table entry", self.at(48), count) {
            let block = self.at(entry);
            self.entries("refcounts", block, 8);
        }
    }

    fn snapshots(&mut self) {
        let mut at = self.at(64);
        for _ in 0..self.read(60, 4) {
            self.tables.insert(at as u64);
            let (l1, count) = (self.at(at), self.read(at + 8, 4));
            self.l1(l1, count, false);
            let (id, name, extra) = (self.read(at + 12, 2), self.read(at + 14, 2), self.read(at + 36, 4));
            self.put(
                at,
                &[
                    ("snapshot l1_table_offset", 8),
                    ("snapshot l1_size", 4),
                    ("snapshot id_size", 2),
                    ("snapshot name_size", 2),
                    ("snapshot date", 4),
                    ("snapshot date_nsec", 4),
                    ("snapshot vm_clock", 8),
                    ("snapshot vm_state_size", 4),
                    ("snapshot extra_data_size", 4),
                    ("snapshot vm_state_size", 8),
                    ("snapshot disk_size", 8),
                    ("snapshot icount", 8),
                ],
            );
            self.put(at + 40 + extra as usize, &[("snapshot id", 1), ("snapshot name", 1)]);
            at += (40 + extra + id + name).next_multiple_of(8) as usize;
        }
    }

    fn bitmaps(&mut self, directory: usize, count: u64) {
        let mut at = directory;
        for _ in 0..count {
            self.tables.insert(at as u64);
            let (table, entries) = (self.at(at), self.read(at + 8, 4));
            self.entries("bitmap table entry", table, entries);
            let (name, extra) = (self.read(at + 18, 2), self.read(at + 20, 4));
            self.put(
                at,
                &[
                    ("bitmap_table_offset", 8),
                    ("bitmap_table_size", 4),
                    ("bitmap flags", 4),
                    ("bitmap type", 1),
                    ("bitmap granularity_bits", 1),
                    ("bitmap name_size", 2),
                    ("bitmap extra_data_size", 4),
                    ("bitmap name", 1),
                ],
            );
            at += (24 + extra + name).next_multiple_of(8) as usize;
        }
    }

    /// All that is put in a field: the ends of ranges, each bit by itself, and offsets that lead astray.
    pub(super) fn values(&self, field: Field) -> Vec<u64> {
        let (is, length, cluster) = (self.read(field.at, field.width), self.image.len() as u64, self.cluster() as u64);
        let end = length.next_multiple_of(cluster);
        let mut offsets: Vec<u64> = self.tables.iter().copied().chain([field.at as u64, length, end]).collect();
        offsets.extend([length - 512, length + 512, end - cluster, end + cluster, is & OFFSET]);
        let around = |offset: u64| {
            [offset, offset + 1, offset + 512, offset | COPIED, offset | COMPRESSED, (offset + 512) | COMPRESSED]
        };
        let mut values: Vec<u64> = offsets.into_iter().flat_map(around).collect();
        values.extend((0..64).map(|bit| is ^ 1 << bit));
        values.extend([31, 32, 55, 56, 62, 63].map(|bit| 1 << bit));
        values.extend([0, 1, 2, 3, is.wrapping_add(1), is.wrapping_sub(1), u64::MAX, u64::MAX - 1, u64::MAX >> 1]);
        values.extend([7, 8, 9, 15, 16, 21, 22, 72, 104, 112, 1023, 1024, 65_535, 65_536, is << 8, is << 62]);
        let most = u64::MAX >> (64 - 8 * field.width);
        let fitting: BTreeSet<u64> =
            values.into_iter().map(|value| value & most).filter(|value| *value != is).collect();
        fitting.into_iter().collect()
    }
}
