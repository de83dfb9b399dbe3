//! Which layer holds each part of a guest range. Pure: layers are anything that can be mapped.

use std::ops::Range;

use crate::qcow2::{CompressedCluster, Content, Extent, GuestOffset, HostOffset};
use crate::storage::push_joined;

/// What can say where the bytes of a guest range are.
pub(crate) trait Mapped {
    type Error;
    /// Room that is used again from call to call.
    type Scratch;

    /// The size of the virtual disk in this layer; behind it the layer reads as zeroes.
    fn size(&self) -> u64;

    /// Calls `each` for the extents of a range that ends in the disk, in order and without gaps.
    fn map(
        &self,
        guest: Range<u64>,
        scratch: &mut Self::Scratch,
        each: &mut dyn FnMut(Extent),
    ) -> Result<(), Self::Error>;

    /// The same for several ranges, in order and apart.
    fn map_all(
        &self,
        ranges: &[Range<u64>],
        scratch: &mut Self::Scratch,
        each: &mut dyn FnMut(Extent),
    ) -> Result<(), Self::Error> {
        ranges.iter().try_for_each(|range| self.map(range.clone(), scratch, each))
    }
}

/// A part of a guest range, and the layer that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) guest: Range<u64>,
    pub(crate) layer: usize,
    pub(crate) bytes: Bytes,
}

/// Where the bytes of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bytes {
    Plain(HostOffset),
    Compressed { cluster: GuestOffset, data: CompressedCluster },
}

impl Piece {
    /// The part of the piece that lies in a range which it touches.
    pub(crate) fn clip(&self, range: &Range<u64>) -> Self {
        let guest = self.guest.start.max(range.start)..self.guest.end.min(range.end);
        let bytes = match self.bytes {
            Bytes::Plain(host) => Bytes::Plain(HostOffset(host.0 + (guest.start - self.guest.start))),
            compressed @ Bytes::Compressed { .. } => compressed,
        };
        Self { guest, layer: self.layer, bytes }
    }
}

/// The parts of pieces, which are in guest order, that lie in a range.
pub(crate) fn within<'a>(pieces: &'a [Piece], range: &'a Range<u64>) -> impl Iterator<Item = Piece> + 'a {
    let first = pieces.partition_point(|piece| piece.guest.end <= range.start);
    let touching = pieces.iter().skip(first).take_while(|piece| piece.guest.start < range.end);
    touching.map(|piece| piece.clip(range))
}

/// The pieces of a guest range, in guest order; between them there are zeroes. Layers come oldest first.
pub(crate) fn resolve<M: Mapped>(
    layers: &[M],
    guest: Range<u64>,
    scratch: &mut M::Scratch,
) -> Result<Vec<Piece>, M::Error> {
    let mut pieces = Vec::new();
    overlay(layers, guest, scratch, &mut |guest, found| {
        pieces.extend(found.map(|(layer, bytes)| Piece { guest, layer, bytes }));
    })?;
    pieces.sort_unstable_by_key(|piece| piece.guest.start);
    Ok(pieces)
}

/// What layers say of a guest range where another one is below them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Changes {
    /// What they hold, in guest order.
    pub(crate) data: Vec<Piece>,
    /// What they say is zeroes, in guest order.
    pub(crate) zeroes: Vec<Range<u64>>,
}

/// What layers change in a guest range of the one below them.
pub(crate) fn changes<M: Mapped>(
    layers: &[M],
    guest: Range<u64>,
    scratch: &mut M::Scratch,
) -> Result<Changes, M::Error> {
    let mut changes = Changes::default();
    overlay(layers, guest, scratch, &mut |guest, found| match found {
        Some((layer, bytes)) => changes.data.push(Piece { guest, layer, bytes }),
        None => changes.zeroes.push(guest),
    })?;
    changes.data.sort_unstable_by_key(|piece| piece.guest.start);
    changes.zeroes.sort_unstable_by_key(|range| range.start);
    Ok(changes)
}

