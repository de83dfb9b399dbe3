//! Backup folders by a seed: a FULL or two, the INCs after them, and what else lies about in the field.
//!
//! `qemu-img` and `qemu-io` make the images; every command is kept so that a failure can be seen again by hand.

use std::collections::HashSet;
use std::fs::{File, FileTimes};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use crate::support::disk::Disk;
use crate::support::layer::{Knobs, Layer, Writer};
use crate::support::prng::Prng;
use crate::support::tools;

const DISK_NAMES: [&str; 6] = [
    "disk1.qcow2",
    "vm-101-disk-0.qcow2",
    "my server - data (old).qcow2",
    "FULL-metal jacket.qcow2",
    "INC-1640000001-x",
    "größe,file=a.img",
];

/// A backup folder and all there is to know about it.
pub(crate) struct Chain {
    pub(crate) seed: u64,
    /// `ROOT/backup/<disk>` is the folder, `ROOT` has room for what the test makes of it.
    root: TempDir,
    pub(crate) dir: PathBuf,
    /// In the order of their times.
    pub(crate) layers: Vec<Layer>,
    /// How all of it was made.
    pub(crate) commands: Vec<String>,
    noise: Vec<Vec<u8>>,
    hot: Vec<u64>,
}

impl Chain {
    pub(crate) fn generate(seed: u64) -> Self {
        let prng = &mut Prng::stream(seed, 0);
        let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let disk = *prng.pick(&DISK_NAMES);
        let dir = root.path().join("backup").join(disk);
        std::fs::create_dir_all(&dir).unwrap();
        let cd = format!("cd {}", tools::quoted(dir.to_str().unwrap()));
        let mut chain =
            Self { seed, root, dir, layers: Vec::new(), commands: vec![cd], noise: Vec::new(), hot: vec![0] };
        chain.make_noise(prng);

        // Several L1 entries with clusters of the usual size, or a disk that is quickly read
        let wide = prng.one_in(12);
        let (smallest_cluster_bits, mut size) = match prng.below(12) {
            _ if wide => (12, prng.between(600 << 20, 2 << 30)),
            0 => (9, prng.between(1, 64 << 10)),
            1..=3 => (9, prng.between(4 << 20, 12 << 20)),
            _ => (9, prng.between(64 << 10, 4 << 20)),
        };
        if wide {
            chain.hot.extend([(512 << 20) - (64 << 10), 512 << 20]);
        }
        let layers = if prng.one_in(10) { prng.between(7, 10) } else { prng.between(2, 6) };
        let second_full = prng.one_in(5).then(|| prng.below(layers));
        let alike = prng.one_in(4);
        let suffix = if prng.one_in(8) { String::new() } else { format!("-{disk}") };
        let mut time = 1_640_000_000 + prng.below(100_000_000);
        for number in 0..layers {
            if number > 0 && prng.one_in(4) {
                size = prng.between(size / 2, size * 2);
            }
            size = size.next_multiple_of(512).max(512);
            time += prng.between(1, 90_000);
            let full = number == 0 || second_full == Some(number);
            let knobs = match chain.layers.last() {
                Some(last) if alike => last.knobs.clone(),
                _ => Knobs::draw(prng, smallest_cluster_bits, size),
            };
            let point = format!("{}-{time}", if full { "FULL" } else { "INC" });
            chain.make_layer(prng, knobs, full, point, &suffix, size);
            let now = chain.layers.last().map_or(size, |layer| layer.alone.size());
            // Half of the disks that shrank grow again at once
            size = if now < size && prng.one_in(2) { size } else { now };
        }
        chain.leave_strays(prng, disk, time);
        chain.scramble_times(prng);
        chain
    }

    /// A folder beside the backups for what a test makes of them.
    pub(crate) fn room(&self, name: &str) -> PathBuf {
        let room = self.root.path().join(name);
        std::fs::create_dir_all(&room).unwrap();
        room
    }

    /// The folder with the disk's folder in it.
    pub(crate) fn target(&self) -> PathBuf {
        self.root.path().join("backup")
    }

    /// The layers that a restore point is made of, the FULL first.
    pub(crate) fn until(&self, number: usize) -> &[Layer] {
        let full = self.layers[..=number].iter().rposition(|layer| layer.full).unwrap();
        &self.layers[full..=number]
    }

    /// Contents for writes: one that nothing compresses, one that loses about half.
    fn make_noise(&mut self, prng: &mut Prng) {
        for number in 0..3_u8 {
            let len = usize::try_from(prng.between(60_000, 300_000)).unwrap();
            let mut bytes = prng.bytes(len);
            if number > 0 {
                for byte in &mut bytes {
                    *byte &= 0x0f;
                }
            }
            std::fs::write(self.root.path().join(format!("noise-{number}")), &bytes).unwrap();
            self.noise.push(bytes);
            let kind = if number > 0 { "bytes from 0 to 15" } else { "any bytes" };
            self.commands.push(format!("# ../../noise-{number}: {len} random bytes, {kind}"));
        }
    }

