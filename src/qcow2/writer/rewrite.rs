//! Makes what stands behind the fixed fields of the header anew: extensions and the backing file name.
//!
//! ```text
//! fixed fields | backing file format | other extensions | feature name table | end marker | backing file name
//! ```
//!
//! The first sector changes at once, and leads to all that lies behind it. So what is new there goes where the header of
//! that moment has nothing, and becomes true with the first sector. Where that is not to be had, the feature name table
//! makes room: it only names bits for people. Then there are two such steps, the first to the same header without the table.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::head::{SECTOR, edit_fields};
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::{Error, Result};
use crate::qcow2::extensions::walk;
use crate::qcow2::features::Features;
use crate::qcow2::header::{Backing, Header};
use crate::qcow2::wire::{self, RawBitmapsExtension, RawExtension};
use crate::storage::to_usize;

/// What is to be changed.
#[derive(Debug, Default)]
pub(super) struct Change<'a> {
    pub(super) backing: Edit<&'a Backing>,
    /// The bitmaps extension, and the autoclear bit that says that it is true.
    pub(super) bitmaps: Edit<RawBitmapsExtension>,
}

/// What becomes of a part of the header.
#[derive(Debug, Default)]
pub(super) enum Edit<T> {
    #[default]
    Stays,
    Becomes(Option<T>),
}

/// A header in parts.
#[derive(Debug, Clone)]
struct Parts {
    /// The fields, also unknown ones.
    fixed: Vec<u8>,
    format: Option<Vec<u8>>,
    others: Vec<(u32, Vec<u8>)>,
    feature_names: Option<Vec<u8>>,
    /// The name of the backing file, empty where there is none.
    name: Vec<u8>,
    autoclear: u64,
}

/// The clusters that the header cluster becomes one after the other, the last of which has what was asked.
pub(super) fn plan(header: &Header, cluster: &[u8], change: &Change<'_>) -> Result<Vec<Vec<u8>>> {
    let (file_length, length) = (cluster.len() as u64, header.geometry.cluster_size());
    if file_length < length {
        return Err(Error::Truncated { what: "the header cluster", offset: HostOffset(0), length, file_length });
    }
    if header.version == 2 && matches!(change.bitmaps, Edit::Becomes(Some(_))) {
        return Err(Error::NotWritable { reason: "images of version 2 have no bitmaps" });
    }
    let old = Parts::of(header, cluster)?;
    let new = old.changed(change);
    let bare_old = Parts { feature_names: None, ..old };
    let bare_new = Parts { feature_names: None, ..new.clone() };
    let from = State::of(header, cluster.to_vec())?;
    for new in [&new, &bare_new] {
        if let Some(next) = from.all_next(header, new).next() {
            return Ok(vec![next]);
        }
        for between in from.all_next(header, &bare_old) {
            let between = State::of(&Header::parse(&between)?, between)?;
            let next = between.all_next(header, new).next();
            if let Some(next) = next {
                return Ok(vec![between.cluster, next]);
            }
        }
    }
    let bitmaps = matches!(change.bitmaps, Edit::Becomes(_));
    let what = if bitmaps { "the bitmaps extension" } else { "the backing file name" };
    Err(Error::NoRoomInHeader { what, cluster_size: length })
}

/// The sectors behind the first that have to be written to make one cluster another.
pub(super) fn changed_behind(from: &[u8], to: &[u8]) -> Option<Range<usize>> {
    let differs = |at: &usize| from.get(*at) != to.get(*at);
    let first = (SECTOR..to.len()).find(differs)?;
    let last = (SECTOR..to.len()).rev().find(differs)?;
    Some(first / SECTOR * SECTOR..(last / SECTOR * SECTOR + SECTOR).min(to.len()))
}

impl Parts {
    fn of(header: &Header, cluster: &[u8]) -> Result<Self> {
        let name = name_range(header, cluster);
        let mut parts = Self {
            fixed: cluster.get(..to_usize(header.header_length)).unwrap_or_default().to_vec(),
            format: None,
            others: Vec::new(),
            feature_names: None,
            name: cluster.get(name.clone()).unwrap_or_default().to_vec(),
            // bits that this program does not know promise what may not be true any more
            autoclear: header.features.autoclear & Features::BITMAPS,
        };
        walk(cluster, header.header_length, word(cluster, 8), |kind, data, _| {
            match kind {
                wire::EXTENSION_BACKING_FORMAT => parts.format = Some(data.to_vec()),
                wire::EXTENSION_FEATURE_NAMES => parts.feature_names = Some(data.to_vec()),
                other => parts.others.push((other, data.to_vec())),
            }
            Ok(())
        })?;
        Ok(parts)
    }

