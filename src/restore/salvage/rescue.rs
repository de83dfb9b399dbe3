//! Bytes in place of those that cannot be read.

use std::ops::Range;

use super::Cause;
use crate::errors;
use crate::qcow2::MapBuffer;
use crate::restore::checked_file::PIECE;
use crate::restore::copier::LayerReader;
use crate::restore::error::{Error, Result};
use crate::restore::layer::Layer;
use crate::restore::plan::{Operation, Origin, operations_apart};
use crate::restore::resolve::resolve;
use crate::storage::to_usize;

impl LayerReader {
    /// Fills `buffer` with what can be read of an operation, and for the rest with what the layers below have there. The
    /// layers remember what they do not give.
    pub(in crate::restore) fn rescue(
        &mut self,
        layers: &[Layer],
        operation: &Operation,
        buffer: &mut [u8],
    ) -> Result<()> {
        let mut scratch = MapBuffer::default();
        // targets are places in the buffer
        let mut wanted = vec![operation.clone()];
        while let Some(next) = wanted.pop() {
            let Operation { layer, target, length, guest, .. } = next;
            let place = buffer.get_mut(to_usize(target)..to_usize(target + length)).unwrap_or_default();
            let range = guest..guest + length;
            let tolerance = layers.get(layer).and_then(Layer::tolerance);
            if !tolerance.is_some_and(|tolerance| tolerance.is_unreadable(&range)) {
                let Err(error) = self.try_read(layers, &next, 0, place) else { continue };
                if let Some(first) = next.first_half() {
                    let second = Operation { target: target + first, ..next.part(first, length - first) };
                    wanted.extend([second, Operation { length: first, ..next }]);
                    continue;
                }
                if let Some(tolerance) = tolerance {
                    tolerance.unreadable().insert(lost_with(layers, &next), Cause::Data(reason(&error)));
                }
            }
            place.fill(0);
            let below = layers.get(..layer).unwrap_or_default();
            let pieces = resolve(below, range, &mut scratch)?;
            wanted.extend(operations_apart(pieces, |address| target + (address - guest)));
        }
        Ok(())
    }
}

/// The range of the disk that cannot be had where the smallest part of an operation cannot: all of a compressed cluster, which
/// need not be inflated again then for its other parts.
fn lost_with(layers: &[Layer], operation: &Operation) -> Range<u64> {
    let Operation { layer, guest, length, source, .. } = operation;
    match (source, layers.get(*layer).and_then(Layer::image)) {
        (Origin::Compressed { cluster, .. }, Some(image)) => {
            cluster.0..(cluster.0 + image.header().geometry.cluster_size()).min(image.size())
        }
        _ => *guest..guest + length,
    }
}

impl Operation {
    /// The length of its first half, if halves may be read where the whole cannot: each is one page or more.
    fn first_half(&self) -> Option<u64> {
        let Origin::Plain(host) = self.source else { return None };
        let (first, last) = (host.0 / PIECE, (host.0 + self.length - 1) / PIECE);
        (first < last).then(|| (first + (last - first).div_ceil(2)) * PIECE - host.0)
    }
}

/// What is wrong, without the name of the image.
pub(in crate::restore) fn reason(error: &Error) -> String {
    match error {
        Error::Image { source, .. } => errors::line(source),
        Error::Read { source, .. } | Error::Open { source, .. } => errors::line(source),
        error => errors::line(error),
    }
}
