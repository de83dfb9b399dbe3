//! The disk's bytes at their own places: a sparse file, or a block device.

use std::fs::File;
use std::ops::Range;

use rustix::fs::FallocateFlags;

use super::for_each_slice;
use crate::qcow2::MapBuffer;
use crate::restore::copier::{Copier, Transfer};
use crate::restore::error::Result;
use crate::restore::merge::output::Target;
use crate::restore::plan::Plan;
use crate::restore::pool;
use crate::restore::resolve::{Piece, resolve};
use crate::restore::slices::Slices;
use crate::storage::to_usize;

/// Writes a new file, in which what is not written is zero.
pub(in crate::restore) fn write_raw(work: &Transfer<'_>, plan: &Plan, target: Target<'_>) -> Result<u64> {
    target.set_len(plan.size)?;
    let copier = || Copier::new(work, target.path, target.file);
    for_each_slice(plan, copier, |copier, buffer, slice| {
        let pieces = resolve(work.layers, slice.guest.clone(), buffer)?;
        copier.copy(&work.operations(pieces, |guest| guest))
    })?;
    Ok(plan.size)
}

/// Writes a device, in which what is between the pieces must be made zero.
pub(in crate::restore) fn write_device(work: &Transfer<'_>, plan: &Plan, target: Target<'_>) -> Result<u64> {
    let scratch = || (Copier::new(work, target.path, target.file), MapBuffer::default());
    pool::for_each(Slices::all(plan.size).ranges(), scratch, |(copier, buffer), guest| {
        let pieces = resolve(work.layers, guest.clone(), buffer)?;
        for gap in gaps(&pieces, guest) {
            work.pace(0)?;
            zero(copier, target.file, gap)?;
        }
        copier.copy(&work.operations(pieces, |guest| guest))
    })?;
    Ok(plan.size)
}

/// What lies between the pieces of a range.
fn gaps(pieces: &[Piece], guest: Range<u64>) -> Vec<Range<u64>> {
    let starts = std::iter::once(guest.start).chain(pieces.iter().map(|piece| piece.guest.end));
    let ends = pieces.iter().map(|piece| piece.guest.start).chain(std::iter::once(guest.end));
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty()).collect()
}

/// Makes a range of a device zero: punched where the device says that this reads back as zeroes, else written.
fn zero(copier: &Copier<'_>, device: &File, range: Range<u64>) -> Result<()> {
    /// The coarsest boundary that devices ask for in practice; the rest is written.
    const ALIGNMENT: u64 = 4096;
    let middle = range.start.next_multiple_of(ALIGNMENT)..range.end / ALIGNMENT * ALIGNMENT;
    if middle.start >= middle.end {
        return write_zeroes(copier, range);
    }
    // the kernel punches a block device only where it then reads as zeroes
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if rustix::fs::fallocate(device, punch, middle.start, middle.end - middle.start).is_err() {
        return write_zeroes(copier, range);
    }
    write_zeroes(copier, range.start..middle.start)?;
    write_zeroes(copier, middle.end..range.end)
}

fn write_zeroes(copier: &Copier<'_>, range: Range<u64>) -> Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    for start in (range.start..range.end).step_by(ZEROES.len()) {
        let length = to_usize(range.end - start).min(ZEROES.len());
        copier.write(ZEROES.get(..length).unwrap_or_default(), start)?;
    }
    Ok(())
}
