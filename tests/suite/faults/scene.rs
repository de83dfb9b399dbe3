//! A small backup folder for a command, what is in it afterwards, and what should be.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use qmpbackup::chain::{FormatHint, Level, Manifest, create_checksums};
use qmpbackup::storage::FileStorage;
use tempfile::TempDir;

use crate::support::in_place::{assert_sound, snapshots};
use crate::support::oracle::convert;
use crate::support::program::{Ended, qmprestore};
use crate::support::seeds::are_many;
use crate::support::sums::assert_fit;
use crate::support::{sparse, tools};

const FULL: &str = "FULL-1700000000-disk";
const INCS: [&str; 2] = ["INC-1700000100-disk", "INC-1700000200-disk"];
const DISK: &str = "backup/disk0";

/// All that is below a folder: folders, links and files.
pub(super) type Tree = BTreeMap<PathBuf, Entry>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    Folder,
    Link(PathBuf),
    File(Vec<u8>),
}

/// The backup folder, as it is before the command and after.
pub(super) struct Scene {
    words: Vec<String>,
    root: TempDir,
    pub(super) before: Tree,
    pub(super) after: Tree,
    /// What the command says on stdout.
    pub(super) said: String,
    /// The disk of the newest restore point.
    disk: PathBuf,
    /// The disks of the internal snapshots.
    kept: Vec<(String, i64, PathBuf)>,
}

impl Scene {
    /// Makes the folder, does what comes before the command, and the command once.
    pub(super) fn new(earlier: &[&[&str]], words: &[&str]) -> Self {
        let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
        let mut scene = Self {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            disk: root.path().join("disk"),
            root,
            before: Tree::new(),
            after: Tree::new(),
            said: String::new(),
            kept: Vec::new(),
        };
        scene.make();
        for words in earlier {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            Ended::of(&mut scene.command_of(&words)).with(0);
        }
        scene.before = tree(&scene.folder());
        scene.said = Ended::of(&mut scene.command()).with(0).stdout;
        scene.after = tree(&scene.folder());
        scene.kept = scene.snapshots("kept");
        let made = scene.after.keys().find(|path| !scene.before.contains_key(*path) && path.ends_with("made"));
        if let Some(made) = made {
            let mut words = vec!["convert", "-O", "raw", "-f"];
            words.push(if scene.words.iter().any(|word| word == "raw") { "raw" } else { "qcow2" });
            let raw = scene.root.path().join("raw");
            tools::run(tools::qemu_img().args(words).args([&scene.folder().join(made), &raw]));
            sparse::assert_same(&raw, &scene.disk, "what was made");
        }
        scene.assert_images(false);
        scene.assert_disk();
        scene
    }

    /// The folder below which faults are.
    pub(super) fn folder(&self) -> PathBuf {
        self.root.path().join("work")
    }

    fn image(&self, name: &str) -> PathBuf {
        self.folder().join(DISK).join(name)
    }

    pub(super) fn command(&self) -> Command {
        self.command_of(&self.words)
    }

    fn command_of(&self, words: &[String]) -> Command {
        let mut command = qmprestore([&words[0], "--dir"]);
        command.arg(self.folder().join(DISK)).args(&words[1..]).current_dir(self.folder());
        command.env("RAYON_NUM_THREADS", "1").env_remove("RUST_BACKTRACE");
        command
    }

    /// Puts all back as it was before.
    pub(super) fn reset(&self) {
        std::fs::remove_dir_all(self.folder()).unwrap();
        for (path, entry) in &self.before {
            let path = self.folder().join(path);
            match entry {
                Entry::Folder => std::fs::create_dir(path).unwrap(),
                Entry::Link(target) => symlink(target, path).unwrap(),
                Entry::File(bytes) => std::fs::write(path, bytes).unwrap(),
            }
        }
    }

    /// What is there.
    pub(super) fn tree(&self) -> Tree {
        tree(&self.folder())
    }

