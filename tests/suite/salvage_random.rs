//! What is salvaged of a damaged chain is what it was, but for what is listed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qmpbackup::chain::{Checksums, FormatHint, Level, Manifest, create_checksums};
use qmpbackup::qcow2::Image;
use qmpbackup::storage::FileStorage;

use crate::support::oracle::convert;
use crate::support::prng::Prng;
use crate::support::program::{Ended, event, qmprestore};
use crate::support::random_chain::Chain;
use crate::support::salvage_damage::{Damage, without_sums};
use crate::support::seeds::{Told, shared_seeds};
use crate::support::{sparse, tools};

fn what_is_not_listed_is_right(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let prng = &mut Prng::stream(seed, 7);
    let last = chain.layers.len() - 1;
    let point = chain.layers[last].point.clone();
    let members: Vec<PathBuf> = chain.until(last).iter().map(|layer| chain.dir.join(&layer.name)).collect();
    let room = chain.room("salvaged");
    let right = room.join("right");
    merge(&chain.dir, &point, &right, &["--skip-check", "--format=raw"]).with(0);

    let checked = prng.one_in(2);
    if checked {
        for path in &members {
            create_checksums(path, &FileStorage::open(path).unwrap()).unwrap();
        }
    }
    write_manifests(&members);
    // nothing is lost of what is whole
    let out = room.join("whole");
    let ended = merge(&chain.dir, &point, &out, &["--salvage", "--format=raw", "--json"]).with(0);
    assert!(ended.events().iter().all(|event| event["event"] != "loss"), "{ended:?}");
    sparse::assert_same(&out, &right, "salvaged of a whole chain");

    if checked && prng.one_in(3) {
        for path in &members {
            if prng.one_in(2) {
                without_sums(prng, path);
            }
        }
    }
    let damages: Vec<Damage> = (0..prng.between(1, 3)).map(|_| Damage::make(prng, &members)).collect();
    let what = damages.iter().map(|damage| damage.what.as_str()).collect::<Vec<_>>().join(", ");
    let out = room.join("raw");
    let ended = merge(&chain.dir, &point, &out, &["--salvage", "--format=raw", "--json", "--threads=1"]);
    if ended.code == Some(4) || ended.code == Some(1) {
        assert!(!out.exists() && members.iter().all(|path| !opens(path)), "{what}: {ended:#?}");
        return;
    }
    let losses = losses(&ended);
    let has_warned = ended.events().iter().any(|event| event["event"] == "warning");
    assert!(has_warned || losses.is_empty(), "{what}: {ended:#?}");
    assert_eq!(ended.code, Some(if has_warned { 3 } else { 0 }), "{what}: {ended:#?}");
    assert_differs_only_in(&out, &right, &losses, &what);
    if let Some(most) = damages.iter().map(|damage| damage.most).sum::<Option<u64>>() {
        let listed: u64 = losses.iter().map(|range| range.end - range.start).sum();
        assert!(listed <= most, "{what}: {listed} bytes are listed, {most} are damaged: {losses:?}");
    }

    let qcow2 = room.join("qcow2");
    let compress: &[&str] = if prng.one_in(2) { &["--compress"] } else { &[] };
    let arguments = [&["--salvage", "--json", "--threads=4", "--verify"], compress].concat();
    // where nothing has checksums, only --verify warns of that
    let has_sums = members.iter().any(|path| Checksums::path(path).exists());
    let again = merge(&chain.dir, &point, &qcow2, &arguments).with(if has_sums { ended.code.unwrap() } else { 3 });
    assert_eq!(self::losses(&again), losses, "{what}: with four threads");
    tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(&qcow2));
    let raw = room.join("of qcow2");
    convert(&qcow2, &raw);
    sparse::assert_same(&raw, &out, &what);
    std::fs::remove_dir_all(&room).unwrap();
}

fn merge(dir: &Path, point: &str, out: &Path, arguments: &[&str]) -> Ended {
    let mut command = qmprestore(["merge", "--until", point, "--dir"]);
    Ended::of(command.arg(dir).arg("--out").arg(out).args(arguments))
}

fn opens(path: &Path) -> bool {
    FileStorage::open(path).is_ok_and(|file| Image::open_damaged(Arc::new(file), None).is_ok())
}

/// The ranges that are listed, each once.
fn losses(ended: &Ended) -> Vec<Range<u64>> {
    let events = ended.events();
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let mut ranges: BTreeMap<u64, u64> = BTreeMap::new();
    for loss in events.iter().filter(|event| event["event"] == "loss") {
        let (start, bytes) = (number(&loss["start"]), number(&loss["bytes"]));
        let end = ranges.entry(start).or_default();
        *end = (*end).max(start + bytes);
    }
    let done = event(&events, "done");
    let mut joined: Vec<Range<u64>> = Vec::new();
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => joined.push(start..end),
        }
    }
    let all: u64 = joined.iter().map(|range| range.end - range.start).sum();
    assert_eq!(["lost", "stale", "damaged"].iter().map(|kind| number(&done[kind])).sum::<u64>(), all, "{done}");
    joined
}

fn assert_differs_only_in(out: &Path, right: &Path, losses: &[Range<u64>], what: &str) {
    let (out, right) = (std::fs::read(out).unwrap(), std::fs::read(right).unwrap());
    assert_eq!(out.len(), right.len(), "{what}");
    let mut start = 0;
    for end in losses.iter().map(|loss| loss.start).chain([right.len() as u64]) {
        let range = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
        if let Some(at) = sparse::difference(&out[range.clone()], &right[range]) {
            panic!("{what}: byte {:#x} is another one and not listed: {losses:?}", start + at);
        }
        start = losses.iter().find(|loss| loss.start == end).map_or(end, |loss| loss.end);
    }
}

fn write_manifests(members: &[PathBuf]) {
    let mut before: Option<&PathBuf> = None;
    for path in members {
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let manifest = Manifest {
            image: name(path),
            level: if before.is_some() { Level::Inc } else { Level::Full },
            time: name(path).split('-').nth(1).unwrap().parse().ok(),
            chain: None,
            parent: before.map(|before| name(before)),
            id: None,
            parent_id: None,
            bitmap: None,
            format: FormatHint::Qcow2,
            virtual_size: Image::open(Arc::new(FileStorage::open(path).unwrap())).unwrap().size(),
            qemu: String::new(),
        };
        manifest.write(path).unwrap();
        before = Some(path);
    }
}

shared_seeds! {
    what_is_not_listed_is_right, 24;
    first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
}
