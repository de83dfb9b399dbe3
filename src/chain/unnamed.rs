//! Images of a backup that are whole but have not got their names, since their run was killed while it gave them.
//!
//! The run's journal, `TARGET/.qmpbackup/run.json`, tells of them: the next run or `qmpbackup recover` ends what it says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::run_journal::{RunEntry, RunJournal};
use super::{FolderLock, Manifest};

/// Such images, by the names that they are to get.
#[derive(Debug, Default)]
pub(super) struct Unnamed(BTreeMap<PathBuf, Whole>);

#[derive(Debug)]
struct Whole {
    partial: PathBuf,
    /// The folder of the backup.
    target: PathBuf,
}

impl Unnamed {
    /// Those of backups to any of these folders.
    pub(super) fn in_folders<'a>(targets: impl IntoIterator<Item = &'a Path>) -> Self {
        Self(targets.into_iter().filter_map(of_run).flatten().collect())
    }

    fn get(&self, image: &Path) -> Option<&Whole> {
        self.0.get(image).filter(|whole| whole.partial.symlink_metadata().is_ok())
    }

    /// Whether this is such an image, or has the name of one, and its run does not go on.
    pub(super) fn is_left(&self, path: &Path) -> bool {
        let is_meant = |whole: &&Whole| whole.partial == path;
        let whole = self.get(path).or_else(|| self.0.values().find(is_meant));
        whole.is_some_and(|whole| FolderLock::held_in(&whole.target).is_none())
    }

    /// The image whose manifest has this name already: it is not that of the image that has the name now.
    pub(super) fn owner_of_manifest(&self, image: &Path) -> Option<&Path> {
        let partial = self.get(image)?.partial.as_path();
        Manifest::path(partial).symlink_metadata().is_err().then_some(partial)
    }
}

/// What the journal of a run says that was about to give names; one that cannot be read says nothing here.
fn of_run(target: &Path) -> Option<Vec<(PathBuf, Whole)>> {
    let journal = RunJournal::read(target).ok()??;
    // the folder of a disk may be a link
    let real = |path: &Path| {
        let path = target.join(path);
        Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?))
    };
    let whole = |entry: &RunEntry| {
        Some((real(&entry.image)?, Whole { partial: real(&entry.partial)?, target: target.to_owned() }))
    };
    journal.publishing.then(|| journal.entries.iter().filter_map(whole).collect())
}
