//! The header cluster of an image that is changed in place.

use zerocopy::{FromBytes, IntoBytes};

use super::rewrite::{self, Change, Edit};
use crate::qcow2::address::HostOffset;
use crate::qcow2::error::{Error, Result};
use crate::qcow2::header::{Header, read_cluster};
use crate::qcow2::wire::{self, RawBitmapsExtension, RawHeader};
use crate::storage::{Storage, WritableStorage, to_usize};

/// Sectors stay whole, whatever happens: what one write changes in one sector is changed at once.
pub(super) const SECTOR: usize = 512;

/// The header as it stands in the image.
#[derive(Debug)]
pub(in crate::qcow2) struct Head {
    header: Header,
    /// The first cluster, or as much of it as the file has.
    cluster: Vec<u8>,
}

/// The ways of the header cluster to what was asked: each but the last means what the one before meant.
#[derive(Debug)]
pub(super) struct HeaderUpdate(Vec<(Header, Vec<u8>)>);

impl Head {
    pub(in crate::qcow2) fn read(storage: &dyn Storage) -> Result<Self> {
        let header = Header::read(storage)?;
        let length = storage.length().min(header.geometry.cluster_size());
        let mut cluster = vec![0; to_usize(length)];
        let io = |source| Error::Io { what: "the header", offset: HostOffset(0), source };
        storage.read_exact_at(&mut cluster, 0).map_err(io)?;
        Ok(Self { header, cluster })
    }

    /// As [`read`](Self::read), also of an image without a refcount table: the first update must give it one.
    pub(in crate::qcow2) fn read_to_repair(storage: &dyn Storage) -> Result<Self> {
        let mut cluster = read_cluster(storage)?;
        let header = Header::parse_to_check(&mut cluster)?;
        Ok(Self { header, cluster })
    }

    pub(in crate::qcow2) fn header(&self) -> &Header {
        &self.header
    }

    /// What the header would say with other fields.
    pub(in crate::qcow2) fn preview(&self, edit: impl FnOnce(&mut RawHeader)) -> Result<Header> {
        let mut cluster = self.cluster.clone();
        edit_fields(&mut cluster, &self.header, edit);
        Header::parse(&cluster)
    }

    /// Changes fields, all at once: they are in one sector. The caller has synced what they lead to, and syncs.
    pub(in crate::qcow2) fn update(
        &mut self,
        storage: &dyn WritableStorage,
        edit: impl FnOnce(&mut RawHeader),
    ) -> Result<()> {
        let mut cluster = self.cluster.clone();
        edit_fields(&mut cluster, &self.header, edit);
        let header = Header::parse(&cluster)?;
        write_first_sector(storage, &cluster)?;
        self.header = header;
        self.cluster = cluster;
        Ok(())
    }

    /// Changes where the bitmap directory is, or that there is one, and syncs. The caller has synced what it leads to.
    pub(super) fn set_bitmaps(
        &mut self,
        storage: &dyn WritableStorage,
        new: Option<RawBitmapsExtension>,
    ) -> Result<()> {
        if let (Some(raw), Some(old)) = (&new, self.header.extensions.bitmaps) {
            // mostly what changes is in one sector, wherever that is
            let mut cluster = self.cluster.clone();
            let data = cluster.iter_mut().skip(to_usize(old.offset.0));
            data.zip(raw.as_bytes()).for_each(|(to, from)| *to = *from);
            let sectors = || (0..).step_by(SECTOR).zip(cluster.chunks(SECTOR).zip(self.cluster.chunks(SECTOR)));
            let mut changed = sectors().filter(|(_, (new, old))| new != old);
            if let (Some((offset, (sector, _))), None) = (changed.next(), changed.next()) {
                let header = Header::parse(&cluster)?;
                let io = |source| Error::Write { what: "the header", offset: HostOffset(offset), source };
                storage.write_all_at(sector, offset).map_err(io)?;
                super::sync(storage)?;
                self.header = header;
                self.cluster = cluster;
                return Ok(());
            }
        }
        let way = self.plan(&Change { bitmaps: Edit::Becomes(new), ..Change::default() })?;
        self.go(storage, way)
    }

    /// How extensions or the backing file name can be changed; nothing is written yet.
    pub(super) fn plan(&self, change: &Change<'_>) -> Result<HeaderUpdate> {
        let states = rewrite::plan(&self.header, &self.cluster, change)?;
        let parsed = states.into_iter().map(|cluster| Ok((Header::parse(&cluster)?, cluster)));
        Ok(HeaderUpdate(parsed.collect::<Result<_>>()?))
    }

    /// Goes a way that was planned, and syncs. The caller has synced what extensions lead to.
    pub(super) fn go(&mut self, storage: &dyn WritableStorage, way: HeaderUpdate) -> Result<()> {
        for (header, cluster) in way.0 {
            if let Some(range) = rewrite::changed_behind(&self.cluster, &cluster) {
                let offset = HostOffset(range.start as u64);
                let io = |source| Error::Write { what: "the header", offset, source };
                storage.write_all_at(cluster.get(range).unwrap_or_default(), offset.0).map_err(io)?;
                super::sync(storage)?;
            }
            write_first_sector(storage, &cluster)?;
            super::sync(storage)?;
            self.header = header;
            self.cluster = cluster;
        }
        Ok(())
    }
}

/// Changes fields in a cluster with this header.
pub(super) fn edit_fields(cluster: &mut [u8], header: &Header, edit: impl FnOnce(&mut RawHeader)) {
    // a header of version 2 ends before fields that are somebody else's
    let length = if header.version == 2 { wire::V2_HEADER_LENGTH } else { header.header_length };
    let known = to_usize(length).min(size_of::<RawHeader>());
    let mut bytes = [0; size_of::<RawHeader>()];
    bytes.iter_mut().zip(cluster.iter().take(known)).for_each(|(to, from)| *to = *from);
    let Ok(mut raw) = RawHeader::read_from_bytes(&bytes) else { return };
    edit(&mut raw);
    cluster.iter_mut().zip(raw.as_bytes().iter().take(known)).for_each(|(to, from)| *to = *from);
}

fn write_first_sector(storage: &dyn WritableStorage, cluster: &[u8]) -> Result<()> {
    let sector = cluster.get(..SECTOR.min(cluster.len())).unwrap_or_default();
    let io = |source| Error::Write { what: "the header", offset: HostOffset(0), source };
    storage.write_all_at(sector, 0).map_err(io)
}
