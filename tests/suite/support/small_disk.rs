//! A file system that is soon full. Needs root for the mount.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::tools;

/// A file system of a few bytes, for as long as this is held.
pub(crate) struct Small(PathBuf);

impl Small {
    pub(crate) fn mount(folder: &Path, size: &str) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let size = format!("size={size}");
        tools::run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(folder));
        Self(folder.to_owned())
    }

    /// Leaves no more than this.
    pub(crate) fn fill(&self, left: u64) {
        let mut ballast = File::create(self.0.join("ballast")).unwrap();
        while ballast.write_all(&[1; 4096]).is_ok() {}
        let length = ballast.metadata().unwrap().len();
        ballast.set_len(length - left).unwrap();
    }

    pub(crate) fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // somebody may have a file open there
        let undone = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(std::thread::panicking() || undone.unwrap().success(), "{}", self.0.display());
    }
}
