//! One image of a chain: how it is formatted, and what is done to it after that.
//!
//! Every layer is a standalone image without a backing name, as backups are. So a write of a part of a cluster makes the
//! rest of that cluster (or subcluster) zeroes, and what a restore point holds is simply what the layers say.

use std::collections::HashSet;
use std::ops::Range;

use crate::support::disk::Disk;
use crate::support::prng::Prng;

/// Metadata for all of a larger disk would only cost time.
const LARGEST_PREALLOCATED: u64 = 16 << 20;
const LONGEST_WRITE: u64 = 5 << 20;
const SECTOR: u64 = 512;

/// The format of one image.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are the options of qemu-img create, independent of each other")]
pub(crate) struct Knobs {
    pub(crate) version_3: bool,
    pub(crate) cluster_bits: u64,
    pub(crate) refcount_bits: u64,
    pub(crate) extended_l2: bool,
    pub(crate) zstd: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) preallocated: bool,
    /// The program that wrote it was killed: refcounts may be stale and the dirty bit set, but tables and data are whole.
    pub(crate) killed: bool,
}

impl Knobs {
    pub(crate) fn draw(prng: &mut Prng, smallest_cluster_bits: u64, size: u64) -> Self {
        let version_3 = !prng.one_in(5);
        let cluster_bits = if prng.one_in(3) { 16 } else { prng.between(smallest_cluster_bits, 21) };
        Self {
            version_3,
            cluster_bits,
            refcount_bits: if version_3 && prng.one_in(2) { 1 << prng.below(7) } else { 16 },
            extended_l2: version_3 && cluster_bits >= 14 && prng.one_in(2),
            zstd: version_3 && prng.one_in(2),
            lazy_refcounts: version_3 && prng.one_in(4),
            preallocated: size <= LARGEST_PREALLOCATED && prng.one_in(8),
            killed: prng.one_in(12),
        }
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// For the `-o` of `qemu-img create`.
    pub(crate) fn options(&self) -> String {
        let mut options = format!("cluster_size={}", self.cluster_size());
        let mut add = |given: bool, option: &str| {
            if given {
                options.push(',');
                options.push_str(option);
            }
        };
        add(true, if self.version_3 { "compat=1.1" } else { "compat=0.10" });
        add(self.refcount_bits != 16, &format!("refcount_bits={}", self.refcount_bits));
        add(self.extended_l2, "extended_l2=on");
        add(self.zstd, "compression_type=zstd");
        add(self.lazy_refcounts, "lazy_refcounts=on");
        add(self.preallocated, "preallocation=metadata");
        options
    }
}

/// An image of a chain, and the disk that it is when it is looked at alone.
pub(crate) struct Layer {
    /// The file's name.
    pub(crate) name: String,
    /// What to say to get it back: `INC-<time>`.
    pub(crate) point: String,
    pub(crate) full: bool,
    pub(crate) knobs: Knobs,
    pub(crate) alone: Disk,
}

/// Draws what is written to an image, says it in the words of qemu-io and does it to the model.
pub(crate) struct Writer<'a> {
    pub(crate) knobs: &'a Knobs,
    pub(crate) alone: &'a mut Disk,
    /// What `-s ../../noise-N` writes, over and over.
    pub(crate) noise: &'a [Vec<u8>],
    /// Where layers like to meet.
    pub(crate) hot: &'a mut Vec<u64>,
    /// Clusters that were written to, which compressed writes cannot be.
    pub(crate) touched: HashSet<u64>,
    /// Clusters that this run of qemu-io compresses.
    pub(crate) compressed: HashSet<u64>,
    /// One of them was freed. QEMU would put the next compressed cluster right behind it, even if that host cluster is
    /// somebody else's by now (seen with 10.0: wrong data, or "overlaps with active L2 table").
    pub(crate) freed_compressed: bool,
}

