//! Whatever a backup could leave is found.

use serde_json::json;

use super::clean::Found;
use super::spec::DiskSpec;
use super::vm::{RELEASES, Vm};

const CHAIN: &str = "1b4e28ba-2fa1-11d2-883f-0016d3cca427";
/// More than a job copies at once.
const SIZE: u64 = 32 << 20;

fn add_bitmap(vm: &mut Vm, name: &str) {
    let node = vm.node(0);
    vm.monitor.execute("block-dirty-bitmap-add", &json!({ "node": node, "name": name })).unwrap();
}

#[test]
fn what_is_left_in_a_machine_and_its_folder_is_found() {
    for release in RELEASES {
        let mut vm = Vm::builder(release).disk(DiskSpec::new("disk.qcow2", SIZE)).start();
        let target = vm.path("target");
        std::fs::create_dir_all(target.join("disk")).unwrap();
        let found = Found::of(&mut vm);
        add_bitmap(&mut vm, &format!("qmpbackup-1700000000-{CHAIN}"));
        found.assert_clean(&mut vm, &target);

        add_bitmap(&mut vm, &format!("qmpbackup-1700000001-{CHAIN}"));
        add_bitmap(&mut vm, "qmpbackup-tmp");
        let null = json!({ "node-name": "qmpbackup-x", "driver": "null-co", "size": SIZE });
        vm.monitor.execute("blockdev-add", &null).unwrap();
        let job =
            json!({ "job-id": "left", "device": vm.node(0), "target": "qmpbackup-x", "sync": "full", "speed": 1 });
        vm.monitor.execute("blockdev-backup", &job).unwrap();
        vm.monitor.execute("stop", &json!({})).unwrap();
        std::fs::write(target.join("disk/FULL-1-disk.partial"), "").unwrap();
        std::fs::write(target.join("disk.fleece"), "").unwrap();
        let left = found.differences(&mut vm, &target).join("\n");
        for what in [
            "disk.partial",
            "disk.fleece",
            "job {",
            "node qmpbackup-x",
            "bitmap qmpbackup-tmp of",
            &format!("2 bitmaps of {CHAIN} of"),
            "the machine is \"paused\", was \"running\"",
            // The filter of the job
            "disk 0 is #block",
        ] {
            assert!(left.contains(what), "{release}: no {what} in\n{left}");
        }
    }
}
