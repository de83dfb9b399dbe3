//! What is salvaged of a damaged chain is what it was, but for what is listed.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qmpbackup::chain::{FormatHint, Level, Manifest, create_checksums};
use qmpbackup::qcow2::Image;
use qmpbackup::storage::FileStorage;

use crate::oracle::convert;
use crate::prng::Prng;
use crate::program::{Ended, event, qmprestore};
use crate::random_chain::Chain;
use crate::seeds::{Told, shared_seeds};
use crate::{sparse, tools};

/// One damage, and the most of the disk that it may cost; `None` where that may be all of it.
struct Damage {
    what: String,
    most: Option<u64>,
}

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

    let damages: Vec<Damage> = (0..prng.between(1, 3)).map(|_| damage(prng, &members, checked)).collect();
    let what = damages.iter().map(|damage| damage.what.as_str()).collect::<Vec<_>>().join(", ");
    let out = room.join("raw");
    let ended = merge(&chain.dir, &point, &out, &["--salvage", "--format=raw", "--json", "--threads=1"]);
    if ended.code == Some(4) || ended.code == Some(1) {
        assert!(!out.exists() && members.iter().all(|path| !opens(path)), "{what}: {ended:#?}");
        return;
    }
    let losses = losses(&ended);
    assert_eq!(ended.code, Some(if losses.is_empty() { 0 } else { 3 }), "{what}: {ended:#?}");
    assert_differs_only_in(&out, &right, &losses, &what);
    if let Some(most) = damages.iter().map(|damage| damage.most).sum::<Option<u64>>() {
        let listed: u64 = losses.iter().map(|range| range.end - range.start).sum();
        assert!(listed <= most, "{what}: {listed} bytes are listed, {most} are damaged: {losses:?}");
    }

    let qcow2 = room.join("qcow2");
    let compress: &[&str] = if prng.one_in(2) { &["--compress"] } else { &[] };
    let arguments = [&["--salvage", "--json", "--threads=4", "--verify"], compress].concat();
    let again = merge(&chain.dir, &point, &qcow2, &arguments).with(ended.code.unwrap());
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
            chain: Some("a chain".to_owned()),
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

fn damage(prng: &mut Prng, members: &[PathBuf], checked: bool) -> Damage {
    let path = prng.pick(members);
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let whole = |what: String| Damage { what, most: None };
    let Some(image) = FileStorage::open(path).ok().and_then(|file| Image::open_damaged(Arc::new(file), None).ok())
    else {
        return whole(format!("{name} is damaged already"));
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    match prng.below(if checked { 6 } else { 4 }) {
        0 if members.len() > 1 && path != members.last().unwrap() => {
            std::fs::remove_file(path).unwrap();
            whole(format!("{name} is gone"))
        }
        0 | 1 if prng.one_in(3) => {
            file.write_all_at(b"no magic", 0).unwrap();
            whole(format!("{name} has no header"))
        }
        0 | 1 => {
            let cut = prng.below(length) / 512 * 512;
            file.set_len(cut).unwrap();
            whole(format!("{name} ends at {cut:#x}"))
        }
        2 => {
            let table = image.header().l1_table;
            let index = prng.below(table.entries);
            let reserved = 0x7f00_0000_0000_0001_u64;
            file.write_all_at(&reserved.to_be_bytes(), table.offset.0 + index * 8).unwrap();
            let geometry = image.header().geometry;
            let most = if checked { None } else { Some(geometry.l2_entries() * geometry.cluster_size()) };
            Damage { what: format!("L1 entry {index} of {name}"), most }
        }
        3 => {
            let geometry = image.header().geometry;
            let occupied = image.occupied();
            if occupied.is_empty() {
                return Damage { what: format!("nothing in {name}"), most: Some(0) };
            }
            let index = prng.pick(&occupied).start / (geometry.l2_entries() * geometry.cluster_size());
            let mut entry = [0; 8];
            file.read_exact_at(&mut entry, image.header().l1_table.offset.0 + index * 8).unwrap();
            let table = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
            let number = prng.below(geometry.l2_entries());
            let entry_size = if geometry.extended_l2() { 16 } else { 8 };
            let reserved = 0x3f00_0000_0000_0002_u64;
            file.write_all_at(&reserved.to_be_bytes(), table + number * entry_size).unwrap();
            let most = if checked { None } else { Some(geometry.cluster_size()) };
            Damage { what: format!("L2 entry {number} of table {index} of {name}"), most }
        }
        _ => {
            let at = prng.below(length);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << prng.below(8)], at).unwrap();
            whole(format!("a bit of byte {at:#x} of {name}"))
        }
    }
}

shared_seeds! {
    what_is_not_listed_is_right, 24;
    first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
}
