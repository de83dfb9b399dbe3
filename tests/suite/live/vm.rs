//! A real QEMU with disks, and monitors for everybody: `qmp` for the program, others for the tests. It dies with the
//! test, also with one that fails.
//!
//! Without a guest it halts at once: nothing but [`super::hand`] uses the disks. The usual firmware would reset virtio disks
//! as it starts, and QEMU 5.2 can abort when that meets the end of a backup job (`bdrv_do_drained_end`).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::hand::Hand;
use super::history::History;
use super::monitor::Monitor;
use super::spec::{Bus, DiskSpec, device_id};
use crate::support::tools;

pub(crate) const RELEASES: [&str; 4] = ["5.2", "7.2", "10.0", "11"];

/// Whether the program keeps old data in fleece images there.
pub(crate) fn fleeces(release: &str) -> bool {
    !["5.2", "7.2"].contains(&release)
}

pub(crate) struct Builder {
    release: &'static str,
    disks: Vec<DiskSpec>,
    prelaunch: bool,
    guest: bool,
    agent: bool,
    words: Vec<String>,
}

impl Builder {
    pub(crate) fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// The machine waits for `cont`.
    pub(crate) fn prelaunch(mut self) -> Self {
        self.prelaunch = true;
        self
    }

    /// A Linux with a shell on the socket `shell`, see [`super::guest`].
    pub(crate) fn guest(mut self) -> Self {
        self.guest = true;
        self
    }

    /// The guest agent on the socket `agent`.
    pub(crate) fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// More words for QEMU's command line.
    pub(crate) fn words(mut self, words: impl IntoIterator<Item = String>) -> Self {
        self.words.extend(words);
        self
    }

    pub(crate) fn start(self) -> Vm {
        self.start_in(new_folder())
    }

    /// Starts it in a folder with files that it needs.
    pub(crate) fn start_in(self, folder: TempDir) -> Vm {
        for disk in &self.disks {
            disk.create(folder.path());
        }
        std::fs::write(folder.path().join(FIRMWARE), halting_firmware()).unwrap();
        let arguments = self.arguments(folder.path());
        let (process, monitor) = spawn(self.release, &arguments, folder.path());
        Vm { release: self.release, process, folder, arguments, monitor, disks: self.disks }
    }

    fn arguments(&self, folder: &Path) -> Vec<String> {
        let memory = if self.guest { "256" } else { "64" };
        let machine = if self.disks.iter().any(|disk| disk.bus == Bus::Ide) { "pc" } else { "q35" };
        let mut arguments: Vec<String> = ["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"]
            .into_iter()
            .chain(["-m", memory, "-M", machine])
            .map(str::to_owned)
            .collect();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        for name in ["qmp", "hand", "look", "qmp2"] {
            add("-qmp", format!("unix:{},server=on,wait=off", file(name)));
        }
        if self.guest {
            add("-kernel", tools::guest_file("vmlinuz").to_str().unwrap().to_owned());
            add("-initrd", tools::guest_file("initramfs").to_str().unwrap().to_owned());
            add("-append", "console=ttyS0 quiet panic=-1 guest=serve".to_owned());
            add("-serial", format!("file:{}", file("console")));
            add("-device", "virtio-serial-pci".to_owned());
        } else {
            add("-bios", file(FIRMWARE));
        }
        for (wanted, name, port) in
            [(self.guest, "shell", "shell"), (self.guest && self.agent, "agent", "org.qemu.guest_agent.0")]
        {
            if wanted {
                add("-chardev", format!("socket,id={name},path={},server=on,wait=off", file(name)));
                add("-device", format!("virtserialport,chardev={name},name={port}"));
            }
        }
        if self.disks.iter().any(|disk| disk.bus == Bus::VirtioScsi) {
            add("-device", "virtio-scsi-pci,id=scsi".to_owned());
        }
        for (number, disk) in self.disks.iter().enumerate() {
            arguments.extend(disk.arguments(folder, number));
        }
        arguments.extend(self.words.iter().cloned());
        if self.prelaunch {
            arguments.push("-S".to_owned());
        }
        arguments
    }
}

const FIRMWARE: &str = "firmware";

