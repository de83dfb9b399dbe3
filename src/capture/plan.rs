//! What is sent to QEMU, decided before any of it is sent.
//!
//! Pure: the commands follow from the disks and the options alone.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::capture::folder::files::text;
use crate::capture::names::{self, NodeRole};
use crate::capture::request::Aio;
use crate::qmp::{Command, Features};

/// Where a filter copies old data before the guest overwrites it; the job reads it from there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FleeceImage {
    /// The device whose drive is exchanged.
    pub qdev: String,
    /// The fleece image.
    pub file: PathBuf,
}

/// The bitmap that an INC follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Old {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
}

/// A disk of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskPlan {
    /// The node that the device has.
    pub node: String,
    /// The node with the disk's format and bitmaps.
    pub format_node: String,
    /// Whether it has a backing file.
    pub is_overlay: bool,
    /// Where its moment is kept; without one, the job itself copies old data to the target before the guest overwrites it.
    pub fleece: Option<FleeceImage>,
    /// The image that is made, under the name that it has until it is whole.
    pub target: PathBuf,
    /// What changed since the image before; INCs only.
    pub old: Option<Old>,
    /// The bitmap that records from now on, and whether QEMU can store it; none with COPY.
    pub new: Option<(String, bool)>,
}

/// What holds for all disks.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches of a command line, independent of each other")]
pub(crate) struct Settings {
    /// The lock of the target folder.
    pub lock: PathBuf,
    /// Whether the machine runs, and must be stopped for its disks to stand still.
    pub running: bool,
    /// Stop it even if QEMU does not need that.
    pub pause: bool,
    /// Compress the images.
    pub compress: bool,
    /// Bytes a second of each job; 0 is no limit.
    pub speed: u64,
    /// Seconds that the guest waits for a fleece image.
    pub cbw_timeout: u32,
    /// Go around the host's cache.
    pub direct: bool,
    /// How QEMU writes the images.
    pub aio: Aio,
    /// Let jobs go when they end, see [`is_fragile`](crate::capture::machine::abilities::is_fragile).
    pub auto_dismiss: bool,
}

/// All commands of a run, in the order in which they are sent.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// The machine's lock, before there is a file or a bitmap of the run.
    pub lock: Vec<Command>,
    /// What goes before the moment, while the guest works: new bitmaps, images, filters.
    pub prepare: Vec<Command>,
    /// The moment of all disks. Where file systems are frozen, they are for this long.
    pub moment: Vec<Command>,
    /// What begins the jobs that do not begin in the moment itself.
    pub start: Vec<Command>,
}

impl Plan {
    /// Decides on all commands.
    pub(super) fn new(disks: &[DiskPlan], settings: &Settings, features: &Features) -> Self {
        let mut prepare: Vec<Command> =
            transaction(disks.iter().filter_map(begin_bitmap).collect(), None).into_iter().collect();
        let each = || disks.iter().enumerate();
        prepare.extend(each().map(|(number, disk)| target(number, disk, settings)));
        let fleeced = || each().filter_map(|(number, disk)| Some((number, disk, disk.fleece.as_ref()?)));
        prepare.extend(fleeced().map(|(number, _, fleece)| image(NodeRole::Fleece.node(number), &fleece.file, None)));
        prepare.extend(fleeced().map(|(number, disk, _)| filter(number, disk, settings)));

        let exchange = |(number, _, fleece): (usize, _, &FleeceImage)| {
            set_drive(&fleece.qdev, &NodeRole::CopyBeforeWrite.node(number))
        };
        let mut moment: Vec<Command> = fleeced().map(exchange).collect();
        let stops = settings.running && (settings.pause || !moment.is_empty());
        let plain = each().filter(|(_, disk)| disk.fleece.is_none());
        let plain = plain.map(|(number, disk)| begin_plain(number, disk, settings, features));
        moment.extend(transaction(plain.collect(), None));
        if stops {
            moment.insert(0, Command::new("stop"));
            moment.push(Command::new("cont"));
        }

        let mut start: Vec<Command> = fleeced().map(|(number, ..)| snapshot(number)).collect();
        start.extend(fleeced().filter_map(|(number, disk, _)| copied(number, disk)));
        let jobs = fleeced().map(|(number, disk, _)| {
            let bitmap = disk.old.as_ref().map(|_| names::COPIED);
            backup_snapshot(number, bitmap, settings)
        });
        start.extend(transaction(jobs.collect(), Some("grouped")));
        Self { lock: vec![lock(&settings.lock)], prepare, moment, start }
    }

