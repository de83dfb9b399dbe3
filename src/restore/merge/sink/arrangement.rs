//! The order of the data of an image that shares its blocks with its layers: that of the layers' files, one layer after the
//! other.
//!
//! Sharing takes the file system a step for each run of blocks, however long that is, and all steps wait for one lock: 16 µs on
//! XFS. What lies together in the file of an INC is in many places of the disk, so in the order of the disk each cluster may be
//! a run of its own. A FULL of 1.2 GB with ten INCs of 60 MB has 2,700 runs in that order, and 1,700 in this one.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::qcow2::{HostOffset, Layout, MapBuffer};
use crate::restore::copier::{Copier, Holes, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::merge::output::Target;
use crate::restore::plan::{self, Plan, PlannedSlice};
use crate::restore::pool;
use crate::restore::resolve::{Bytes, Piece, resolve};
use crate::storage::{shares_blocks, to_usize};

/// The most runs that are kept in memory, 8 MiB of them; an image with more is laid out in the order of the disk.
const RUNS: usize = 1 << 18;

/// The most runs that a thread copies at once, and about the most bytes: they may have to be copied after all.
const AT_ONCE: (usize, u64) = (256, 64 << 20);

/// Blocks that file systems share are not smaller.
const BLOCK: u64 = 4096;

/// Whole clusters that lie together on the disk and in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    guest: u64,
    host: u64,
    layer: u32,
    /// Bytes; of the last cluster of the disk perhaps not all.
    length: u32,
    /// The number of its first data cluster in the new image.
    number: u64,
}

/// Where each cluster of the disk goes.
#[derive(Debug)]
pub(super) struct Arrangement {
    /// In the order of the layers, which is that of their numbers.
    runs: Vec<Run>,
}

/// The same, to look places of the disk up.
#[derive(Debug)]
pub(super) struct Places {
    /// In the order of the disk.
    runs: Vec<Run>,
}

impl Arrangement {
    /// The arrangement for an output, where its file system can share blocks of all layers, and what is read are whole clusters
    /// of the new image.
    pub(super) fn of(work: &Transfer<'_>, plan: &Plan, layout: &Layout, target: Target<'_>) -> Result<Option<Self>> {
        let shares = |file| shares_blocks(file, target.file);
        let is_shared = work.layers.iter().all(|layer| layer.tolerance().is_none() && layer.file().is_some_and(shares));
        if is_shared && work.holes != Holes::Made && layout.geometry().cluster_size() >= BLOCK {
            Self::new(work, plan, layout)
        } else {
            Ok(None)
        }
    }

    fn new(work: &Transfer<'_>, plan: &Plan, layout: &Layout) -> Result<Option<Self>> {
        let number = AtomicUsize::new(0);
        let runs = pool::map(plan.slices.iter(), MapBuffer::default, |buffer, slice| {
            if number.load(Ordering::Relaxed) > RUNS {
                return Ok(Vec::new());
            }
            work.pace(0)?;
            let pieces = resolve(work.layers, slice.guest.clone(), buffer)?;
            let runs: Option<Vec<Run>> = pieces.iter().map(|piece| Run::of(piece, plan, layout)).collect();
            number.fetch_add(runs.as_ref().map_or(RUNS + 1, Vec::len), Ordering::Relaxed);
            let mut runs = runs.unwrap_or_default();
            runs.shrink_to_fit();
            Ok::<_, Error>(runs)
        })?;
        if number.into_inner() > RUNS {
            return Ok(None);
        }
        let mut runs = runs.concat();
        runs.sort_unstable_by_key(|run| (run.layer, run.host, run.guest));
        let mut clusters = 0;
        for run in &mut runs {
            run.number = clusters;
            clusters += layout.geometry().clusters(run.length.into());
        }
        if clusters != plan.clusters {
            return Err(Error::Changed);
        }
        Ok(Some(Self { runs }))
    }

    /// Copies the data.
    pub(super) fn copy(&self, work: &Transfer<'_>, layout: &Layout, target: Target<'_>) -> Result<()> {
        let copier = || Copier::new(work, target.path, target.file);
        pool::for_each(parts(&self.runs), copier, |copier, runs| {
            let mut targets = runs.iter().map(|run| layout.data_cluster(run.number).0);
            // each piece is asked for once
            let place = |_| targets.next().unwrap_or(u64::MAX);
            copier.copy(&plan::operations(runs.iter().map(Run::piece).collect(), place))
        })
    }

