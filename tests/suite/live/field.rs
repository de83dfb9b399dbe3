//! A machine with disks as they are in the field, and its backup folder.
//!
//! [`super::field_setup`] makes it. [`Field::backup`] runs the built program and remembers what was on the disks, which
//! [`super::field_judge`] compares with restored ones. Writes come between backups, never while one goes on: that is the
//! business of other modules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::clean::Found;
use super::field_judge::{Image, Point};
use super::proxy::{Hook, Proxy};
use super::tool::Tool;
use super::vm::Vm;
use crate::support::program::Ended;

pub(crate) struct Field {
    pub(crate) vm: Vm,
    /// The backup folder.
    pub(crate) target: PathBuf,
    /// What may be strange in the machine after a backup.
    pub(crate) usual: Vec<String>,
    found: Found,
    drives: Vec<String>,
    /// What is on the disks, by the device's id.
    contents: BTreeMap<String, Vec<u8>>,
    pub(crate) points: Vec<Point>,
    byte: u8,
}

impl Field {
    /// A machine that was just started, with disks of zeroes.
    pub(super) fn new(mut vm: Vm) -> Self {
        let target = vm.path("target");
        let found = Found::of(&mut vm);
        let drives = drives(&mut vm);
        let mut field = Self {
            vm,
            target,
            usual: Vec::new(),
            found,
            drives,
            contents: BTreeMap::new(),
            points: Vec::new(),
            byte: 0,
        };
        field.look();
        field
    }

    /// Looks what disks there are: those that are new are zeroes, those that have grown have zeroes at the end.
    pub(crate) fn look(&mut self) {
        self.drives = drives(&mut self.vm);
        let blocks = self.vm.monitor.execute("query-block", &json!({})).unwrap();
        for block in blocks.as_array().unwrap() {
            if let (Some(id), Some(size)) = (id(block), block["inserted"]["image"]["virtual-size"].as_u64()) {
                self.contents.entry(id).or_default().resize(usize::try_from(size).unwrap(), 0);
            }
        }
    }

    /// Says what is on a disk that did not begin as zeroes.
    pub(crate) fn holds(&mut self, id: &str, bytes: &[u8]) {
        self.contents.get_mut(id).unwrap()[..bytes.len()].copy_from_slice(bytes);
    }

    /// Says that a disk is zeroes again.
    pub(crate) fn forget(&mut self, id: &str) {
        self.contents.get_mut(id).unwrap().fill(0);
    }

    /// Writes some bytes to a disk.
    pub(crate) fn write(&mut self, id: &str, byte: u8, offset: usize, length: usize) {
        self.aio(id, &format!("aio_write -P {byte} {offset} {length}"));
        self.contents.get_mut(id).unwrap()[offset..offset + length].fill(byte);
    }

    /// Writes zeroes, which may need no room then.
    pub(crate) fn zero(&mut self, id: &str, offset: usize, length: usize) {
        self.aio(id, &format!("aio_write -z -u {offset} {length}"));
        self.contents.get_mut(id).unwrap()[offset..offset + length].fill(0);
    }

    /// Writes here and there, and zeroes, something else each time.
    pub(crate) fn scribble(&mut self, id: &str) {
        let size = self.contents[id].len();
        self.byte += 1;
        let (byte, step) = (self.byte, usize::from(self.byte));
        self.write(id, byte, (step * 70_000 / 512 * 512) % (size / 2), 66_048);
        self.zero(id, (step * 30_000 / 512 * 512) % (size / 4), 33_280);
        self.write(id, byte ^ 0x80, size - 512, 512);
    }

    /// What was written so far outlives the machine.
    pub(crate) fn flush(&mut self, id: &str) {
        self.qemu_io(id, "flush");
    }

