//! The journal of a run in the backup folder, which is [read](RunJournal::read) as `chain` does.

use std::io;
use std::path::Path;

use serde_json::{Value, json};

use crate::capture::error::Error;
use crate::capture::folder::files;
use crate::chain::{BOOKKEEPING, RUN_JOURNAL_VERSION, RunJournal, json_file};

/// Reads that of a target; none is there where no run has died.
pub(crate) fn read(target: &Path) -> Result<Option<RunJournal>, Error> {
    RunJournal::read(target).map_err(|source| {
        let path = RunJournal::path(target);
        match source.kind() {
            io::ErrorKind::InvalidData => Error::Journal { path },
            _ => Error::Io { path, source },
        }
    })
}

/// Writes it, so that it outlives a power cut.
pub(crate) fn write(journal: &RunJournal, target: &Path) -> Result<(), Error> {
    let path = RunJournal::path(target);
    json_file::write(&path, &to_json(journal)).map_err(Error::io(&path))
}

/// Removes it.
pub(crate) fn remove(target: &Path) -> Result<(), Error> {
    let path = RunJournal::path(target);
    match std::fs::remove_file(&path) {
        Ok(()) => files::sync_folder(&target.join(BOOKKEEPING)),
        // gone, perhaps with the whole target
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::Io { path, source }),
    }
}

fn to_json(journal: &RunJournal) -> Value {
    let text = |path: &Path| files::text(path);
    let entries = journal.entries.iter().map(|entry| {
        json!({
            "disk": entry.disk,
            "partial": text(&entry.partial),
            "image": text(&entry.image),
            "link": entry.link.as_deref().map(text),
        })
    });
    let mut value = json!({
        "version": RUN_JOURNAL_VERSION,
        "time": journal.time,
        "chain": journal.chain,
        "publishing": journal.publishing,
        "images": entries.collect::<Vec<_>>(),
        "fleece": journal.fleece.iter().map(|path| text(path)).collect::<Vec<_>>(),
    });
    if let Some(keys) = value.as_object_mut() {
        json_file::seal(keys);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::RunEntry;
    use crate::errors::ErrorKind;
    use std::path::PathBuf;

    fn journal() -> RunJournal {
        RunJournal {
            time: 5,
            chain: Some("c".to_owned()),
            publishing: true,
            entries: vec![RunEntry {
                disk: "disk0".to_owned(),
                partial: "disk0/FULL-5-disk.partial".into(),
                image: "disk0/FULL-5-disk".into(),
                link: None,
            }],
            fleece: vec!["/vm/FULL-5-disk0-x.fleece.qcow2".into()],
        }
    }

    #[test]
    fn a_journal_is_read_as_it_was_written_and_gone_when_removed() {
        let target = tempfile::tempdir().unwrap();
        assert_eq!(read(target.path()).unwrap(), None);
        write(&journal(), target.path()).unwrap();
        assert_eq!(read(target.path()).unwrap(), Some(journal()));
        remove(target.path()).unwrap();
        remove(target.path()).unwrap();
        assert_eq!(read(target.path()).unwrap(), None);
    }

    /// Reads what somebody has changed.
    fn reread(value: &Value) -> Option<RunJournal> {
        let target = tempfile::tempdir().unwrap();
        json_file::write(&RunJournal::path(target.path()), value).unwrap();
        read(target.path()).ok()?
    }

    /// Reads what somebody has changed and sealed again.
    fn parsed(mut value: Value) -> Option<RunJournal> {
        json_file::seal(value.as_object_mut().unwrap());
        reread(&value)
    }

    #[test]
    fn any_flipped_bit_of_a_journal_is_found() {
        let target = tempfile::tempdir().unwrap();
        write(&journal(), target.path()).unwrap();
        let path = RunJournal::path(target.path());
        let whole = std::fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, flipped).unwrap();
            match read(target.path()) {
                Err(error @ Error::Journal { .. }) => assert_eq!(error.kind(), ErrorKind::Damaged),
                // space between the values
                read => assert_eq!(read.unwrap(), Some(journal()), "{bit}"),
            }
        }
    }

    #[test]
    fn a_journal_that_leads_out_of_its_folder_is_refused() {
        for (key, path) in [("image", "../x"), ("image", "uuid"), ("partial", "a/../../x.partial"), ("partial", "disk")]
        {
            let mut value = to_json(&journal());
            value["images"][0][key] = path.into();
            assert_eq!(parsed(value), None, "{path}");
        }
        let mut value = to_json(&journal());
        for foreign in
            ["/etc/passwd", "/vm/FULL-6-disk0-x.fleece.qcow2", "FULL-5-disk0-x.fleece.qcow2", "/vm/x.fleece.qcow2"]
        {
            value["fleece"][0] = foreign.into();
            assert_eq!(parsed(value.clone()).unwrap().fleece, Vec::<PathBuf>::new(), "{foreign}");
        }
        assert_eq!(reread(&value), None);
        value["version"] = 3.into();
        assert_eq!(parsed(value), None);
    }
}
