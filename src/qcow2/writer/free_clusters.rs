//! Free clusters for what is written beside the old, without a change to anything that the image has.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::qcow2::address::HostOffset;
use crate::qcow2::check::{Report, Stored};
use crate::qcow2::error::Result;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, Table};
use crate::storage::{Storage, to_usize};

/// Gives clusters away, in order. What was not given away is as free as before.
pub(in crate::qcow2) struct FreeClusters<'a> {
    geometry: Geometry,
    /// Refcounts in a block.
    unit: u64,
    /// Refcounts of the image; none where they are not to be believed.
    stored: Option<Stored<'a>>,
    /// Clusters that are in use, whatever refcounts say.
    used: BTreeSet<u64>,
    /// Whether clusters are free, those of one block.
    known: (u64, Vec<bool>),
    next: u64,
    /// Taken behind `next`.
    runs: Vec<Range<u64>>,
    /// Behind all that was taken.
    end: u64,
    /// Refcount blocks that are needed for what was taken.
    blocks: BTreeSet<u64>,
}

impl<'a> FreeClusters<'a> {
    /// Clusters with refcount zero, behind the end of the file too, but for some that are known to be in use.
    pub(in crate::qcow2) fn by_refcounts(
        storage: &'a dyn Storage,
        header: &Header,
        used: BTreeSet<u64>,
    ) -> Result<Self> {
        // damaged entries give no free clusters
        let stored = Stored::read(storage, header, &mut Report::default())?;
        Ok(Self { stored: Some(stored), used, next: 1, ..Self::behind_end(storage, header) })
    }

    /// Clusters behind the end of the file.
    pub(in crate::qcow2) fn behind_end(storage: &dyn Storage, header: &Header) -> Self {
        let geometry = header.geometry;
        Self {
            geometry,
            unit: header.refcounts_per_block(),
            stored: None,
            used: BTreeSet::new(),
            known: (0, Vec::new()),
            next: geometry.clusters(storage.length()),
            runs: Vec::new(),
            end: 0,
            blocks: BTreeSet::new(),
        }
    }

    /// Takes one cluster.
    pub(in crate::qcow2) fn take(&mut self) -> Result<HostOffset> {
        while !self.is_free(self.next)? {
            self.next += 1;
        }
        let cluster = self.next;
        self.next += 1;
        self.note(cluster..cluster + 1);
        Ok(HostOffset(cluster << self.geometry.cluster_bits()))
    }

    /// Takes clusters that follow each other, enough for so many bytes.
    pub(in crate::qcow2) fn take_run(&mut self, bytes: u64) -> Result<HostOffset> {
        let count = self.geometry.clusters(bytes).max(1);
        let (mut first, mut end) = (self.next, self.next);
        while end - first < count {
            if !self.is_free(end)? {
                first = end + 1;
            }
            end += 1;
        }
        self.runs.push(first..end);
        self.note(first..end);
        Ok(HostOffset(first << self.geometry.cluster_bits()))
    }

    /// Takes clusters for an L1 table of the disk with this header; one without entries stays where it is.
    pub(in crate::qcow2) fn take_l1(&mut self, header: &Header, entries: usize) -> Result<Table> {
        let entries = entries as u64;
        let offset = if entries == 0 { header.l1_table.offset } else { self.take_run(entries * 8)? };
        Ok(Table { offset, entries })
    }

    /// Behind all that was taken, in bytes.
    pub(in crate::qcow2) fn end(&self) -> u64 {
        self.end << self.geometry.cluster_bits()
    }

    /// The indices of the refcount blocks that are needed for what was taken.
    pub(in crate::qcow2) fn blocks(&self) -> &BTreeSet<u64> {
        &self.blocks
    }

    fn note(&mut self, clusters: Range<u64>) {
        self.end = self.end.max(clusters.end);
        self.blocks.extend(clusters.start / self.unit..clusters.end.div_ceil(self.unit));
    }

    fn is_free(&mut self, cluster: u64) -> Result<bool> {
        if self.used.contains(&cluster) || self.runs.iter().any(|run| run.contains(&cluster)) {
            return Ok(false);
        }
        let Some(stored) = &self.stored else { return Ok(true) };
        let (index, place) = (cluster / self.unit, to_usize(cluster % self.unit));
        if self.known.0 != index || self.known.1.is_empty() {
            let mut free = Vec::with_capacity(to_usize(self.unit));
            stored.runs(index * self.unit..(index + 1) * self.unit, &mut |run, refcount| {
                free.extend(run.map(|_| refcount == Some(0)));
                Ok(())
            })?;
            self.known = (index, free);
        }
        Ok(self.known.1.get(place).copied().unwrap_or_default())
    }
}
