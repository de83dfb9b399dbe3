//! What was written, read again and compared with the images once more.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::qcow2::MapBuffer;
use crate::restore::copier::{LayerReader, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::layer::{Format, Layer};
use crate::restore::merge::output::Target;
use crate::restore::observer::Phase;
use crate::restore::plan::Plan;
use crate::restore::pool;
use crate::restore::resolve::{Piece, resolve, within};
use crate::restore::slices::{self, Slices};
use crate::storage::{FileStorage, Storage, forget, to_usize};

/// Bytes of the disk that are compared at once.
const PART: u64 = 1 << 20;

/// Syncs an output and compares it, from the disk that it is on, with what the layers hold.
///
/// # Errors
/// [`Error::ReadBack`] where a byte differs, [`Error::Unreadable`] where the output cannot be read; [`Error::Write`] where it
/// cannot be synced.
pub(super) fn check(work: &Transfer<'_>, plan: &Plan, target: Target<'_>, format: Format) -> Result<()> {
    let Target { path, file } = target;
    let write_error = |source| target.error(source);
    file.sync_all().map_err(write_error)?;
    forget(file);
    work.observer.phase(Phase::Comparing { bytes: plan.bytes });
    let storage = file.try_clone().and_then(FileStorage::new).map_err(write_error)?;
    compare(work, plan.size, path, Arc::new(storage), format)
}

/// Compares an output with what the layers hold.
fn compare(work: &Transfer<'_>, size: u64, output: &Path, storage: Arc<dyn Storage>, format: Format) -> Result<()> {
    let unreadable = |error| match error {
        Error::Cancelled => Error::Cancelled,
        error => Error::Unreadable { path: output.to_owned(), source: Box::new(error) },
    };
    let written = [Layer::new(output.to_owned(), storage, format).map_err(unreadable)?];
    let occupied = work.layers.iter().chain(&written).flat_map(Layer::occupied);
    let scratch = || (Side::default(), Side::default());
    pool::for_each(Slices::new(size, occupied).ranges(), scratch, |(expected, found), slice| {
        expected.resolve(work.layers, &slice)?;
        found.resolve(&written, &slice).map_err(unreadable)?;
        for part in slices::parts(slice, PART) {
            if !expected.touches(&part) && !found.touches(&part) {
                continue;
            }
            work.pace(0)?;
            let bytes = expected.read(work, &part)?;
            let there = found.read(&Transfer { layers: &written, ..*work }, &part).map_err(unreadable)?;
            if let Some(at) = bytes.iter().zip(there).position(|(byte, other)| byte != other) {
                return Err(Error::ReadBack { path: output.to_owned(), offset: part.start + at as u64 });
            }
            work.observer.advance(expected.length(&part));
        }
        Ok(())
    })
}

/// One of the two that are compared; one for each thread.
#[derive(Default)]
struct Side {
    map: MapBuffer,
    reader: LayerReader,
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
}

impl Side {
    fn resolve(&mut self, layers: &[Layer], slice: &Range<u64>) -> Result<()> {
        self.pieces = resolve(layers, slice.clone(), &mut self.map)?;
        Ok(())
    }

    fn touches(&self, part: &Range<u64>) -> bool {
        within(&self.pieces, part).next().is_some()
    }

    fn length(&self, part: &Range<u64>) -> u64 {
        within(&self.pieces, part).map(|piece| piece.guest.end - piece.guest.start).sum()
    }

    fn read(&mut self, work: &Transfer<'_>, part: &Range<u64>) -> Result<&[u8]> {
        let pieces: Vec<Piece> = within(&self.pieces, part).collect();
        self.bytes.clear();
        self.bytes.resize(to_usize(part.end - part.start), 0);
        for operation in work.operations(pieces, |guest| guest - part.start) {
            let start = to_usize(operation.target);
            let place = self.bytes.get_mut(start..start + to_usize(operation.length)).ok_or(Error::Changed)?;
            self.reader.read(work.layers, &operation, 0, place)?;
        }
        Ok(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::Image;
    use crate::restore::copier::Holes;
    use crate::restore::{Layers, Silent};
    use crate::storage::MemoryStorage;
    use std::path::PathBuf;

    fn full() -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/chain/disk0");
        std::fs::read(folder.join("FULL-1793588400-disk.qcow2")).unwrap()
    }

    fn layer(bytes: Vec<u8>, format: Format) -> Layer {
        Layer::new(PathBuf::from("full"), Arc::new(MemoryStorage::new(bytes)), format).unwrap()
    }

    fn compared(output: Vec<u8>, format: Format) -> Result<()> {
        let layers = Layers::of(vec![layer(full(), Format::Qcow2)]);
        let work = Transfer { layers: layers.as_slice(), limiter: None, observer: &Silent, holes: Holes::None };
        compare(&work, layers.size(), Path::new("out"), Arc::new(MemoryStorage::new(output)), format)
    }

    fn raw() -> Vec<u8> {
        let image = Image::open(Arc::new(MemoryStorage::new(full()))).unwrap();
        let mut bytes = vec![0; to_usize(image.size())];
        crate::qcow2::Reader::new(&image).read(&mut bytes, crate::qcow2::GuestOffset(0)).unwrap();
        bytes
    }

    #[test]
    fn a_byte_that_changed_on_its_way_is_found_wherever_it_is() {
        compared(raw(), Format::Raw).unwrap();
        let raw = raw();
        let data = raw.iter().position(|byte| *byte != 0).unwrap();
        let zero = raw.iter().rposition(|byte| *byte == 0).unwrap();
        for at in [data, zero, raw.len() - 1] {
            let mut changed = raw.clone();
            changed[at] ^= 1;
            let error = compared(changed, Format::Raw).unwrap_err();
            assert!(matches!(error, Error::ReadBack { offset, .. } if offset == at as u64), "{at}: {error}");
        }
    }

    #[test]
    fn a_qcow2_output_that_cannot_be_read_or_has_other_tables_is_found() {
        compared(full(), Format::Qcow2).unwrap();
        let mut changed = full();
        changed[0] ^= 1;
        assert!(matches!(compared(changed, Format::Qcow2), Err(Error::Unreadable { .. })));
        let word = |bytes: &[u8], at: usize| usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()));
        let l1 = word(&full(), 40).unwrap();
        let l2 = word(&full(), l1).unwrap() & 0xff_ffff_fe00;
        let entry = (l2..).step_by(8).find(|at| word(&full(), *at).unwrap() != 0).unwrap();
        let mut changed = full();
        changed[entry..entry + 8].fill(0);
        assert!(matches!(compared(changed, Format::Qcow2), Err(Error::ReadBack { .. })));
    }
}
