//! Images that are changed in place and held against QEMU after it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use qmpbackup::qcow2::{self, GuestOffset, Image, Reader, Writer};
use qmpbackup::storage::{MemoryStorage, WritableStorage};
use tempfile::TempDir;

use crate::support::tools;

/// A folder in which QEMU's tools make images and judge them.
pub(crate) struct Bench(TempDir);

impl Bench {
    pub(crate) fn new() -> Self {
        Self(tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn create(&self, name: &str, options: &str, size: u64) -> &Self {
        self.img(&["create", "-q", "-f", "qcow2", "-o", options, name, &size.to_string()])
    }

    pub(crate) fn img(&self, arguments: &[&str]) -> &Self {
        tools::run(tools::qemu_img().args(arguments).current_dir(self.0.path()));
        self
    }

    pub(crate) fn io(&self, name: &str, commands: &[&str]) -> &Self {
        let mut command = tools::qemu_io();
        command.args(["-f", "qcow2", "-d", "unmap"]).args(commands.iter().flat_map(|word| ["-c", word]));
        tools::run(command.arg(name).current_dir(self.0.path()));
        self
    }

    pub(crate) fn load(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub(crate) fn save(&self, name: &str, image: &[u8]) {
        std::fs::write(self.path(name), image).unwrap();
    }

    /// The disk as QEMU reads it; a name of a snapshot for that one's.
    pub(crate) fn disk(&self, name: &str, snapshot: Option<&str>) -> Vec<u8> {
        let of = snapshot.map(|snapshot| format!("snapshot.name={snapshot}"));
        let option = of.as_ref().map_or(vec![], |of| vec!["-l", of]);
        self.img(&[&["convert", "-f", "qcow2", "-O", "raw"], &option[..], &[name, "raw"]].concat());
        std::fs::read(self.path("raw")).unwrap()
    }

    /// Neither errors nor leaks, in QEMU's eyes and in ours.
    #[track_caller]
    pub(crate) fn assert_clean(&self, image: &[u8], said: &str) {
        self.save("judged", image);
        let mut check = tools::qemu_img();
        check.args(["check", "-f", "qcow2"]).arg(self.path("judged"));
        let output = tools::output(&mut check);
        let clean = output.status.success() && output.stderr.is_empty();
        assert!(clean, "{said}\n{}", tools::told(&check, &output));
        assert_eq!(faults(image), (0, 0), "{said}");
    }
}

pub(crate) fn memory(image: &[u8]) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::new(image.to_vec()))
}

/// Changes an image.
pub(crate) fn edit(image: &[u8], work: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let storage = memory(image);
    edit_in(storage.clone(), work);
    storage.to_vec()
}

pub(crate) fn edit_in(storage: Arc<dyn WritableStorage>, work: impl FnOnce(&mut Writer)) {
    let mut writer = Writer::open(storage).unwrap();
    work(&mut writer);
    writer.finish().unwrap();
}

/// Corruptions and leaks.
pub(crate) fn faults(image: &[u8]) -> (u64, u64) {
    let report = qcow2::check(&MemoryStorage::new(image.to_vec()), &mut |_| ControlFlow::Continue(())).unwrap();
    (report.corruptions(), report.leaks)
}

/// The disk as we read it.
pub(crate) fn read(image: &[u8]) -> Vec<u8> {
    let image = Image::open(memory(image)).unwrap();
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    Reader::new(&image).read(&mut bytes, GuestOffset(0)).unwrap();
    bytes
}

/// The same bytes, or where they begin to differ.
#[track_caller]
pub(crate) fn assert_same_disk(is: &[u8], should: &[u8], said: &str) {
    assert_eq!(is.len(), should.len(), "{said}");
    let differs = is.iter().zip(should).position(|(is, should)| is != should);
    assert_eq!(differs, None, "{said}");
}
