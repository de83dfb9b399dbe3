//! Changes an image in place: see [`Writer`].

mod allocate;
mod backing;
mod bitmap_bits;
mod bitmaps;
mod compress;
mod dirty;
mod free_clusters;
mod head;
mod new_snapshot;
mod read;
mod rebuild;
mod refcounts;
mod resize;
mod rewrite;
mod snapshots;
mod tables;
mod zero;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use self::allocate::Place;
pub(crate) use self::backing::plan_backing;
pub use self::backing::set_backing;
use self::bitmaps::Bitmaps;
pub(super) use self::free_clusters::FreeClusters;
pub(super) use self::head::Head;
pub(super) use self::rebuild::{Next, Rebuild, share};
use self::refcounts::Refcounts;
pub(super) use self::refcounts::{clusters_of, write};
use self::tables::Tables;
use super::address::{GuestOffset, HostOffset};
use super::codec::Deflater;
use super::entry::{EntryRules, L2Entry};
use super::error::{Error, Invalid, Result};
use super::features::Features;
use super::header::Header;
use super::image::Image;
use super::reader::ClusterReader;
use crate::storage::WritableStorage;

/// An image that is being changed in place, in an order that no crash can harm.
///
/// ```text
/// 1  data and new L2 tables into clusters that are free, refcounts that rise, new refcount blocks       sync
/// 2  what leads to new refcount blocks: entries of the refcount table, or the header to a longer table  sync
/// 3  what leads to new clusters: entries of L1 and L2 tables                                            sync
/// 4  refcounts that fall
/// ```
///
/// Until step 3, nothing in the image leads to what was written; a cluster is free again only when nothing in the image
/// leads to it any more. So a crash between any two writes, or one that kept some of the writes since the last sync and lost
/// others, leaves an image in which at most clusters are leaked. [`Writer::flush`] does these steps for all that
/// was asked since the one before. A cluster that belongs to the active disk alone is overwritten where it is, as a disk
/// would do it: what was written to it since the last flush may be there or not, sector by sector.
///
/// Extensions of the header and the backing file name are changed at once: see [`set_backing`].
///
/// What cannot be cut into such steps is written beside the old and becomes true by one write of the header's
/// sector: snapshots, repairs, a longer L1 table.
///
/// After a write has failed, nothing more is written: the image is what a crash would have left.
///
/// Nothing is certain before [`Writer::flush`] or [`Writer::finish`]; a writer that is dropped leaves what a crash would.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use qmpbackup::qcow2::{GuestOffset, Writer};
/// use qmpbackup::restore::open_writable;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("disk.qcow2");
/// # std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/chain/disk0/FULL-1793588400-disk.qcow2"), &path)?;
/// // locked: QEMU does not open it meanwhile
/// let mut writer = Writer::open(open_writable(&path)?)?;
/// writer.create_snapshot("before", Duration::from_secs(1_793_588_400))?;
/// writer.write(b"hello", GuestOffset(1 << 20))?;
/// writer.discard(2 << 20..3 << 20)?;
/// writer.finish()?;
/// # Ok(())
/// # }
/// ```
pub struct Writer {
    storage: Arc<dyn WritableStorage>,
    head: Head,
    tables: Tables,
    refcounts: Refcounts,
    bitmaps: Bitmaps,
    /// Room behind the compressed cluster that was written last.
    open: Range<u64>,
    compressed: ClusterReader,
    deflater: Option<Deflater>,
    failed: bool,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("header", self.header()).finish_non_exhaustive()
    }
}

impl Writer {
    /// Bytes of tables in memory at which [`Writer::write`] and its like flush by themselves.
    const PENDING_MAX: u64 = 32 << 20;

    /// Opens an image, whose refcounts must be right: see [`check`](super::check()). Where they are not, guest data may
    /// come to harm, but neither the header nor a table of the active disk does.
    ///
    /// The caller has [locked](crate::storage::FileStorage::lock) it, and sees to its checksums, if it has some.
    ///
    /// # Errors
    /// What is wrong with the header or the tables; [`Error::SharedMetadata`]; [`Error::NotWritable`] where the image is dirty or marked as corrupt, or
    /// its data lies elsewhere.
    pub fn open(storage: Arc<dyn WritableStorage>) -> Result<Self> {
        let head = Head::read(&storage)?;
        let refuse = |reason| Err(Error::NotWritable { reason });
        if head.header().has_data_file() {
            return refuse("its data lies in another file");
        }
        if head.header().is_dirty() {
            return refuse("it was not closed, so that its refcounts may be wrong: repair it first");
        }
        if head.header().is_corrupt() {
            return refuse("some program marked it as corrupt: repair it first");
        }
        head.header().extensions.refused.clone().map_or(Ok(()), Err)?;
        // finds what is wrong with the L1 table
        Image::open(Arc::new(Arc::clone(&storage)))?;
        let tables = Tables::read(&storage, head.header())?;
        let mut refcounts = Refcounts::read(&storage, head.header())?;
        refcounts.guard("the L1 table", clusters_of(tables.l1_table(), head.header().geometry))?;
        refcounts.guard("an L2 table", tables.hosts())?;
        if refcounts.get(&storage, 0)? == 0 {
            return Err(Error::InUse { cluster: HostOffset(0) });
        }
        let bitmaps = Bitmaps::read(&storage, head.header())?;
        Ok(Self {
            storage,
            head,
            tables,
            refcounts,
            bitmaps,
            open: 0..0,
            compressed: ClusterReader::default(),
            deflater: None,
            failed: false,
        })
    }

