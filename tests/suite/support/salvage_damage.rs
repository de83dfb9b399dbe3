//! Damage to one image of a chain, as a salvage must find it.
//!
//! Where an image has no checksums, it is such damage only that its tables or its neighbours give away.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qmpbackup::chain::Checksums;
use qmpbackup::qcow2::Image;
use qmpbackup::storage::FileStorage;

use crate::support::prng::Prng;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One damage, and the most of the disk that it may cost; `None` where that may be all of it.
pub(crate) struct Damage {
    pub(crate) what: String,
    pub(crate) most: Option<u64>,
}

impl Damage {
    /// Damages any of the images.
    pub(crate) fn make(prng: &mut Prng, members: &[PathBuf]) -> Self {
        let path = prng.pick(members);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(image) = FileStorage::open(path).ok().and_then(|file| Image::open_damaged(Arc::new(file), None).ok())
        else {
            return Self { what: format!("{name} is damaged already"), most: None };
        };
        let file = File::options().read(true).write(true).open(path).unwrap();
        let checked = has_sums(path);
        let victim = Victim { path, name, image, file, checked };
        match prng.below(if checked { 8 } else { 6 }) {
            0 if members.len() > 1 && path != members.last().unwrap() && prng.one_in(2) => victim.remove(),
            0 | 1 => victim.truncate_or_behead(prng),
            2 => victim.break_l1(prng),
            3 => victim.break_l2(prng),
            4 => victim.break_header(prng),
            5 => victim.swap_l2(prng),
            _ => victim.flip(prng),
        }
    }
}

/// The image that is damaged.
struct Victim<'a> {
    path: &'a Path,
    name: String,
    image: Image,
    file: File,
    checked: bool,
}

impl Victim<'_> {
    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn put(&self, at: u64, value: u64) {
        self.file.write_all_at(&value.to_be_bytes(), at).unwrap();
    }

    fn whole(&self, what: &str) -> Damage {
        Damage { what: format!("{} {what}", self.name), most: None }
    }

    /// What costs so much of the disk, unless the checksum of a block says that more may be wrong.
    fn costs(&self, most: u64, what: &str) -> Damage {
        Damage { most: (!self.checked).then_some(most), ..self.whole(what) }
    }

    fn remove(self) -> Damage {
        std::fs::remove_file(self.path).unwrap();
        self.whole("is gone")
    }

    fn truncate_or_behead(self, prng: &mut Prng) -> Damage {
        if prng.one_in(3) {
            self.file.write_all_at(b"no magic", 0).unwrap();
            return self.whole("has no header");
        }
        let cut = prng.below(self.file.metadata().unwrap().len()) / 512 * 512;
        self.file.set_len(cut).unwrap();
        self.whole(&format!("ends at {cut:#x}"))
    }

    fn break_l1(self, prng: &mut Prng) -> Damage {
        let table = self.image.header().l1_table;
        let index = prng.below(table.entries);
        self.put(table.offset.0 + index * 8, 0x7f00_0000_0000_0001);
        let geometry = self.image.header().geometry;
        self.costs(geometry.l2_entries() * geometry.cluster_size(), &format!("has a bad L1 entry {index}"))
    }

    /// The places of the entries of an L2 table that is used.
    fn entries(&self, prng: &mut Prng) -> Option<Vec<u64>> {
        let header = self.image.header();
        let geometry = header.geometry;
        let occupied = self.image.occupied();
        if occupied.is_empty() {
            return None;
        }
        let index = prng.pick(&occupied).start / (geometry.l2_entries() * geometry.cluster_size());
        let table = self.word(header.l1_table.offset.0 + index * 8) & OFFSET;
        let size = if geometry.extended_l2() { 16 } else { 8 };
        Some((0..geometry.l2_entries()).map(|number| table + number * size).collect())
    }

    fn break_l2(self, prng: &mut Prng) -> Damage {
        let Some(entries) = self.entries(prng) else { return self.costs(0, "holds nothing") };
        let at = *prng.pick(&entries);
        self.put(at, 0x3f00_0000_0000_0002);
        self.costs(self.image.header().geometry.cluster_size(), &format!("has a bad L2 entry at {at:#x}"))
    }

    /// An entry that can be right, and is that of another cluster.
    fn swap_l2(self, prng: &mut Prng) -> Damage {
        let Some(entries) = self.entries(prng) else { return self.costs(0, "holds nothing") };
        let is_plain =
            |at: &u64| self.word(*at) >> 62 & 1 == 0 && self.word(*at) & 1 == 0 && self.word(*at) & OFFSET > 0;
        let plain: Vec<u64> = entries.into_iter().filter(is_plain).collect();
        if plain.len() < 2 {
            return self.costs(0, "has no two clusters");
        }
        let (from, to) = (*prng.pick(&plain), *prng.pick(&plain));
        self.put(to, self.word(from));
        let most = 2 * self.image.header().geometry.cluster_size();
        self.costs(most, &format!("has the L2 entry at {from:#x} at {to:#x}, too"))
    }

    fn break_header(self, prng: &mut Prng) -> Damage {
        let is_new = self.image.header().version == 3;
        // what only a checksum gives away: where the L1 table is, and features
        let any = [(40, 8), (36, 4), (72, 8), (80, 8), (88, 8)];
        // what cannot be right, is known from elsewhere, or no read needs
        let told = [(4, 4), (8, 8), (16, 4), (24, 8), (48, 8), (56, 4), (60, 4), (64, 8), (96, 4), (100, 4)];
        let fields: Vec<(u64, usize)> =
            if self.checked { any.into_iter().chain(told).collect() } else { told.to_vec() };
        let fields: Vec<_> = fields.into_iter().filter(|(at, _)| is_new || *at < 72).collect();
        let (at, length) = *prng.pick(&fields);
        let value = match (at, prng.below(3)) {
            (4, _) => 4 << 32,
            (_, 0) => 1 << (64 - 8 * length + usize::try_from(prng.below(8 * length as u64)).unwrap()),
            (_, 1) => u64::MAX,
            _ => prng.next(),
        };
        self.file.write_all_at(&value.to_be_bytes()[..length], at).unwrap();
        self.whole(&format!("has {value:#x} at {at} of its header"))
    }

    fn flip(self, prng: &mut Prng) -> Damage {
        let at = prng.below(self.file.metadata().unwrap().len());
        flip(&self.file, at, prng);
        self.whole(&format!("has another bit in byte {at:#x}"))
    }
}

/// Takes the checksums of an image away: the file, or what it is worth.
pub(crate) fn without_sums(prng: &mut Prng, path: &Path) {
    let sums = Checksums::path(path);
    if prng.one_in(2) {
        std::fs::remove_file(sums).unwrap();
        return;
    }
    let file = File::options().read(true).write(true).open(sums).unwrap();
    flip(&file, prng.below(file.metadata().unwrap().len()), prng);
    assert!(!has_sums(path), "checksums of which a bit is another one are believed");
}

/// Whether there are checksums that can be used.
fn has_sums(path: &Path) -> bool {
    let sums = Checksums::open(path).ok().flatten();
    sums.is_some_and(|sums| sums.read(0..sums.blocks()).is_ok())
}

fn flip(file: &File, at: u64, prng: &mut Prng) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << prng.below(8)], at).unwrap();
}
