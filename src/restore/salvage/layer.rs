//! What one layer can tell of a range.

use std::ops::Range;
use std::slice;

use super::{Cause, Tolerance};
use crate::errors;
use crate::qcow2::{self, Content, Extent, Image, MapBuffer, Unmapped};
use crate::restore::layer::Layer;
use crate::restore::ranges::without;
use crate::restore::resolve::Mapped;

/// What was found out about a range.
#[derive(Debug)]
pub(super) enum Note {
    /// The layer cannot give it.
    Missing(Cause),
    /// The layer gives something, or nothing, and may be wrong.
    Doubtful(Cause),
}

/// Why a range cannot be mapped.
#[derive(Debug)]
pub(in crate::restore) enum Why<'a> {
    /// As was found before.
    Known(Cause),
    /// As the tables say.
    Error(&'a qcow2::Error),
}

impl Why<'_> {
    /// The words for it, which cost time where there are millions of entries.
    fn cause(self) -> Cause {
        match self {
            Self::Known(cause) => cause,
            Self::Error(error) => Cause::Tables(errors::line(error)),
        }
    }
}

impl Tolerance {
    /// Maps ranges as [`Image::map`] does. What cannot be mapped, or could not be before, is told to `bad`, as small as it is,
    /// and taken for unallocated.
    pub(in crate::restore) fn map(
        &self,
        image: &Image,
        ranges: &[Range<u64>],
        scratch: &mut MapBuffer,
        each: &mut dyn FnMut(Extent),
        bad: &mut dyn FnMut(Range<u64>, Why<'_>),
    ) {
        let bad_now = |range: Range<u64>, error: &qcow2::Error, bad: &mut dyn FnMut(Range<u64>, Why<'_>)| {
            // what the tables say is always the same
            if matches!(error, qcow2::Error::Io { .. }) {
                self.unmapped().insert(range.clone(), Why::Error(error).cause());
            }
            bad(range, Why::Error(error));
        };
        let unmapped: Vec<_> = {
            let all = self.unmapped();
            ranges.iter().flat_map(|range| all.within(range)).collect()
        };
        if unmapped.is_empty() {
            map(image, ranges, scratch, each, &mut |range, error| bad_now(range, error, bad));
            return;
        }
        let known: Vec<Range<u64>> = unmapped.iter().map(|(range, _)| range.clone()).collect();
        let others = ranges.iter().flat_map(|range| without(range.clone(), &known)).map(|range| (range, None));
        let unmapped = unmapped.into_iter().map(|(range, cause)| (range, Some(cause)));
        let mut parts: Vec<_> = unmapped.chain(others).collect();
        parts.sort_unstable_by_key(|(range, _)| range.start);
        for (range, cause) in parts {
            if let Some(cause) = cause {
                bad(range.clone(), Why::Known(cause));
                each(Extent { guest: range, content: Content::Unallocated });
            } else {
                map(image, slice::from_ref(&range), scratch, each, &mut |range, error| bad_now(range, error, bad));
            }
        }
    }
}

/// Maps ranges as [`Image::map`] does. What cannot be mapped is told to `bad`, as small as it is, and taken for unallocated.
fn map(
    image: &Image,
    ranges: &[Range<u64>],
    scratch: &mut MapBuffer,
    each: &mut dyn FnMut(Extent),
    bad: &mut dyn FnMut(Range<u64>, &qcow2::Error),
) {
    let mut parts = Vec::new();
    // a closure that never fails
    let _ = image.map_parts(ranges, scratch, |part| {
        parts.push(part);
        Ok(())
    });
    for part in parts {
        let Unmapped { guest, error } = match part {
            Ok(extent) => {
                each(extent);
                continue;
            }
            Err(unmapped) => unmapped,
        };
        if let Some(middle) = middle(image, &guest, &error) {
            for half in [guest.start..middle, middle..guest.end] {
                map(image, slice::from_ref(&half), scratch, each, bad);
            }
        } else {
            bad(guest.clone(), &error);
            each(Extent { guest, content: Content::Unallocated });
        }
    }
}

/// Where a range that cannot be mapped is cut, if a part of it may be mapped.
fn middle(image: &Image, range: &Range<u64>, error: &qcow2::Error) -> Option<u64> {
    let geometry = image.header().geometry;
    match error {
        qcow2::Error::Io { .. } => {
            let unit = geometry.cluster_size();
            let units = (range.end - 1) / unit - range.start / unit;
            (units > 0).then(|| (range.start / unit + units.div_ceil(2)) * unit)
        }
        qcow2::Error::Invalid(invalid) => {
            let cluster = range.start - geometry.offset_in_cluster(range.start);
            let end = cluster.checked_add(invalid.held()?)?;
            (range.start < end && end < range.end).then_some(end)
        }
        _ => None,
    }
}

impl Layer {
    /// Finds what is wrong with what the layer tells of a range that ends in its disk, and what it says nothing of.
    pub(super) fn examine(
        &self,
        guest: &Range<u64>,
        scratch: &mut MapBuffer,
        below: &mut Vec<Range<u64>>,
        note: &mut dyn FnMut(Range<u64>, Note),
    ) -> crate::restore::Result<()> {
        let Some(tolerance) = self.tolerance() else {
            return self.map(guest.clone(), scratch, &mut |extent| below.extend(unallocated(&extent)));
        };
        if let Some(cause) = &tolerance.absent {
            note(guest.clone(), Note::Missing(cause.clone()));
            below.push(guest.clone());
            return Ok(());
        }
        let mut extents = Vec::new();
        if let Some(image) = self.image() {
            let range = slice::from_ref(guest);
            tolerance.map(image, range, scratch, &mut |extent| extents.push(extent), &mut |range, why| {
                note(range, Note::Missing(why.cause()));
            });
            let shared = tolerance.shared().within(guest).into_iter().map(|(range, ())| range);
            shared.chain(image.with_shared_tables(guest)).for_each(|range| note(range, Note::Doubtful(Cause::Shared)));
        } else {
            self.map(guest.clone(), scratch, &mut |extent| extents.push(extent))?;
            let behind = self.data().length().clamp(guest.start, guest.end)..guest.end;
            if !behind.is_empty() {
                note(behind, Note::Missing(Cause::Truncated));
            }
        }
        for extent in &extents {
            let unreadable = tolerance.unreadable().within(&extent.guest);
            let ranges: Vec<Range<u64>> = unreadable.iter().map(|(range, _)| range.clone()).collect();
            match extent.content {
                Content::Unallocated => below.push(extent.guest.clone()),
                Content::Zero => {}
                Content::Data(_) | Content::Compressed { .. } => {
                    below.extend(ranges.iter().cloned());
                    for (range, cause) in unreadable {
                        note(range, Note::Missing(cause));
                    }
                }
            }
            let is_hole = self.image().is_none() && extent.content == Content::Unallocated;
            for (cause, parts) in tolerance.doubts() {
                // what became a hole shows the image below
                let doubtful = if is_hole { parts(extent.guest.clone()) } else { doubtful(&parts, extent) };
                for part in doubtful.into_iter().flat_map(|part| without(part, &ranges)) {
                    note(part, Note::Doubtful(cause.clone()));
                }
            }
        }
        if let Some(image) = self.image() {
            let header = tolerance.file.as_ref().map(|file| file.misfits(0..image.header().header_length));
            if header.is_some_and(|header| !header.is_empty()) {
                note(guest.clone(), Note::Doubtful(Cause::Checksum));
            }
            for (cause, parts) in tolerance.doubts() {
                for range in image.mapped_from(guest, &|range| parts(range)) {
                    note(range, Note::Doubtful(cause.clone()));
                }
            }
        }
        Ok(())
    }
}

fn unallocated(extent: &Extent) -> Option<Range<u64>> {
    (extent.content == Content::Unallocated).then(|| extent.guest.clone())
}

/// The parts of an extent that come from such parts of the file.
fn doubtful(parts: &dyn Fn(Range<u64>) -> Vec<Range<u64>>, extent: &Extent) -> Vec<Range<u64>> {
    let guest = &extent.guest;
    match extent.content {
        Content::Unallocated | Content::Zero => Vec::new(),
        Content::Data(host) => {
            let wrong = parts(host.0..host.0 + (guest.end - guest.start));
            wrong.into_iter().map(|part| guest.start + part.start - host.0..guest.start + part.end - host.0).collect()
        }
        Content::Compressed { data, .. } => {
            let wrong = parts(data.host.0..data.host.0 + data.length);
            if wrong.is_empty() { Vec::new() } else { vec![guest.clone()] }
        }
    }
}
