//! What four releases of QEMU say of machines with every kind of disk.

use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::capture::Bitmap;
use crate::capture::Why;

const RELEASES: [&str; 4] = ["5.2", "7.2", "10.0", "11"];

/// The replies to the three commands, trimmed, as a release gave them.
fn replies(release: &str, what: &str) -> Value {
    let path = format!("{}/tests/data/devices/{release}-{what}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn read(replies: &Value, selection: &Selection) -> Result<Devices, DeviceError> {
    devices(&replies["blocks"], &replies["nodes"], &replies["graph"], selection)
}

/// All of a disk on one line; nodes that QEMU named are `#`.
fn line(disk: &Device) -> String {
    let node = |name: &str| if name.starts_with('#') { "#".to_owned() } else { name.to_owned() };
    let flag = |flag, text: &str| if flag { format!(" {text}") } else { String::new() };
    let list = |what: &str, list: Vec<String>| {
        if list.is_empty() { String::new() } else { format!(" {what}={}", list.join(",")) }
    };
    let bitmap = |bitmap: &Bitmap| {
        assert_eq!(bitmap.node, disk.format_node);
        assert!(!bitmap.inconsistent);
        let flags = flag(bitmap.recording, "rec") + &flag(bitmap.busy, "busy") + &flag(bitmap.persistent, "pers");
        format!("{}[{}]", bitmap.name, flags.trim())
    };
    format!(
        "{:?} {} {}>{} names={} file={} base={} folder={} {} {}/{}{}{}{}{}",
        disk.device,
        disk.qdev.as_deref().unwrap_or("-"),
        node(&disk.node),
        node(&disk.format_node),
        disk.names.join(","),
        disk.file,
        disk.base,
        disk.folder.as_ref().map_or("-".into(), |folder| folder.to_string_lossy()),
        disk.format,
        disk.virtual_size,
        disk.cluster_size.unwrap_or(0),
        flag(disk.read_only, "ro"),
        flag(disk.persistent, "pers"),
        list("backing", disk.backing.clone()),
        list("bitmaps", disk.bitmaps.iter().map(bitmap).collect()),
    )
}

fn text(devices: &Devices) -> String {
    let skipped = devices.skipped.iter().map(|skipped| format!("skipped {} {:?}", skipped.name, skipped.why));
    devices.disks.iter().map(line).chain(skipped).map(|line| line + "\n").collect()
}

/// What a machine's disks are read as: a release's own text where there is one, else that of all.
fn expected(release: &str, what: &str) -> String {
    let folder = format!("{}/tests/data/devices", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(format!("{folder}/{release}-{what}.txt"))
        .or_else(|_| fs::read_to_string(format!("{folder}/{what}.txt")))
        .unwrap()
}

fn all(release: &str, what: &str) -> Devices {
    let selection = Selection { include_raw: true, ..Selection::default() };
    read(&replies(release, what), &selection).unwrap()
}

fn disk(release: &str, what: &str, base: &str) -> Device {
    all(release, what).disks.into_iter().find(|disk| disk.base == base).unwrap()
}

#[test]
fn drives_of_each_release_are_read_as_they_are() {
    for release in RELEASES {
        assert_eq!(text(&all(release, "drives")), expected(release, "drives"), "{release}");
    }
}

#[test]
fn media_are_left_out_but_removable_disks_are_not() {
    for release in RELEASES {
        assert_eq!(text(&all(release, "removable")), expected(release, "removable"), "{release}");
    }
}

#[test]
fn nodes_filters_and_protocols_of_each_release_are_read_as_they_are() {
    for release in RELEASES {
        assert_eq!(text(&all(release, "blockdevs")), expected(release, "blockdevs"), "{release}");
    }
}

#[test]
fn jobs_and_what_a_dead_run_left_do_not_hide_the_disks() {
    for release in RELEASES {
        assert_eq!(text(&all(release, "jobs")), expected(release, "jobs"), "{release}");
    }
}

#[test]
fn a_node_of_ours_leads_to_the_node_below_and_its_bitmap_is_found() {
    for release in &RELEASES[1..] {
        let replies = replies(release, "jobs");
        let graph = Graph::parse(&replies["graph"]).unwrap();
        assert_eq!(graph.child("qmpbackup-1-cbw", "file"), Some("n2"), "{release}");
        assert_eq!(graph.child("qmpbackup-1-cbw", "target"), Some("f0"), "{release}");
        assert_eq!(graph.child("qmpbackup-1-snap", "file"), Some("qmpbackup-1-cbw"), "{release}");
        let nodes = nodes::nodes(&replies["nodes"]).unwrap();
        let bitmap = nodes.iter().flat_map(|node| &node.bitmaps).find(|bitmap| bitmap.name == "qmpbackup-tmp").unwrap();
        assert_eq!((bitmap.node.as_str(), bitmap.recording, bitmap.persistent), ("qmpbackup-1-snap", false, false));
    }
}

fn choose(what: &str, selection: &Selection) -> (Vec<String>, Vec<(String, Why)>, Vec<String>) {
    let devices = read(&replies("11", what), selection).unwrap();
    let skipped = devices.skipped.into_iter().map(|skipped| (skipped.name, skipped.why)).collect();
    (devices.disks.into_iter().map(|disk| disk.base).collect(), skipped, devices.unmatched)
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().copied().map(str::to_owned).collect()
}

#[test]
fn raw_disks_are_left_out_but_flash_is_not() {
    let (bases, skipped, unmatched) = choose("drives", &Selection::default());
    assert_eq!(bases[..3], ["pf0.raw", "pf1.raw", "a.qcow2"]);
    assert_eq!(skipped, [("draw".to_owned(), Why::Raw)]);
    assert!(unmatched.is_empty());
    let (_, skipped, _) = choose("blockdevs", &Selection::default());
    let names: Vec<_> = skipped.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["nbd2", "vb15", "vb16", "vb17", "vb20"], "below filters and without a format, too");
    assert!(skipped.iter().all(|(_, why)| *why == Why::Raw));
}

#[test]
fn a_disk_is_chosen_by_any_of_its_names() {
    let include =
        |name: &str| choose("blockdevs", &Selection { include: Some(owned(&[name])), ..Selection::default() });
    for name in ["thr", "disk2", "/machine/peripheral/vb2/virtio-backend", "vb2", "thr.qcow2"] {
        let (bases, skipped, unmatched) = include(name);
        assert_eq!((bases, unmatched), (owned(&["thr.qcow2"]), Vec::new()), "{name}");
        assert!(skipped.iter().all(|(_, why)| *why == Why::NotIncluded));
    }
    assert_eq!(include("js").0, ["jsn.qcow2"], "the name of the backend");
    for name in ["vb11", "vb12"] {
        assert_eq!(include(name).0, ["two.qcow2"], "each of the two devices names it");
    }
    for name in ["", "vb", "virtio-backend", "THR", "device[0]"] {
        let (bases, _, unmatched) = include(name);
        assert_eq!((bases, unmatched), (Vec::new(), owned(&[name])), "{name:?}");
    }
}

#[test]
fn an_excluded_disk_is_left_out_though_it_is_included() {
    let selection = Selection { include: Some(owned(&["d0", "dsc"])), exclude: owned(&["sh0"]), include_raw: true };
    let (bases, skipped, unmatched) = choose("drives", &selection);
    assert_eq!((bases, unmatched), (owned(&["a.qcow2"]), Vec::new()));
    assert!(skipped.contains(&("dsc".to_owned(), Why::Excluded)));
    assert!(skipped.contains(&("draw".to_owned(), Why::NotIncluded)));
}

#[test]
fn names_of_nothing_are_told_once_and_names_of_what_is_left_out_are_not() {
    let selection = Selection {
        include: Some(owned(&["typo", "draw"])),
        exclude: owned(&["dro", "other", "typo"]),
        include_raw: false,
    };
    let (bases, skipped, unmatched) = choose("drives", &selection);
    assert_eq!((bases, unmatched), (Vec::new(), owned(&["typo", "other"])));
    assert!(skipped.contains(&("draw".to_owned(), Why::Raw)));
    let (_, _, unmatched) =
        choose("removable", &Selection { exclude: owned(&["cd0", "scd0", "fl1"]), ..Selection::default() });
    assert!(unmatched.is_empty(), "drives without a medium have names");
}

#[test]
fn a_relative_path_is_one_of_qemus_folder() {
    let relative = disk("11", "drives", "c.qcow2");
    assert_eq!(relative.absolute(None), None);
    assert_eq!(relative.absolute(Some(Path::new("/srv"))), Some(PathBuf::from("/srv/c.qcow2")));
    let absolute = disk("11", "drives", "a.qcow2");
    assert_eq!(absolute.absolute(Some(Path::new("/srv"))), Some(PathBuf::from("/vm/a.qcow2")));
    assert_eq!(disk("11", "blockdevs", "data").absolute(Some(Path::new("/srv"))), None);
    assert_eq!(disk("11", "blockdevs", "fds").absolute(Some(Path::new("/srv"))), None);
}

#[test]
fn a_disk_in_json_has_the_keys_that_programs_read() {
    for release in RELEASES {
        let expected = json!({
            "node": "thr",
            "device": "",
            "qdev": "/machine/peripheral/vb2/virtio-backend",
            "format": "qcow2",
            "filename": "/vm/thr.qcow2",
            "virtual_size": 1_048_576,
            "backing_image": false,
            "has_bitmap": true,
            "bitmaps": [{
                "name": "b2",
                "count": 0,
                "granularity": 65536,
                "recording": true,
                "busy": false,
                "persistent": true,
                "inconsistent": false,
            }],
            "driver": null,
            "path": "/vm",
        });
        assert_eq!(disk(release, "blockdevs", "thr.qcow2").to_json(), expected, "{release}");
        let remote = disk(release, "blockdevs", "data").to_json();
        assert_eq!(
            (&remote["driver"], &remote["path"], &remote["has_bitmap"]),
            (&json!("nbd"), &Value::Null, &json!(false))
        );
        assert_eq!(disk(release, "drives", "top.qcow2").to_json()["backing_image"], json!(true));
    }
}

#[test]
fn settings_are_those_of_the_image_below_filters() {
    for release in RELEASES {
        let settings = crate::capture::machine::device::config(&disk(release, "blockdevs", "thr.qcow2"), false);
        assert_eq!(settings["format"], "qcow2", "{release}");
        assert_eq!(settings["filename"], "/vm/thr.qcow2", "{release}");
        assert_eq!(settings["virtual-size"], 1_048_576, "{release}");
        assert_eq!(settings["format-specific"]["type"], "qcow2", "{release}");
        let bare = disk(release, "blockdevs", "offs.raw");
        assert_eq!(bare.image["format"], "file", "{release}");
        let settings = |foreign: bool| crate::capture::machine::device::config(&bare, foreign);
        assert_eq!(settings(false)["format"], "raw", "{release}");
        assert_eq!(settings(false)["backup-format"], "qcow2", "{release}");
        assert_eq!(settings(true)["backup-format"], Value::Null, "{release}");
    }
}

/// The replies about one disk of these nodes: name, driver and file, each the `file` child of the one before.
fn machine(nodes: &[(&str, &str, &str)]) -> Value {
    let image =
        json!({"virtual-size": 1, "format": "qcow2", "filename": "x", "format-specific": {"data": {"compat": "1.1"}}});
    let named = nodes.iter().map(
        |(name, driver, file)| json!({"node-name": name, "drv": driver, "file": file, "ro": false, "image": image}),
    );
    let ids = nodes.iter().enumerate().map(|(id, (name, ..))| json!({"id": id, "type": "block-driver", "name": name}));
    let edges = (1..nodes.len()).map(|id| json!({"parent": id - 1, "child": id, "name": "file"}));
    json!({
        "blocks": [{"device": "", "removable": false, "inserted": {"node-name": nodes[0].0, "ro": false}}],
        "nodes": named.collect::<Vec<_>>(),
        "graph": {"nodes": ids.collect::<Vec<_>>(), "edges": edges.collect::<Vec<_>>()},
    })
}

fn only(replies: &Value) -> Device {
    let mut disks = read(replies, &Selection::default()).unwrap().disks;
    assert_eq!(disks.len(), 1);
    disks.remove(0)
}

#[test]
fn a_name_that_was_cut_off_is_that_of_the_protocols_node() {
    let cut = "json:{\"driver\": \"qcow2\", \"file\": {\"dri";
    let disk = only(&machine(&[("a", "qcow2", cut), ("#b", "throttle", cut), ("#c", "file", "/vm/a.qcow2")]));
    assert_eq!((disk.file.as_str(), disk.base.as_str()), ("/vm/a.qcow2", "a.qcow2"));
}

#[test]
fn names_hold_no_node_of_ours_and_none_that_changes() {
    let file = "/vm/qmpbackup-a.qcow2";
    let nodes = [("qmpbackup-5-cbw", "copy-before-write", file), ("thr", "throttle", file), ("#block1", "qcow2", file)];
    let disk = only(&machine(&nodes));
    assert_eq!((disk.node.as_str(), disk.format_node.as_str()), ("qmpbackup-5-cbw", "#block1"));
    assert_eq!(disk.names, ["thr", "qmpbackup-a.qcow2"], "the name of the user's file is the user's");
    assert_eq!(only(&machine(&[("#block1", "qcow2", "/dev/fdset/3")])).names, ["#block1"], "better than none");
}

#[test]
fn bitmaps_of_old_releases_stand_beside_the_medium() {
    let mut replies = machine(&[("a", "qcow2", "/vm/a.qcow2")]);
    let bitmap = json!({"name": "b", "count": 0, "granularity": 65536, "status": "active"});
    replies["blocks"][0]["dirty-bitmaps"] = json!([bitmap]);
    let disk = only(&replies);
    assert_eq!((disk.bitmaps[0].name.as_str(), disk.bitmaps[0].node.as_str()), ("b", "a"));
    replies["nodes"][0]["dirty-bitmaps"] = json!([]);
    replies["blocks"][0]["dirty-bitmaps"] = json!([{"name": "b"}]);
    assert!(read(&replies, &Selection::default()).is_err());
}

#[test]
fn bitmaps_last_only_in_version_3_of_qcow2_that_can_be_written() {
    let mut replies = machine(&[("a", "qcow2", "/vm/a.qcow2")]);
    assert!(only(&replies).persistent);
    let compat = "/nodes/0/image/format-specific/data/compat";
    for (pointer, value) in [(compat, json!("0.10")), ("/nodes/0/drv", json!("qed")), ("/nodes/0/ro", json!(true))] {
        let before = std::mem::replace(replies.pointer_mut(pointer).unwrap(), value);
        assert!(!only(&replies).persistent, "{pointer}");
        *replies.pointer_mut(pointer).unwrap() = before;
    }
}

/// The only block of a machine with a read-only disk, changed; and what comes of it.
fn read_only(format: &str, change: impl FnOnce(&mut Value)) -> Result<Device, Why> {
    let mut replies = machine(&[("a", format, "/vm/a")]);
    replies["blocks"][0]["inserted"]["ro"] = true.into();
    change(&mut replies["blocks"]);
    let mut devices = read(&replies, &Selection { include_raw: true, ..Selection::default() }).unwrap();
    assert_eq!(devices.disks.len() + devices.skipped.len(), 1);
    devices.disks.pop().ok_or_else(|| devices.skipped[0].why)
}

#[test]
fn read_only_disks_are_media_where_the_device_has_a_tray_or_is_removable() {
    let set = |key: &'static str, value: bool| {
        move |blocks: &mut Value| {
            blocks[0]["qdev"] = "sh0".into();
            blocks[0][key] = value.into();
        }
    };
    assert!(read_only("qcow2", set("removable", false)).unwrap().read_only, "as the device says, though not the node");
    assert_eq!(read_only("qcow2", set("removable", true)), Err(Why::Removable));
    assert_eq!(read_only("qcow2", set("tray_open", false)), Err(Why::Removable));
    assert_eq!(read_only("raw", set("tray-open", true)), Err(Why::Removable));
}