    /// All commands, in order.
    pub fn commands(&self) -> impl Iterator<Item = &Command> {
        self.lock.iter().chain(&self.prepare).chain(&self.moment).chain(&self.start)
    }
}

/// The node that is the machine's lock: adding it fails while another run has it.
fn lock(file: &Path) -> Command {
    Command::new("blockdev-add")
        .with("driver", "file")
        .with("node-name", names::LOCK)
        .with("filename", text(file))
        .with("read-only", true)
        .with("locking", "off")
}

/// A node that says something by being there.
pub(super) fn mark(node: &str) -> Command {
    Command::new("blockdev-add").with("driver", "null-co").with("node-name", node)
}

/// The image that a job writes. QEMU writes the last tables when it closes it, and tells nobody if it cannot. Where it cannot
/// be asked to write them [before](flush), it marks with lazy refcounts an image that gets plain clusters as dirty, and takes
/// the mark away only when all of it is written.
fn target(number: usize, disk: &DiskPlan, settings: &Settings) -> Command {
    let image = image(NodeRole::Target.node(number), &disk.target, Some(settings)).with("lazy-refcounts", true);
    // of an overlay, a snapshot does not say where nothing is: the job copies zeroes there
    if disk.is_overlay && disk.fleece.is_some() { image.with("detect-zeroes", "on") } else { image }
}

fn image(node: String, file: &Path, settings: Option<&Settings>) -> Command {
    let mut protocol = json!({"driver": "file", "filename": text(file)});
    let mut command =
        Command::new("blockdev-add").with("driver", "qcow2").with("node-name", node).with("discard", "unmap");
    if let (Some(settings), Some(protocol)) = (settings, protocol.as_object_mut()) {
        let aio = match settings.aio {
            Aio::Threads => "threads",
            Aio::IoUring => "io_uring",
        };
        protocol.insert("aio".to_owned(), aio.into());
        if settings.direct {
            protocol.insert("cache".to_owned(), json!({"direct": true}));
            command = command.with("cache", json!({"direct": true}));
        }
    }
    command.with("file", protocol)
}

/// The filter between a device and its disk. It has no bitmap: the job decides what it reads. Without `discard` the guest's
/// would be lost in it.
fn filter(number: usize, disk: &DiskPlan, settings: &Settings) -> Command {
    Command::new("blockdev-add")
        .with("driver", "copy-before-write")
        .with("node-name", NodeRole::CopyBeforeWrite.node(number))
        .with("file", disk.node.clone())
        .with("target", NodeRole::Fleece.node(number))
        .with("on-cbw-error", "break-snapshot")
        .with("discard", "unmap")
        .with("cbw-timeout", settings.cbw_timeout)
}

/// Has QEMU write all of an image that a job has made, and nothing after that; `file` is the node below it. This fails where
/// something cannot be written. Not [every QEMU](crate::capture::machine::abilities::can_flush) can.
pub(super) fn flush(number: usize, file: &str) -> Command {
    let image = json!({
        "driver": "qcow2",
        "node-name": NodeRole::Target.node(number),
        "read-only": true,
        "file": file,
    });
    Command::new("blockdev-reopen").with("options", json!([image]))
}

