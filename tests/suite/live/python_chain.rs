//! Chains that the Python tool has begun go on: its folders, its id, its bitmap. What it does is done here by hand.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use qmpbackup::chain::{Checksums, Manifest};
use serde_json::json;

use super::clean::is_of;
use super::field::Field;
use super::field_judge::Image;
use super::field_setup::{Setup, releases};
use crate::support::program::{Ended, qmprestore};
use crate::support::tools;

const UUID: &str = "0c2b7d0e-5a1e-4b6b-9c7f-2f6a3c1d9e77";
const FULL: i64 = 1_790_000_000;
const INC: i64 = 1_790_003_600;

/// How a version of the tool lays things out.
struct Layout {
    /// The folder below the target; empty with `--no-subdir`.
    folder: &'static str,
    /// What follows level and time in the names of images.
    base: &'static str,
    bitmap: String,
}

/// A machine, and the device and node of its disk.
struct Run {
    field: Field,
    node: String,
    layout: Layout,
}

impl Run {
    /// A machine with a disk `disk.qcow2` and the device `disk0`; the Python tool has made a FULL and an INC of it.
    fn of(release: &'static str, drive: &str, layout: Layout) -> Self {
        let mut field = Setup::of(release)
            .image("disk.qcow2", "4M", "")
            .words(drive)
            .words("-device virtio-blk-pci,id=disk0,drive=top")
            .start();
        let node = field.drive("disk0")["inserted"]["node-name"].as_str().unwrap().to_owned();
        let mut run = Self { field, node, layout };
        std::fs::create_dir_all(run.folder()).unwrap();
        std::fs::write(run.field.target.join("uuid"), UUID).unwrap();
        let disk = run.field.vm.path("disk.qcow2");
        let info = tools::run(tools::qemu_img().args(["info", "-U", "--output", "json"]).arg(disk));
        std::fs::write(run.field.target.join("disk.qcow2.config"), info).unwrap();
        for (level, time) in [("FULL", FULL), ("INC", INC)] {
            run.field.scribble("disk0");
            run.python(level, time);
            let image = Image { disk: run.disk(), level: level.to_owned(), path: run.image(level, time) };
            run.field.remember(time, image);
        }
        run.field.scribble("disk0");
        run
    }

    fn folder(&self) -> PathBuf {
        self.field.target.join(self.layout.folder)
    }

    /// What the disk is called.
    fn disk(&self) -> String {
        if self.layout.folder.is_empty() { "top" } else { self.layout.folder }.to_owned()
    }

    fn image(&self, level: &str, time: i64) -> PathBuf {
        self.folder().join(format!("{level}-{time}{}", self.layout.base))
    }

    /// Makes an image as the Python tool does.
    fn python(&mut self, level: &str, time: i64) {
        let image = self.image(level, time);
        let partial = PathBuf::from(format!("{}.partial", image.display()));
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&partial).arg("4M"));
        let file = json!({ "driver": "file", "filename": partial });
        let target = json!({ "node-name": "qmpbackup-target", "driver": "qcow2", "file": file });
        self.field.execute("blockdev-add", &target);
        let bitmap = &self.layout.bitmap;
        let add = json!({ "node": self.node, "name": bitmap, "persistent": true });
        let add = json!({ "type": "block-dirty-bitmap-add", "data": add });
        let job = json!({ "device": self.node, "target": "qmpbackup-target", "job-id": "qmpbackup.top.disk" });
        let mut job = json!({ "type": "blockdev-backup", "data": job });
        let actions = if level == "FULL" {
            job["data"]["sync"] = "full".into();
            vec![add, job]
        } else {
            job["data"]["sync"] = "incremental".into();
            job["data"]["bitmap"] = bitmap.as_str().into();
            vec![job]
        };
        self.field.execute("transaction", &json!({ "actions": actions }));
        let until = Instant::now() + Duration::from_secs(60);
        while self.field.execute("query-jobs", &json!({})) != json!([]) {
            assert!(Instant::now() < until, "the job does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.field.execute("blockdev-del", &json!({ "node-name": "qmpbackup-target" }));
        std::fs::rename(partial, image).unwrap();
    }

    /// The chain goes on with two INCs, and the Python tool's bitmap is gone.
    fn goes_on(mut self, words: &str) {
        let disk = self.disk();
        for level in ["inc", "auto"] {
            self.field.makes(&format!("--level {level} {words}"), 0, &format!("{disk} INC"));
            assert_eq!(self.field.newest(&disk).parent().unwrap(), self.folder().components().as_path());
            let time = self.field.points.last().unwrap().time;
            assert!(is_of(&self.field.bitmaps(&self.node), time, UUID));
            assert_eq!(std::fs::read_to_string(self.field.target.join("uuid")).unwrap(), UUID);
            self.field.scribble("disk0");
        }
        self.field.verify_as(&[(&disk, "disk0")]);
    }
}