#[test]
fn a_disk_is_no_medium_where_there_is_no_device_or_another_one_that_is_fixed() {
    assert!(read_only("raw", |blocks| blocks[0]["removable"] = true.into()).is_ok(), "QEMU says so of all without one");
    let shared = |blocks: &mut Value| {
        let mut other = blocks[0].clone();
        other["qdev"] = "sh0".into();
        blocks[0]["qdev"] = "cd0".into();
        blocks[0]["removable"] = true.into();
        blocks.as_array_mut().unwrap().push(other);
    };
    assert_eq!(read_only("qcow2", shared).unwrap().qdev.as_deref(), Some("cd0"));
}

#[test]
fn an_id_is_what_the_owner_of_the_machine_chose() {
    for (qdev, id) in [
        ("sh0", Some("sh0")),
        ("/machine/peripheral/vb0/virtio-backend", Some("vb0")),
        ("/machine/peripheral/usb0/usb0.0/legacy[0]", Some("usb0")),
        ("/machine/peripheral/nvme0", Some("nvme0")),
        ("/machine/peripheral-anon/device[1]/virtio-backend", None),
        ("/machine/unattached/device[16]", None),
        ("/machine/system.flash0", Some("system.flash0")),
    ] {
        assert_eq!(qdev_id(qdev), id, "{qdev}");
    }
}