/// Exchanges what a device reads and writes.
pub(super) fn set_drive(qdev: &str, node: &str) -> Command {
    Command::new("qom-set").with("path", path(qdev)).with("property", "drive").with("value", node)
}

/// Asks for a property of a device.
pub(super) fn property(qdev: &str, property: &str) -> Command {
    Command::new("qom-get").with("path", path(qdev)).with("property", property)
}

/// Where a device is. Of some devices QEMU tells the id only, which other objects may have, too.
fn path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

fn begin_bitmap(disk: &DiskPlan) -> Option<Value> {
    let (name, persistent) = disk.new.as_ref()?;
    let data = json!({"node": disk.format_node, "name": name, "persistent": persistent});
    Some(action("block-dirty-bitmap-add", data))
}

/// The job that copies old data itself. It takes the old bitmap as it is when the disk stands still: all that a write had
/// begun is in it then. A bitmap that was disabled before would lack what was on its way, while the guest goes on with
/// other disks as soon as that is done.
///
/// If the target fails, QEMU breaks the guest's write, unless it can be told to break the backup instead.
fn begin_plain(number: usize, disk: &DiskPlan, settings: &Settings, features: &Features) -> Value {
    let old = disk.old.as_ref().map(|old| old.name.as_str());
    let mut job = backup(number, &disk.format_node, old, settings);
    if let (true, Some(data)) = (features.backup_on_cbw_error, job.get_mut("data").and_then(Value::as_object_mut)) {
        data.insert("on-cbw-error".to_owned(), "break-snapshot".into());
    }
    job
}

fn snapshot(number: usize) -> Command {
    Command::new("blockdev-add")
        .with("driver", "snapshot-access")
        .with("node-name", NodeRole::Snapshot.node(number))
        .with("file", NodeRole::CopyBeforeWrite.node(number))
        .with("discard", "unmap")
}

/// The job that copies a snapshot. What it has copied is of no use in the fleece image any more, and goes there: the guest
/// may overwrite it at once then.
fn backup_snapshot(number: usize, bitmap: Option<&str>, settings: &Settings) -> Value {
    let mut job = backup(number, &NodeRole::Snapshot.node(number), bitmap, settings);
    if let Some(data) = job.get_mut("data").and_then(Value::as_object_mut) {
        data.insert("discard-source".to_owned(), true.into());
    }
    job
}

/// What an INC copies. What was written after the moment is in the old bitmap, too: so much more is copied, as it was.
fn copied(number: usize, disk: &DiskPlan) -> Option<Command> {
    let old = disk.old.as_ref()?;
    let snapshot = NodeRole::Snapshot.node(number);
    let new = json!({"node": snapshot, "name": names::COPIED, "disabled": true, "granularity": old.granularity});
    let bitmaps = json!([{"node": disk.format_node, "name": old.name}]);
    let merge = json!({"node": snapshot, "target": names::COPIED, "bitmaps": bitmaps});
    transaction(vec![action("block-dirty-bitmap-add", new), action("block-dirty-bitmap-merge", merge)], None)
}

fn backup(number: usize, source: &str, bitmap: Option<&str>, settings: &Settings) -> Value {
    let mut data = json!({
        "job-id": names::job(number),
        "device": source,
        "target": NodeRole::Target.node(number),
        "sync": if bitmap.is_some() { "bitmap" } else { "full" },
        "auto-dismiss": settings.auto_dismiss,
        "compress": settings.compress,
        "speed": settings.speed,
    });
    if let (Some(bitmap), Some(data)) = (bitmap, data.as_object_mut()) {
        data.insert("bitmap".to_owned(), bitmap.into());
        data.insert("bitmap-mode".to_owned(), "never".into());
    }
    action("blockdev-backup", data)
}

#[expect(clippy::needless_pass_by_value, reason = "callers make it on the spot")]
pub(super) fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

