//! The differential test: a merged restore point is, byte for byte, what QEMU makes of the chain.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::support::merge::Wanted;
use crate::support::oracle::{Oracle, convert};
use crate::support::prng::Prng;
use crate::support::random_chain::Chain;
use crate::support::seeds::{Told, shared_seeds};
use crate::support::{sparse, tools};

fn merged_restore_points_are_what_qemu_makes_of_them(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let prng = &mut Prng::stream(seed, 1);
    let before = sparse::fingerprints(&chain.target());
    let oracle = Oracle::new(&chain);

    // The newest one, and one or two others
    let last = chain.layers.len() - 1;
    let others = (0..2).map(|_| usize::try_from(prng.below(last as u64 + 1)).unwrap());
    let points: BTreeSet<usize> = others.chain([last]).collect();
    for number in points {
        merged_is_right(&chain, number, &Wanted::draw(prng), &oracle.raw(&chain, number));
    }
    assert_eq!(sparse::fingerprints(&chain.target()), before, "the merge changed the backups");
}

fn merged_is_right(chain: &Chain, number: usize, wanted: &Wanted, expected: &Path) {
    let point = &chain.layers[number].point;
    let what = format!("{point} as {wanted:?}");
    let room = chain.room("merged");
    let out = wanted.merge(&chain.dir, point, &room, "by one thread", 1);
    let again = wanted.merge(&chain.dir, point, &room, "by four threads", 4);
    sparse::assert_same(&again, &out, &format!("{what}: with four threads instead of one"));
    assert_eq!(sparse::fingerprints(&room).len(), 2, "{what}: more is left than the two outputs");

    if wanted.raw {
        sparse::assert_same(&out, expected, &what);
    } else {
        tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(&out));
        let full = &chain.until(number)[0].knobs;
        assert_plain(&out, wanted.cluster_size.unwrap_or(full.cluster_size()), &what);
        let raw = room.join("raw");
        convert(&out, &raw);
        sparse::assert_same(&raw, expected, &what);
    }
    std::fs::remove_dir_all(&room).unwrap();
}

/// A healthy image of version 3 that stands alone.
fn assert_plain(qcow2: &Path, cluster_size: u64, what: &str) {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(qcow2));
    let info: Value = serde_json::from_str(&info).unwrap();
    let specific = &info["format-specific"]["data"];
    assert_eq!(specific["compat"], "1.1", "{what}: {info:#}");
    assert_eq!(specific["corrupt"], false, "{what}: {info:#}");
    assert_eq!(info["dirty-flag"], false, "{what}: {info:#}");
    assert_eq!(info["cluster-size"], cluster_size, "{what}: {info:#}");
    assert_eq!(info["backing-filename"], Value::Null, "{what}: {info:#}");
}

shared_seeds! {
    merged_restore_points_are_what_qemu_makes_of_them, 40;
    first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
}