const NODE: &str = "-blockdev node-name=top,driver=qcow2,file.driver=file,file.filename=@/disk.qcow2";
const DRIVE: &str = "-drive if=none,id=top,format=qcow2,file=@/disk.qcow2";
/// A drive that has a node name, too; old versions did not look at that.
const BOTH: &str = "-drive if=none,id=top,node-name=node,format=qcow2,file=@/disk.qcow2";

fn layout(folder: &'static str, base: &'static str) -> Layout {
    Layout { folder, base, bitmap: format!("qmpbackup-{UUID}") }
}

#[test]
fn a_chain_of_the_python_tool_goes_on() {
    for release in releases(&["5.2", "10.0", "11"]) {
        Run::of(release, NODE, layout("top", "-disk.qcow2")).goes_on("");
    }
}

#[test]
fn a_chain_of_the_python_tool_goes_on_when_its_inc_was_written_into_its_full() {
    for release in releases(&["5.2", "10.0"]) {
        let mut run = Run::of(release, NODE, layout("top", "-disk.qcow2"));
        run.field.commit(1);
        run.goes_on("");
    }
}

#[test]
fn a_chain_of_the_python_tool_gets_manifests_and_goes_on() {
    for release in releases(&["5.2", "10.0"]) {
        for (folder, words) in [("top", ""), ("", "--no-subdir")] {
            let run = Run::of(release, NODE, layout(folder, "-disk.qcow2"));
            let manifest = || Ended::of(qmprestore(["manifest", "--dir"]).arg(&run.field.target));
            manifest().with(0).says("has got manifest and checksums");
            for (level, parent) in [("FULL", None), ("INC", Some(format!("FULL-{FULL}-disk.qcow2")))] {
                let image = run.image(level, if level == "FULL" { FULL } else { INC });
                let known = Manifest::read(&image).unwrap().unwrap();
                assert_eq!((known.chain.as_deref(), known.parent), (Some(UUID), parent));
                assert!(Checksums::open(&image).unwrap().is_some());
            }
            Ended::of(qmprestore(["list", "--dir"]).arg(&run.field.target)).with(0);
            manifest().with(0).says("has both already").says_not("has got");
            run.goes_on(words);
        }
    }
}

#[test]
fn a_chain_of_the_python_tool_goes_on_after_qemu_was_restarted() {
    for release in releases(&["10.0"]) {
        let mut run = Run::of(release, NODE, layout("top", "-disk.qcow2"));
        run.field.restart();
        run.field.scribble("disk0");
        run.goes_on("");
    }
}

#[test]
fn a_bitmap_with_the_name_of_the_device_is_taken_over() {
    for release in releases(&["10.0"]) {
        let bitmap = format!("qmpbackup-top-{UUID}");
        Run::of(release, DRIVE, Layout { bitmap, ..layout("top", "-disk.qcow2") }).goes_on("");
    }
}

#[test]
fn the_folder_of_a_device_is_kept_though_there_is_a_node_name() {
    for release in releases(&["10.0"]) {
        let bitmap = format!("qmpbackup-top-{UUID}");
        Run::of(release, BOTH, Layout { bitmap, ..layout("top", "-disk.qcow2") }).goes_on("");
    }
}

#[test]
fn a_flat_folder_goes_on_as_one() {
    for release in releases(&["10.0"]) {
        Run::of(release, NODE, layout("", "-disk.qcow2")).goes_on("--no-subdir");
    }
}

#[test]
fn images_without_the_name_of_the_disk_are_built_on() {
    for release in releases(&["10.0"]) {
        Run::of(release, NODE, layout("top", "")).goes_on("");
    }
}

/// Its bitmap is clear, and QEMU may have the image open still.
#[test]
fn what_a_failed_run_of_the_python_tool_left_ends_its_chain() {
    for (release, is_open) in [("10.0", false), ("10.0", true), ("5.2", true)] {
        let mut run = Run::of(release, NODE, layout("top", "-disk.qcow2"));
        run.python("INC", INC + 60);
        let image = run.image("INC", INC + 60);
        let partial = PathBuf::from(format!("{}.partial", image.display()));
        std::fs::rename(image, &partial).unwrap();
        if is_open {
            let file = json!({ "driver": "file", "filename": partial });
            let target = json!({ "node-name": "qmpbackup-virtio0", "driver": "qcow2", "file": file });
            run.field.execute("blockdev-add", &target);
        }
        run.field.usual.extend([".partial", "qmpbackup-virtio0", &format!("qmpbackup-{UUID}")].map(str::to_owned));
        run.field.backup("--level inc", 4).says("a run before failed and left").says("--level full");
        run.field.makes("--level auto", 3, "top FULL").says("a run before failed and left");
        run.field.scribble("disk0");
        let told = run.field.makes("--level inc", if is_open { 3 } else { 0 }, "top INC");
        assert_eq!(
            told.stderr.contains("nodes of another tool, which perhaps was killed: qmpbackup-virtio0;"),
            is_open
        );
        assert!(partial.exists(), "it is not ours");
        run.field.verify_as(&[("top", "disk0")]);
    }
}
