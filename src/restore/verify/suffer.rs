//! Which restore points suffer from a flaw of an image: its own, and those after it until later images hide it.

use std::ops::Range;
use std::sync::Arc;

use super::judge::Reach;
use super::look::Members;
use crate::chain::Image;
use crate::qcow2::{Content, MapBuffer};
use crate::restore::layer::Layer;
use crate::restore::layers::{self, Source};
use crate::restore::resolve::Mapped;

/// For each of the flaws of an image, which is in this place of its chain, the restore points that suffer.
///
/// An image that is `untrusted` hides nothing.
pub(super) fn points(
    chain: &Members<'_>,
    depth: usize,
    reaches: &[&Reach],
    untrusted: impl Fn(usize) -> bool,
) -> Vec<Vec<Arc<Image>>> {
    let visible = |reach: &&Reach| match reach {
        Reach::Nothing => Some(Vec::new()),
        Reach::Guest(ranges) => Some(ranges.clone()),
        Reach::All => None,
    };
    let mut visible: Vec<Option<Vec<Range<u64>>>> = reaches.iter().map(visible).collect();
    let mut points: Vec<Vec<Arc<Image>>> = vec![Vec::new(); reaches.len()];
    let members = chain.images.iter().zip(&chain.formats).enumerate().skip(depth);
    for (place, (image, format)) in members {
        let mut ranges = visible.iter_mut().flatten().filter(|ranges| !ranges.is_empty()).peekable();
        if place > depth && ranges.peek().is_some() && !image.missing && !untrusted(place) {
            let source = Source::from(&***image);
            let layer = layers::open(&source).and_then(|storage| Layer::new(source.path.clone(), storage, *format));
            if let Ok(layer) = layer {
                ranges.for_each(|ranges| *ranges = shown(&layer, ranges));
            }
        }
        for (points, visible) in points.iter_mut().zip(&visible) {
            if visible.as_ref().is_none_or(|ranges| !ranges.is_empty()) {
                points.push(Arc::clone(image));
            }
        }
    }
    points
}

/// The parts of guest ranges that a layer does not hide.
fn shown(layer: &Layer, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut shown: Vec<Range<u64>> = Vec::new();
    let mut buffer = MapBuffer::default();
    for range in ranges {
        let before = shown.len();
        // behind the end of a smaller disk there are zeroes
        let inside = range.start..range.end.min(layer.size());
        if inside.is_empty() {
            continue;
        }
        let mapped = layer.map(inside.clone(), &mut buffer, &mut |extent| {
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
