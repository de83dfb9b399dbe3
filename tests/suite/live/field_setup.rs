//! A machine that is given by any words of QEMU's command line, and the files that it needs. Nothing runs before
//! [`Setup::start`] but `qemu-img`.

use tempfile::TempDir;

use super::field::Field;
use super::vm::{RELEASES, Vm, new_folder};
use crate::support::tools;

/// The releases that a test runs on: these, or all of them with `QMPBACKUP_LONG=1`.
pub(crate) fn releases(usual: &[&'static str]) -> Vec<&'static str> {
    let long = std::env::var_os("QMPBACKUP_LONG").is_some_and(|long| long != "0");
    if long { RELEASES.to_vec() } else { usual.to_vec() }
}

/// A machine that is not there yet. In all words `@` is its folder.
pub(crate) struct Setup {
    release: &'static str,
    folder: TempDir,
    words: Vec<String>,
    prelaunch: bool,
}

impl Setup {
    pub(crate) fn of(release: &'static str) -> Self {
        Self { release, folder: new_folder(), words: Vec::new(), prelaunch: false }
    }

    /// Makes a qcow2 image with options of `qemu-img create`.
    pub(crate) fn image(self, name: &str, size: &str, options: &str) -> Self {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut command = tools::qemu_img();
        command.args(["create", "-q", "-f", "qcow2"]);
        if !options.is_empty() {
            command.args(["-o", &options.replace('@', self.folder.path().to_str().unwrap())]);
        }
        tools::run(command.arg(path).arg(size));
        self
    }

    /// Makes a file of these bytes.
    pub(crate) fn file(self, name: &str, bytes: &[u8]) -> Self {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
        self
    }

    /// Adds words, with spaces between them.
    pub(crate) fn words(mut self, words: &str) -> Self {
        let folder = self.folder.path().to_str().unwrap();
        self.words.extend(words.split_whitespace().map(|word| word.replace('@', folder)));
        self
    }

    /// A qcow2 disk of 4 MiB whose file, node and device have this name.
    pub(crate) fn disk(self, name: &str) -> Self {
        self.image(name, "4M", "").qcow2(name, name)
    }

    /// Gives an image to a virtio disk; node and device have the same name.
    pub(crate) fn qcow2(self, id: &str, file: &str) -> Self {
        self.words(&format!("-blockdev {}", qcow2(id, file)))
            .words(&format!("-device virtio-blk-pci,id={id},drive={id}"))
    }

    /// The machine waits for `cont`.
    pub(crate) fn prelaunch(mut self) -> Self {
        self.prelaunch = true;
        self
    }

    pub(crate) fn start(self) -> Field {
        let builder = Vm::builder(self.release).words(self.words);
        let builder = if self.prelaunch { builder.prelaunch() } else { builder };
        Field::new(builder.start_in(self.folder))
    }
}

/// The words for a qcow2 node.
pub(crate) fn qcow2(node: &str, file: &str) -> String {
    format!("node-name={node},driver=qcow2,discard=unmap,file.driver=file,file.discard=unmap,file.filename=@/{file}")
}