    /// For the tables.
    pub(super) fn into_places(self) -> Places {
        let Self { mut runs } = self;
        runs.sort_unstable_by_key(|run| run.guest);
        Places { runs }
    }
}

impl Places {
    /// The clusters of the disk in a slice, and the numbers of their data clusters.
    pub(super) fn clusters(&self, slice: &PlannedSlice, layout: &Layout) -> (Vec<u64>, Vec<u64>) {
        let geometry = layout.geometry();
        let first = self.runs.partition_point(|run| run.guest < slice.guest.start);
        let runs = self.runs.iter().skip(first).take_while(|run| run.guest < slice.guest.end);
        let each = |run: &Run| {
            let clusters = geometry.clusters(run.length.into());
            let (guest, number) = (run.guest >> geometry.cluster_bits(), run.number);
            (0..clusters).map(move |index| (guest + index, number + index))
        };
        runs.flat_map(each).unzip()
    }
}

/// The runs that are copied at once, in order.
fn parts(mut runs: &[Run]) -> impl Iterator<Item = &[Run]> + Send {
    std::iter::from_fn(move || {
        let (most, mut bytes) = AT_ONCE;
        let fits = |run: &&Run| {
            let fits = bytes > 0;
            bytes = bytes.saturating_sub(run.length.into());
            fits
        };
        let (part, rest) = runs.split_at_checked(runs.iter().take(most).take_while(fits).count())?;
        runs = rest;
        (!part.is_empty()).then_some(part)
    })
}

impl Run {
    fn of(piece: &Piece, plan: &Plan, layout: &Layout) -> Option<Self> {
        let geometry = layout.geometry();
        let Bytes::Plain(host) = piece.bytes else { return None };
        let is_whole = |guest| geometry.offset_in_cluster(guest) == 0;
        (is_whole(piece.guest.start) && (is_whole(piece.guest.end) || piece.guest.end == plan.size)).then_some(Self {
            guest: piece.guest.start,
            host: host.0,
            layer: u32::try_from(piece.layer).ok()?,
            length: u32::try_from(piece.guest.end - piece.guest.start).ok()?,
            number: 0,
        })
    }

