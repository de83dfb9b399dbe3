//! What a commit does not begin, since it could not end it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::FULL_SNAPSHOT;
use crate::chain::{self, Checksums, Image, ImageName, Manifest, RestorePoint, Stage};
use crate::qcow2;
use crate::restore::error::{Error, Result};
use crate::restore::in_place::{self, InPlace};
use crate::restore::resolve::Mapped;
use crate::storage;

/// What would be refused when a part of the work is done. `names` are those of the snapshots that it makes.
pub(super) fn impossible<'a>(
    work: chain::Work,
    chain: &InPlace,
    full: &qcow2::Image,
    path: &Path,
    names: impl Iterator<Item = &'a str>,
    resumed: bool,
) -> Result<()> {
    let header = full.header();
    let refuse = |reason| Err(in_place::refused(path, reason));
    let failed = Error::image(path);
    let groups = super::groups(work, chain.incs());
    let sizes: Vec<u64> = groups.iter().filter_map(|group| group.last().map(Mapped::size)).collect();
    let has_snapshots = header.nb_snapshots > 0 || work == chain::Work::SnapshotRebase;
    if header.version == 2 && has_snapshots && sizes.iter().any(|size| *size != header.size) {
        return refuse("the size of the disk changes, which snapshots of a version 2 image do not hold");
    }
    if sizes.iter().any(|size| !header.geometry.can_map(*size)) {
        return refuse("its clusters are too small for the size of the disk");
    }
    // an earlier run has looked before it changed anything
    if resumed {
        return Ok(());
    }
    let refused = header.extensions.refused.clone().map(qcow2::Error::from);
    refused.map_or(Ok(()), Err).map_err(&failed)?;
    if sizes.iter().any(|size| *size != header.size) {
        for size in &sizes {
            if !full.bitmaps_fit(*size).map_err(failed)? {
                return refuse(
                    "has a bitmap that a disk of the size of an INC cannot have: remove it first (qemu-img bitmap --remove)",
                );
            }
        }
    }
    chain.check_bitmaps(&sizes)?;
    if full.snapshot_table_with(names).map_err(failed)?.is_none() {
        return refuse("cannot hold so many internal snapshots more: delete some, or take fewer INCs (--until)");
    }
    if work == chain::Work::SnapshotRebase {
        // one for the FULL and one for each INC; and QEMU counts once more while it goes to one of them
        let made = sizes.len() as u64 + 2;
        let highest = full.highest_refcount().map_err(failed)?;
        if highest.saturating_mul(made + 1) > header.most_references() {
            return refuse("its refcounts are too narrow for so many snapshots");
        }
    }
    Ok(())
}

/// Whether what goes, and what is replaced beside the FULL and the INC that will follow it, can be removed.
pub(super) fn unremovable(incs: &[Arc<Image>], full: &Arc<Image>, next: Option<&Arc<Image>>) -> Result<()> {
    let beside = |image: &Arc<Image>| [Manifest::path(&image.path), Checksums::path(&image.path)];
    let all = incs.iter().chain([full]).chain(next).flat_map(beside);
    let link = in_place::link_to(&full.path, incs)?;
    for path in incs.iter().map(|inc| inc.path.clone()).chain(all).chain(link) {
        let why = storage::why_unremovable(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        why.map_or(Ok(()), |reason| Err(in_place::refused(&path, reason)))?;
    }
    Ok(())
}

/// Refuses a file whose refcounts could not tell of all its clusters when it has grown by as many bytes as it may.
pub(super) fn refcounts(full: &qcow2::Image, path: &Path, growth: u64) -> Result<()> {
    if full.storage().length().saturating_add(growth) > full.header().most_counted() {
        return Err(in_place::refused(
            path,
            "may become larger than its refcounts can tell: take fewer INCs (--until), or make a new image with larger clusters \
             (merge --cluster-size)",
        ));
    }
    Ok(())
}

/// Refuses what would make a mixture of the FULL without a trace. `snapshots` are those that count for the work.
pub(super) fn mixture(
    point: &RestorePoint,
    work: chain::Work,
    snapshots: &[qcow2::Snapshot],
    incs: &[Arc<Image>],
) -> Result<()> {
    let Some(full) = point.members.first() else { return Ok(()) };
    let Some(unfinished) = &point.unfinished else {
        return match work {
            chain::Work::Commit => Ok(()),
            chain::Work::SnapshotRebase => dates(snapshots, &full.path, incs),
        };
    };
    if unfinished.stage == Stage::Removing {
        let id = in_place::id(&full.path)?;
        return if id.is_some() && id == unfinished.full_id {
            Err(in_place::refused(
                &full.path,
                "is the one from before the INCs were written into it, put back: they are in the other one; to begin anew \
                 with this one, remove its .in-place.json",
            ))
        } else {
            Ok(())
        };
    }
    // each INC that went into the FULL is needed, but for those that a snapshot holds
    let is_there = |name: &&String| incs.iter().any(|image| image.display_name() == **name);
    let is_held = |name: &&String| {
        let date = in_place::seconds(ImageName::parse(name.as_ref()).map(|inc| inc.time));
        snapshots.iter().any(|snapshot| Some(snapshot.date) == date)
    };
    match unfinished.incs.iter().find(|name| !is_there(name) && !is_held(name)) {
        Some(name) => Err(Error::Gone { path: full.path.with_file_name(name) }),
        None => Ok(()),
    }
}

/// By their dates, snapshots are known when the work is done again: each INC needs one that none has that is there already.
fn dates(snapshots: &[qcow2::Snapshot], full: &Path, incs: &[Arc<Image>]) -> Result<()> {
    let is_late = |inc: &&Arc<Image>| in_place::seconds(inc.time).is_some_and(|time| time.as_secs() > u32::MAX.into());
    if let Some(inc) = incs.iter().find(is_late) {
        return Err(in_place::refused(
            &inc.path,
            "has a time after 2106, which no snapshot can have: commit keeps none",
        ));
    }
    let is_of = |date: Duration| incs.iter().any(|inc| in_place::seconds(inc.time) == Some(date));
    match snapshots.iter().find(|snapshot| snapshot.name != FULL_SNAPSHOT && is_of(snapshot.date)) {
        Some(snapshot) => Err(Error::SnapshotThere { path: full.to_owned(), name: snapshot.name.clone() }),
        None => Ok(()),
    }
}
