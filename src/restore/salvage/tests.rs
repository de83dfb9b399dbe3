use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::chain::{BLOCK, Checksums, create_checksums};
use crate::qcow2::{Image, MapBuffer, locate};
use crate::restore::copier::{Holes, LayerReader, Transfer};
use crate::restore::layer::{Format, Layer};
use crate::restore::layers::Layers;
use crate::restore::merge::{Merge, MergeOptions, Output, OutputFormat};
use crate::restore::observer::{Observer, Silent, Warning};
use crate::restore::resolve::resolve;
use crate::storage::{MemoryStorage, Storage, to_usize};

/// The first cluster of the recorded images.
const HEADER: u64 = 1 << 16;

/// An image on a disk with pages that cannot be read, or not each time.
struct Faulty {
    bytes: MemoryStorage,
    bad: Vec<Range<u64>>,
    /// Whether a read of these pages fails, by its number.
    fails: Box<dyn Fn(usize) -> bool + Send + Sync>,
    reads: AtomicUsize,
}

impl Storage for Faulty {
    fn length(&self) -> u64 {
        self.bytes.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        let is_bad = self.bad.iter().any(|bad| bad.start < end && offset < bad.end);
        if is_bad && (self.fails)(self.reads.fetch_add(1, Ordering::Relaxed)) {
            return Err(io::Error::from_raw_os_error(5));
        }
        self.bytes.read_exact_at(buffer, offset)
    }
}

fn recorded() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/chain/disk0");
    let images = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut images: Vec<_> = images.filter(|path| path.is_file()).collect();
    images.sort();
    images.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn layers(bad: impl Fn(usize) -> Vec<Range<u64>>) -> io::Result<Layers> {
    layers_that(bad, |_| true)
}

fn layers_that(
    bad: impl Fn(usize) -> Vec<Range<u64>>,
    fails: impl Fn(usize) -> bool + Clone + Send + Sync + 'static,
) -> io::Result<Layers> {
    let layer = |(number, (path, bytes)): (usize, (PathBuf, Vec<u8>))| {
        let (bytes, fails) = (MemoryStorage::new(bytes), Box::new(fails.clone()));
        let file = Arc::new(Faulty { bytes, bad: bad(number), fails, reads: AtomicUsize::new(0) });
        let file = Arc::new(CheckedFile::new(file, None, true));
        Layer::damaged(path, file.clone(), Format::Qcow2, None, Tolerance::of(file)).map_err(io::Error::other)
    };
    Ok(Layers::of(recorded().into_iter().enumerate().map(layer).collect::<io::Result<_>>()?))
}

/// The disk, as a salvage reads it.
fn disk(layers: &Layers) -> Vec<u8> {
    let work = Transfer { layers: layers.as_slice(), limiter: None, observer: &Silent, holes: Holes::None };
    let mut disk = vec![0; usize::try_from(layers.size()).unwrap()];
    let pieces = resolve(layers.as_slice(), 0..layers.size(), &mut MapBuffer::default()).unwrap();
    let mut reader = LayerReader::default();
    for operation in work.operations(pieces, |guest| guest) {
        let start = usize::try_from(operation.target).unwrap();
        let place = &mut disk[start..start + usize::try_from(operation.length).unwrap()];
        reader.read(layers.as_slice(), &operation, 0, place).unwrap();
    }
    disk
}

#[test]
fn a_page_that_cannot_be_read_costs_what_it_holds() {
    let right = disk(&layers(|_| Vec::new()).unwrap());
    let mut kinds = std::collections::BTreeSet::new();
    for (number, (path, bytes)) in recorded().into_iter().enumerate() {
        for page in 1..bytes.len() as u64 / 4096 {
            let bad = page * 4096..(page + 1) * 4096;
            let salvaged = layers(|layer| if layer == number { vec![bad.clone()] } else { Vec::new() });
            // without its header the whole image is
            let Ok(salvaged) = salvaged else {
                assert!(bad.start < HEADER, "page {page}");
                continue;
            };
            let found = disk(&salvaged);
            let losses = list(&salvaged, &Silent).unwrap();
            let image = Image::open(Arc::new(MemoryStorage::new(bytes.clone()))).unwrap();
            let held = locate(&image, std::slice::from_ref(&bad)).unwrap().remove(0).guest;
            let what = format!("page {page} of {}", path.display());
            let listed = |at: u64| losses.list.iter().any(|loss| loss.guest.contains(&at));
            let page_of = |at: usize| at as u64 * 512;
            let wrong = found.chunks(512).zip(right.chunks(512)).enumerate().filter(|(_, (is, should))| is != should);
            for (sector, _) in wrong {
                assert!(listed(page_of(sector)), "{what}: sector {sector} is another one: {losses:?}");
            }
            for loss in &losses.list {
                assert_eq!((&loss.image, losses.unlisted), (&path, 0), "{what}");
                assert_eq!(loss.kind == LossKind::Lost, number == 0, "{what}");
                let inside = |range: &Range<u64>| range.start <= loss.guest.start && loss.guest.end <= range.end;
                assert!(held.iter().any(inside), "{what}: {losses:?}, it holds {held:?}");
                kinds.insert((loss.kind, loss.cause.as_str()));
            }
            let neighbours = losses.list.windows(2).filter(|pair| pair[0].guest.end == pair[1].guest.start);
            assert_eq!(neighbours.count(), 0, "{what}: {losses:?}");
            assert_eq!(losses, list(&salvaged, &Silent).unwrap(), "{what}: listed again");
        }
    }
    assert_eq!(kinds.len(), 4, "{kinds:?}");
}

