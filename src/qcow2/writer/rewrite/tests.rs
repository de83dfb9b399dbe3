//! Headers of every kind, made from bytes, and every state in which a crash can leave them.

use std::io;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::qcow2::writer::head::Head;
use crate::qcow2::{plan_backing, set_backing};
use crate::storage::{MemoryStorage, Storage, WritableStorage};

/// Extensions of types that nobody knows.
const UNKNOWN: [u32; 2] = [0x1234_5678, 0x0bad_cafe];

/// What a header is made of.
#[derive(Debug, Clone)]
struct Made {
    version: u32,
    cluster_bits: u32,
    header_length: usize,
    autoclear: u64,
    extensions: Vec<(u32, Vec<u8>)>,
    name: Vec<u8>,
    /// Bytes between extensions and name.
    gap: usize,
}

impl Made {
    /// The header of a usual image of QEMU: format, feature name table, perhaps bitmaps.
    fn usual(name: &str, bitmaps: bool) -> Self {
        let mut extensions = vec![(wire::EXTENSION_BACKING_FORMAT, b"qcow2".to_vec())];
        extensions.push((wire::EXTENSION_FEATURE_NAMES, vec![b'n'; 48 * 7]));
        extensions.extend(bitmaps.then(|| (wire::EXTENSION_BITMAPS, raw_bitmaps(7).as_bytes().to_vec())));
        let name = name.as_bytes().to_vec();
        let autoclear = u64::from(bitmaps);
        Self { version: 3, cluster_bits: 16, header_length: 112, autoclear, extensions, name, gap: 0 }
    }

    fn cluster(&self) -> Vec<u8> {
        let mut bytes = vec![0xee; self.header_length];
        let mut set = |at: usize, field: &[u8]| {
            bytes.iter_mut().skip(at).zip(field).for_each(|(to, from)| *to = *from);
        };
        set(0, b"QFI\xfb");
        set(4, &self.version.to_be_bytes());
        set(8, &[0; 64]);
        set(20, &self.cluster_bits.to_be_bytes());
        set(48, &(1_u64 << self.cluster_bits).to_be_bytes());
        set(56, &1_u32.to_be_bytes());
        if self.version == 3 {
            set(72, &[0; 32]);
            set(88, &self.autoclear.to_be_bytes());
            set(96, &4_u32.to_be_bytes());
            set(100, &u32::try_from(self.header_length).unwrap().to_be_bytes());
            set(104, &[0]);
        }
        for (kind, data) in &self.extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        // nothing leads here
        bytes.resize(bytes.len() + self.gap, 0xdd);
        if !self.name.is_empty() {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(self.name.len()).unwrap().to_be_bytes());
            bytes.extend(&self.name);
        }
        bytes
    }

    /// An image of two clusters, where the header fits into the first.
    fn image(&self) -> Option<Vec<u8>> {
        let mut bytes = self.cluster();
        let fits = bytes.len() <= 1 << self.cluster_bits;
        bytes.resize(2 << self.cluster_bits, 0xcc);
        fits.then_some(bytes)
    }

    /// Fields and extensions without the feature name table fit into the first sector.
    fn is_short(&self) -> bool {
        let lengths = self.extensions.iter().filter(|(kind, _)| *kind != wire::EXTENSION_FEATURE_NAMES);
        let lengths = lengths.map(|(_, data)| 8 + data.len().next_multiple_of(8));
        self.header_length + lengths.sum::<usize>() + 8 <= SECTOR
    }
}

fn raw_bitmaps(count: u32) -> RawBitmapsExtension {
    RawBitmapsExtension {
        nb_bitmaps: count.into(),
        reserved: 0.into(),
        directory_size: 64.into(),
        directory_offset: 0x10000.into(),
    }
}

/// All that a header says, but not how.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Meaning {
    /// Fields, also unknown ones, without the place of the name and the autoclear bits.
    fields: Vec<u8>,
    backing: Option<Backing>,
    extensions: Vec<(u32, Vec<u8>)>,
    bitmaps: Vec<Vec<u8>>,
    bitmaps_are_true: bool,
}