    fn piece(&self) -> Piece {
        Piece {
            guest: self.guest..self.guest + u64::from(self.length),
            layer: to_usize(self.layer.into()),
            bytes: Bytes::Plain(HostOffset(self.host)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::qcow2::{CompressionType, Geometry, GuestOffset, Image, Reader, RefcountWriter, Writer, check};
    use crate::restore::layer::{Format, Layer};
    use crate::restore::merge::sink::qcow2::{write_arranged, write_qcow2};
    use crate::restore::{Layers, Silent};
    use crate::storage::{FileStorage, MemoryStorage, WritableStorage};

    const CLUSTER: u64 = 4096;
    /// Two slices and a half, and the last cluster is not whole.
    const SIZE: u64 = (20 << 20) - 1024;

    fn geometry() -> Geometry {
        Geometry::new(12, false).unwrap()
    }

    /// An image in which clusters were written in this order.
    fn image(written: &[u64], byte: u8) -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::default());
        let layout = Layout::new(geometry(), SIZE, CompressionType::Deflate, 0, 0).unwrap();
        storage.set_length(layout.length()).unwrap();
        let mut write = |host: HostOffset, bytes: &[u8]| storage.write_all_at(bytes, host.0);
        write(HostOffset(0), &layout.header()).unwrap();
        RefcountWriter::new(&layout, &mut write).unwrap().finish(&mut write).unwrap();
        let mut writer = Writer::open(storage.clone()).unwrap();
        for cluster in written {
            let length = CLUSTER.min(SIZE - cluster * CLUSTER);
            writer.write(&vec![byte; to_usize(length)], GuestOffset(cluster * CLUSTER)).unwrap();
        }
        writer.finish().unwrap();
        storage
    }

    fn disk(path: &Path) -> Vec<u8> {
        let storage = Arc::new(FileStorage::open(path).unwrap());
        let report = check(&*storage, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        assert!(report.findings.is_empty(), "{report:?}");
        let image = Image::open(storage).unwrap();
        let mut disk = vec![0; to_usize(SIZE)];
        Reader::new(&image).read(&mut disk, GuestOffset(0)).unwrap();
        disk
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        #[test]
        fn an_image_in_the_order_of_its_layers_is_the_same_disk(
            writes in prop::collection::vec(prop::collection::vec((0..SIZE.div_ceil(CLUSTER), 1u64..40), 0..30), 1..4),
        ) {
            let ends = |(start, length): &(u64, u64)| *start..(start + length).min(SIZE.div_ceil(CLUSTER));
            let images = writes.iter().zip(1..).map(|(writes, byte)| {
                let storage = image(&writes.iter().flat_map(ends).collect::<Vec<_>>(), byte);
                Layer::new("image".into(), storage, Format::Qcow2).unwrap()
            });
            let layers = Layers::of(images.collect());
            let work = Transfer { layers: layers.as_slice(), limiter: None, observer: &Silent, holes: Holes::None };
            let plan = Plan::new(&layers, geometry(), &Silent).unwrap();
            let layout = Layout::new(geometry(), SIZE, CompressionType::Deflate, plan.l2_tables, plan.clusters).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let paths = ["usual", "arranged"].map(|name| folder.path().join(name));
            let files = paths.each_ref().map(|path| std::fs::File::create_new(path).unwrap());
            let [usual, arranged] = [0, 1].map(|index| Target { path: &paths[index], file: &files[index] });
            write_qcow2(&work, &plan, &layout, usual).unwrap();
            // header and refcounts do not depend on the order, the others are to be written
            std::fs::copy(&paths[0], &paths[1]).unwrap();
            files[1].set_len(layout.l1_entry(0).0).unwrap();
            files[1].set_len(layout.length()).unwrap();
            let arrangement = Arrangement::new(&work, &plan, &layout).unwrap().unwrap();
            let runs = arrangement.runs.clone();
            write_arranged(&work, &plan, &layout, arranged, arrangement).unwrap();
            let mut expected = vec![0; to_usize(SIZE)];
            for (writes, byte) in writes.iter().zip(1..) {
                for cluster in writes.iter().flat_map(ends) {
                    let end = to_usize((cluster + 1) * CLUSTER).min(expected.len());
                    expected[to_usize(cluster * CLUSTER)..end].fill(byte);
                }
            }
            prop_assert!(disk(&paths[0]) == expected);
            prop_assert!(disk(&paths[1]) == expected);

            let mut next = 0;
            for run in &runs {
                prop_assert_eq!(run.number, next);
                next += geometry().clusters(run.length.into());
            }
            prop_assert_eq!(next, plan.clusters);
            prop_assert!(runs.is_sorted_by_key(|run| (run.layer, run.host)));
            prop_assert!(parts(&runs).eq(runs.chunks(AT_ONCE.0)));
        }
    }

    #[test]
    fn no_thread_gets_much_more_than_the_others() {
        let run = |length| Run { guest: 0, host: 0, layer: 0, length, number: 0 };
        let runs = [128 << 20, 63 << 20, 1 << 20, 4096, 32 << 20, 128 << 20, 4096].map(run);
        let lengths = |part: &[Run]| part.iter().map(|run| run.length >> 20).collect::<Vec<_>>();
        assert_eq!(parts(&runs).map(lengths).collect::<Vec<_>>(), [&[128][..], &[63, 1], &[0, 32, 128], &[0]]);
        assert_eq!(parts(&[]).count(), 0);
    }

    #[test]
    fn clusters_that_are_not_whole_keep_the_order_of_the_disk() {
        let layers = Layers::of(vec![Layer::new("image".into(), image(&[3], 1), Format::Qcow2).unwrap()]);
        let work = Transfer { layers: layers.as_slice(), limiter: None, observer: &Silent, holes: Holes::None };
        for (bits, is_arranged) in [(12, true), (11, true), (13, false)] {
            let geometry = Geometry::new(bits, false).unwrap();
            let plan = Plan::new(&layers, geometry, &Silent).unwrap();
            let layout = Layout::new(geometry, SIZE, CompressionType::Deflate, plan.l2_tables, plan.clusters).unwrap();
            assert_eq!(Arrangement::new(&work, &plan, &layout).unwrap().is_some(), is_arranged, "{bits}");
        }
    }
}
