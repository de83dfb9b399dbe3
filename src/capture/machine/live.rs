//! The files that a machine has open: they may lie where its backups go, and are none of them.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::capture::machine::file_name::FileName;
use crate::capture::machine::nodes::Node;
use crate::chain::Manifest;

/// Devices and numbers of files.
type Files = BTreeSet<(u64, u64)>;

/// The files of a machine's nodes, as far as they are local.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    written: Files,
    /// Those that are only read, too: a backup may be the backing file of a disk.
    open: Files,
    /// The names of files that may lie anywhere, since QEMU's working directory is not known.
    names: BTreeSet<OsString>,
}

impl Live {
    /// Looks at the files of nodes; QEMU's working directory is where relative names start.
    pub(crate) fn of(nodes: &[Node], cwd: Option<&Path>) -> Self {
        let mut live = Self::default();
        for node in nodes {
            let name = FileName::parse(&node.file);
            let Some(path) = name.absolute(cwd) else {
                let name = name.path.as_deref().and_then(|path| Path::new(path).file_name());
                live.names.extend(name.map(OsStr::to_owned));
                continue;
            };
            let Some(file) = number(&path) else { continue };
            live.open.insert(file);
            if !node.read_only {
                live.written.insert(file);
            }
        }
        live
    }

    /// Whether the machine has a file open.
    pub(crate) fn has_open(&self, path: &Path) -> bool {
        self.may_have(path) || number(path).is_some_and(|file| self.open.contains(&file))
    }

    /// Whether the machine writes to a file.
    pub(crate) fn writes_to(&self, path: &Path) -> bool {
        self.may_have(path) || number(path).is_some_and(|file| self.written.contains(&file))
    }

    fn may_have(&self, path: &Path) -> bool {
        let is_called_so = path.file_name().is_some_and(|name| self.names.contains(name));
        // no disk has a manifest
        is_called_so && !Manifest::path(path).exists()
    }
}

fn number(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|file| (file.dev(), file.ino()))
}
