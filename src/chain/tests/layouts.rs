use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode};

use serde_json::json;

use super::super::{FolderLock, FormatHint, Note};
use super::*;

#[test]
fn a_backup_of_one_disk_is_found_from_its_root_and_from_its_folder() {
    let tree = Tree::new([
        "uuid",
        "my disk-1.qcow2.config",
        "ide0-hd0/FULL-100-my disk-1.qcow2",
        "ide0-hd0/INC-200-my disk-1.qcow2",
        "ide0-hd0/.qmpbackup/FULL-100-my disk-1.qcow2",
    ]);
    let disk = tree.disk();
    assert_eq!(disk.label(), "ide0-hd0");
    assert_eq!(disk.name().unwrap(), "my disk-1.qcow2");
    assert_eq!(points(&disk), ["FULL-100-my disk-1.qcow2", "INC-200-my disk-1.qcow2"]);
    assert_eq!(disk.images()[0].path, tree.path("ide0-hd0/FULL-100-my disk-1.qcow2"));

    let inventory = discover(&tree.path("ide0-hd0")).unwrap();
    let disk = inventory.disk(Some("ide0-hd0")).unwrap();
    assert_eq!(disk.label(), "my disk-1.qcow2");
    assert_eq!(members(disk, "latest"), ["FULL-100-my disk-1.qcow2", "INC-200-my disk-1.qcow2"]);
}

#[test]
fn the_oldest_layout_names_no_disk() {
    let tree = Tree::new(["ide0-hd0/FULL-1643308898", "ide0-hd0/INC-1643308928"]);
    let disk = tree.disk();
    assert_eq!((disk.label(), disk.name()), ("ide0-hd0", None));
    assert_eq!(members(&disk, "latest"), ["ide0-hd0/FULL-1643308898", "ide0-hd0/INC-1643308928"]);
    let inventory = discover(&tree.path("ide0-hd0")).unwrap();
    assert_eq!(inventory.disk(None).unwrap().label(), "ide0-hd0");
}

#[test]
fn a_chain_goes_on_under_new_names() {
    let tree = Tree::new(["hd0/FULL-100", "hd0/INC-200", "hd0/FULL-300-disk", "hd0/INC-400-disk"]);
    let disk = tree.disk();
    assert_eq!((disk.label(), disk.name()), ("hd0", Some(OsStr::new("disk"))));
    assert_eq!(members(&disk, "200"), ["hd0/FULL-100", "hd0/INC-200"]);
    assert_eq!(members(&disk, "400"), ["hd0/FULL-300-disk", "hd0/INC-400-disk"]);
}

#[test]
fn disks_that_share_a_folder_are_told_apart_by_name() {
    let tree = Tree::new(["FULL-100-a.qcow2", "INC-200-a.qcow2", "FULL-100-b.qcow2", "INC-200-b.qcow2", "FULL-50"]);
    let inventory = tree.discover();
    assert_eq!(tree.labels()[1..], ["a.qcow2", "b.qcow2"]);
    assert_eq!(points(inventory.disk(Some("b.qcow2")).unwrap()), ["FULL-100-b.qcow2", "INC-200-b.qcow2"]);
    assert_eq!(inventory.disks.len(), 3, "nobody knows whose the image without a name is");
}

#[test]
fn disks_of_one_file_name_are_told_apart_by_folder() {
    let tree = Tree::new(["ide0-hd0/FULL-100-disk", "ide0-hd1/FULL-100-disk"]);
    assert_eq!(tree.labels(), ["ide0-hd0", "ide0-hd1"]);
    let tree = Tree::new(["ide0-hd0/FULL-100-a", "ide0-hd0/FULL-100-b"]);
    assert_eq!(tree.labels(), ["ide0-hd0/a", "ide0-hd0/b"]);
}