/// Calls `each` for what the newest layer that says anything says, data or zeroes, newest layers first.
fn overlay<M: Mapped>(
    layers: &[M],
    guest: Range<u64>,
    scratch: &mut M::Scratch,
    each: &mut dyn FnMut(Range<u64>, Option<(usize, Bytes)>),
) -> Result<(), M::Error> {
    let mut wanted = vec![guest];
    let mut below = Vec::new();
    for (layer, mapped) in layers.iter().enumerate().rev() {
        wanted.retain_mut(|range| {
            let end = mapped.size().clamp(range.start, range.end);
            if end < range.end {
                each(end..range.end, None);
            }
            range.end = end;
            !range.is_empty()
        });
        mapped.map_all(&wanted, scratch, &mut |Extent { guest, content }| match content {
            Content::Unallocated => push_joined(&mut below, guest),
            Content::Zero => each(guest, None),
            Content::Data(host) => each(guest, Some((layer, Bytes::Plain(host)))),
            Content::Compressed { cluster, data } => {
                each(guest, Some((layer, Bytes::Compressed { cluster, data })));
            }
        })?;
        wanted.clear();
        std::mem::swap(&mut wanted, &mut below);
        if wanted.is_empty() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    /// A layer as a list: for each unit of the disk nothing, zero or data.
    #[derive(Debug, Clone)]
    struct Model {
        units: Vec<Option<bool>>,
    }

    const UNIT: u64 = 512;

    impl Mapped for Model {
        type Error = Infallible;
        type Scratch = ();

        fn size(&self) -> u64 {
            self.units.len() as u64 * UNIT
        }

        fn map(&self, guest: Range<u64>, (): &mut (), each: &mut dyn FnMut(Extent)) -> Result<(), Infallible> {
            for unit in guest.start / UNIT..guest.end.div_ceil(UNIT) {
                let start = (unit * UNIT).max(guest.start);
                let content = match self.units[usize::try_from(unit).unwrap()] {
                    None => Content::Unallocated,
                    Some(false) => Content::Zero,
                    Some(true) => Content::Data(HostOffset((1 << 20) + start)),
                };
                each(Extent { guest: start..((unit + 1) * UNIT).min(guest.end), content });
            }
            Ok(())
        }
    }

    fn layer() -> impl Strategy<Value = Model> {
        prop::collection::vec(prop::option::of(any::<bool>()), 0..40).prop_map(|units| Model { units })
    }

    /// The newest layer that says anything wins; past the end of a layer there are zeroes.
    fn model(layers: &[Model], unit: usize) -> Option<usize> {
        for (index, layer) in layers.iter().enumerate().rev() {
            match layer.units.get(unit) {
                Some(Some(true)) => return Some(index),
                Some(None) => {}
                Some(Some(false)) | None => return None,
            }
        }
        None
    }

    proptest! {
        #[test]
        fn each_unit_comes_from_the_newest_layer_that_has_it(
            layers in prop::collection::vec(layer(), 1..6), start in 0u64..30, length in 1u64..30,
        ) {
            let pieces = resolve(&layers, start * UNIT..(start + length) * UNIT, &mut ()).unwrap();
            for pair in pieces.windows(2) {
                prop_assert!(pair[0].guest.end <= pair[1].guest.start);
            }
            for unit in start..start + length {
                let place = unit * UNIT;
                let found = pieces.iter().find(|piece| piece.guest.contains(&place));
                let expected = model(&layers, usize::try_from(unit).unwrap());
                prop_assert_eq!(found.map(|piece| piece.layer), expected);
                if let Some(piece) = found {
                    let host = HostOffset((1 << 20) + piece.guest.start);
                    prop_assert_eq!(piece.bytes, Bytes::Plain(host));
                }
            }
            let changes = changes(&layers, start * UNIT..(start + length) * UNIT, &mut ()).unwrap();
            prop_assert_eq!(&changes.data, &pieces);
            for unit in start..start + length {
                let place = unit * UNIT;
                let zero = changes.zeroes.iter().filter(|range| range.contains(&place)).count();
                let held = pieces.iter().any(|piece| piece.guest.contains(&place));
                let shown = layers.iter().all(|layer| layer.units.get(usize::try_from(unit).unwrap()) == Some(&None));
                prop_assert_eq!(zero, usize::from(!held && !shown));
            }
        }
    }
}
