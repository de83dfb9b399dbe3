//! The disk's bytes from the first to the last, zeroes too, for a pipe.

use std::io::Write;
use std::path::Path;

use super::PART;
use crate::qcow2::MapBuffer;
use crate::restore::copier::{LayerReader, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::plan::Plan;
use crate::restore::pool;
use crate::restore::resolve::resolve;
use crate::restore::slices;
use crate::storage::to_usize;

/// Writes the whole disk; `output` is its name for errors.
pub(in crate::restore) fn write_stream(
    work: &Transfer<'_>,
    plan: &Plan,
    output: &Path,
    stream: &mut (dyn Write + Send),
) -> Result<u64> {
    let write_error = |source| Error::Write { path: output.to_owned(), source };
    let scratch = || (LayerReader::default(), MapBuffer::default());
    pool::in_order(
        slices::parts(0..plan.size, PART),
        scratch,
        |(reader, buffer), guest| {
            let mut part = vec![0; to_usize(guest.end - guest.start)];
            let pieces = resolve(work.layers, guest.clone(), buffer)?;
            for operation in work.operations(pieces, |address| address - guest.start) {
                work.pace(operation.length)?;
                let start = to_usize(operation.target);
                let place = part.get_mut(start..start + to_usize(operation.length)).ok_or(Error::Changed)?;
                reader.read(work.layers, &operation, 0, place)?;
                work.observer.advance(operation.length);
            }
            Ok(part)
        },
        |part| {
            work.pace(0)?;
            stream.write_all(&part).map_err(write_error)
        },
    )?;
    stream.flush().map_err(write_error)?;
    Ok(plan.size)
}
