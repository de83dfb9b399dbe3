//! The differential test of a rebase: QEMU reads where the images lie what it reads of copies that it has rebased itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::merge::Wanted;
use crate::support::oracle::Oracle;
use crate::support::prng::Prng;
use crate::support::program::Ended;
use crate::support::random_chain::Chain;
use crate::support::seeds::{Told, shared_seeds};
use crate::support::{sparse, tools};

fn backing(image: &Path) -> (Value, Value) {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(image));
    let info: Value = serde_json::from_str(&info).unwrap();
    (info["backing-filename"].clone(), info["backing-filename-format"].clone())
}

/// What `qemu-img check` says of each image: what was killed has leaks and wrong refcounts.
fn checks(chain: &Chain) -> BTreeMap<String, String> {
    let check = |name: &String| {
        let mut check = tools::qemu_img();
        check.args(["check", "-f", "qcow2", "--output", "json"]).arg(chain.dir.join(name));
        String::from_utf8(tools::output(&mut check).stdout).unwrap()
    };
    chain.layers.iter().map(|layer| (layer.name.clone(), check(&layer.name))).collect()
}

fn rebase(chain: &Chain, number: usize) -> Ended {
    let dir = chain.dir.to_str().unwrap();
    Ended::run(["rebase", "--dir", dir, "--until", &chain.layers[number].point])
}

fn rebased_images_are_what_qemu_makes_of_them(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let prng = &mut Prng::stream(seed, 2);
    let oracle = Oracle::new(&chain);
    let before = checks(&chain);
    let last = chain.layers.len() - 1;
    let room = chain.room("read");
    let raw = room.join("raw");
    let points = BTreeSet::from([usize::try_from(prng.below(last as u64 + 1)).unwrap(), last]);
    for number in points {
        let link = chain.dir.join("image");
        if chain.layers[number].full {
            let bytes = sparse::fingerprints(&chain.target());
            rebase(&chain, number).with(2).says("nothing to rebase");
            assert_eq!(sparse::fingerprints(&chain.target()), bytes);
            continue;
        }
        rebase(&chain, number).with(0);
        assert_eq!(link.read_link().unwrap(), Path::new(&chain.layers[number].name));
        let members = chain.until(number);
        for (below, layer) in members.iter().zip(&members[1..]) {
            let ours = backing(&chain.dir.join(&layer.name));
            assert_eq!(ours, (below.name.as_str().into(), "qcow2".into()), "{}", layer.name);
        }
        let expected = oracle.raw(&chain, number);
        let zstd = members.iter().any(|layer| layer.knobs.zstd);
        // Debian 11's QEMU was built without zstd
        let old = (!zstd).then(|| tools::qemu_img_of("5.2"));
        let readers: Vec<Command> = [tools::qemu_img(), tools::qemu_img_of("11")].into_iter().chain(old).collect();
        for mut reader in readers {
            tools::run(reader.args(["convert", "-f", "qcow2", "-O", "raw"]).args([&link, &raw]));
            sparse::assert_same(&raw, &expected, &tools::line(&reader));
        }
        let bytes = sparse::fingerprints(&chain.target());
        rebase(&chain, number).with(0).says("done already");
        let merged = Wanted { raw: true, ..Wanted::default() };
        let merged = merged.merge(&chain.dir, &chain.layers[number].point, &room, &number.to_string(), 2);
        sparse::assert_same(&merged, &expected, "merged after the rebase");
        assert_eq!(sparse::fingerprints(&chain.target()), bytes, "changed a second time");
    }
    assert_eq!(checks(&chain), before);
}

shared_seeds! {
    rebased_images_are_what_qemu_makes_of_them, 16;
    first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
}
