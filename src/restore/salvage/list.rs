//! The list of losses: all layers are asked for each range that the layers above do not hold, once more.

use std::collections::BTreeMap;
use std::ops::Range;

use super::layer::Note;
use super::{Cause, Loss, LossKind, Losses, Tolerance, shared};
use crate::qcow2::MapBuffer;
use crate::restore::checked_file::Unverified;
use crate::restore::error::Result;
use crate::restore::layer::Layer;
use crate::restore::layers::Layers;
use crate::restore::observer::{Observer, Warning};
use crate::restore::pool;
use crate::restore::ranges::without;
use crate::restore::resolve::Mapped;
use crate::restore::slices::{Slices, parts};
use crate::storage::joined;

/// Losses that are listed; more are counted.
const LISTED: usize = 10_000;

/// Losses of all layers in a slice that are kept apart.
const APART: usize = 1 << 13;

/// Parts of a disk that holds nothing.
const GAPS: u64 = 1 << 10;

/// What was lost in a range.
#[derive(Debug, Default)]
struct Part {
    found: Vec<(usize, LossKind, Cause, Range<u64>)>,
    /// Bytes of each kind.
    lost: u64,
    stale: u64,
    damaged: u64,
}

/// Lists what the layers do not give, as far as that is known when their data was read.
///
/// # Errors
/// [`Error::Cancelled`]; what is wrong with a layer that is not to be salvaged.
pub(in crate::restore) fn list(layers: &Layers, observer: &dyn Observer) -> Result<Losses> {
    let all = layers.as_slice();
    for layer in all {
        shared::find(layer, observer)?;
        if let Some(reason) = layer.tolerance().and_then(Tolerance::unchecked) {
            let reason = Unverified::Unusable(reason.to_owned());
            observer.warning(Warning::Unchecked { path: layer.path().to_owned(), reason });
        }
    }
    let slices = Slices::new(layers.size(), all.iter().flat_map(Layer::occupied)).ranges();
    let mut lister = Lister { layers: all, losses: Losses::default(), last: BTreeMap::new() };
    pool::in_order(
        with_gaps(slices, layers.size()),
        MapBuffer::default,
        |buffer, guest| {
            observer.go_on()?;
            examine(all, guest, buffer)
        },
        |part| {
            lister.take(part);
            Ok(())
        },
    )?;
    Ok(lister.losses)
}

/// Slices, and what lies between them and behind the last. That may be most of a huge disk, and has few parts all the same.
fn with_gaps(slices: impl Iterator<Item = Range<u64>>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let part = (size / GAPS).max(1);
    let mut end = 0;
    let behind = std::iter::once(size..size);
    slices.chain(behind).flat_map(move |slice| {
        let gap = end..slice.start;
        end = slice.end;
        parts(gap, part).chain(std::iter::once(slice)).filter(|range| !range.is_empty())
    })
}

/// What was found out about a range of a layer, by its number.
type Found = (usize, Cause, Range<u64>);

/// Adds what was found of the layer that begins at `first`. Neighbours become one; where there are too many, together with
/// what is between them, so that nothing is missing.
fn keep(all: &mut Vec<Found>, first: usize, most: usize, (number, cause, range): Found) {
    let is_full = all.len() - first >= most;
    match all.get_mut(first..).and_then(<[_]>::last_mut) {
        Some((_, known, last))
            if known.is_like(&cause) && last.end <= range.start && (is_full || last.end == range.start) =>
        {
            last.end = range.end;
        }
        _ => all.push((number, cause, range)),
    }
}

fn examine(layers: &[Layer], guest: Range<u64>, buffer: &mut MapBuffer) -> Result<Part> {
    let most = (APART / layers.len().max(1)).max(64);
    let mut missing: Vec<Found> = Vec::new();
    let mut doubtful: Vec<Found> = Vec::new();
    let mut wanted = vec![guest];
    for (number, layer) in layers.iter().enumerate().rev() {
        let mut below = Vec::new();
        let (first_missing, first_doubtful) = (missing.len(), doubtful.len());
        for range in wanted {
            let end = layer.size().clamp(range.start, range.end);
            if range.start < end {
                layer.examine(&(range.start..end), buffer, &mut below, &mut |range, note| match note {
                    Note::Missing(cause) => keep(&mut missing, first_missing, most, (number, cause, range)),
                    Note::Doubtful(cause) => keep(&mut doubtful, first_doubtful, most, (number, cause, range)),
                })?;
            }
            // it may hold something behind the end, too
            if end < range.end && layer.has_doubtful_size() {
                keep(&mut doubtful, first_doubtful, most, (number, Cause::Checksum, end..range.end));
            }
        }
        wanted = joined(below);
        if wanted.is_empty() {
            break;
        }
    }
    Ok(Part::of(missing, doubtful))
}

