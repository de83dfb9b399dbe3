//! A compressed qcow2 image: clusters are compressed in parallel and placed in guest order.
//!
//! A cluster that is compressed in its layer already, with the codec and the cluster size of the output, is passed
//! through as it is, but not unseen: damage is to be found now and not at the next restore, see [`PassThrough`].

use std::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use super::PART;
use super::passthrough::{PassThrough, Stream};
use crate::qcow2::{ClusterReader, Deflater, HostOffset, Layout, MapBuffer, Packer, ZERO_CLUSTER};
use crate::restore::copier::{Copier, LayerReader, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::merge::output::Target;
use crate::restore::plan::{self, Operation, Origin, Plan};
use crate::restore::pool;
use crate::restore::resolve::{Piece, resolve, within};
use crate::restore::slices;
use crate::storage::to_usize;

/// Writes the image; the length of the file comes back.
pub(in crate::restore) fn write_compressed(
    work: &Transfer<'_>,
    plan: &Plan,
    layout: &Layout,
    trust_streams: bool,
    target: Target<'_>,
) -> Result<u64> {
    let of = |layer| if trust_streams { PassThrough::Trusted } else { PassThrough::of(layer) };
    let passed: Vec<PassThrough> = work.layers.iter().map(of).collect();
    let maker = || Maker::new(work, layout, &passed);
    let mut writer = Writer::new(plan, layout, Copier::new(work, target.path, target.file))?;
    let unit = PART.max(layout.geometry().cluster_size());
    let parts = plan.slices.iter().flat_map(|slice| slices::parts(slice.guest.clone(), unit));
    pool::in_order(parts, maker, Maker::make, |part| writer.take(&part))?;
    let length = writer.finish()?;
    target.set_len(length)?;
    Ok(length)
}

/// The clusters of a part of the disk, ready to be placed.
#[derive(Debug, Default)]
struct Part {
    clusters: Vec<(u64, Stored)>,
    bytes: Vec<u8>,
}

/// How a cluster is stored; ranges are in the bytes of the part.
#[derive(Debug)]
enum Stored {
    Zero,
    Plain(Range<usize>),
    Compressed(Range<usize>),
}

/// Makes parts; one for each thread.
struct Maker<'a> {
    work: &'a Transfer<'a>,
    layout: &'a Layout,
    /// What the compressed clusters of each layer are held against.
    passed: &'a [PassThrough],
    buffer: MapBuffer,
    reader: LayerReader,
    clusters: ClusterReader,
    deflater: Deflater,
    cluster: Vec<u8>,
}

impl<'a> Maker<'a> {
    fn new(work: &'a Transfer<'a>, layout: &'a Layout, passed: &'a [PassThrough]) -> Self {
        let cluster_size = layout.geometry().cluster_size();
        Self {
            work,
            layout,
            passed,
            buffer: MapBuffer::default(),
            reader: LayerReader::default(),
            clusters: ClusterReader::default(),
            deflater: Deflater::new(layout.codec(), cluster_size),
            cluster: vec![0; to_usize(cluster_size)],
        }
    }

    fn make(&mut self, guest: Range<u64>) -> Result<Part> {
        let pieces = resolve(self.work.layers, guest, &mut self.buffer)?;
        let bits = self.layout.geometry().cluster_bits();
        let mut part = Part::default();
        for cluster in plan::touched(&pieces, self.layout.geometry()) {
            let range = cluster << bits..(cluster + 1) << bits;
            let inside: Vec<Piece> = within(&pieces, &range).collect();
            let length = inside.iter().map(|piece| piece.guest.end - piece.guest.start).sum();
            self.work.pace(length)?;
            let stored = if let Some(stored) = self.pass_through(&inside, &range, &mut part.bytes)? {
                stored
            } else {
                self.read(inside, range.start)?;
                self.store(&mut part.bytes)
            };
            part.clusters.push((cluster, stored));
            self.work.observer.advance(length);
        }
        Ok(part)
    }

    /// Fills the cluster buffer; what no piece covers is zero.
    fn read(&mut self, pieces: Vec<Piece>, start: u64) -> Result<()> {
        self.cluster.fill(0);
        for operation in self.work.operations(pieces, |guest| guest - start) {
            let Operation { target, length, .. } = operation;
            let place = self.cluster.get_mut(to_usize(target)..to_usize(target + length)).ok_or(Error::Changed)?;
            self.reader.read(self.work.layers, &operation, 0, place)?;
        }
        Ok(())
    }

    /// Appends the bytes of the cluster buffer, compressed if that makes them less.
    fn store(&mut self, bytes: &mut Vec<u8>) -> Stored {
        let start = bytes.len();
        if self.cluster.iter().all(|byte| *byte == 0) {
            return Stored::Zero;
        }
        if let Some(compressed) = self.deflater.deflate(&self.cluster) {
            bytes.extend_from_slice(compressed);
            return Stored::Compressed(start..bytes.len());
        }
        bytes.extend_from_slice(&self.cluster);
        Stored::Plain(start..bytes.len())
    }