#[test]
fn a_full_without_a_time_is_older_than_all() {
    let tree = Tree::new(["disk1.qcow2", "INC-200-disk1.qcow2", "INC-300-disk1.qcow2"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["disk1.qcow2", "INC-200-disk1.qcow2", "INC-300-disk1.qcow2"]);
    assert_eq!(members(&disk, "latest"), ["disk1.qcow2", "INC-200-disk1.qcow2", "INC-300-disk1.qcow2"]);
    let first = select(&disk, "disk1.qcow2").unwrap();
    assert_eq!((first.time, first.level, paths(&first)), (None, Level::Full, vec!["disk1.qcow2".to_owned()]));
    assert_eq!(members(&disk, "7"), ["disk1.qcow2"]);
}

#[test]
fn links_beside_a_name_without_time_tell_its_level() {
    let tree = Tree::new(["hd0/vm", "hd0/FULL-vm -> /elsewhere/hd0/vm", "hd1/vm", "hd1/COPY-vm -> vm"]);
    let inventory = tree.discover();
    let level = |disk: &str| inventory.disk(Some(disk)).unwrap().images().iter().map(|i| i.level).collect::<Vec<_>>();
    assert_eq!(level("hd0"), [Level::Full]);
    assert_eq!(level("hd1"), [Level::Copy]);
    // a disk that is itself called `7-vm`
    let tree = Tree::new(["hd0/7-vm", "hd0/COPY-7-vm -> 7-vm"]);
    assert_eq!(points(&tree.disk()), ["7-vm"]);
    // links that a copy made into files
    let tree = Tree::new(["hd0/vm", "hd0/FULL-vm"]);
    assert_eq!(points(&tree.disk()), ["vm"]);
}

#[test]
fn a_name_without_time_is_an_image_if_its_settings_say_so() {
    let tree = Tree::new(["a.config", "b.config", "a", "b", "README"]);
    assert_eq!(tree.labels(), ["a", "b"]);
    let tree = Tree::new(["vm.config", "hd0/vm", "hd0/notes"]);
    assert_eq!(points(&tree.disk()), ["vm"]);
}

#[test]
fn the_only_disk_image_of_a_folder_is_an_image() {
    for name in ["vm.qcow2", "vm.QCOW", "vm.img", "vm.raw"] {
        assert_eq!(points(&Tree::new([name, "uuid", "run.log"]).disk()), [name]);
    }
    for other in [
        &["vm.iso"][..],
        &["vm"],
        &["vm.qcow2", "other.qcow2"],
        &["vm", "INC-vm -> vm"],
        &["vm.qcow2 -> /dev/null"],
        &["vm.qcow2/"],
    ] {
        assert_eq!(Tree::new(other.iter().copied()).labels(), Vec::<String>::new(), "{other:?}");
    }
}

/// Also where a disk was restored beside it.
#[test]
fn a_name_without_time_is_an_image_if_its_manifest_says_so() {
    let tree = Tree::new(["vm.qcow2", "restored.qcow2"]);
    assert_eq!(tree.labels(), Vec::<String>::new());
    tree.holds("vm.qcow2", 100);
    // a journal is no manifest, though it has the name of one
    tree.write("run", "a script");
    tree.write(".qmpbackup/run.json", "{\"version\": 1}");
    assert_eq!(points(&tree.disk()), ["vm.qcow2"]);
}

#[test]
fn a_restored_disk_is_no_image() {
    let tree = Tree::new(["disk.qcow2.config", "disk.qcow2", "new.qcow2", "hd0/FULL-100-disk.qcow2"]);
    assert_eq!(tree.labels(), ["hd0"]);
    let tree = Tree::new(["new.qcow2", "hd0/FULL-100-disk.qcow2"]);
    assert_eq!(tree.labels(), ["hd0"]);
    let tree = Tree::new(["hd0/FULL-100-disk.qcow2", "hd0/restored.qcow2"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-disk.qcow2"]);
}

#[test]
fn months_are_one_disk_with_the_chains_of_all() {
    let tree = Tree::new([
        "2021-11/hd0/FULL-100-disk",
        "2021-11/hd0/INC-200-disk",
        "2021-12/hd0/FULL-300-disk",
        "2021-12/hd0/INC-400-disk",
        "2022-01/hd0/INC-500-disk",
    ]);
    let disk = tree.disk();
    assert_eq!(disk.label(), "hd0");
    assert_eq!(disk.chains().len(), 3);
    assert_eq!(members(&disk, "250"), ["2021-11/hd0/FULL-100-disk", "2021-11/hd0/INC-200-disk"]);
    assert_eq!(members(&disk, "400"), ["2021-12/hd0/FULL-300-disk", "2021-12/hd0/INC-400-disk"]);
    assert!(
        matches!(select(&disk, "latest"), Err(Error::Broken { fault: Fault::NoFull, .. })),
        "a FULL of another folder is no base"
    );
}

#[test]
fn a_single_month_is_part_of_the_label() {
    let tree = Tree::new(["2021-11/ide0-hd0/FULL-1643308898"]);
    assert_eq!(tree.labels(), ["2021-11/ide0-hd0"]);
    let tree = Tree::new(["2021-11/FULL-1-a", "2021-11/FULL-1-b"]);
    assert_eq!(tree.labels(), ["2021-11/a", "2021-11/b"]);
    let tree = Tree::new(["vm/2021-11/hd0/FULL-1", "vm/2021-12/hd0/FULL-2"]);
    assert_eq!(tree.labels(), ["vm/hd0"]);
}

#[test]
fn months_without_folders_for_disks_are_kept_apart_by_name() {
    let tree = Tree::new([
        "2021-11/FULL-100-a",
        "2021-11/FULL-100-b",
        "2021-11/INC-200-b",
        "2021-12/FULL-300-a",
        "2021-12/FULL-300-b",
        "2021-12/INC-400-b",
    ]);
    assert_eq!(tree.labels(), ["a", "b"]);
    let inventory = tree.discover();
    assert_eq!(members(inventory.disk(Some("b")).unwrap(), "latest"), ["2021-12/FULL-300-b", "2021-12/INC-400-b"]);
}

#[test]
fn months_order_images_without_a_time() {
    // 2021-11-30 23:00 west of Greenwich is December there
    let tree = Tree::new(["2021-11/hd0/vm.img", "2021-11/hd0/INC-1638331200-vm.img", "2021-12/hd0/vm.img"]);
    let disk = tree.disk();
    assert_eq!(members(&disk, "latest"), ["2021-12/hd0/vm.img"]);
    assert_eq!(members(&disk, "2021-11-29"), ["2021-11/hd0/vm.img"]);
    assert!(matches!(select(&disk, "vm.img"), Err(Error::WhichPoint { points, .. }) if points.len() == 2));
    assert_eq!(members(&disk, "2021-11/hd0/vm.img"), ["2021-11/hd0/vm.img"]);
    // east of it, December begins while it is November there
    tree.add("2021-12/hd0/INC-1638300000-vm.img");
    assert_eq!(members(&tree.disk(), "latest"), ["2021-11/hd0/vm.img", "2021-11/hd0/INC-1638331200-vm.img"]);
    tree.add("2021-12/hd0/INC-1638400000-vm.img");
    let december = ["2021-12/hd0/vm.img", "2021-12/hd0/INC-1638300000-vm.img", "2021-12/hd0/INC-1638400000-vm.img"];
    assert_eq!(members(&tree.disk(), "latest"), december);
    assert!(matches!(select(&tree.disk(), "1635000000"), Err(Error::TooEarly { .. })));
}

#[test]
fn stray_files_are_no_images() {
    let tree = Tree::new([
        "uuid",
        "disk.qcow2.config",
        "qmpbackup.log",
        "hd0/FULL-100-disk.qcow2",
        "hd0/FULL-100-disk.qcow2.log",
        "hd0/FULL-100-disk.qcow2~",
        "hd0/.FULL-100-disk.qcow2.swp",
        "hd0/FULL-100-hd0.fleece.qcow2",
        "hd0/FULL-300-disk.qcow2/",
        "hd0/.hidden",
        "hd0/image -> FULL-100-disk.qcow2",
        "hd0/newest.qcow2 -> FULL-100-disk.qcow2",
        "hd0/INC-400-disk.qcow2 -> gone",
        "hd0/INC-500-disk.qcow2 -> /dev/null",
        "hd1 -> hd0",
    ]);
    let fifo = tree.path("hd0/INC-200-disk.qcow2");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = UnixListener::bind(tree.path("hd0/INC-300-disk.qcow2")).unwrap();
    tree.add("hd0/INC-600-disk.qcow2 -> INC-200-disk.qcow2");
    assert_eq!(tree.labels(), ["hd0"]);
    tree.add("hd0/INC-700-disk.qcow2/");
    // somebody's for images of a year
    tree.add("hd0/INC-2023/");
    assert_eq!(points(&tree.disk()), ["FULL-100-disk.qcow2", "INC-400-disk.qcow2!"]);
    // others may build on them
    let inventory = tree.discover();
    let mut told: Vec<_> = inventory.notes_of(None).unwrap().into_iter().filter_map(Note::place).collect();
    told.sort();
    let names = [200, 300, 500, 600, 700].map(|time| tree.path(&format!("hd0/INC-{time}-disk.qcow2")));
    assert_eq!(told, names.each_ref().map(PathBuf::as_path));
}

#[test]
fn settings_that_are_a_fifo_are_not_waited_for() {
    let tree = Tree::new(["hd0/FULL-100-disk"]);
    rustix::fs::mknodat(CWD, tree.path("disk.config"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let inventory = tree.discover();
    assert_eq!(inventory.disks[0].images()[0].format, FormatHint::Unknown);
    assert!(matches!(inventory.disks[0].notes(), [Note::Config { .. }]));
}

#[test]
fn a_folder_that_lies_elsewhere_is_left_out_and_said() {
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("FULL-100-disk"), "").unwrap();
    let link = format!("hd1 -> {}", elsewhere.path().display());
    let tree = Tree::new(["hd0/FULL-100-disk", link.as_str(), "hd2 -> hd0", "hd3 -> nowhere"]);
    let inventory = tree.discover();
    assert_eq!(inventory.disks.len(), 1);
    let notes = inventory.notes_of(None).unwrap();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes.contains(&&Note::Link { path: tree.path("hd1") }));
    assert!(notes.iter().any(|note| matches!(note, Note::Dangling { path, .. } if *path == tree.path("hd3"))));
}

#[test]
fn a_folder_of_a_backup_that_is_too_deep_is_left_out_and_said() {
    let tree = Tree::new(["a/b/c/FULL-100-disk", "a/b/c/.qmpbackup/", "a/b/c/d/FULL-100-disk", "a/b/c/e/notes"]);
    assert_eq!(tree.discover().notes_of(None).unwrap(), Vec::<&Note>::new());
    tree.add("a/b/c/d/.qmpbackup/FULL-100-disk.json");
    let inventory = tree.discover();
    assert_eq!(inventory.disks.len(), 1);
    assert_eq!(inventory.notes_of(None).unwrap(), [&Note::Deep { path: tree.path("a/b/c/d") }]);
}

#[test]
fn a_full_that_has_lost_its_manifest_may_hold_another_moment() {
    let tree = Tree::new(["hd0/FULL-100-disk", "hd0/INC-200-disk", "hd0/.qmpbackup/FULL-100-disk.crc32"]);
    assert_eq!(tree.disk().notes(), [], "images may have checksums and nothing else");
    let moment = Note::Moment { path: tree.path("hd0/FULL-100-disk") };
    tree.add("hd0/.qmpbackup/INC-200-disk.json");
    assert!(tree.disk().notes().contains(&moment));
    fs::remove_file(tree.path("hd0/.qmpbackup/FULL-100-disk.crc32")).unwrap();
    assert!(!tree.disk().notes().contains(&moment));
    tree.add("hd0/.qmpbackup/FULL-100-disk.json");
    assert!(tree.disk().notes().contains(&moment));
}

/// A run to the folder above was killed while it gave names, and has given one of them.
fn half_named(files: &[&str], images: &[&str], publishing: bool) -> Tree {
    let tree = Tree::new(files.iter().copied());
    let entry =
        |image: &&str| json!({"disk": "d", "image": image, "partial": format!("{image}.partial"), "link": null});
    let entries: Vec<_> = images.iter().map(entry).collect();
    let mut journal = json!({"version": 2, "time": 200, "publishing": publishing, "images": entries, "fleece": []});
    super::super::json_file::seal(journal.as_object_mut().unwrap());
    tree.write(".qmpbackup/run.json", &journal.to_string());
    tree
}

#[test]
fn an_image_that_has_not_got_its_name_is_told() {
    let files = ["hd0/FULL-100-a", "hd0/INC-200-a", "hd1/FULL-100-b", "hd1/INC-200-b.partial"];
    let images = ["hd0/INC-200-a", "hd1/INC-200-b"];
    let tree = half_named(&files, &images, true);
    let unnamed = Note::Unnamed { path: tree.path("hd1/INC-200-b.partial") };
    let notes = |tree: &Tree| tree.discover().notes_of(None).unwrap().into_iter().cloned().collect::<Vec<_>>();
    assert_eq!(notes(&tree), [unnamed]);
    let alone = discover(&tree.path("hd1")).unwrap();
    assert_eq!(alone.disks[0].notes(), [Note::Unnamed { path: tree.path("hd1/INC-200-b.partial") }]);
    assert_eq!(discover(&tree.path("hd0")).unwrap().disks[0].notes(), []);
    // the images are not whole, or their run goes on
    assert_eq!(notes(&half_named(&files, &images, false)), []);
    let _lock = FolderLock::take(&tree.path(".")).unwrap();
    assert_eq!(notes(&tree), []);
}

#[test]
fn an_image_is_not_taken_for_the_one_whose_manifest_has_its_name_already() {
    let files = ["hd0/a.qcow2", "hd0/FULL-a.qcow2 -> a.qcow2", "hd0/.qmpbackup/a.qcow2.partial.json"];
    let tree = half_named(&files, &["hd0/a.qcow2"], true);
    assert_eq!(points(&tree.disk()), ["a.qcow2"]);
    tree.add("hd0/a.qcow2.partial");
    assert_eq!(points(&tree.disk()), ["a.qcow2"], "its manifest is still its own");
    fs::remove_file(tree.path("hd0/.qmpbackup/a.qcow2.partial.json")).unwrap();
    let disk = tree.disk();
    let by = fs::canonicalize(tree.path("hd0/a.qcow2.partial")).unwrap();
    assert_eq!(*disk.points()[0].state(), State::Broken(Fault::Replaced { by }));
    assert!(disk.notes().contains(&Note::Unnamed { path: tree.path("hd0/a.qcow2.partial") }), "{:?}", disk.notes());
}

#[test]
fn an_image_may_lie_elsewhere() {
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    let tree = Tree::new([format!("hd0/FULL-100-disk -> {}", elsewhere.path().display()).as_str(), "hd0/INC-200-disk"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-disk", "INC-200-disk"]);
}

#[test]
fn the_format_is_what_the_settings_say() {
    let tree = Tree::new(["hd0/FULL-100-a", "hd1/FULL-100-b", "hd2/FULL-100-c"]);
    tree.write("a.config", r#"{"format": "raw"}"#);
    tree.write("b.config", r#"{"format": "qcow2"}"#);
    tree.write("c.config", "x");
    let inventory = tree.discover();
    let formats: Vec<FormatHint> = inventory.disks.iter().map(|disk| disk.images()[0].format).collect();
    assert_eq!(formats, [FormatHint::RawDisk, FormatHint::Qcow2, FormatHint::Unknown]);
    let notes: Vec<usize> = inventory.disks.iter().map(|disk| disk.notes().len()).collect();
    assert_eq!((inventory.notes.len(), notes), (0, vec![0, 0, 1]));
    assert!(inventory.disks[2].notes()[0].to_string().contains("c.config is ignored: "));
    let below = discover(&tree.path("hd0")).unwrap();
    assert_eq!(below.disks[0].images()[0].format, FormatHint::RawDisk);
}

#[test]
fn folders_are_searched_three_deep() {
    let tree = Tree::new(["a/b/c/FULL-1-disk", "a/b/c/d/FULL-2-other"]);
    assert_eq!(tree.labels(), ["a/b/c"]);
}

#[test]
fn a_folder_that_is_none_is_an_error_with_its_name() {
    let tree = Tree::new(["file"]);
    for name in ["missing", "file"] {
        let error = discover(&tree.path(name)).unwrap_err();
        assert_eq!(error.kind(), crate::errors::ErrorKind::Other);
        assert!(error.to_string().contains(name));
    }
    assert!(matches!(tree.discover().disk(None), Err(Error::NoDisk { .. })));
}

#[test]
fn names_need_not_be_text() {
    let tree = Tree::new(["uuid"]);
    for name in [&b"FULL-100-d\xff"[..], b"INC-200-d\xff", b"FULL-100-d\xfe"] {
        fs::write(tree.0.path().join(OsString::from_vec(name.to_vec())), "").unwrap();
    }
    let inventory = tree.discover();
    assert_eq!(tree.labels(), ["d\u{fffd}", "d\u{fffd} (2)"], "labels are unique");
    let disk = inventory.disk(Some("d\u{fffd} (2)")).unwrap();
    let point = select(disk, "INC-200-d\u{fffd}").unwrap();
    assert_eq!(point.members[1].name(), OsString::from_vec(b"INC-200-d\xff".to_vec()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_folder_makes_it_panic(
        names in prop::collection::vec(
            "(2021-1[12]/|hd0/|\\.x/)?(FULL-|INC-|COPY-)?([0-9]{1,3}-?)?(a|b|disk\\.raw|image)?(\\.partial|\\.config)?( -> [ab]| -> \\.)?",
            0..12,
        ),
        when in "(latest|[0-9]{1,3}|-[0-9]d|[FI].{0,6}|[ab])",
    ) {
        let tree = Tree::new([]);
        for name in names.iter().filter(|name| !name.is_empty() && !name.starts_with(" ->") && !name.contains("/ ->")) {
            let path = tree.path(name.split(" -> ").next().unwrap());
            if path.symlink_metadata().is_err() && path.parent().is_none_or(|parent| !parent.is_file()) {
                tree.add(name);
            }
        }
        let inventory = tree.discover();
        let mut labels = tree.labels();
        labels.dedup();
        prop_assert_eq!(labels.len(), inventory.disks.len());
        for disk in &inventory.disks {
            let _ = select(disk, &when);
            for point in disk.points() {
                if let Ok(point) = disk.restore_point(point, true) {
                    prop_assert!(point.members.iter().all(|image| image.path.is_file() && !image.partial));
                    prop_assert!(point.members[0].level != Level::Inc);
                    prop_assert!(point.members[1..].iter().all(|image| image.level == Level::Inc));
                }
            }
        }
    }
}

#[test]
fn a_folder_of_manifests_that_cannot_be_read_is_noted() {
    let tree = Tree::new(["disk/FULL-5-disk", "disk/.qmpbackup"]);
    let notes = tree.discover().notes;
    assert!(matches!(&notes[..], [Note::Manifests { path, .. }] if path.ends_with("disk")), "{notes:?}");
    let tree = Tree::new(["disk/FULL-5-disk"]);
    assert_eq!(tree.discover().notes, []);
}