    fn make_layer(&mut self, prng: &mut Prng, knobs: Knobs, full: bool, point: String, suffix: &str, size: u64) {
        let name = format!("{point}{suffix}");
        let options = knobs.options();
        self.run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", &options, &name, &size.to_string()]));
        let mut alone = Disk::new(size);
        let (mut touched, mut compressed, mut snapshots) = (HashSet::new(), false, 0);
        let stages = prng.between(1, 3);
        let shrinks = !knobs.killed && prng.one_in(4);
        let (mut shrank, mut end) = (false, None);
        for stage in 1..=stages {
            let count = prng.between(u64::from(full), if full { 12 } else { 6 });
            let mut hot = std::mem::take(&mut self.hot);
            let mut writer = Writer {
                knobs: &knobs,
                alone: &mut alone,
                noise: &self.noise,
                hot: &mut hot,
                touched: std::mem::take(&mut touched),
                compressed: HashSet::new(),
                freed_compressed: false,
            };
            let first = if full && stage == 1 && !prng.one_in(3) { writer.fill(prng) } else { None };
            let mut batch: Vec<String> = first.into_iter().chain((0..count).map(|_| writer.draw(prng))).collect();
            if stage == stages && shrinks && snapshots == 0 {
                let (write, cut) = writer.straddle(prng);
                batch.push(write);
                end = Some(cut);
            }
            touched = std::mem::take(&mut writer.touched);
            compressed |= writer.freed_compressed || !writer.compressed.is_empty();
            self.hot = hot;
            self.write(&name, &batch, knobs.killed && stage == stages);
            if stage == stages {
                break;
            }
            match prng.below(4) {
                // A snapshot doubles refcounts, which must fit
                0 if knobs.refcount_bits >= 16 || (knobs.refcount_bits > 1 && !compressed && snapshots == 0) => {
                    let snapshot = format!("snapshot {stage}");
                    self.run(tools::qemu_img().args(["snapshot", "-q", "-c", &snapshot, &name]));
                    snapshots += 1;
                }
                1 if knobs.version_3 => {
                    let bitmap = format!("bitmap {stage}");
                    self.run(tools::qemu_img().args(["bitmap", "--add", "-f", "qcow2", &name, &bitmap]));
                }
                2 if knobs.version_3 || snapshots == 0 => {
                    let to = prng.between(alone.size() / 2, alone.size() * 2).next_multiple_of(512).max(512);
                    // What a shrunk image still has past its end would come back
                    if to < alone.size() || (full && !shrank) {
                        shrank |= to < alone.size();
                        self.resize(&name, &mut alone, to);
                    }
                }
                _ => {}
            }
        }
        if let Some(cut) = end {
            self.resize(&name, &mut alone, cut);
        }
        self.layers.push(Layer { name, point, full, knobs, alone });
    }

    /// A smaller disk keeps its last cluster whole in the file: data that no longer is the disk's.
    fn resize(&mut self, name: &str, alone: &mut Disk, to: u64) {
        self.run(tools::qemu_img().args(["resize", "-q", "--shrink", "-f", "qcow2", name, &to.to_string()]));
        alone.resize(to);
    }

    fn write(&mut self, name: &str, batch: &[String], killed: bool) {
        let mut qemu_io = tools::qemu_io();
        qemu_io.args(["-f", "qcow2", "-t", "unsafe", "-d", "unmap"]);
        for command in batch {
            qemu_io.args(["-c", command]);
        }
        if killed {
            qemu_io.args(["-c", "flush", "-c", "sigraise 9", name]).current_dir(&self.dir);
            self.commands.push(tools::line(&qemu_io));
            let output = tools::output(&mut qemu_io);
            let complete = output.status.code().is_none() && output.stdout.is_empty() && output.stderr.is_empty();
            assert!(complete, "{}", tools::told(&qemu_io, &output));
        } else if !batch.is_empty() {
            self.run(qemu_io.arg(name));
        }
    }

    fn run(&mut self, command: &mut Command) {
        command.current_dir(&self.dir);
        self.commands.push(tools::line(command));
        let output = tools::output(command);
        // qemu-io tells of a failed write on standard output
        let silent = output.stdout.is_empty() && output.stderr.is_empty();
        assert!(
            output.status.success() && silent,
            "seed {}: {}\nafter:\n{}",
            self.seed,
            tools::told(command, &output),
            self.commands.join("\n")
        );
    }

    /// Files that are no restore points.
    fn leave_strays(&mut self, prng: &mut Prng, disk: &str, time: u64) {
        let later = time + prng.between(1, 1000);
        let strays = [
            (format!("INC-{later}-{disk}.partial"), "QFI"),
            ("notes.txt".to_owned(), "FULL-1 was made by hand\n"),
            ("../uuid".to_owned(), "1b4e28ba-2fa1-11d2-883f-0016d3cca427"),
            (format!("../{disk}.config"), r#"{"format":"qcow2"}"#),
            (".qmpbackup-not".to_owned(), ""),
        ];
        for (name, content) in strays {
            if prng.one_in(2) {
                std::fs::write(self.dir.join(&name), content).unwrap();
                self.commands.push(format!("printf %s {} > {}", tools::quoted(content), tools::quoted(&name)));
            }
        }
        if prng.one_in(3) {
            std::fs::create_dir(self.dir.join("lost+found")).unwrap();
            self.commands.push("mkdir lost+found".to_owned());
        }
    }

    /// The order of a chain is that of the names.
    fn scramble_times(&self, prng: &mut Prng) {
        for layer in &self.layers {
            let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000 + prng.below(200_000_000));
            let file = File::options().append(true).open(self.dir.join(&layer.name)).unwrap();
            file.set_times(FileTimes::new().set_modified(modified)).unwrap();
        }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("QMPBACKUP_KEEP").is_some() {
            self.root.disable_cleanup(true);
            eprintln!("kept: {}", self.root.path().display());
        }
    }
}
