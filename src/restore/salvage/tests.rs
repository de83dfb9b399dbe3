use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::qcow2::{Image, MapBuffer, locate};
use crate::restore::copier::{LayerReader, Work};
use crate::restore::layer::{Format, Layer};
use crate::restore::layers::Layers;
use crate::restore::observer::Silent;
use crate::restore::resolve::resolve;
use crate::storage::{MemoryStorage, Storage};

/// The first cluster of the recorded images.
const HEADER: u64 = 1 << 16;

/// An image on a disk with pages that cannot be read.
struct Faulty {
    bytes: MemoryStorage,
    bad: Vec<Range<u64>>,
}

impl Storage for Faulty {
    fn length(&self) -> u64 {
        self.bytes.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        if self.bad.iter().any(|bad| bad.start < end && offset < bad.end) {
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
    let layer = |(number, (path, bytes)): (usize, (PathBuf, Vec<u8>))| {
        let file = Arc::new(Faulty { bytes: MemoryStorage::new(bytes), bad: bad(number) });
        let file = Arc::new(Verified::new(file, None, true));
        Layer::damaged(path, file.clone(), (Format::Qcow2, None), Tolerance::of(file)).map_err(io::Error::other)
    };
    Ok(Layers::of(recorded().into_iter().enumerate().map(layer).collect::<io::Result<_>>()?))
}

/// The disk, as a salvage reads it.
fn disk(layers: &Layers) -> Vec<u8> {
    let work = Work { layers: layers.as_slice(), limiter: None, observer: &Silent };
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