/// One moment for several actions; none where there are none.
pub(super) fn transaction(actions: Vec<Value>, completion: Option<&str>) -> Option<Command> {
    if actions.is_empty() {
        return None;
    }
    let command = Command::new("transaction").with("actions", actions);
    Some(match completion {
        Some(mode) => command.with("properties", json!({"completion-mode": mode})),
        None => command,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            lock: "/t/.qmpbackup/lock".into(),
            running: true,
            pause: false,
            compress: false,
            speed: 0,
            cbw_timeout: 45,
            direct: false,
            aio: Aio::Threads,
            auto_dismiss: false,
        }
    }

    fn disk(number: usize, fleece: bool, old: bool) -> DiskPlan {
        let image = FleeceImage { qdev: format!("/vb{number}"), file: format!("/d/{number}.fleece.qcow2").into() };
        DiskPlan {
            node: format!("top{number}"),
            format_node: format!("disk{number}"),
            is_overlay: false,
            fleece: fleece.then_some(image),
            target: format!("/t/{number}.partial").into(),
            old: old.then(|| Old { name: "qmpbackup-5-c".to_owned(), granularity: 4096 }),
            new: Some(("qmpbackup-6-c".to_owned(), true)),
        }
    }

    /// Each command in a line: its name and, of a transaction, the actions.
    fn lines(commands: &[Command]) -> Vec<String> {
        let line = |command: &Command| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let arguments = command.arguments();
            let detail = match (command.name(), arguments.get("actions").and_then(Value::as_array)) {
                (_, Some(actions)) => actions
                    .iter()
                    .map(|action| {
                        let place = |key: &str| text(&action["data"][key]);
                        let where_ = [place("node"), place("device"), place("target"), place("name"), place("bitmap")];
                        let words: Vec<&str> =
                            where_.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
                        format!("{} {}", text(&action["type"]), words.join(" "))
                    })
                    .collect::<Vec<_>>()
                    .join(" + "),
                ("qom-set", _) => format!("{} {}", text(&arguments["path"]), text(&arguments["value"])),
                _ => arguments.get("node-name").map(text).unwrap_or_default(),
            };
            format!("{} {detail}", command.name()).trim_end().to_owned()
        };
        commands.iter().map(line).collect()
    }

    #[test]
    fn with_fleecing_the_machine_stops_only_to_exchange_drives() {
        let plan = Plan::new(&[disk(0, true, true), disk(1, true, false)], &settings(), &Features::default());
        assert_eq!(lines(&plan.lock), ["blockdev-add qmpbackup-lock"]);
        let prepare = [
            "transaction block-dirty-bitmap-add disk0 qmpbackup-6-c + block-dirty-bitmap-add disk1 qmpbackup-6-c",
            "blockdev-add qmpbackup-0-target",
            "blockdev-add qmpbackup-1-target",
            "blockdev-add qmpbackup-0-fleece",
            "blockdev-add qmpbackup-1-fleece",
            "blockdev-add qmpbackup-0-cbw",
            "blockdev-add qmpbackup-1-cbw",
        ];
        assert_eq!(lines(&plan.prepare), prepare);
        assert_eq!(
            lines(&plan.moment),
            ["stop", "qom-set /vb0 qmpbackup-0-cbw", "qom-set /vb1 qmpbackup-1-cbw", "cont"]
        );
        let start = [
            "blockdev-add qmpbackup-0-snapshot",
            "blockdev-add qmpbackup-1-snapshot",
            "transaction block-dirty-bitmap-add qmpbackup-0-snapshot qmpbackup-copied + block-dirty-bitmap-merge \
             qmpbackup-0-snapshot qmpbackup-copied",
            "transaction blockdev-backup qmpbackup-0-snapshot qmpbackup-0-target qmpbackup-copied + blockdev-backup \
             qmpbackup-1-snapshot qmpbackup-1-target",
        ];
        assert_eq!(lines(&plan.start), start);
        let jobs = plan.start.last().unwrap().arguments()["actions"].as_array().unwrap();
        assert!(jobs.iter().all(|job| job["data"]["discard-source"] == true), "{jobs:?}");
        assert_eq!(plan.start[0].arguments()["discard"], "unmap");
        let grouped = plan.start.last().unwrap().arguments()["properties"].clone();
        assert_eq!(grouped, json!({"completion-mode": "grouped"}));
    }

    #[test]
    fn a_device_of_which_qemu_tells_the_id_only_has_a_path() {
        let paths = ["nv", "/machine/peripheral/nv", "/machine/unattached/device[5]"];
        let sent = paths.map(|qdev| set_drive(qdev, "n").arguments()["path"].clone());
        assert_eq!(sent, [paths[1], paths[1], paths[2]]);
    }

    #[test]
    fn without_fleecing_the_moment_is_one_transaction() {
        let plan = Plan::new(&[disk(0, false, true), disk(1, false, false)], &settings(), &Features::default());
        assert_eq!(plan.prepare.len(), 3);
        let moment = "transaction blockdev-backup disk0 qmpbackup-0-target qmpbackup-5-c + blockdev-backup disk1 \
                      qmpbackup-1-target";
        assert_eq!(lines(&plan.moment), [moment]);
        assert!(plan.start.is_empty());
        let job = |features: &Features| {
            let plan = Plan::new(&[disk(0, false, false)], &settings(), features);
            plan.moment[0].arguments()["actions"][0]["data"]["on-cbw-error"].clone()
        };
        let mut new = Features::default();
        new.backup_on_cbw_error = true;
        assert_eq!((job(&Features::default()), job(&new)), (Value::Null, json!("break-snapshot")));
        let pause = Settings { pause: true, ..settings() };
        let plan = Plan::new(&[disk(0, false, false)], &pause, &Features::default());
        assert_eq!(lines(&plan.moment), ["stop", "transaction blockdev-backup disk0 qmpbackup-0-target", "cont"]);
    }

    #[test]
    fn both_ways_share_one_moment() {
        let plan = Plan::new(&[disk(0, true, false), disk(1, false, false)], &settings(), &Features::default());
        let moment =
            ["stop", "qom-set /vb0 qmpbackup-0-cbw", "transaction blockdev-backup disk1 qmpbackup-1-target", "cont"];
        assert_eq!(lines(&plan.moment), moment);
        assert_eq!(plan.commands().count(), 1 + plan.prepare.len() + moment.len() + plan.start.len());
    }

    #[test]
    fn a_machine_that_stands_still_is_not_stopped() {
        let still = Settings { running: false, pause: true, ..settings() };
        let plan = Plan::new(&[disk(0, true, false)], &still, &Features::default());
        assert_eq!(lines(&plan.moment), ["qom-set /vb0 qmpbackup-0-cbw"]);
    }

    #[test]
    fn options_reach_the_images_and_jobs() {
        let settings = Settings { direct: true, aio: Aio::IoUring, compress: true, speed: 7, ..settings() };
        let plan = Plan::new(&[disk(0, true, false)], &settings, &Features::default());
        let argument = |command: &str, key: &str| {
            let find = |found: &&Command| found.arguments().get("node-name").is_some_and(|name| name == command);
            plan.commands().find(find).and_then(|found| found.arguments().get(key).cloned())
        };
        assert_eq!(argument("qmpbackup-0-cbw", "cbw-timeout"), Some(json!(45)));
        let file = argument("qmpbackup-0-target", "file").unwrap();
        assert_eq!((&file["aio"], &file["cache"]), (&json!("io_uring"), &json!({"direct": true})));
        let job = &plan.start.last().unwrap().arguments()["actions"][0]["data"];
        assert_eq!((&job["compress"], &job["speed"], &job["sync"]), (&json!(true), &json!(7), &json!("full")));
    }
}