    fn make(&mut self) {
        let dir = self.folder().join(DISK);
        std::fs::create_dir_all(&dir).unwrap();
        let writes: [(&str, &[&str]); 3] = [
            (FULL, &["write -P 1 0 512k", "write -c -P 2 1M 64k", "write -P 3 2M 100k"]),
            (INCS[0], &["write -P 4 256k 192k", "write -z 64k 64k", "write -c -P 5 1536k 64k"]),
            (INCS[1], &["write -P 6 1M 32k", "write -P 7 3M 200k"]),
        ];
        let copies = self.root.path().join("copies");
        std::fs::create_dir(&copies).unwrap();
        let mut below: Option<&str> = None;
        for ((name, writes), time) in writes.into_iter().zip([1_700_000_000, 1_700_000_100, 1_700_000_200]) {
            let image = dir.join(name);
            tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("4M"));
            let words = writes.iter().flat_map(|write| ["-c", *write]);
            tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(words).arg(&image));
            let manifest = Manifest {
                level: if below.is_none() { Level::Full } else { Level::Inc },
                image: name.to_owned(),
                time: Some(time),
                id: None,
                parent_id: None,
                bitmap: None,
                format: FormatHint::Qcow2,
                chain: Some("chain".to_owned()),
                parent: below.map(str::to_owned),
                virtual_size: 4 << 20,
                qemu: "10.0.2".to_owned(),
            };
            if self.words.iter().any(|word| word == "--repair") {
                leak(&image);
            }
            // made by another tool
            if self.words[0] != "manifest" {
                manifest.write(&image).unwrap();
                create_checksums(&image, &FileStorage::open(&image).unwrap()).unwrap();
            }
            std::fs::copy(&image, copies.join(name)).unwrap();
            if let Some(below) = below {
                let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, name];
                tools::run(tools::qemu_img().args(rebase).current_dir(&copies));
            }
            below = Some(name);
        }
        convert(&copies.join(INCS[1]), &self.disk);
        std::fs::write(self.folder().join("old"), "what the output replaces").unwrap();
    }

    /// The FULL holds the whole disk, or the link leads to it; or a merge can still make it.
    pub(super) fn assert_disk(&self) {
        let link = self.image("image");
        let raw = self.root.path().join("raw");
        if link.exists() {
            convert(&link, &raw);
        } else if INCS.iter().any(|inc| self.image(inc).exists()) {
            let words = ["merge", "--format", "raw", "--force", "--out"].map(str::to_owned);
            Ended::of(self.command_of(&words).arg(&raw)).with(0);
        } else {
            convert(&self.image(FULL), &raw);
        }
        sparse::assert_same(&raw, &self.disk, "the disk");
    }

    /// Each image that was changed and is there is sound.
    pub(super) fn assert_images(&self, leaks: bool) {
        for name in [&[FULL][..], &INCS].concat() {
            let image = self.image(name);
            let same = self.before.get(&Path::new(DISK).join(name));
            if image.exists() && same != Some(&Entry::File(std::fs::read(&image).unwrap())) {
                assert_sound(&image, leaks);
            }
        }
    }

    fn snapshots(&self, room: &str) -> Vec<(String, i64, PathBuf)> {
        snapshots(&self.image(FULL), &self.root.path().join(room))
    }

    /// All is as the command has to leave it; images need not be so byte for byte, but their disks.
    pub(super) fn assert_done(&self, leaks: bool) {
        let is = self.tree();
        // the first run was judged
        if is == self.after {
            return;
        }
        assert_eq!(is.keys().collect::<Vec<_>>(), self.after.keys().collect::<Vec<_>>());
        // those of the images that there are
        assert_fit(&self.folder());
        let same = |path: &Path| path.extension().is_none_or(|extension| extension != "crc32");
        for (path, should) in self.after.iter().filter(|(path, _)| same(path)) {
            let image = path.file_name().is_some_and(|name| name == FULL || INCS.iter().any(|inc| name == *inc));
            let (is, should) = (without_ids(path, &is[path]), without_ids(path, should));
            assert!(image || is == should, "{}: {is:?}, not {should:?}", path.display());
        }
        self.assert_images(leaks);
        self.assert_disk();
        if are_many() && !self.kept.is_empty() {
            let now = self.snapshots("now");
            assert_eq!(now.len(), self.kept.len());
            for ((name, date, disk), (kept, kept_date, kept_disk)) in now.iter().zip(&self.kept) {
                assert_eq!((name, date), (kept, kept_date));
                sparse::assert_same(disk, kept_disk, name);
            }
        }
    }
}

/// A manifest but for what is random in it, and the checksum of that.
fn without_ids(path: &Path, entry: &Entry) -> Entry {
    let (Entry::File(bytes), Some("json")) = (entry, path.extension().and_then(|extension| extension.to_str())) else {
        return entry.clone();
    };
    let mut value: serde_json::Value = serde_json::from_slice(bytes).unwrap();
    for key in ["id", "parent-id", "crc32"] {
        value.as_object_mut().unwrap().remove(key);
    }
    Entry::File(value.to_string().into_bytes())
}

/// Makes an image longer by a cluster that is counted and not used.
fn leak(image: &Path) {
    const CLUSTER: u64 = 1 << 16;
    let file = File::options().write(true).open(image).unwrap();
    let clusters = file.metadata().unwrap().len().div_ceil(CLUSTER);
    file.set_len((clusters + 1) * CLUSTER).unwrap();
    // the first refcount block of a new image is its third cluster
    file.write_all_at(&[0, 1], 2 * CLUSTER + clusters * 2).unwrap();
}

fn tree(folder: &Path) -> Tree {
    let mut found = Tree::new();
    let mut queue = vec![folder.to_owned()];
    while let Some(path) = queue.pop() {
        let kind = path.symlink_metadata().unwrap().file_type();
        let entry = if kind.is_dir() {
            queue.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Entry::Folder
        } else if kind.is_symlink() {
            Entry::Link(path.read_link().unwrap())
        } else {
            Entry::File(std::fs::read(&path).unwrap())
        };
        found.insert(path.strip_prefix(folder).unwrap().to_owned(), entry);
    }
    found
}
