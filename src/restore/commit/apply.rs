//! Writes what INCs hold into the image below them, in place.
//!
//! Places are given out on one thread, in guest order, so that the image is the same for any number of threads; the bytes
//! move on all of them. Tables follow when the bytes of a batch are written: see [`Writer`].

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::qcow2::{self, MapBuffer, Place, Writer};
use crate::restore::copier::{Copier, Holes, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::in_place;
use crate::restore::layer::Layer;
use crate::restore::layers::Layers;
use crate::restore::observer::Observer;
use crate::restore::plan::{self, Operation};
use crate::restore::pool;
use crate::restore::resolve::{Mapped, Piece, changes};
use crate::restore::slices::Slices;
use crate::storage::to_usize;

/// Slices whose places are given out before their bytes move.
const BATCH: u64 = 64;
/// Pieces that these have together at most, but for those of a single slice: some 200 bytes each.
const PIECES_MAX: u64 = 1 << 18;
/// Bytes of tables that wait in memory.
const PENDING_MAX: u64 = 16 << 20;

/// Makes the disk of an image what it is with these images above it: the part of a [commit](super::Commit) that
/// changes one file, for programs that keep images in their own ways. Done again after it was interrupted, it ends right.
///
/// The writer's image must have no backing file, and `path` is what errors call it. When this returns, all is on stable
/// storage.
///
/// # Errors
/// What is wrong with an image, what the system says, or [`Error::Cancelled`]. The writer may write nothing more then.
pub fn apply_layers(layers: &Layers, path: &Path, writer: &mut Writer, observer: &dyn Observer) -> Result<()> {
    if writer.header().backing.is_some() {
        return Err(in_place::refused(path, "has a backing file: only what stands alone takes images from above"));
    }
    apply(&Transfer { layers: layers.as_slice(), limiter: None, observer, holes: Holes::None }, path, writer)
}

/// Makes the disk of an image, which has no backing file, what it is with these layers above it.
///
/// When this returns, all of it is on stable storage.
pub(super) fn apply(work: &Transfer<'_>, path: &Path, writer: &mut Writer) -> Result<()> {
    let failed = Error::image(path);
    let Some(size) = work.layers.last().map(Mapped::size) else { return Ok(()) };
    if writer.header().size != size {
        writer.resize(size).map_err(failed)?;
    }
    let storage = Arc::clone(writer.storage());
    let slices = slices(work.layers, size, || writer.occupied()).map_err(failed)?;
    let batch = batch(work.layers, slices.length());
    let mut slices = slices.ranges();
    loop {
        let batch: Vec<Range<u64>> = slices.by_ref().take(batch).collect();
        if batch.is_empty() {
            return writer.flush().map_err(failed);
        }
        let found =
            pool::map(batch.into_iter(), MapBuffer::default, |buffer, guest| changes(work.layers, guest, buffer))?;
        // first, because this may flush, and then all places must be written
        for zeroes in found.iter().flat_map(|changes| &changes.zeroes) {
            work.pace(0)?;
            zero(writer, zeroes).map_err(failed)?;
        }
        let copies = found.into_iter().map(|changes| operations(writer, changes.data));
        let copies: Vec<Vec<Operation>> = copies.collect::<qcow2::Result<_>>().map_err(failed)?;
        let mover = || Copier::new(work, path, &*storage);
        let done = pool::for_each(copies.iter(), mover, |copier, operations| copier.copy(operations));
        done.inspect_err(|_| writer.fail())?;
        if writer.pending() > PENDING_MAX {
            writer.flush().map_err(failed)?;
        }
    }
}

/// The slices of the disk in which the layers change anything; outside of `below` the image below them holds nothing.
pub(super) fn slices<E>(
    layers: &[Layer],
    size: u64,
    below: impl FnOnce() -> Result<Vec<Range<u64>>, E>,
) -> Result<Slices, E> {
    let occupied = layers.iter().flat_map(Layer::occupied);
    // behind the end of a smaller disk there are zeroes, also where a larger one follows: what is below must go
    let smallest = layers.iter().map(Mapped::size).min().unwrap_or(size);
    let below = if smallest < size { below()? } else { Vec::new() };
    let hidden = below.into_iter().map(|range| range.start.max(smallest)..range.end);
    Ok(Slices::new(size, occupied.chain(hidden)))
}

/// How many slices are done at once: fewer, where layers may have each of them in a great many pieces.
fn batch(layers: &[Layer], slice: u64) -> usize {
    let smallest = layers.iter().map(Layer::granularity).min().unwrap_or(slice);
    to_usize((PIECES_MAX / (slice / smallest).max(1)).clamp(1, BATCH))
}

fn zero(writer: &mut Writer, guest: &Range<u64>) -> qcow2::Result<()> {
    let (unit, size) = (writer.header().geometry.cluster_size(), writer.header().size);
    let first = guest.start.next_multiple_of(unit);
    let last = if guest.end == size { size } else { guest.end / unit * unit };
    if first >= last {
        return writer.write_zeroes(guest.clone());
    }
    writer.write_zeroes(guest.start..first)?;
    writer.discard(first..last)?;
    writer.write_zeroes(last..guest.end)
}

/// Places for pieces, and the copies that bring them there.
fn operations(writer: &mut Writer, pieces: Vec<Piece>) -> qcow2::Result<Vec<Operation>> {
    let mut places: Vec<Place> = Vec::new();
    for run in pieces.chunk_by(|one, next| one.guest.end == next.guest.start) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            writer.allocate(first.guest.start..last.guest.end, |place| places.push(place))?;
        }
    }
    let mut parts = Vec::with_capacity(pieces.len().max(places.len()));
    let mut pieces = pieces.into_iter().peekable();
    for place in &places {
        while let Some(piece) = pieces.next_if(|piece| piece.guest.end <= place.guest.end) {
            parts.push(piece.clip(&place.guest));
        }
        if let Some(piece) = pieces.peek().filter(|piece| piece.guest.start < place.guest.end) {
            parts.push(piece.clip(&place.guest));
        }
    }
    let mut places = places.iter().peekable();
    let target = |guest: u64| {
        while places.next_if(|place| place.guest.end <= guest).is_some() {}
        places.peek().map_or(0, |place| place.host.0 + (guest - place.guest.start))
    };
    Ok(plan::operations(parts, target))
}
