//! Makes refcounts and COPIED flags right again. What refers to what is not guessed at: damaged tables stay damaged.
//!
//! The old refcounts stay where they are until the header leads to the new ones, and everything new goes behind the end of
//! the file, so that a crash, or a disk that is full, leaves the image as it was. Then they become zeroes: what was damaged
//! there is no damage of the image any more.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::check::{CheckLimits, Finding, Progress, Report, Roots, Stored, check};
use super::error::{Error, Result};
use super::features::Features;
use super::header::Header;
use super::l1::l1_entries;
use super::writer::{FreeClusters, Head, Next, Rebuild, clusters_of, share, sync, write};
use crate::storage::{LastHole, Storage as _, WritableStorage, to_usize};

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters become free, where nothing else is wrong.
    Leaks,
    /// All refcounts and COPIED flags become what the tables say.
    All,
}

/// What a repair found, and what it left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    /// The report of the image as it was.
    pub before: Report,
    /// The report of the image as it is now; the same where nothing could be repaired.
    pub after: Report,
}

/// Repairs an image whose header can be read. One in which nothing is wrong is not written to.
///
/// Nothing is changed either where what the tables lead to cannot be known (the snapshot table or the bitmap directory is
/// damaged), where something ends beyond the end of the file (the file would grow over the gap), and where refcounts are
/// too narrow for what they would have to count.
///
/// # Errors
/// What is wrong with the header; [`Error::NotWritable`] where something is wrong with an image that keeps its data in
/// another file; [`Error::Cancelled`]; what the system says. The image is what it was then, unless the system failed at
/// the very last write.
pub fn repair(
    storage: &Arc<dyn WritableStorage>,
    what: Repair,
    observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Repaired> {
    let length = storage.length();
    let before = check(storage, &mut share(length, 0, 3, &mut *observer))?;
    let mut head = Head::read_to_repair(storage)?;
    let rebuilds = is_wrong(storage, head.header(), &before)?;
    let wanted = match what {
        Repair::Leaks => before.leaks > 0 && before.corruptions() == 0 && !before.dirty && !before.marked_corrupt,
        Repair::All => rebuilds || before.dirty || before.marked_corrupt,
    };
    if !wanted || before.beyond_end || Roots::read(storage, head.header(), &mut Report::default())?.is_lost() {
        return Ok(Repaired { after: before.clone(), before });
    }
    if head.header().has_data_file() {
        return Err(Error::NotWritable { reason: "its data lies in another file" });
    }
    let mut old = BTreeSet::new();
    if rebuilds {
        let free = FreeClusters::behind_end(storage, head.header());
        let rebuild = Rebuild { storage, free, takes_damage: true, limits: CheckLimits::default() };
        let next = next(storage, head.header())?;
        old = refcount_clusters(storage, head.header())?;
        match rebuild.run(&mut head, next, &mut share(length, 1, 3, &mut *observer)) {
            Err(Error::RefcountOverflow { .. } | Error::TableTooLarge { .. }) => {
                return Ok(Repaired { after: before.clone(), before });
            }
            result => result?,
        }
    } else if before.dirty {
        clear(storage, &mut head, Features::DIRTY)?;
    }
    let mut after = check(storage, &mut share(length, 2, 3, observer))?;
    if after.marked_corrupt && after.corruptions() == 0 {
        clear(storage, &mut head, Features::CORRUPT)?;
        after.marked_corrupt = false;
    }
    // what damaged tables lead to may be there
    if after.corruptions() == 0 && !old.is_empty() {
        // the image is right whether they could be written or not
        let _ = erase_free(storage, head.header(), &old);
        // but those who sum it have to know what it is
        sync(&**storage)?;
    }
    Ok(Repaired { before, after })
}

/// Whether something is wrong that new refcounts and flags make right.
fn is_wrong(storage: &Arc<dyn WritableStorage>, header: &Header, report: &Report) -> Result<bool> {
    let mut refcount_table = Report::default();
    let stored = Stored::read(storage, header, &mut refcount_table)?;
    let start = header.refcount_table.offset.0;
    let table = start..start.saturating_add(header.refcount_table.bytes());
    let overlaps = report.findings.iter().any(|finding| match finding {
        Finding::Overlap { cluster } => table.contains(&cluster.0) || stored.references.contains(cluster),
        _ => false,
    });
    let damaged = refcount_table.structure_errors > 0 || table.is_empty() || table.end > storage.length();
    Ok(report.leaks > 0 || report.refcount_errors > 0 || damaged || overlaps)
}

/// The clusters of the refcount structure, as far as they are in the file.
fn refcount_clusters(storage: &Arc<dyn WritableStorage>, header: &Header) -> Result<BTreeSet<u64>> {
    let bits = header.geometry.cluster_bits();
    let blocks = Stored::read(storage, header, &mut Report::default())?.references;
    let clusters =
        clusters_of(header.refcount_table, header.geometry).chain(blocks.iter().map(|block| block.0 >> bits));
    let in_file = storage.length() >> bits;
    Ok(clusters.filter(|cluster| *cluster < in_file).collect())
}

/// Writes zeroes to those of these clusters that nothing leads to.
fn erase_free(storage: &Arc<dyn WritableStorage>, header: &Header, clusters: &BTreeSet<u64>) -> Result<()> {
    let size = header.geometry.cluster_size();
    let stored = Stored::read(storage, header, &mut Report::default())?;
    let mut hole = LastHole::default();
    for cluster in clusters {
        let bytes = cluster * size..(cluster + 1) * size;
        if hole.next_data_within(storage, bytes).is_ok_and(|data| data.is_none()) {
            continue;
        }
        let mut is_free = false;
        stored.runs(*cluster..cluster + 1, &mut |_, count| {
            is_free = count == Some(0);
            Ok(())
        })?;
        if is_free {
            write(&**storage, "a refcount block", cluster * size, &vec![0; to_usize(size)])?;
        }
    }
    Ok(())
}

/// The image as it is.
fn next(storage: &Arc<dyn WritableStorage>, header: &Header) -> Result<Next> {
    let l1 = l1_entries(storage, header.l1_table, "the L1 table")?;
    Ok(Next {
        l1,
        size: header.size,
        nb_snapshots: header.nb_snapshots,
        snapshots_offset: header.snapshots_offset,
        snapshot_table: Vec::new(),
        features: header.features.incompatible & !Features::DIRTY,
    })
}

fn clear(storage: &Arc<dyn WritableStorage>, head: &mut Head, feature: u64) -> Result<()> {
    head.update(&**storage, |raw| raw.incompatible_features = (raw.incompatible_features.get() & !feature).into())?;
    sync(&**storage)
}
