//! What one layer can tell of a range.

use std::error::Error;
use std::ops::Range;

use super::{Cause, Tolerance};
use crate::qcow2::{self, Content, Extent, Image, MapBuffer};
use crate::restore::layer::Layer;
use crate::restore::ranges::without;
use crate::restore::resolve::Mapped;
use crate::restore::verified::Verified;

/// What was found out about a range.
#[derive(Debug)]
pub(super) enum Note {
    /// The layer cannot give it.
    Missing(Cause),
    /// The layer gives something, or nothing, and may be wrong.
    Doubtful(Cause),
}

impl Tolerance {
    /// Maps a range as [`Image::map`] does. What cannot be mapped, or could not be before, is told to `bad`, as small as it is,
    /// and taken for unallocated.
    pub(in crate::restore) fn map(
        &self,
        image: &Image,
        guest: Range<u64>,
        scratch: &mut MapBuffer,
        each: &mut dyn FnMut(Extent),
        bad: &mut dyn FnMut(Range<u64>, Cause),
    ) {
        let unmapped = self.unmapped().within(&guest);
        let ranges: Vec<Range<u64>> = unmapped.iter().map(|(range, _)| range.clone()).collect();
        let known = without(guest, &ranges).into_iter().map(|range| (range, None));
        let mut parts: Vec<_> = unmapped.into_iter().map(|(range, cause)| (range, Some(cause))).chain(known).collect();
        parts.sort_unstable_by_key(|(range, _)| range.start);
        for (range, cause) in parts {
            if let Some(cause) = cause {
                bad(range.clone(), cause);
                each(Extent { guest: range, content: Content::Unallocated });
                continue;
            }
            map(image, range, scratch, each, &mut |range, error| {
                let cause = Cause::Tables(told(error));
                // what the tables say is always the same
                if matches!(error, qcow2::Error::Io { .. }) {
                    self.unmapped().insert(range.clone(), cause.clone());
                }
                bad(range, cause);
            });
        }
    }
}

/// Maps a range as [`Image::map`] does. What cannot be mapped is told to `bad`, as small as it is, and taken for unallocated.
fn map(
    image: &Image,
    guest: Range<u64>,
    scratch: &mut MapBuffer,
    each: &mut dyn FnMut(Extent),
    bad: &mut dyn FnMut(Range<u64>, &qcow2::Error),
) {
    let mut wanted = vec![guest];
    let mut extents = Vec::new();
    while let Some(range) = wanted.pop() {
        match image.map(range.clone(), scratch, |extent| extents.push(extent)) {
            Ok(()) => extents.drain(..).for_each(&mut *each),
            Err(error) => {
                extents.clear();
                if let Some(middle) = middle(image, &range, &error) {
                    wanted.push(middle..range.end);
                    wanted.push(range.start..middle);
                } else {
                    bad(range.clone(), &error);
                    each(Extent { guest: range, content: Content::Unallocated });
                }
            }
        }
    }
}

/// Where a range that cannot be mapped is cut, if a part of it may be mapped.
fn middle(image: &Image, range: &Range<u64>, error: &qcow2::Error) -> Option<u64> {
    let geometry = image.header().geometry;
    let cut = |unit: u64| {
        let units = (range.end - 1) / unit - range.start / unit;
        (units > 0).then(|| (range.start / unit + units.div_ceil(2)) * unit)
    };
    let of_one_table = matches!(error, qcow2::Error::DamagedL1 { .. });
    let cut = cut(geometry.l2_coverage()).or_else(|| if of_one_table { None } else { cut(geometry.cluster_size()) });
    cut.or_else(|| {
        let qcow2::Error::Invalid(invalid) = error else { return None };
        let cluster = range.start - geometry.offset_in_cluster(range.start);
        invalid.held().map(|held| cluster + held).filter(|end| range.start < *end && *end < range.end)
    })
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
            tolerance.map(image, guest.clone(), scratch, &mut |extent| extents.push(extent), &mut |range, cause| {
                note(range, Note::Missing(cause));
            });
            for (range, ()) in tolerance.shared().within(guest) {
                note(range, Note::Doubtful(Cause::Shared));
            }
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
            // what became a hole shows the image below
            let doubtful = tolerance
                .file
                .as_ref()
                .map(|file| if is_hole { file.misfits(extent.guest.clone()) } else { doubtful(file, extent) });
            let doubtful = doubtful.unwrap_or_default();
            for part in doubtful.into_iter().flat_map(|part| without(part, &ranges)) {
                note(part, Note::Doubtful(Cause::Checksum));
            }
        }
        if let (Some(image), Some(file)) = (self.image(), &tolerance.file) {
            let header = file.misfits(0..image.header().header_length);
            let all = (!header.is_empty()).then(|| guest.clone());
            let entries = image.mapped_from(guest, &|range| file.misfits(range));
            all.into_iter().chain(entries).for_each(|range| note(range, Note::Doubtful(Cause::Checksum)));
        }
        Ok(())
    }
}

fn unallocated(extent: &Extent) -> Option<Range<u64>> {
    (extent.content == Content::Unallocated).then(|| extent.guest.clone())
}

/// The parts of an extent that come from blocks that do not fit their checksums.
fn doubtful(file: &Verified, extent: &Extent) -> Vec<Range<u64>> {
    let guest = &extent.guest;
    match extent.content {
        Content::Unallocated | Content::Zero => Vec::new(),
        Content::Data(host) => {
            let wrong = file.misfits(host.0..host.0 + (guest.end - guest.start));
            wrong.into_iter().map(|part| guest.start + part.start - host.0..guest.start + part.end - host.0).collect()
        }
        Content::Compressed { data, .. } => {
            let wrong = file.misfits(data.host.0..data.host.0 + data.length);
            if wrong.is_empty() { Vec::new() } else { vec![guest.clone()] }
        }
    }
}

/// An error and its causes in one line.
pub(super) fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