/// Instead of firmware: where the processor begins, 16 bytes before the end, it halts for ever.
fn halting_firmware() -> Vec<u8> {
    // cli; hlt; jmp to hlt
    let halt = [0xfa, 0xf4, 0xeb, 0xfd];
    let mut image = vec![0; 1 << 16];
    let start = image.len() - 16;
    image[start..start + halt.len()].copy_from_slice(&halt);
    image
}

/// A folder for a machine.
pub(super) fn new_folder() -> TempDir {
    tempfile::Builder::new().prefix("qmpbackup-live-").tempdir().unwrap()
}

pub(crate) struct Vm {
    pub(crate) release: &'static str,
    process: Process,
    folder: TempDir,
    arguments: Vec<String>,
    /// A monitor of the tests' own.
    pub(crate) monitor: Monitor,
    pub(crate) disks: Vec<DiskSpec>,
}

impl Vm {
    pub(crate) fn builder(release: &'static str) -> Builder {
        Builder { release, disks: Vec::new(), prelaunch: false, guest: false, agent: false, words: Vec::new() }
    }

    /// A file in the folder of the machine: a disk, a socket, or what a test puts there.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The monitor that is the program's.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("qmp")
    }

    /// That which writes to the disks; there is one at a time.
    pub(crate) fn hand(&mut self, history: &Arc<Mutex<History>>) -> Hand {
        let paths = (0..self.disks.len()).map(|number| self.device(number)["qdev"].as_str().unwrap().to_owned());
        let paths = paths.collect();
        let discards = self.release != "5.2";
        Hand::new(Monitor::connect(&self.path("hand")), paths, discards, self.path("said"), Arc::clone(history))
    }

    /// What `query-block` tells of a disk's device.
    pub(crate) fn device(&mut self, number: usize) -> Value {
        let blocks = self.monitor.execute("query-block", &json!({})).unwrap();
        let id = device_id(number);
        let is_it = |block: &&Value| block["qdev"].as_str().is_some_and(|path| path.split('/').any(|part| part == id));
        blocks.as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("no {id} in {blocks:#}")).clone()
    }

    /// The name of the node that a disk's device has now.
    pub(crate) fn node(&mut self, number: usize) -> String {
        self.device(number)["inserted"]["node-name"].as_str().unwrap().to_owned()
    }

    /// What says how long files may become that it writes to.
    pub(super) fn file_limit(&self) -> FileLimit {
        FileLimit(Pid::from_child(&self.process.0))
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends it as one should: bitmaps that are persistent are saved.
    pub(crate) fn quit(&mut self) {
        self.monitor.send("quit", &json!({}));
        let until = Instant::now() + Duration::from_secs(60);
        while self.process.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "QEMU does not quit");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it again after it has ended, with the same disks.
    pub(crate) fn restart(&mut self) {
        (self.process, self.monitor) = spawn(self.release, &self.arguments, self.folder.path());
    }
}

/// How long files may become that a process writes to; what is behind that cannot be written even where it is there.
#[derive(Clone, Copy)]
pub(super) struct FileLimit(Pid);

impl FileLimit {
    pub(super) fn set(self, bytes: Option<u64>) {
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(self.0), Resource::Fsize, limit).unwrap();
    }
}

/// A QEMU that ends with its owner.
struct Process(Child);

impl Process {
    fn kill(&mut self) {
        // It may be gone already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(release: &str, arguments: &[String], folder: &Path) -> (Process, Monitor) {
    let look = folder.join("look");
    // One that was killed has left its socket
    let _ = std::fs::remove_file(&look);
    // qemu-io tells there what became of a write, not in the monitor
    let said = File::options().create(true).append(true).open(folder.join("said")).unwrap();
    // a write beyond its limit is an error, and not its end
    let mut command = Command::new("env");
    command.arg("--ignore-signal=XFSZ").arg(tools::qemu_system_of(release).get_program());
    let child = command.args(arguments).current_dir(folder).stdin(Stdio::null()).stdout(said).spawn();
    let mut process = Process(child.unwrap_or_else(|error| panic!("{}: {error}", tools::line(&command))));
    while !look.exists() {
        let ended = process.0.try_wait().unwrap();
        assert_eq!(ended, None, "{}", tools::line(&command));
        std::thread::sleep(Duration::from_millis(5));
    }
    let monitor = Monitor::connect(&look);
    (process, monitor)
}