/// The meaning and the feature name table, by a parser of its own.
fn meaning(image: &[u8]) -> (Meaning, Option<Vec<u8>>) {
    let header = Header::read(&MemoryStorage::new(image.to_vec())).unwrap();
    let number = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
    let mut at = usize::try_from(header.header_length).unwrap();
    let mut fields = image[..at].to_vec();
    fields[8..20].fill(0);
    if header.version == 3 {
        fields[88..96].fill(0);
    }
    let (mut extensions, mut bitmaps, mut names) = (Vec::new(), Vec::new(), None);
    while number(at) != 0 {
        let (kind, length) = (number(at), number(at + 4) as usize);
        let data = image[at + 8..at + 8 + length].to_vec();
        match kind {
            wire::EXTENSION_BACKING_FORMAT => {}
            wire::EXTENSION_FEATURE_NAMES => names = Some(data),
            wire::EXTENSION_BITMAPS => bitmaps.push(data),
            other => extensions.push((other, data)),
        }
        at += 8 + length.next_multiple_of(8);
    }
    let bitmaps_are_true = header.features.autoclear & Features::BITMAPS != 0;
    (Meaning { fields, backing: header.backing, extensions, bitmaps, bitmaps_are_true }, names)
}

/// Where, and what.
type Write = (u64, Vec<u8>);

/// Remembers writes, and `None` for a sync.
#[derive(Debug)]
struct Tape {
    now: MemoryStorage,
    steps: Mutex<Vec<Option<Write>>>,
}

impl Tape {
    fn new(image: Vec<u8>) -> Self {
        Self { now: MemoryStorage::new(image), steps: Mutex::default() }
    }
}

impl Storage for Tape {
    fn length(&self) -> u64 {
        self.now.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.now.read_exact_at(buffer, offset)
    }
}

impl WritableStorage for Tape {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.steps.lock().unwrap().push(Some((offset, bytes.to_vec())));
        self.now.write_all_at(bytes, offset)
    }

    fn set_length(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.steps.lock().unwrap().push(None);
        Ok(())
    }
}

/// Every image that a crash can leave: all that was synced, and any of the sectors written since.
fn crashed(image: &[u8], tape: &Tape) -> Vec<Vec<u8>> {
    let steps = tape.steps.lock().unwrap();
    let mut images = vec![image.to_vec()];
    let mut synced = image.to_vec();
    for epoch in steps.split(Option::is_none) {
        let writes = epoch.iter().flatten();
        let sectors: Vec<(usize, &[u8])> = writes
            .flat_map(|(offset, bytes)| {
                let offset = usize::try_from(*offset).unwrap();
                assert_eq!(offset % SECTOR, 0);
                bytes.chunks(SECTOR).enumerate().map(move |(number, sector)| (offset + number * SECTOR, sector))
            })
            .collect();
        assert!(sectors.len() <= 10, "too much is written at once");
        for kept in 0..1_usize << sectors.len() {
            let mut image = synced.clone();
            for (number, (offset, sector)) in sectors.iter().enumerate() {
                if kept >> number & 1 != 0 {
                    image[*offset..offset + sector.len()].copy_from_slice(sector);
                }
            }
            images.push(image);
        }
        // the last is the one with all of them
        synced = images.last().unwrap().clone();
    }
    images
}

/// Changes a header, and looks at each state on the way.
fn assert_harmless(made: &Made, change: &Change<'_>) -> Result<()> {
    let image = made.image().unwrap();
    let (old, names) = meaning(&image);
    let mut new = old.clone();
    if let Edit::Becomes(backing) = change.backing {
        new.backing = backing.cloned();
    }
    if let Edit::Becomes(bitmaps) = &change.bitmaps {
        new.bitmaps = bitmaps.iter().map(|raw| raw.as_bytes().to_vec()).collect();
        new.bitmaps_are_true = bitmaps.is_some();
    }
    let tape = Tape::new(image.clone());
    let mut head = Head::read(&tape).unwrap();
    let way = head.plan(change).inspect_err(|_| assert!(tape.steps.lock().unwrap().is_empty()))?;
    head.go(&tape, way).unwrap();
    for state in crashed(&image, &tape) {
        let (there, names_there) = meaning(&state);
        assert!(there == old || there == new, "{there:#?}\nis neither {old:#?}\nnor {new:#?}");
        assert!(names_there.is_none() || names_there == names);
        assert_eq!(state[1 << made.cluster_bits..], image[1 << made.cluster_bits..], "behind the header cluster");
    }
    let done = tape.now.to_vec();
    assert_eq!(meaning(&done).0, new);
    let header = Header::read(&tape).unwrap();
    assert_eq!(*head.header(), header);
    assert_eq!(header.features.autoclear & !Features::BITMAPS, 0);
    assert_eq!(tape.steps.lock().unwrap().last(), Some(&None), "the last write is not synced");
    Ok(())
}

