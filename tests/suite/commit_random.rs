//! The differential tests of work in place: a FULL that has taken INCs holds, byte for byte, what QEMU makes of the chain.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::oracle::{Oracle, convert};
use crate::support::prng::Prng;
use crate::support::program::{Ended, event};
use crate::support::random_chain::Chain;
use crate::support::seeds::{Told, shared_seeds};
use crate::support::{sparse, tools};

/// A random restore point that has a FULL and INCs, if the chain has one: its number and that of its FULL.
fn point(chain: &Chain, prng: &mut Prng) -> Option<(usize, usize)> {
    let points: Vec<usize> = (0..chain.layers.len()).filter(|number| !chain.layers[*number].full).collect();
    let number = *points.get(usize::try_from(prng.below(points.len().max(1) as u64)).unwrap())?;
    Some((number, number + 1 - chain.until(number).len()))
}

fn info(image: &Path) -> Value {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(image));
    serde_json::from_str(&info).unwrap()
}

/// Each internal snapshot of an image, by id: its name and its content.
fn snapshots(image: &Path, room: &Path) -> BTreeMap<String, (String, PathBuf)> {
    let mut found = BTreeMap::new();
    for snapshot in info(image)["snapshots"].as_array().into_iter().flatten() {
        let (id, name) = (snapshot["id"].as_str().unwrap(), snapshot["name"].as_str().unwrap());
        let raw = room.join(format!("snapshot-{id}.raw"));
        let which = format!("snapshot.id={id}");
        let convert = ["convert", "-f", "qcow2", "-O", "raw", "-l", &which];
        tools::run(tools::qemu_img().args(convert).args([image, &raw]));
        found.insert(id.to_owned(), (name.to_owned(), raw));
    }
    found
}

/// What the files in the chain's folder are.
fn images(chain: &Chain) -> BTreeMap<String, sparse::Fingerprint> {
    let mut found = sparse::fingerprints(&chain.dir);
    found.retain(|path, _| chain.dir.join(path).is_file() && !path.starts_with(".qmpbackup/"));
    found
}

/// QEMU shows of a snapshot what fits on the disk as it is now.
fn assert_same_snapshot(is: &Path, should_be: &Path, name: &str) {
    let length = |path: &Path| path.metadata().unwrap().len();
    let common = length(is).min(length(should_be));
    let difference = sparse::first_difference(is, should_be).filter(|at| *at < common);
    assert_eq!(difference, None, "snapshot {name}");
}

/// Nothing is wrong with an image, leaks included; but those of a program that was killed are not ours.
fn assert_clean(image: &Path, killed: bool) {
    let mut check = tools::qemu_img();
    check.args(["check", "-f", "qcow2"]).arg(image);
    let output = tools::output(&mut check);
    let code = output.status.code().unwrap();
    assert!(code == 0 || (killed && code == 3), "{}", tools::told(&check, &output));
}

/// QEMU has no place in a version 2 image to say how large the disk was in a snapshot, and does not resize it.
fn cannot_be_resized(chain: &Chain, full: usize, number: usize) -> bool {
    let resized = chain.layers[full].alone.size() != chain.layers[number].alone.size();
    let image = chain.dir.join(&chain.layers[full].name);
    resized && !chain.layers[full].knobs.version_3 && info(&image)["snapshots"].is_array()
}

fn run(chain: &Chain, words: &[&str]) -> Ended {
    Ended::run(words[..1].iter().chain(&["--dir", chain.dir.to_str().unwrap()]).chain(&words[1..]))
}

/// By how much a FULL may grow at most.
fn planned(chain: &Chain, words: &[&str]) -> u64 {
    let ended = run(chain, &[words, &["--dry-run", "--json"]].concat());
    if ended.code != Some(0) {
        return 0;
    }
    event(&ended.events(), "plan")["growth"].as_u64().unwrap()
}

/// The work found the room that it asked for.
fn assert_grew(image: &Path, before: u64, planned: u64) {
    let after = image.metadata().unwrap().len();
    assert!(after <= before + planned, "from {before} to {after} bytes, planned were {planned} more");
}

