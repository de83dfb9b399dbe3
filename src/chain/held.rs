//! The moment that a FULL holds, where it is not that of its name: INCs were written into it, or its name has no time.
//!
//! Its manifest tells, see [`Manifest::time`](super::Manifest::time). It says *when* the FULL is a restore point of, and
//! nothing else: which INCs belong to which FULL is told by names alone, so that no manifest moves an INC to another FULL.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::image::Image;
use super::name::Level;

/// The moment of a FULL with this time in its name, or none. A manifest never makes it earlier.
pub(super) fn time(named: Option<i64>, manifest: Option<i64>) -> Option<i64> {
    named.max(manifest)
}

/// Takes back what manifests claim that cannot be. `images` are those of a disk in the order in which they were made.
///
/// No FULL holds what was after the next one in its folder: INCs of before are that one's.
pub(super) fn refuse_claims(images: &mut [Image]) {
    let mut next: BTreeMap<PathBuf, i64> = BTreeMap::new();
    for image in images.iter_mut().rev().filter(|image| image.level == Level::Full && !image.partial) {
        let Some(named) = image.named else { continue };
        let limit = next.insert(image.folder().to_owned(), named);
        if limit.is_some_and(|limit| image.time >= Some(limit)) {
            image.time = image.named;
        }
    }
}
