//! A plain qcow2 image: every offset follows from the plan, so the slices need not wait for each other.

use byteorder::{BigEndian, ByteOrder};

use super::arrangement::Arrangement;
use super::for_each_slice;
use crate::qcow2::{HostOffset, Layout, RefcountWriter};
use crate::restore::copier::{Copier, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::merge::output::Target;
use crate::restore::plan::{self, Plan, PlannedSlice};
use crate::restore::resolve::resolve;
use crate::storage::to_usize;

/// Writes the image; the length of the file comes back.
pub(in crate::restore) fn write_qcow2(
    work: &Transfer<'_>,
    plan: &Plan,
    layout: &Layout,
    target: Target<'_>,
) -> Result<u64> {
    target.set_len(layout.length())?;
    let metadata = Copier::new(work, target.path, target.file);
    let mut write = |host: HostOffset, bytes: &[u8]| metadata.write(bytes, host.0);
    write(HostOffset(0), &layout.header())?;
    let mut refcounts = RefcountWriter::new(layout, &mut write)?;
    refcounts.repeat(plan.clusters, 1, &mut write)?;
    refcounts.finish(&mut write)?;
    let copier = || Copier::new(work, target.path, target.file);
    if let Some(arrangement) = Arrangement::of(work, plan, layout, target)? {
        write_arranged(work, plan, layout, target, arrangement)?;
        return Ok(layout.length());
    }
    for_each_slice(plan, copier, |copier, buffer, slice| {
        let pieces = resolve(work.layers, slice.guest.clone(), buffer)?;
        let clusters = plan::touched(&pieces, layout.geometry());
        write_tables(copier, layout, slice, &clusters, slice.first_cluster..)?;
        let first = layout.data_cluster(slice.first_cluster);
        copier.copy(&work.operations(pieces, plan::packed(&clusters, first, layout.geometry())))
    })?;
    Ok(layout.length())
}

/// Writes data and tables of an image whose data does not lie in the order of the disk.
pub(super) fn write_arranged(
    work: &Transfer<'_>,
    plan: &Plan,
    layout: &Layout,
    target: Target<'_>,
    arrangement: Arrangement,
) -> Result<()> {
    arrangement.copy(work, layout, target)?;
    let places = arrangement.into_places();
    let copier = || Copier::new(work, target.path, target.file);
    for_each_slice(plan, copier, |copier, _, slice| {
        work.pace(0)?;
        let (clusters, numbers) = places.clusters(slice, layout);
        write_tables(copier, layout, slice, &clusters, numbers.into_iter())
    })
}

/// The parts of L1 and L2 tables that belong to a slice: of the disk's clusters, whose data clusters have these numbers.
fn write_tables(
    copier: &Copier<'_>,
    layout: &Layout,
    slice: &PlannedSlice,
    clusters: &[u64],
    mut numbers: impl Iterator<Item = u64>,
) -> Result<()> {
    if clusters.len() as u64 != slice.clusters {
        return Err(Error::Changed);
    }
    let entries = layout.geometry().l2_entries();
    let same_table = |one: &u64, next: &u64| one / entries == next / entries;
    let mut l1_bytes: Vec<u8> = Vec::new();
    let mut l1_start = 0;
    for (table_number, table) in (slice.first_table..).zip(clusters.chunk_by(same_table)) {
        let (Some(first), Some(last)) = (table.first(), table.last()) else { continue };
        let mut bytes = vec![0; to_usize((last - first + 1) * 8)];
        for (cluster, number) in table.iter().zip(&mut numbers) {
            let start = to_usize((cluster - first) * 8);
            let entry = Layout::entry(layout.data_cluster(number));
            BigEndian::write_u64(bytes.get_mut(start..start + 8).unwrap_or_default(), entry);
        }
        let host = layout.l2_table(table_number);
        copier.write(&bytes, host.0 + first % entries * 8)?;
        if table_number == slice.first_table && slice.shares_first_table {
            continue;
        }
        let index = first / entries;
        if l1_bytes.is_empty() {
            l1_start = index;
        }
        let place = to_usize((index - l1_start) * 8);
        l1_bytes.resize(place + 8, 0);
        BigEndian::write_u64(l1_bytes.get_mut(place..).unwrap_or_default(), Layout::entry(host));
    }
    copier.write(&l1_bytes, layout.l1_entry(l1_start).0)
}