impl Part {
    fn of(missing: Vec<Found>, doubtful: Vec<Found>) -> Self {
        let length = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        let ranges = |wanted: &dyn Fn(usize) -> bool| {
            let ranges = missing.iter().filter(|(number, ..)| wanted(*number)).map(|(.., range)| range.clone());
            joined(ranges.collect())
        };
        // below the first image there is nothing
        let (lost, all) = (ranges(&|number| number == 0), ranges(&|_| true));
        let damaged = joined(doubtful.iter().map(|(.., range)| range.clone()).collect());
        let only: Vec<Range<u64>> = damaged.into_iter().flat_map(|range| without(range, &all)).collect();
        let mut part = Self {
            found: Vec::new(),
            lost: length(&lost),
            stale: length(&all) - length(&lost),
            damaged: length(&only),
        };
        for (number, cause, range) in missing {
            let stale = without(range.clone(), &lost);
            let zeroes = without(range, &stale);
            part.found.extend(stale.into_iter().map(|range| (number, LossKind::Stale, cause.clone(), range)));
            part.found.extend(zeroes.into_iter().map(|range| (number, LossKind::Lost, cause.clone(), range)));
        }
        let mut of_layer: BTreeMap<(usize, &str), Vec<Found>> = BTreeMap::new();
        for found in doubtful {
            of_layer.entry((found.0, found.1.as_str())).or_default().push(found);
        }
        for found in of_layer.into_values() {
            let Some((number, cause, _)) = found.first().cloned() else { continue };
            let ranges = joined(found.into_iter().map(|(.., range)| range).collect()).into_iter();
            part.found.extend(ranges.map(|range| (number, LossKind::Damaged, cause.clone(), range)));
        }
        part.found.sort_by_key(|(number, kind, _, range)| (range.start, *number, *kind));
        part
    }
}

/// Puts the parts of the list together.
struct Lister<'a> {
    layers: &'a [Layer],
    losses: Losses,
    /// For each image and kind, the last in the list.
    last: BTreeMap<(usize, LossKind), usize>,
}

impl Lister<'_> {
    fn take(&mut self, part: Part) {
        let losses = &mut self.losses;
        losses.lost += part.lost;
        losses.stale += part.stale;
        losses.damaged += part.damaged;
        for (number, kind, cause, guest) in part.found {
            let listed = losses.list.len();
            let last = self.last.get(&(number, kind)).and_then(|place| losses.list.get_mut(*place));
            if let Some(last) = last.filter(|last| last.guest.end == guest.start && last.cause.is_like(&cause)) {
                last.guest.end = guest.end;
            } else if listed < LISTED {
                self.last.insert((number, kind), listed);
                let image = self.layers.get(number).map(|layer| layer.path().to_owned()).unwrap_or_default();
                losses.list.push(Loss { image, kind, cause, guest });
            } else {
                losses.unlisted += 1;
                losses.unlisted_from.get_or_insert(guest.start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Gaps and lengths become ranges; what is kept of them is little, and covers all.
        #[test]
        fn what_is_kept_is_bounded_and_misses_nothing(steps in prop::collection::vec((0_u64..3, 1_u64..4), 0..60), most in 1_usize..40) {
            let (mut end, mut put, mut all) = (0, Vec::new(), vec![(9, Cause::Missing, 0..1)]);
            for (gap, length) in steps {
                let range = end + gap..end + gap + length;
                end = range.end;
                keep(&mut all, 1, most, (1, Cause::Checksum, range.clone()));
                put.push(range);
            }
            let kept: Vec<Range<u64>> = all.drain(1..).map(|(.., range)| range).collect();
            prop_assert!(kept.len() <= most);
            prop_assert_eq!(&all, &[(9, Cause::Missing, 0..1)]);
            prop_assert!(put.iter().all(|range| without(range.clone(), &kept).is_empty()));
            let apart = joined(put);
            if apart.len() <= most {
                prop_assert_eq!(kept, apart);
            }
        }
    }
}
