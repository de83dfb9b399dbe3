//! Whatever a crash leaves of a change of the backing file name, QEMU and we read the old name or the new one.

use std::collections::BTreeSet;
use std::path::Path;

use qmpbackup::qcow2::{Backing, Header, set_backing};
use qmpbackup::storage::MemoryStorage;
use serde_json::{Value, json};

use crate::support::prng::Prng;
use crate::support::recorder::Recorder;
use crate::support::tools;

/// How an image is made: options, name of the backing file, number of bitmaps.
const IMAGES: [(&str, &str, u32); 8] = [
    ("cluster_size=64K", "", 0),
    ("cluster_size=64K", "FULL-1-disk", 2),
    ("cluster_size=4K,lazy_refcounts=on", "LONG", 3),
    ("cluster_size=2M", "LONGEST", 0),
    ("cluster_size=512", "FULL-1-disk", 0),
    ("cluster_size=1K,compression_type=zstd", "LONG", 1),
    ("compat=0.10,cluster_size=64K", "LONG", 0),
    ("compat=0.10,cluster_size=512", "", 0),
];

fn name(word: &str) -> String {
    match word {
        "LONG" => "folder/".repeat(35),
        "LONGEST" => "x".repeat(1023),
        word => word.to_owned(),
    }
}

/// What QEMU says of an image, without what cannot be the same.
fn info(image: &Path) -> (Option<String>, Option<String>, Value) {
    let info = tools::run(tools::qemu_img().args(["info", "-f", "qcow2", "--output", "json"]).arg(image));
    let mut info: Value = serde_json::from_str(&info).unwrap();
    let fields = info.as_object_mut().unwrap();
    for key in ["filename", "actual-size", "full-backing-filename", "children"] {
        fields.remove(key);
    }
    let mut text = |key: &str| fields.remove(key).map(|value| value.as_str().unwrap().to_owned());
    let (name, format) = (text("backing-filename"), text("backing-filename-format"));
    (name, format, info)
}

fn assert_old_or_new(number: usize, wanted: Option<&Backing>, prng: &mut Prng) {
    let (options, backing, bitmaps) = IMAGES[number];
    let what = format!("{options} from {backing:?} to {:?}", wanted.map(|backing| &backing.name));
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let mut create = tools::qemu_img();
    create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&image).arg("1M");
    tools::run(&mut create);
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write -q -P 7 100K 300K"]).arg(&image));
    if !backing.is_empty() {
        let based = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", &name(backing)];
        tools::run(tools::qemu_img().args(based).arg(&image));
    }
    for bitmap in 0..bitmaps {
        tools::run(tools::qemu_img().args(["bitmap", "--add", "-f", "qcow2"]).arg(&image).arg(bitmap.to_string()));
    }
    let before = std::fs::read(&image).unwrap();
    let (old_name, old_format, rest) = info(&image);
    let old = (old_name, old_format);
    let new = (wanted.map(|backing| backing.name.clone()), wanted.and_then(|backing| backing.format.clone()));

    let recorder = Recorder::new(before.clone());
    set_backing(&recorder, wanted).unwrap_or_else(|error| panic!("{what}: {error}"));
    let steps = recorder.steps().len();
    let states: BTreeSet<Vec<u8>> =
        (0..=steps).flat_map(|done| (0..8).map(move |_| done)).map(|done| recorder.crashed(done, prng)).collect();
    assert!(states.contains(&before), "{what}");
    let cluster = 1 << u32::from_be_bytes(before[20..24].try_into().unwrap());
    for state in &states {
        assert_eq!(state[cluster..], before[cluster..], "{what}: behind the header");
        std::fs::write(&image, state).unwrap();
        let (name, format, all) = info(&image);
        let there = (name, format);
        assert!(there == old || there == new, "{what}: {there:?}");
        assert_eq!(all, rest, "{what}");
        let header = Header::read(&MemoryStorage::new(state.clone())).unwrap();
        let ours = (header.backing.as_ref().map(|backing| backing.name.clone()), header.backing.and_then(|b| b.format));
        assert_eq!(ours, there, "{what}");
    }
    // all is synced at the end
    let done = recorder.crashed(steps, prng);
    std::fs::write(&image, &done).unwrap();
    let (name, format, _) = info(&image);
    assert_eq!((name, format), new, "{what}");
    let alone = json!({ "driver": "qcow2", "backing": null, "file": { "driver": "file", "filename": image } });
    tools::run(tools::qemu_img().args(["check", "-q", &format!("json:{alone}")]));
    assert_eq!(recorder.crashed(steps, prng), done, "{what}: the last write is not synced");
}

fn all_names(images: impl Iterator<Item = usize>) {
    let prng = &mut Prng::stream(7, 7);
    for number in images {
        for word in ["FULL-2-disk", "LONG", "./with:colon", "LONGEST", ""] {
            // there is no room for these in the smallest clusters
            let smallest = IMAGES[number].0.contains("=512") || IMAGES[number].0.contains("=1K");
            if smallest && word == "LONGEST" {
                continue;
            }
            let wanted = Backing { name: name(word), format: Some("qcow2".to_owned()) };
            assert_old_or_new(number, Some(&wanted).filter(|wanted| !wanted.name.is_empty()), prng);
        }
    }
}

#[test]
fn a_crash_leaves_the_old_backing_file_name_or_the_new_one() {
    all_names(0..4);
}

#[test]
fn a_crash_leaves_the_old_backing_file_name_or_the_new_one_in_small_and_old_headers() {
    all_names(4..8);
}