    /// The header as it is in the image.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.head.header()
    }

    /// The file.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn WritableStorage> {
        &self.storage
    }

    /// Guest ranges outside of which nothing is allocated, as [`Image::occupied`] has them. All is flushed for that.
    pub(crate) fn occupied(&mut self) -> Result<Vec<Range<u64>>> {
        self.flush()?;
        Ok(Image::open(Arc::new(Arc::clone(&self.storage)))?.occupied())
    }

    /// Writes guest data.
    ///
    /// # Errors
    /// [`Error::BeyondDisk`]; [`Error::NeedsBacking`] where a part of a cluster is written whose rest is in a backing
    /// file; what is wrong with the image; what the system says.
    pub fn write(&mut self, bytes: &[u8], offset: GuestOffset) -> Result<()> {
        self.relieve()?;
        let end = self.end(offset, bytes.len() as u64)?;
        let mut places = Vec::new();
        self.allocate(offset.0..end, |place| places.push(place))?;
        for Place { guest, host } in places {
            let part = crate::storage::to_usize(guest.start - offset.0)..crate::storage::to_usize(guest.end - offset.0);
            let bytes = bytes.get(part).unwrap_or_default();
            self.guarded(|writer| write(&*writer.storage, "guest data", host.0, bytes))?;
        }
        Ok(())
    }

    /// Bytes of tables in memory that the image does not have yet.
    #[must_use]
    pub fn pending(&self) -> u64 {
        self.tables.pending() + self.refcounts.pending()
    }

    /// Brings all that was asked to stable storage, in the order that the [module](super) describes.
    ///
    /// # Errors
    /// What the system says.
    pub fn flush(&mut self) -> Result<()> {
        self.guarded(|writer| {
            let storage = &*writer.storage;
            writer.tables.write_fresh(storage)?;
            writer.refcounts.write_blocks(storage)?;
            sync(storage)?;
            if writer.refcounts.write_table(storage, &mut writer.head)? {
                sync(storage)?;
            }
            if writer.tables.write_links(storage)? {
                sync(storage)?;
            }
            writer.refcounts.settle(storage)
        })
    }

    /// Brings all to stable storage, also what bitmaps record and the refcounts that fell.
    ///
    /// # Errors
    /// What is wrong with the bitmaps; what the system says.
    pub fn finish(mut self) -> Result<()> {
        self.guarded(Self::store_bitmaps)?;
        self.flush()?;
        self.guarded(|writer| sync(&*writer.storage))
    }

    /// Lets nothing more be written: places that were given away did not get their bytes.
    pub(crate) fn fail(&mut self) {
        self.failed = true;
    }

    /// Does work that writes, unless some has failed before.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.failed {
            return Err(Error::Failed);
        }
        let result = work(self);
        self.failed = result.is_err();
        result
    }

    /// Flushes where much has gathered.
    fn relieve(&mut self) -> Result<()> {
        if self.pending() > Self::PENDING_MAX { self.flush() } else { Ok(()) }
    }

    /// The end of a guest range.
    fn end(&self, offset: GuestOffset, length: u64) -> Result<u64> {
        let size = self.header().size;
        let end = offset.0.checked_add(length).filter(|end| *end <= size);
        end.ok_or(Error::BeyondDisk { offset, length, size })
    }

    fn rules(&self) -> EntryRules {
        EntryRules::of(self.header())
    }

    /// The entry of a guest cluster, decoded.
    fn entry(&mut self, cluster: u64) -> Result<L2Entry> {
        let (value, bitmap) = self.tables.entry(&self.storage, cluster)?;
        let decoded = L2Entry::decode(value, bitmap, self.rules());
        let allowed = match decoded {
            Ok(entry) => match self.check_place(entry) {
                Ok(()) => return Ok(entry),
                Err(allowed) => allowed,
            },
            Err(allowed) => allowed,
        };
        let offset = self.tables.entry_offset(cluster);
        Err(Invalid { field: "L2 entry", offset, value, allowed }.into())
    }

    fn set_entry(&mut self, cluster: u64, entry: (u64, u64)) -> Result<()> {
        self.tables.set_entry(&self.storage, &mut self.refcounts, cluster, entry)
    }

    /// Gives the clusters back that an entry refers to.
    fn release(&mut self, entry: L2Entry) {
        let bits = self.header().geometry.cluster_bits();
        for cluster in self.host_clusters(entry) {
            if self.open.start >> bits == cluster {
                self.open = 0..0;
            }
            self.refcounts.release(cluster);
        }
    }

    /// The clusters that an entry refers to.
    fn host_clusters(&self, entry: L2Entry) -> Range<u64> {
        let (start, length) = match entry {
            L2Entry::Compressed(data) => (data.host, data.length),
            L2Entry::Data { host, .. }
            | L2Entry::Zero { host: Some(host), .. }
            | L2Entry::Subclusters { host: Some(host), .. } => (host, 1),
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } | L2Entry::Subclusters { host: None, .. } => {
                return 0..0;
            }
        };
        let geometry = self.header().geometry;
        start.0 >> geometry.cluster_bits()..geometry.clusters(start.0 + length)
    }

    /// Takes a free cluster.
    fn take(&mut self) -> Result<HostOffset> {
        let cluster = self.refcounts.take(&self.storage)?;
        Ok(HostOffset(cluster << self.header().geometry.cluster_bits()))
    }

    /// Clears the bits of what is not kept right here, as whoever changes an image must.
    fn clear_autoclear(&mut self) -> Result<()> {
        let autoclear = self.header().features.autoclear;
        if autoclear & !Features::BITMAPS == 0 {
            return Ok(());
        }
        self.head.update(&*self.storage, |raw| raw.autoclear_features = (autoclear & Features::BITMAPS).into())?;
        sync(&*self.storage)
    }
}

pub(super) fn sync(storage: &dyn WritableStorage) -> Result<()> {
    storage.sync().map_err(|source| Error::Sync { source })
}