    fn changed(&self, change: &Change<'_>) -> Self {
        let mut new = self.clone();
        if let Edit::Becomes(backing) = change.backing {
            new.name = backing.map(|backing| backing.name.clone().into_bytes()).unwrap_or_default();
            new.format = backing.and_then(|backing| backing.format.clone()).map(String::into_bytes);
        }
        if let Edit::Becomes(bitmaps) = &change.bitmaps {
            new.others.retain(|(kind, _)| *kind != wire::EXTENSION_BITMAPS);
            new.others.extend(bitmaps.iter().map(|raw| (wire::EXTENSION_BITMAPS, raw.as_bytes().to_vec())));
            new.autoclear = if bitmaps.is_some() { Features::BITMAPS } else { 0 };
        }
        new
    }

    /// Fixed fields, extensions and the end marker.
    fn front(&self) -> Vec<u8> {
        let mut front = self.fixed.clone();
        let format = self.format.iter().map(|data| (wire::EXTENSION_BACKING_FORMAT, data));
        let others = self.others.iter().map(|(kind, data)| (*kind, data));
        let names = self.feature_names.iter().map(|data| (wire::EXTENSION_FEATURE_NAMES, data));
        let end = Vec::new();
        for (kind, data) in format.chain(others).chain(names).chain([(wire::EXTENSION_END, &end)]) {
            let length = u32::try_from(data.len()).unwrap_or(u32::MAX).into();
            front.extend(RawExtension { kind: kind.into(), length }.as_bytes());
            front.extend(data);
            front.resize(front.len().next_multiple_of(8), 0);
        }
        front
    }
}

/// The header cluster at one moment.
struct State {
    cluster: Vec<u8>,
    /// What the first sector leads to: extensions, and the backing file name.
    live: [Range<usize>; 2],
}

impl State {
    fn of(header: &Header, cluster: Vec<u8>) -> Result<Self> {
        let end = walk(&cluster, header.header_length, word(&cluster, 8), |_, _, _| Ok(()))?;
        let live = [0..to_usize(end), name_range(header, &cluster)];
        Ok(Self { cluster, live })
    }

    /// The clusters with these parts that this one can become: behind the first sector, they have what this one has
    /// wherever it has something.
    fn all_next<'a>(&'a self, header: &'a Header, parts: &'a Parts) -> impl Iterator<Item = Vec<u8>> + 'a {
        let front = parts.front();
        let length = parts.name.len();
        let places = [
            front.len(),
            front.len().max(SECTOR),
            self.live[1].start,
            self.live[0].end,
            self.live[1].end,
            self.cluster.len().saturating_sub(length),
        ];
        let fits = move |place: &usize| *place >= front.len() && place.saturating_add(length) <= self.cluster.len();
        let front = parts.front();
        let next = places.into_iter().filter(fits).map(move |place| self.next(header, parts, &front, place));
        next.filter(|next| self.live.iter().all(|live| is_kept(&self.cluster, next, live)))
    }

    /// The cluster with these parts, and the backing file name at a place behind the others.
    fn next(&self, header: &Header, parts: &Parts, front: &[u8], place: usize) -> Vec<u8> {
        let mut next = self.cluster.clone();
        // nothing of the old is left where that costs nothing
        next.iter_mut().take(SECTOR).for_each(|byte| *byte = 0);
        put(&mut next, 0, front);
        put(&mut next, place, &parts.name);
        let named = !parts.name.is_empty();
        edit_fields(&mut next, header, |raw| {
            raw.backing_file_offset = if named { place as u64 } else { 0 }.into();
            raw.backing_file_size = u32::try_from(parts.name.len()).unwrap_or(u32::MAX).into();
            raw.autoclear_features = parts.autoclear.into();
        });
        next
    }
}

/// Where the backing file name is.
fn name_range(header: &Header, cluster: &[u8]) -> Range<usize> {
    let length = header.backing.as_ref().map_or(0, |backing| backing.name.len());
    let start = if length == 0 { 0 } else { to_usize(word(cluster, 8)) };
    start..start + length
}

/// Whether a range behind the first sector is the same in both.
fn is_kept(from: &[u8], to: &[u8], range: &Range<usize>) -> bool {
    let behind = range.start.max(SECTOR)..range.end.max(SECTOR);
    behind.is_empty() || from.get(behind.clone()) == to.get(behind)
}

fn put(cluster: &mut [u8], offset: usize, bytes: &[u8]) {
    cluster.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
}

/// A big-endian number.
fn word(cluster: &[u8], offset: usize) -> u64 {
    let bytes = cluster.get(offset..).and_then(|bytes| bytes.first_chunk()).copied();
    u64::from_be_bytes(bytes.unwrap_or_default())
}

#[cfg(test)]
mod tests;
