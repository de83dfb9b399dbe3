//! Random disks, and random writes to them: which disk, where, how much, and what.

use super::history::{Kind, Write};
use super::spec::{Bus, DiskSpec, Format, Given};
use crate::support::prng::Prng;

/// Two or three disks of any kind. A bitmap can be persistent in some of them only.
pub(crate) fn draw_disks(prng: &mut Prng) -> Vec<DiskSpec> {
    (0..prng.between(2, 3)).map(|number| draw_disk(prng, number)).collect()
}

fn draw_disk(prng: &mut Prng, number: u64) -> DiskSpec {
    // At least as large as two of the largest clusters
    let size = 512 * prng.between(8 << 10, 16 << 10);
    let cluster_size = *prng.pick(&[4 << 10, 64 << 10, 64 << 10, 2 << 20]);
    let format = match prng.below(6) {
        0 => Format::Raw,
        1 => Format::OldQcow2 { cluster_size },
        _ => Format::Qcow2 { cluster_size },
    };
    let bus = *prng.pick(&[Bus::VirtioBlk, Bus::VirtioBlk, Bus::VirtioScsi, Bus::Ide]);
    let given = *prng.pick(&[Given::Drive, Given::Blockdev]);
    DiskSpec::new(&format!("disk{number}.img"), size).on(bus).given(given).format(format)
}

/// A write to any of the disks: small ones and large ones, some places more often than others.
pub(crate) fn draw_write(prng: &mut Prng, disks: &[DiskSpec]) -> Write {
    let disk = usize::try_from(prng.below(disks.len() as u64)).unwrap();
    let spec = &disks[disk];
    let kind = match prng.below(8) {
        0 => Kind::Zeroes,
        1 => Kind::Unmap,
        2 => Kind::Discard,
        _ => Kind::Fill(u8::try_from(prng.between(1, 255)).unwrap()),
    };
    let piece = if kind == Kind::Discard { spec.discards() } else { 512 };
    let longest = if prng.one_in(6) { 512 << 10 } else { 64 << 10 };
    let pieces = spec.size / piece;
    let length = prng.between(1, (longest / piece).clamp(1, pieces));
    let last = if prng.one_in(2) { pieces - length } else { (pieces - length) / 4 };
    Write { disk, offset: piece * prng.between(0, last), length: piece * length, kind }
}