    /// Not the synchronous commands of `qemu-io`: QEMU 7.2 may end itself when the firmware moves the disk to another thread.
    fn aio(&mut self, id: &str, command: &str) {
        let said = self.vm.path("said");
        let count = || std::fs::read_to_string(&said).unwrap().matches(" ops/sec)").count();
        let before = count();
        self.qemu_io(id, command);
        let until = Instant::now() + Duration::from_secs(60);
        while count() == before {
            assert!(Instant::now() < until, "{command}: {}", std::fs::read_to_string(&said).unwrap());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn qemu_io(&mut self, id: &str, command: &str) {
        let path = self.drive(id)["qdev"].as_str().unwrap().to_owned();
        assert_eq!(self.vm.monitor.hmp(&format!("qemu-io -d {path} \"{command}\"")), "", "{command}");
    }

    /// What `query-block` tells of a device.
    pub(crate) fn drive(&mut self, wanted: &str) -> Value {
        let blocks = self.vm.monitor.execute("query-block", &json!({})).unwrap();
        let found = blocks.as_array().unwrap().iter().find(|block| id(block).as_deref() == Some(wanted));
        found.unwrap_or_else(|| panic!("no {wanted} in {blocks:#}")).clone()
    }

    pub(crate) fn execute(&mut self, name: &str, arguments: &Value) -> Value {
        self.vm.monitor.execute(name, arguments).unwrap_or_else(|error| panic!("{name} {arguments}: {error}"))
    }

    /// The names of the bitmaps of a node.
    pub(crate) fn bitmaps(&mut self, node: &str) -> Vec<String> {
        let nodes = self.execute("query-named-block-nodes", &json!({ "flat": true }));
        let it = nodes.as_array().unwrap().iter().find(|it| it["node-name"] == node).unwrap().clone();
        let name = |bitmap: &Value| bitmap["name"].as_str().unwrap().to_owned();
        it["dirty-bitmaps"].as_array().into_iter().flatten().map(name).collect()
    }

    /// The machine is to stay as it is now.
    pub(crate) fn stays(&mut self) {
        self.found = Found::of(&mut self.vm);
    }

    /// Says that an image is the one of a restore point of now, which another tool has made.
    pub(crate) fn remember(&mut self, time: i64, image: Image) {
        self.points.push(Point { time, images: vec![image], contents: self.contents.clone() });
    }

    /// Exchanges the files of two disks, and with them what is on these, while the machine is off.
    pub(crate) fn exchange(&mut self, files: [&str; 2], ids: [&str; 2]) {
        self.vm.quit();
        let [one, other] = files.map(|file| self.vm.path(file));
        let aside = self.vm.path("aside");
        for (from, to) in [(&one, &aside), (&other, &one), (&aside, &other)] {
            std::fs::rename(from, to).unwrap();
        }
        let [first, second] = ids.map(|id| self.contents.remove(id).unwrap());
        self.contents.extend([(ids[0].to_owned(), second), (ids[1].to_owned(), first)]);
        self.vm.restart();
        self.stays();
        self.look();
    }

    /// Ends the machine as one should, and starts it again.
    pub(crate) fn restart(&mut self) {
        self.vm.quit();
        self.vm.restart();
        self.stays();
        self.look();
    }

    /// Runs the program.
    pub(crate) fn run(&self, words: &str) -> Ended {
        self.run_at(&Tool::built("qmpbackup"), &self.vm.socket(), words)
    }

    /// Runs it with a monitor whose commands a hook sees before QEMU does.
    pub(crate) fn run_through(&self, hook: Hook, words: &str) -> Ended {
        let tool = Tool::built("qmpbackup");
        let proxy = Proxy::start(&self.vm.path("proxy"), &self.vm.socket(), &tool.victim, hook);
        let ended = self.run_at(&tool, proxy.path(), words);
        proxy.end();
        ended
    }

    fn run_at(&self, tool: &Tool, socket: &Path, words: &str) -> Ended {
        let folder = self.vm.path("");
        let words: Vec<String> = words
            .split_whitespace()
            .map(|word| word.replace('@', folder.to_str().unwrap().trim_end_matches('/')))
            .collect();
        let mut all = vec!["--socket", socket.to_str().unwrap()];
        all.extend(words.iter().map(String::as_str));
        tool.run(&all)
    }

    /// Makes a backup, which ends with this code; a success is a restore point. Nothing strange is left.
    #[track_caller]
    pub(crate) fn backup(&mut self, words: &str, code: i32) -> Ended {
        let ended = self.run(&format!("backup --json --target {} {words}", self.target.display())).with(code);
        if matches!(code, 0 | 3) && !words.contains("--dry-run") {
            let text = |event: &Value, key: &str| event[key].as_str().unwrap().to_owned();
            let events = ended.events();
            let images = events.iter().filter(|event| event["event"] == "image").map(|event| Image {
                disk: text(event, "disk"),
                level: text(event, "level"),
                path: text(event, "path").into(),
            });
            let time = events.last().unwrap()["time"].as_i64().unwrap();
            self.points.push(Point { time, images: images.collect(), contents: self.contents.clone() });
        }
        self.assert_clean();
        ended
    }

    /// Makes a backup whose images have these levels, as `disk0 FULL, disk1 INC`.
    #[track_caller]
    pub(crate) fn makes(&mut self, words: &str, code: i32, levels: &str) -> Ended {
        let ended = self.backup(words, code);
        let made = &self.points.last().unwrap().images;
        let mut made: Vec<String> = made.iter().map(|image| format!("{} {}", image.disk, image.level)).collect();
        // QEMU tells drives before nodes
        made.sort();
        assert_eq!(made.join(", "), levels, "{ended:#?}");
        ended
    }

    /// An image of the newest restore point.
    pub(crate) fn newest(&self, disk: &str) -> &Path {
        let images = &self.points.last().unwrap().images;
        &images.iter().find(|image| image.disk == disk).unwrap_or_else(|| panic!("no {disk} in {images:#?}")).path
    }

    #[track_caller]
    pub(crate) fn assert_clean(&mut self) {
        let folder = self.vm.path("");
        let mut left = self.found.differences(&mut self.vm, &folder);
        left.retain(|what| !self.usual.iter().any(|usual| what.contains(usual)));
        assert_eq!(left, [""; 0]);
        assert_eq!(drives(&mut self.vm), self.drives, "devices do not have the nodes that they had");
    }
}

/// The id that a device was given.
fn id(block: &Value) -> Option<String> {
    let qdev = block["qdev"].as_str()?;
    let id = qdev.strip_prefix("/machine/peripheral/").unwrap_or(qdev).split('/').next()?;
    (!id.is_empty()).then(|| id.to_owned())
}

/// Each drive with the node that it has.
fn drives(vm: &mut Vm) -> Vec<String> {
    let blocks = vm.monitor.execute("query-block", &json!({})).unwrap();
    let line = |block: &Value| format!("{} {} {}", block["device"], block["qdev"], block["inserted"]["node-name"]);
    blocks.as_array().unwrap().iter().map(line).collect()
}