fn backing(name: &str, format: Option<&str>) -> Backing {
    Backing { name: name.to_owned(), format: format.map(str::to_owned) }
}

fn bytes(lengths: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), lengths)
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![3 => "[a-z:é/]{1,40}", 2 => "[a-z]{200,500}", 1 => "[a-z]{1023}"]
}

fn extension() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let unknown = prop::sample::select(&UNKNOWN[..]);
    prop_oneof![
        4 => (unknown.clone(), bytes(0..40)),
        1 => (unknown, bytes(100..600)),
        3 => (Just(wire::EXTENSION_FEATURE_NAMES), (1..9_usize).prop_flat_map(|count| bytes(48 * count))),
        2 => (Just(wire::EXTENSION_BACKING_FORMAT), "[a-z0-9]{1,15}".prop_map(String::into_bytes)),
        1 => (Just(wire::EXTENSION_DATA_FILE), "[a-z]{1,300}".prop_map(String::into_bytes)),
    ]
}

prop_compose! {
    fn made()(
        version in 2..=3_u32,
        cluster_bits in prop::sample::select(&[9, 9, 10, 11, 12][..]),
        header_length in prop::sample::select(&[104, 104, 112, 112, 128, 504, 512, 520][..]),
        autoclear in prop::sample::select(&[0, 1, 1, 2, 0xff00_0000_0000_0001][..]),
        mut extensions in prop::collection::vec(extension(), 0..5),
        bitmaps in prop::option::of(1..100_u32),
        at in any::<prop::sample::Index>(),
        name in prop::option::of(name()),
        gap in prop_oneof![3 => Just(0), 1 => 0..1500_usize],
    ) -> Made {
        // of an extension that comes twice, programs take this or that
        let mut seen = Vec::new();
        extensions.retain(|(kind, _)| {
            let twice = seen.contains(kind) && !UNKNOWN.contains(kind);
            seen.push(*kind);
            !twice
        });
        if let Some(count) = bitmaps {
            let at = at.index(extensions.len() + 1);
            extensions.insert(at, (wire::EXTENSION_BITMAPS, raw_bitmaps(count).as_bytes().to_vec()));
        }
        let header_length = if version == 2 { 72 } else { header_length };
        let name = name.unwrap_or_default().into_bytes();
        Made { version, cluster_bits, header_length, autoclear, extensions, name, gap }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_a_crash_leaves_is_the_old_header_or_the_new_one(
        made in made(),
        wanted in prop::option::of((name(), prop::option::of("[a-z0-9]{1,15}"))),
        bitmaps in prop::option::of(1..100_u32),
        which in 0..3,
    ) {
        prop_assume!(made.image().is_some());
        let wanted = wanted.map(|(name, format)| backing(&name, format.as_deref()));
        let bitmaps = bitmaps.filter(|_| made.version == 3).map(raw_bitmaps);
        let short = made.is_short() && made.header_length < 400;
        let change = Change {
            backing: if which == 0 { Edit::Stays } else { Edit::Becomes(wanted.as_ref()) },
            bitmaps: if which == 1 { Edit::Stays } else { Edit::Becomes(bitmaps) },
        };
        let result = assert_harmless(&made, &change);
        // the format and the bitmaps may come to what is there
        let roomy = made.cluster_bits == 12 && short && {
            let more = Made { extensions: made.extensions.iter().cloned().chain([
                (UNKNOWN[0], vec![0; 15]),
                (UNKNOWN[0], vec![0; 24]),
            ]).collect(), ..made.clone() };
            more.is_short()
        };
        prop_assert!(!roomy || result.is_ok(), "{result:?}");
        let no_room = result.is_err_and(|error| !matches!(error, Error::NoRoomInHeader { .. }));
        prop_assert!(!no_room, "another error");
    }
}

#[test]
fn usual_headers_change_in_the_fewest_steps() {
    let syncs = |from: &str, to: &str, names| {
        let mut made = Made::usual(from, false);
        made.extensions[1].1.resize(48 * names, b'n');
        let tape = Tape::new(made.image().unwrap());
        let backing = backing(to, (names == 7).then_some("qcow2"));
        assert!(plan_backing(&tape, Some(&backing)).unwrap());
        set_backing(&tape, Some(&backing)).unwrap();
        assert!(!plan_backing(&tape, Some(&backing)).unwrap());
        assert_eq!(Header::read(&tape).unwrap().extensions.feature_names.len(), names);
        let syncs = tape.steps.lock().unwrap().iter().filter(|step| step.is_none()).count();
        set_backing(&tape, Some(&backing)).unwrap();
        assert_eq!(tape.steps.lock().unwrap().iter().filter(|step| step.is_none()).count(), syncs, "written again");
        syncs
    };
    assert_eq!(syncs("", "FULL-1793588400-disk.qcow2", 7), 1, "one sector");
    assert_eq!(syncs("FULL-1", &"x".repeat(300), 7), 2, "the name, then the sector");
    assert_eq!(syncs(&"x".repeat(300), &"y".repeat(300), 7), 2, "another place, then the sector");
    assert_eq!(syncs(&"x".repeat(300), "FULL-1", 7), 1, "back");
    assert_eq!(syncs("FULL-1", "FULL-1793588400-disk.qcow2", 9), 3, "the table makes room for itself");
}

#[test]
fn bitmaps_come_go_and_change() {
    for (before, length) in [(false, 6), (true, 6), (true, 300)] {
        let made = Made::usual(&"x".repeat(length), before);
        for bitmaps in [None, Some(raw_bitmaps(3))] {
            assert_harmless(&made, &Change { bitmaps: Edit::Becomes(bitmaps), ..Change::default() }).unwrap();
        }
    }
    let made = Made { version: 2, header_length: 72, ..Made::usual("FULL-1", false) };
    let change = Change { bitmaps: Edit::Becomes(Some(raw_bitmaps(3))), ..Change::default() };
    assert!(matches!(assert_harmless(&made, &change), Err(Error::NotWritable { .. })));
}

#[test]
fn in_the_smallest_cluster_the_table_goes_and_then_there_is_no_room() {
    let made = Made { cluster_bits: 9, ..Made::usual("FULL-1", false) };
    let fits = 512 - 112 - 16 - 8;
    let long = backing(&"x".repeat(fits), Some("qcow2"));
    assert_harmless(&made, &Change { backing: Edit::Becomes(Some(&long)), ..Change::default() }).unwrap();
    let longer = backing(&"x".repeat(fits + 1), Some("qcow2"));
    let tape = Tape::new(made.image().unwrap());
    for result in [set_backing(&tape, Some(&longer)), plan_backing(&tape, Some(&longer)).map(drop)] {
        assert!(matches!(result, Err(Error::NoRoomInHeader { cluster_size: 512, .. })), "{result:?}");
    }
    assert!(tape.steps.lock().unwrap().is_empty());
}

#[test]
fn names_that_no_image_can_have_are_refused_before_anything_is_written() {
    let tape = Tape::new(Made::usual("FULL-1", false).image().unwrap());
    let refused = |name: &str, format| set_backing(&tape, Some(&backing(name, format))).unwrap_err();
    assert!(matches!(refused("", None), Error::Name { .. }));
    assert!(matches!(refused("a\0b", None), Error::Name { .. }));
    assert!(matches!(refused("a", Some("")), Error::Name { .. }));
    assert!(matches!(refused(&"x".repeat(1024), None), Error::TableTooLarge { most: 1023, .. }));
    assert!(matches!(refused("a", Some("0123456789abcdef")), Error::TableTooLarge { most: 15, .. }));
    assert!(tape.steps.lock().unwrap().is_empty());
}

#[test]
fn an_image_that_is_marked_as_corrupt_or_ends_in_its_header_is_left_alone() {
    let mut image = Made::usual("FULL-1", false).image().unwrap();
    let tape = Tape::new(image[..4096].to_vec());
    assert!(matches!(set_backing(&tape, None), Err(Error::Truncated { .. })));
    image[79] = 2;
    let tape = Tape::new(image);
    assert!(matches!(set_backing(&tape, None), Err(Error::NotWritable { .. })));
    assert!(tape.steps.lock().unwrap().is_empty());
}