/// The page with the L2 entries of an image that are used first.
fn table_page(bytes: &[u8]) -> Range<u64> {
    let word = |at: u64| u64::from_be_bytes(bytes[to_usize(at)..to_usize(at) + 8].try_into().unwrap());
    let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    table..table + 4096
}

/// Keeps the warnings.
#[derive(Default)]
struct Heard(Mutex<Vec<Warning>>);

impl Observer for Heard {
    fn warning(&self, warning: Warning) {
        self.0.lock().unwrap().push(warning);
    }
}

#[test]
fn refcounts_that_cannot_be_read_cost_nothing_but_leave_the_tables_unchecked() {
    let right = disk(&layers(|_| Vec::new()).unwrap());
    for number in [0, 3] {
        let (path, bytes) = &recorded()[number];
        let word = |at: u64| u64::from_be_bytes(bytes[to_usize(at)..to_usize(at) + 8].try_into().unwrap());
        let block = word(word(48));
        let page = block..block + 4096;
        let layers = layers(|layer| if layer == number { vec![page.clone()] } else { Vec::new() }).unwrap();
        let heard = Heard::default();
        let (found, losses) = salvaged_with(layers, OutputFormat::Raw, &heard);
        assert!(found == right && losses.is_empty(), "{losses:?}");
        let heard = heard.0.into_inner().unwrap();
        assert!(matches!(&heard[..], [Warning::UncheckedTables { path: of, .. }] if of == path), "{heard:?}");
    }
}

#[test]
fn an_entry_that_is_empty_now_is_told_by_the_refcount_of_what_it_led_to() {
    let (path, bytes) = recorded().remove(3);
    let entry = table_page(&bytes);
    let used = (entry.start..entry.end).step_by(8).find(|at| bytes[to_usize(*at)..][..8] != [0; 8]).unwrap();
    let mut wrong = bytes;
    wrong[to_usize(used)..][..8].fill(0);
    let layer = |(number, (path, bytes)): (usize, (PathBuf, Vec<u8>))| {
        let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new(if number == 3 { wrong.clone() } else { bytes }));
        let file = Arc::new(CheckedFile::new(file, None, true));
        Layer::damaged(path, file.clone(), Format::Qcow2, None, Tolerance::of(file)).unwrap()
    };
    let heard = Heard::default();
    salvaged_with(Layers::of(recorded().into_iter().enumerate().map(layer).collect()), OutputFormat::Raw, &heard);
    let heard = heard.0.into_inner().unwrap();
    let told = |warning: &Warning| matches!(warning, Warning::LostClusters { path: of, .. } if *of == path);
    assert!(heard.iter().any(told), "{heard:?}");
}

/// What a salvage makes of it, with the list.
fn salvaged(layers: Layers, format: OutputFormat) -> (Vec<u8>, Losses) {
    salvaged_with(layers, format, &Silent)
}

fn salvaged_with(layers: Layers, format: OutputFormat, observer: &dyn Observer) -> (Vec<u8>, Losses) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let threads = std::num::NonZeroUsize::new(1);
    let output = Output::File(path.clone());
    let options = MergeOptions { threads, ..MergeOptions::new(output, format) };
    let (_, losses) = Merge::plan(layers, options, observer).unwrap().salvage(observer).unwrap();
    let storage = Arc::new(crate::storage::FileStorage::open(&path).unwrap());
    let format = if format == OutputFormat::Raw { Format::Raw } else { Format::Qcow2 };
    (disk(&Layers::of(vec![Layer::new(path, storage, format).unwrap()])), losses)
}

