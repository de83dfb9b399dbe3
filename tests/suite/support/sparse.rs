//! Files with holes: where their data is, copies, comparisons and fingerprints that do not read the holes.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{SeekFrom, seek};

/// How much is read at once.
const CHUNK: u64 = 1 << 20;

/// The ranges of the file that are not holes, in order.
pub(crate) fn data_extents(file: &File) -> Vec<Range<u64>> {
    let end = file.metadata().unwrap().len();
    let mut extents = Vec::new();
    let mut at = 0;
    while at < end {
        // ENXIO: nothing but a hole follows
        let Ok(start) = seek(file, SeekFrom::Data(at)) else { break };
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        extents.push(start..at);
    }
    extents
}

pub(crate) fn copy(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
    to.set_len(from.metadata().unwrap().len()).unwrap();
    for chunk in data_extents(&from).into_iter().flat_map(chunks) {
        to.write_all_at(&read(&from, &chunk), chunk.start).unwrap();
    }
}

/// The first offset at which the files differ, the end of the shorter one included. Holes are zeroes.
pub(crate) fn first_difference(left: &Path, right: &Path) -> Option<u64> {
    let (left, right) = (File::open(left).unwrap(), File::open(right).unwrap());
    let (left_len, right_len) = (left.metadata().unwrap().len(), right.metadata().unwrap().len());
    let common = left_len.min(right_len);
    let mut extents = [data_extents(&left), data_extents(&right)].concat();
    extents.sort_by_key(|extent| extent.start);
    let mut compared = 0;
    for extent in extents {
        for chunk in chunks(extent.start.max(compared)..extent.end.min(common)) {
            let (ours, theirs) = (read(&left, &chunk), read(&right, &chunk));
            if let Some(at) = difference(&ours, &theirs) {
                return Some(chunk.start + at);
            }
            compared = chunk.end;
        }
    }
    (left_len != right_len).then_some(common)
}

/// Panics unless the files have the same bytes, telling which one is wrong where.
pub(crate) fn assert_same(is: &Path, should_be: &Path, what: &str) {
    let Some(at) = first_difference(is, should_be) else { return };
    let around = |path: &Path| {
        let file = File::open(path).unwrap();
        let len = file.metadata().unwrap().len();
        format!("{} bytes, there {:02x?}", len, read(&file, &(at.min(len)..(at + 16).min(len))))
    };
    panic!(
        "{what}: differs at {at} ({at:#x})\n     is {} ({})\n should {} ({})",
        around(is),
        is.display(),
        around(should_be),
        should_be.display()
    );
}

/// Where two pieces of the same length differ first.
pub(crate) fn difference(left: &[u8], right: &[u8]) -> Option<u64> {
    // The comparison of whole slices is much faster than that of their bytes
    let at = (left != right).then(|| left.iter().zip(right).position(|(left, right)| left != right))??;
    Some(at as u64)
}

pub(crate) fn read(file: &File, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    file.read_exact_at(&mut bytes, range.start).unwrap();
    bytes
}

/// What is known of a file without its bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    len: u64,
    modified: SystemTime,
    hash: u64,
}

/// All files and folders below a folder, by their paths in it.
pub(crate) fn fingerprints(folder: &Path) -> BTreeMap<String, Fingerprint> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            let mut hasher = DefaultHasher::new();
            if metadata.is_file() {
                hash_content(&File::open(&path).unwrap(), &mut hasher);
            }
            let print =
                Fingerprint { len: metadata.len(), modified: metadata.modified().unwrap(), hash: hasher.finish() };
            found.insert(path.strip_prefix(folder).unwrap().to_string_lossy().into_owned(), print);
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

/// Where the holes are must not matter: allocated zeroes come and go as data with what is cached.
fn hash_content(file: &File, hasher: &mut DefaultHasher) {
    let len = file.metadata().unwrap().len();
    let mut done = 0;
    for extent in data_extents(file) {
        let whole = (extent.start - extent.start % CHUNK).max(done)..extent.end.next_multiple_of(CHUNK).min(len);
        for chunk in chunks(whole) {
            let bytes = read(file, &chunk);
            if bytes.iter().any(|byte| *byte != 0) {
                (chunk.start, bytes).hash(hasher);
            }
            done = chunk.end;
        }
    }
}

fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    let step = usize::try_from(CHUNK).unwrap();
    range.step_by(step).map(move |start| start..end.min(start + CHUNK))
}

#[test]
fn the_first_differing_byte_is_found_in_data_against_a_hole_and_in_the_length() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, len: u64, at: u64, bytes: &[u8]| {
        let path = folder.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        file.write_all_at(bytes, at).unwrap();
        path
    };
    let len = 3 * CHUNK;
    let holes = write("holes", len, 0, b"");
    let zeroes = write("zeroes", len, CHUNK, &vec![0; 70_000]);
    assert_eq!(first_difference(&holes, &zeroes), None);
    assert_eq!(first_difference(&holes, &write("one", len, 2 * CHUNK + 77, b"x")), Some(2 * CHUNK + 77));
    assert_eq!(first_difference(&holes, &write("short", len - 512, 0, b"")), Some(len - 512));
    let copied = folder.path().join("copied");
    copy(&folder.path().join("one"), &copied);
    assert_same(&copied, &folder.path().join("one"), "a copy");
}