fn a_committed_full_is_what_qemu_makes_of_the_chain(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let prng = &mut Prng::stream(seed, 7);
    let Some((number, full)) = point(&chain, prng) else { return };
    let (layers, point) = (&chain.layers, chain.layers[number].point.as_str());
    let oracle = Oracle::new(&chain);
    let image = chain.dir.join(&layers[full].name);
    let before = images(&chain);
    if cannot_be_resized(&chain, full, number) {
        let ended = run(&chain, &["commit", "--until", point]);
        assert_ne!(ended.code, Some(0), "{ended:?}");
        assert!(images(&chain) == before, "{ended:?}");
        return;
    }
    let all = sparse::fingerprints(&chain.target());
    run(&chain, &["commit", "--dry-run", "--until", point]).with(0).says("qemu-img commit");
    assert!(sparse::fingerprints(&chain.target()) == all, "a dry run changed something");
    let kept = snapshots(&image, &chain.room("before"));

    let (length, growth) = (image.metadata().unwrap().len(), planned(&chain, &["commit", "--until", point]));
    run(&chain, &["commit", "--until", point]).with(0).says(point);
    assert_grew(&image, length, growth);

    assert_clean(&image, layers[full].knobs.killed);
    let raw = chain.room("committed").join("raw");
    convert(&image, &raw);
    sparse::assert_same(&raw, &oracle.raw(&chain, number), point);
    for (id, (name, content)) in snapshots(&image, &chain.room("after")) {
        assert_eq!(kept[&id].0, name);
        assert_same_snapshot(&content, &kept[&id].1, &name);
    }
    for (at, layer) in layers.iter().enumerate() {
        let gone = at > full && at <= number;
        assert_eq!(chain.dir.join(&layer.name).exists(), !gone, "{}", layer.name);
    }
    // what comes later still fits on top
    let later = (number + 1..layers.len()).take_while(|at| !layers[*at].full).last();
    if let Some(later) = later {
        let out = raw.with_file_name("later.raw");
        let out_word = out.to_str().unwrap();
        run(&chain, &["merge", "--until", &layers[later].point, "--format=raw", "--out", out_word]).with(0);
        sparse::assert_same(&out, &oracle.raw(&chain, later), &layers[later].point);
    }
    run(&chain, &["list"]).with(0);
}

mod committed {
    super::shared_seeds! {
        super::a_committed_full_is_what_qemu_makes_of_the_chain, 40;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}

fn each_snapshot_is_a_restore_point(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let prng = &mut Prng::stream(seed, 8);
    let Some((number, full)) = point(&chain, prng) else { return };
    let (layers, point) = (&chain.layers, chain.layers[number].point.as_str());
    let oracle = Oracle::new(&chain);
    let image = chain.dir.join(&layers[full].name);
    let knobs = &layers[full].knobs;
    let before = images(&chain);
    let kept = snapshots(&image, &chain.room("before"));
    let words = ["snapshotrebase", "--until", point];
    let (length, growth) = (image.metadata().unwrap().len(), planned(&chain, &words));
    let ended = run(&chain, &words);
    if ended.code != Some(0) {
        // refcounts that cannot count a snapshot more, or disks of snapshots whose size nobody could tell
        let sizes: std::collections::BTreeSet<u64> =
            layers[full..=number].iter().map(|layer| layer.alone.size()).collect();
        assert!(knobs.refcount_bits < 16 || (!knobs.version_3 && sizes.len() > 1), "{ended:?}");
        assert!(images(&chain) == before, "{ended:?}");
        return;
    }
    assert_grew(&image, length, growth);
    assert_clean(&image, knobs.killed);
    let found = snapshots(&image, &chain.room("after"));
    let mut made: Vec<&(String, PathBuf)> = Vec::new();
    for (id, snapshot) in &found {
        match kept.get(id) {
            Some((name, content)) => {
                assert_eq!(*name, snapshot.0);
                assert_same_snapshot(&snapshot.1, content, name);
            }
            None => made.push(snapshot),
        }
    }
    assert_eq!(made.len(), number - full + 1);
    for (at, layer) in layers.iter().enumerate().take(number + 1).skip(full) {
        let time = layer.point.split('-').nth(1).unwrap().parse().unwrap();
        let local = jiff::Timestamp::from_second(time).unwrap().strftime("%Y-%m-%d-%H:%M:%S").to_string();
        let name = if at == full { "FULL-BACKUP".to_owned() } else { local };
        let (_, content) =
            made.iter().find(|(made, _)| *made == name).unwrap_or_else(|| panic!("no {name} in {made:?}"));
        assert_same_snapshot(content, &oracle.raw(&chain, at), &name);
    }
    if info(&image)["format-specific"]["data"]["bitmaps"].is_array() {
        // QEMU does not go back where bitmaps would not know of it
        return;
    }
    // QEMU goes to one of them
    let (name, content) = *prng.pick(&made);
    tools::run(tools::qemu_img().args(["snapshot", "-a", name]).arg(&image));
    let raw = chain.room("applied").join("raw");
    convert(&image, &raw);
    assert_same_snapshot(&raw, content, name);
    assert_clean(&image, knobs.killed);
}

mod snapshots_of {
    super::shared_seeds! {
        super::each_snapshot_is_a_restore_point, 24;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}