fn assert_others_are(right: &[u8], found: &[u8], losses: &Losses, what: &str) {
    assert_eq!(found.len(), right.len(), "{what}");
    let mut found = found.to_vec();
    for loss in &losses.list {
        let bytes = to_usize(loss.guest.start)..to_usize(loss.guest.end);
        found[bytes.clone()].copy_from_slice(&right[bytes]);
    }
    let at = found.iter().zip(right).position(|(is, should)| is != should);
    assert_eq!(at, None, "{what}: another byte, and not listed: {losses:?}");
}

/// A read that fails now and then, or from some moment on, at any of the times when tables are read.
#[test]
fn a_table_that_cannot_be_read_at_times_costs_nothing_that_is_not_listed() {
    let right = disk(&layers(|_| Vec::new()).unwrap());
    let qcow2 = |compression| OutputFormat::Qcow2 { cluster_size: None, compression };
    let (mut lost, mut kept) = (0, 0);
    for format in [OutputFormat::Raw, qcow2(None), qcow2(Some(crate::qcow2::CompressionType::Deflate))] {
        for number in [0, 3] {
            let page = table_page(&recorded()[number].1);
            let bad = |layer| if layer == number { vec![page.clone()] } else { Vec::new() };
            for count in 0..4 {
                let what = format!("{format:?} {number} {count}");
                for salvaged in [
                    salvaged(layers_that(bad, move |read| read >= count).unwrap(), format),
                    salvaged(layers_that(bad, move |read| read == count).unwrap(), format),
                    salvaged(layers_that(bad, move |read| read < 4 * count && read % 2 == 0).unwrap(), format),
                ] {
                    assert_others_are(&right, &salvaged.0, &salvaged.1, &what);
                    *(if salvaged.1.is_empty() { &mut kept } else { &mut lost }) += 1;
                }
            }
        }
    }
    assert!(lost > 10 && kept > 10, "{lost} {kept}");
}

/// A flipped bit, and a page that cannot be read in the same block: its checksum says nothing any more.
#[test]
fn what_cannot_be_checked_beside_a_page_that_cannot_be_read_is_listed() {
    let right = disk(&layers(|_| Vec::new()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let (mut wrong_ones, mut right_ones) = (0, 0);
    for (number, (path, bytes)) in recorded().into_iter().enumerate() {
        let path = folder.path().join(path.file_name().unwrap());
        std::fs::write(&path, &bytes).unwrap();
        create_checksums(&path, &MemoryStorage::new(bytes.clone())).unwrap();
        for block in (BLOCK..bytes.len() as u64).step_by(to_usize(BLOCK)) {
            let (bad, flipped) = (block + 0x1000..block + 0x2000, block + 0x2007);
            let mut wrong = bytes.clone();
            let Some(byte) = wrong.get_mut(to_usize(flipped)) else { continue };
            *byte ^= 1;
            let layer = |(at, (other, bytes)): (usize, (PathBuf, Vec<u8>))| {
                let is_it = at == number;
                let bytes = MemoryStorage::new(if is_it { wrong.clone() } else { bytes });
                let bad = if is_it { vec![bad.clone()] } else { Vec::new() };
                let file = Arc::new(Faulty { bytes, bad, fails: Box::new(|_| true), reads: AtomicUsize::new(0) });
                let sums = if is_it { Checksums::open(&path).unwrap() } else { None };
                let file = Arc::new(CheckedFile::new(file, sums, true));
                Layer::damaged(other, file.clone(), Format::Qcow2, None, Tolerance::of(file)).unwrap()
            };
            let layers = Layers::of(recorded().into_iter().enumerate().map(layer).collect());
            let (found, losses) = salvaged(layers, OutputFormat::Raw);
            assert_others_are(&right, &found, &losses, &format!("{} {block:#x}", path.display()));
            for loss in losses.list.iter().filter(|loss| loss.cause == Cause::Unchecked) {
                let bytes = to_usize(loss.guest.start)..to_usize(loss.guest.end);
                *(if found[bytes.clone()] == right[bytes] { &mut right_ones } else { &mut wrong_ones }) += 1;
            }
        }
    }
    assert!(wrong_ones > 5 && right_ones > 0, "{wrong_ones} {right_ones}");
}

#[test]
fn a_list_that_is_too_long_says_so() {
    let mut ranges = Ranges::new(2);
    for start in [0, 100, 200, 300] {
        ranges.insert(start..start + 1, ());
    }
    let kept: Vec<u64> =
        ranges.within(&(0..400)).into_iter().flat_map(|(range, ())| [range.start, range.end]).collect();
    assert_eq!(kept, [0, 1, 100, 301]);
}
