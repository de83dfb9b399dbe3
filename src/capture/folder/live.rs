//! The files that a machine has open: they may lie where its backups go, and are none of them.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::capture::machine::file_name::FileName;
use crate::capture::machine::nodes::Node;

/// Devices and numbers of files.
type Files = BTreeSet<(u64, u64)>;

/// The files of a machine's nodes, as far as they are local.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    written: Files,
    /// Those that are only read, too: a backup may be the backing file of a disk.
    open: Files,
}

impl Live {
    /// Looks at the files of nodes; QEMU's working directory is where relative names start.
    pub(crate) fn of(nodes: &[Node], cwd: Option<&Path>) -> Self {
        let mut live = Self::default();
        for node in nodes {
            let Some(path) = FileName::parse(&node.file).path.map(PathBuf::from) else { continue };
            let path = if path.is_absolute() { Some(path) } else { cwd.map(|cwd| cwd.join(path)) };
            let Some(file) = path.and_then(|path| number(&path)) else { continue };
            live.open.insert(file);
            if !node.read_only {
                live.written.insert(file);
            }
        }
        live
    }

    /// Whether the machine has a file open.
    pub(crate) fn has_open(&self, path: &Path) -> bool {
        number(path).is_some_and(|file| self.open.contains(&file))
    }

    /// Whether the machine writes to a file.
    pub(crate) fn writes_to(&self, path: &Path) -> bool {
        number(path).is_some_and(|file| self.written.contains(&file))
    }
}

fn number(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|file| (file.dev(), file.ino()))
}
