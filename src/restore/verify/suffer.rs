//! Which restore points suffer from a flaw of an image: its own, and those after it until later images hide it.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::flaw::Points;
use super::judge::Reach;
use super::look::Members;
use crate::chain::Image;
use crate::qcow2::{Content, MapBuffer};
use crate::restore::error::Result;
use crate::restore::layer::Layer;
use crate::restore::resolve::Mapped;
use crate::restore::source::{self, Source};

/// The flaws of an image of a chain.
pub(super) struct Flaws<'a> {
    /// The place of the image in its chain.
    pub(super) depth: usize,
    pub(super) reaches: Vec<&'a Reach>,
}

/// A flaw on its way through the chain.
struct Spread {
    /// What of it is to be seen yet; `None` where that is all, or nobody knows.
    visible: Option<Vec<Range<u64>>>,
    /// The places of the images that it has come to.
    points: Range<usize>,
}

/// For each of the flaws of some images, which are in the order of their chain, the restore points that suffer. Each image
/// of the chain is opened once at most.
///
/// An image that is `untrusted` hides nothing.
///
/// # Errors
/// What `cancelled` returns, which is asked for each image.
pub(super) fn points(
    chain: &Members<'_>,
    flawed: &[Flaws<'_>],
    untrusted: impl Fn(usize) -> bool,
    cancelled: impl Fn() -> Result<()>,
) -> Result<Vec<Vec<Points>>> {
    let spread = |flawed: &Flaws<'_>| flawed.reaches.iter().map(|reach| Spread::of(reach, flawed.depth)).collect();
    let mut all: Vec<Vec<Spread>> = flawed.iter().map(spread).collect();
    let mut waiting = flawed.iter().zip(&mut all).peekable();
    let mut active: Vec<&mut Spread> = Vec::new();
    for (place, (image, format)) in chain.images.iter().zip(&chain.formats).enumerate() {
        cancelled()?;
        let parts: Vec<_> = active.iter_mut().filter_map(|spread| spread.visible.as_mut()).collect();
        if !parts.is_empty() && !image.missing && !untrusted(place) {
            let source = Source::from(&***image);
            let layer = source::open(&source).and_then(|storage| Layer::new(source.path.clone(), storage, *format));
            if let Ok(layer) = layer {
                parts.into_par_iter().for_each_init(MapBuffer::default, |buffer, ranges| {
                    *ranges = shown(&layer, ranges, buffer);
                });
            }
        }
        while let Some((_, begun)) = waiting.next_if(|(flawed, _)| flawed.depth == place) {
            active.extend(begun);
        }
        active.retain(|spread| spread.visible.as_ref().is_none_or(|ranges| !ranges.is_empty()));
        for spread in &mut active {
            spread.points.end = place + 1;
        }
    }
    let images: Arc<[Arc<Image>]> = chain.images.iter().copied().map(Arc::clone).collect();
    let points = |spread: Spread| Points::within(&images, spread.points);
    Ok(all.into_iter().map(|flaws| flaws.into_iter().map(points).collect()).collect())
}

impl Spread {
    fn of(reach: &Reach, depth: usize) -> Self {
        let visible = match reach {
            Reach::Nothing => Some(Vec::new()),
            Reach::Guest(ranges) => Some(ranges.clone()),
            Reach::All => None,
        };
        Self { visible, points: depth..depth }
    }
}

/// The parts of guest ranges that a layer does not hide.
fn shown(layer: &Layer, ranges: &[Range<u64>], buffer: &mut MapBuffer) -> Vec<Range<u64>> {
    let mut shown: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let before = shown.len();
        // behind the end of a smaller disk there are zeroes
        let inside = range.start..range.end.min(layer.size());
        if inside.is_empty() {
            continue;
        }
        let mapped = layer.map(inside.clone(), buffer, &mut |extent| {
            if extent.content == Content::Unallocated {
                shown.push(extent.guest);
            }
        });
        if mapped.is_err() {
            shown.truncate(before);
            shown.push(inside);
        }
    }
    shown
}