#[test]
fn replies_that_do_not_fit_each_other_get_an_error() {
    let error = |change: &dyn Fn(&mut Value)| {
        let mut replies = replies("11", "blockdevs");
        change(&mut replies);
        read(&replies, &Selection::default()).unwrap_err()
    };
    let no_node = |node: &str| DeviceError::NoNode { reply: "query-named-block-nodes", node: node.to_owned() };
    let gone = error(&|replies| replies["nodes"].as_array_mut().unwrap().retain(|node| node["node-name"] != "disk2"));
    assert_eq!(gone, no_node("disk2"));
    let backing =
        error(&|replies| replies["nodes"].as_array_mut().unwrap().retain(|node| node["node-name"] != "lowest"));
    assert_eq!(backing, no_node("lowest"));
    let field = |field, want| DeviceError::Field { reply: "query-block", field, want };
    assert_eq!(error(&|replies| replies["blocks"] = json!({})), field("devices", "list"));
    assert_eq!(error(&|replies| replies["blocks"][0]["inserted"] = json!({})), field("node-name", "string"));
    assert_eq!(error(&|replies| replies["blocks"][0]["removable"] = json!(1)), field("removable", "bool"));
    let size = "virtual-size";
    assert_eq!(error(&|replies| replies["blocks"][0]["inserted"]["image"][size] = json!(-1)), field(size, "number"));
}