impl Writer<'_> {
    /// One command for qemu-io.
    pub(crate) fn draw(&mut self, prng: &mut Prng) -> String {
        let range = self.range(prng);
        match prng.below(20) {
            0..=5 => self.write(prng, range, "", false),
            6..=9 => self.write(prng, range, "", true),
            10..=11 => self.compress(prng, range, false),
            12..=14 => self.compress(prng, range, true),
            15..=16 => self.zero(prng, range, "-z"),
            17 => self.zero(prng, range, "-z -u"),
            _ => self.discard(&range),
        }
    }

    /// All of a small disk, so that whatever a layer wrongly covers or leaves is seen.
    pub(crate) fn fill(&mut self, prng: &mut Prng) -> Option<String> {
        let all = 0..self.alone.size();
        (all.end <= LARGEST_PREALLOCATED).then(|| self.write(prng, all, "", true))
    }

    /// Data across an offset in the middle of a cluster, and that offset: where the disk could end soon.
    pub(crate) fn straddle(&mut self, prng: &mut Prng) -> (String, u64) {
        let size = self.alone.size();
        let cut = prng.between(1, size.div_ceil(SECTOR)) * SECTOR;
        let range = cut.saturating_sub(prng.between(1, 4 * SECTOR))..size.min(cut + self.knobs.cluster_size());
        (self.write(prng, range, "", false), cut)
    }

    fn range(&mut self, prng: &mut Prng) -> Range<u64> {
        let (size, cluster) = (self.alone.size(), self.knobs.cluster_size());
        let near_end = size.saturating_sub(prng.between(1, 3 * cluster));
        let start = match prng.below(10) {
            0 => 0,
            1 => near_end,
            2..=5 => (*prng.pick(self.hot) + prng.below(2) * cluster).min(size - 1),
            _ => prng.below(size),
        };
        let start = match prng.below(5) {
            0 => start,
            1 | 2 => start - start % SECTOR,
            _ => start - start % cluster,
        };
        let len = match prng.below(6) {
            0 => prng.between(1, SECTOR),
            1 => SECTOR * prng.between(1, 16),
            2 => cluster,
            3 => cluster * prng.between(1, 4),
            4 => cluster.max(64 << 10) * prng.between(1, 3),
            _ => prng.between(1, 3 * cluster),
        };
        if prng.one_in(3) {
            self.hot.push(start);
        }
        start..size.min(start + len.min(LONGEST_WRITE))
    }

    fn write(&mut self, prng: &mut Prng, range: Range<u64>, flags: &str, noise: bool) -> String {
        let len = usize::try_from(range.end - range.start).unwrap();
        self.touch(&range);
        let source = if noise {
            let number = prng.below(self.noise.len() as u64);
            let noise = &self.noise[usize::try_from(number).unwrap()];
            self.alone.write(range.start, &noise.iter().copied().cycle().take(len).collect::<Vec<_>>());
            format!("-s ../../noise-{number}")
        } else {
            // Now and then zeroes that are stored as data
            let pattern = if prng.one_in(12) { 0 } else { prng.next().to_le_bytes()[0] };
            self.alone.write(range.start, &vec![pattern; len]);
            format!("-P {pattern}")
        };
        format!("write -q {flags}{source} {} {len}", range.start)
    }

    /// Whole clusters of which none was written to before; a plain write where there is no such thing.
    fn compress(&mut self, prng: &mut Prng, range: Range<u64>, noise: bool) -> String {
        let cluster = self.knobs.cluster_size();
        let start = range.start - range.start % cluster;
        let end = self.alone.size().min(range.end.next_multiple_of(cluster).min(start + 4 * cluster));
        let untouched = self.clusters(&(start..end)).all(|cluster| !self.touched.contains(&cluster));
        if self.knobs.preallocated || self.freed_compressed || !untouched {
            return self.write(prng, range, "", noise);
        }
        let said = self.write(prng, start..end, "-c ", noise);
        self.compressed.extend(self.clusters(&(start..end)));
        said
    }

    fn zero(&mut self, prng: &mut Prng, mut range: Range<u64>, how: &str) -> String {
        if self.alone.size() <= LARGEST_PREALLOCATED && prng.one_in(12) {
            range = 0..self.alone.size();
        }
        self.touch(&range);
        self.alone.zero(&range);
        format!("write -q {how} {} {}", range.start, range.end - range.start)
    }

    /// Clusters that are covered only in part stay as they are; the last one ends where the disk does.
    fn discard(&mut self, range: &Range<u64>) -> String {
        let (size, cluster_size) = (self.alone.size(), self.knobs.cluster_size());
        for cluster in self.clusters(range) {
            let all = cluster * cluster_size..size.min((cluster + 1) * cluster_size);
            if range.start <= all.start && all.end <= range.end {
                self.alone.zero(&all);
                self.touched.remove(&cluster);
                self.freed_compressed |= self.compressed.remove(&cluster);
            }
        }
        format!("discard -q {} {}", range.start, range.end - range.start)
    }

    fn touch(&mut self, range: &Range<u64>) {
        for cluster in self.clusters(range) {
            self.touched.insert(cluster);
            self.freed_compressed |= self.compressed.remove(&cluster);
        }
    }

    fn clusters(&self, range: &Range<u64>) -> Range<u64> {
        let cluster = self.knobs.cluster_size();
        range.start / cluster..range.end.div_ceil(cluster)
    }
}
