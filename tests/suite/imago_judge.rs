//! A second judge: imago reads qcow2 with code that has nothing to do with QEMU's.
//!
//! imago 0.2 refuses what needs an incompatible feature bit that it does not know: zstd (`compression_type`), extended
//! L2 entries, and images whose dirty bit a killed writer left behind. Such images are left to QEMU; every other kind is read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use crate::support::layer::Knobs;
use crate::support::merge::Wanted;
use crate::support::oracle::{Oracle, convert};
use crate::support::random_chain::Chain;
use crate::support::seeds::{Told, shared_seeds};
use crate::support::sparse;

const CHUNK: u64 = 1 << 20;
/// The compression type bit and that of extended L2 entries, which a merged image may take over from its FULL.
const UNKNOWN_TO_IMAGO: u64 = 0b1_1000;

/// Panics unless imago reads from the image what the raw file has.
pub(crate) fn assert_reads_as(qcow2: &Path, raw: &Path) {
    let storage = imago::StorageOpenOptions::new().filename(qcow2);
    let storage = <ImagoFile as imago::Storage>::open(storage).unwrap();
    // Opened by hand, so that the gate can be shut: a standalone image has nothing to ask it for
    let image = Qcow2::<ImagoFile>::builder(storage).open(DenyImplicitOpenGate::default());
    let image = FormatAccess::new(image.unwrap_or_else(|error| panic!("imago on {}: {error}", qcow2.display())));
    let raw = File::open(raw).unwrap();
    let size = raw.metadata().unwrap().len();
    assert_eq!(image.size(), size, "the size of {} by imago", qcow2.display());

    let (mut is, mut should_be) = (Vec::new(), Vec::new());
    for start in (0..size).step_by(usize::try_from(CHUNK).unwrap()) {
        let len = usize::try_from(CHUNK.min(size - start)).unwrap();
        is.resize(len, 0);
        should_be.resize(len, 0);
        image.read(&mut is[..], start).unwrap_or_else(|error| panic!("imago on {}: {error}", qcow2.display()));
        raw.read_exact_at(&mut should_be, start).unwrap();
        let difference = sparse::difference(&is, &should_be).map(|at| start + at);
        assert_eq!(difference, None, "imago reads {} differently here", qcow2.display());
    }
}

fn incompatible_features(version_3: &Path) -> u64 {
    let mut field = [0; 8];
    File::open(version_3).unwrap().read_exact_at(&mut field, 72).unwrap();
    u64::from_be_bytes(field)
}

fn can_read(knobs: &Knobs) -> bool {
    let dirty = knobs.killed && knobs.lazy_refcounts;
    !(knobs.zstd || knobs.extended_l2 || dirty)
}

fn imago_agrees_with_qemu(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let raw = chain.room("alone").join("alone.raw");
    for layer in chain.layers.iter().filter(|layer| can_read(&layer.knobs)) {
        let image = chain.dir.join(&layer.name);
        convert(&image, &raw);
        assert_reads_as(&image, &raw);
    }
}

mod imago_reads_single_layers_as_qemu_does {
    super::shared_seeds! {
        super::imago_agrees_with_qemu, 24;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}

/// Whatever the layers are, the merged image is one that imago can read.
fn imago_reads_the_merged_image_as_qemu_reads_the_chain(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let oracle = Oracle::new(&chain);
    let last = chain.layers.len() - 1;
    let (point, room) = (&chain.layers[last].point, chain.room("merged"));
    let raw = oracle.raw(&chain, last);
    for compress in [None, Some("--compress=zlib")] {
        let wanted = Wanted { compress, ..Wanted::default() };
        let merged = wanted.merge(&chain.dir, point, &room, &format!("{compress:?}"), 2);
        if incompatible_features(&merged) & UNKNOWN_TO_IMAGO == 0 {
            assert_reads_as(&merged, &raw);
        }
    }
}

mod imago_reads_merged_images {
    super::shared_seeds! {
        super::imago_reads_the_merged_image_as_qemu_reads_the_chain, 16;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}