#[test]
fn a_cycle_in_the_graph_gets_an_error() {
    for (parent, child, name) in [("thr", "thr", "file"), ("lowest", "upper", "backing")] {
        let mut replies = replies("11", "blockdevs");
        let nodes = replies["graph"]["nodes"].as_array().unwrap();
        let id = |name: &str| nodes.iter().find(|node| node["name"] == name).unwrap()["id"].clone();
        let edge = json!({"parent": id(parent), "child": id(child), "name": name});
        replies["graph"]["edges"].as_array_mut().unwrap().push(edge);
        let error = read(&replies, &Selection::default()).unwrap_err();
        assert!(matches!(error, DeviceError::Depth { .. }), "{error}");
    }
}

/// JSON of any shape, with the keys and words that matter.
fn any_json() -> impl Strategy<Value = Value> {
    let words = ["", "a", "b", "/vm/a", "json:{}", "block-driver", "throttle", "qcow2", "file", "backing", "x\0/y"];
    let keys = [
        "device",
        "qdev",
        "removable",
        "tray_open",
        "inserted",
        "node-name",
        "drv",
        "file",
        "ro",
        "image",
        "virtual-size",
        "dirty-bitmaps",
        "name",
        "count",
        "granularity",
        "nodes",
        "edges",
        "id",
        "type",
        "parent",
        "child",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1_i64..4).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(words.to_vec()).prop_map(Value::from),
        ".{0,5}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(prop::sample::select(keys.to_vec()), inner, 0..12)
                .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

/// Walks into the value as the steps say, and returns where they end.
fn place<'a>(mut value: &'a mut Value, steps: &[usize]) -> &'a mut Value {
    for step in steps {
        let len = match &*value {
            Value::Array(list) => list.len(),
            Value::Object(map) => map.len(),
            _ => 0,
        };
        if len == 0 {
            return value;
        }
        value = match value {
            Value::Array(list) => &mut list[step % len],
            Value::Object(map) => map.values_mut().nth(step % len).unwrap(),
            _ => unreachable!("it has members"),
        };
    }
    value
}