    /// Appends the compressed bytes of a layer, where one cluster of it is just what is wanted.
    fn pass_through(&mut self, inside: &[Piece], range: &Range<u64>, bytes: &mut Vec<u8>) -> Result<Option<Stored>> {
        let [piece] = inside else { return Ok(None) };
        let mut layers = self.work.layers.iter().zip(self.passed);
        let Some((layer, passed)) = layers.nth(piece.layer) else { return Ok(None) };
        let Some(image) = layer.image() else { return Ok(None) };
        // its bytes may have to be replaced by older ones
        if layer.tolerance().is_some() {
            return Ok(None);
        }
        let header = image.header();
        let fits = header.codec == self.layout.codec()
            && header.geometry.cluster_size() == self.layout.geometry().cluster_size()
            && piece.guest == *range;
        let Origin::Compressed { cluster, data, .. } = Origin::of(piece) else { return Ok(None) };
        let length = image.storage().length().saturating_sub(data.host.0).min(data.length);
        // the length is one of whole sectors: with what lies behind a stream it may be more than the plan has room for
        if !fits || length >= header.geometry.cluster_size() {
            return Ok(None);
        }
        let start = bytes.len();
        passed.read(layer, image, &Stream { cluster, data, length }, &mut self.clusters, bytes)?;
        Ok(Some(Stored::Compressed(start..bytes.len())))
    }
}

/// Places parts in order and writes them with their tables.
struct Writer<'a> {
    plan: &'a Plan,
    layout: &'a Layout,
    copier: Copier<'a>,
    packer: Packer<'a>,
    /// The L1 index of the table that is being filled.
    l1_index: Option<u64>,
    table: Vec<u8>,
    tables: u64,
    clusters: u64,
    /// Where the bytes begin that the kernel was not told to write yet, and where they end.
    behind: Range<u64>,
}

impl<'a> Writer<'a> {
    /// Bytes that the kernel is told of at once.
    const WRITEBACK: u64 = 8 << 20;

    fn new(plan: &'a Plan, layout: &'a Layout, copier: Copier<'a>) -> Result<Self> {
        let packer = Packer::new(layout, |host, bytes| copier.write(bytes, host.0))?;
        let table = vec![0; to_usize(layout.geometry().cluster_size())];
        copier.write(&layout.header(), 0)?;
        Ok(Self { plan, layout, copier, packer, l1_index: None, table, tables: 0, clusters: 0, behind: 0..0 })
    }

    fn take(&mut self, part: &Part) -> Result<()> {
        self.clusters += part.clusters.len() as u64;
        if self.clusters > self.plan.clusters {
            return Err(Error::Changed);
        }
        for (cluster, stored) in &part.clusters {
            let entry = match stored {
                Stored::Zero => ZERO_CLUSTER,
                Stored::Plain(range) => {
                    let host = self.packer.plain();
                    self.gather(part.bytes.get(range.clone()).unwrap_or_default(), host.0)?;
                    Layout::entry(host)
                }
                Stored::Compressed(range) => {
                    let length = range.len() as u64;
                    let host = self.packer.compressed(length);
                    self.gather(part.bytes.get(range.clone()).unwrap_or_default(), host.0)?;
                    let entry = self.layout.compressed_entry(host, length);
                    entry.ok_or(Error::CompressedTooLarge { offset: host.0 + length })?
                }
            };
            self.enter(*cluster, entry)?;
        }
        if self.behind.end - self.behind.start >= Self::WRITEBACK {
            self.copier.flush()?;
            self.copier.start_writeback(self.behind.clone());
            self.behind.start = self.behind.end;
        }
        let Self { packer, copier, .. } = self;
        packer.settle(|host, bytes| copier.write(bytes, host.0))
    }

    /// Writes the bytes of a cluster.
    fn gather(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        if self.behind.is_empty() {
            self.behind = offset..offset;
        }
        // a compressed cluster may end in what was left free by earlier ones
        self.behind.end = self.behind.end.max(offset + bytes.len() as u64);
        self.copier.gather(bytes, offset)
    }

    fn enter(&mut self, cluster: u64, entry: u64) -> Result<()> {
        let entries = self.layout.geometry().l2_entries();
        if self.l1_index != Some(cluster / entries) {
            self.write_table()?;
            self.l1_index = Some(cluster / entries);
        }
        let place = to_usize(cluster % entries * 8);
        BigEndian::write_u64(self.table.get_mut(place..place + 8).unwrap_or_default(), entry);
        Ok(())
    }

    fn write_table(&mut self) -> Result<()> {
        let Some(index) = self.l1_index.take() else { return Ok(()) };
        if self.tables == self.plan.l2_tables {
            return Err(Error::Changed);
        }
        let host: HostOffset = self.layout.l2_table(self.tables);
        self.copier.write(&self.table, host.0)?;
        self.copier.write(&Layout::entry(host).to_be_bytes(), self.layout.l1_entry(index).0)?;
        self.table.fill(0);
        self.tables += 1;
        Ok(())
    }

    fn finish(mut self) -> Result<u64> {
        self.write_table()?;
        self.copier.flush()?;
        if (self.clusters, self.tables) != (self.plan.clusters, self.plan.l2_tables) {
            return Err(Error::Changed);
        }
        let Self { packer, copier, .. } = self;
        packer.finish(|host, bytes| copier.write(bytes, host.0))
    }
}