proptest! {
    #[test]
    fn any_json_is_read_or_gets_an_error(blocks in any_json(), nodes in any_json(), graph in any_json()) {
        let _ = devices(&blocks, &nodes, &graph, &Selection::default());
        let real = replies("11", "drives");
        let _ = devices(&blocks, &real["nodes"], &real["graph"], &Selection::default());
        let _ = devices(&real["blocks"], &nodes, &real["graph"], &Selection::default());
        let read = devices(&real["blocks"], &real["nodes"], &graph, &Selection::default());
        prop_assert_eq!(read.is_ok(), Graph::parse(&graph).is_ok());
    }

    #[test]
    fn replies_with_something_else_in_one_place_give_safe_names_or_an_error(
        what in prop::sample::select(&["drives", "removable", "blockdevs", "jobs"][..]),
        changes in prop::collection::vec((prop::collection::vec(any::<usize>(), 1..7), any_json()), 1..4),
    ) {
        let mut replies = replies("10.0", what);
        for (steps, value) in changes {
            *place(&mut replies, &steps) = value;
        }
        let selection = Selection { include_raw: true, ..Selection::default() };
        for disk in read(&replies, &selection).into_iter().flat_map(|devices| devices.disks) {
            for name in disk.names.iter().chain([&disk.base]) {
                prop_assert_eq!(component(name), Some(name.clone()));
            }
            prop_assert!(disk.names.contains(&disk.base));
            prop_assert!(disk.to_json().is_object());
        }
    }
}

#[test]
fn a_disk_that_is_called_like_a_log_has_images_that_are_found() {
    for base in ["disk.qcow2", "disk", "a.b", ".hidden", "config"] {
        assert!(names_images(base), "{base}");
    }
    for base in ["disk.bak", "vm.orig", "disk.img~", "disk.partial", "x.fleece.qcow2", "disk.log"] {
        assert!(!names_images(base), "{base}");
        assert!(names_images(&format!("disk_{}", base.replace(['.', '~', '#'], "_"))), "{base}");
    }
}

#[test]
fn no_disk_is_called_as_what_else_is_in_a_backup_folder() {
    for name in ["uuid", ".qmpbackup"] {
        let disk = only(&machine(&[(name, "qcow2", &format!("/vm/{name}"))]));
        assert!(!disk.names.iter().any(|other| other == name) && disk.base != name, "{disk:?}");
        assert!(names_images(&disk.base));
    }
}
