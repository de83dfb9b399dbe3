//! The backup folder: the id of its chain, the settings of its disks, and names for images that are whole.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::capture::error::Error;
use crate::capture::folder::files;
use crate::chain::{
    self, BOOKKEEPING, Checksums, Clock, FolderLock, ImageName, Level, Manifest, RunEntry, UUID, Unfinished,
};
use crate::qcow2::Header;
use crate::storage::{self, Access, FileStorage};

/// The folder of the run: one for each month, if so asked.
pub(crate) fn folder(target: &Path, monthly: bool) -> Result<PathBuf, Error> {
    if !monthly {
        return Ok(target.to_owned());
    }
    let month = Clock::system().local().strftime("%Y-%m").to_string();
    if target.exists() {
        files::check_inside(target, Path::new(&month))?;
    }
    Ok(target.join(month))
}

/// Makes the folder, and its path whole.
pub(crate) fn create(folder: &Path) -> Result<PathBuf, Error> {
    let failed = Error::io(folder);
    // nothing is made where QEMU cannot be told of it
    files::utf8(std::path::absolute(folder).map_err(failed)?)?;
    storage::create_folders(folder).map_err(failed)?;
    files::utf8(folder.canonicalize().map_err(failed)?)
}

/// A folder that is there, and those of its months that runs have been in.
pub(crate) fn with_months(target: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = Error::io(target);
    let target = files::utf8(target.canonicalize().map_err(failed)?)?;
    let entries = storage::read_folder(&target).map_err(failed)?.flatten().map(|(name, _)| target.join(name));
    // not over links: no run has been there
    let folders = entries.filter(|path| path.symlink_metadata().is_ok_and(|entry| entry.is_dir()));
    let mut months: Vec<PathBuf> = folders.filter(|folder| FolderLock::is_in(folder)).collect();
    months.sort();
    months.insert(0, target);
    months.into_iter().map(files::utf8).collect()
}

/// The id of the folder's chain; `None` where none has begun.
pub(crate) fn chain(folder: &Path) -> Result<Option<String>, Error> {
    let path = folder.join(UUID);
    chain::chain_id(folder).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => Error::Uuid { path },
        _ => Error::Io { path, source },
    })
}

/// A random id, for a chain or a name that nobody can guess.
pub(crate) fn new_id() -> Result<String, Error> {
    chain::random_id().map_err(Error::io(Path::new("getrandom")))
}

/// Writes the id down, without a line end, as the Python tool does.
pub(crate) fn write_chain(folder: &Path, chain: &str) -> Result<(), Error> {
    files::write(&folder.join(UUID), chain.as_bytes())
}

/// Opens an image that QEMU still writes to: the file that was made for it, not what a link in its place leads to.
pub(crate) fn open(partial: &Path) -> Result<File, Error> {
    let file = storage::open_unlinked(File::options().read(true), partial);
    file.map_err(Error::io(partial))
}

/// Whether QEMU has made what it says: an image of the right size, all of it written when it was closed.
pub(crate) fn verify(partial: &Path, image: &File, size: u64) -> Result<(), Error> {
    let torn = |reason: String| Error::Torn { path: partial.to_owned(), reason };
    let header = Header::read(image).map_err(|error| torn(error.to_string()))?;
    if header.size != size {
        return Err(torn(format!("its disk has {} bytes, not {size}", header.size)));
    }
    if header.is_dirty() {
        return Err(torn("its last tables could not be written".to_owned()));
    }
    Ok(())
}

/// Keeps programs from writing to what has the name of an image, as QEMU would to its disk.
pub(crate) fn hold(image: &Path) -> Result<Option<FileStorage>, Error> {
    let held = FileStorage::open(image).and_then(|there| there.lock(Access::Read).map(|()| there));
    match held {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(Error::InUse { path: image.to_owned() }),
        // nobody can be asked about one that cannot be read
        held => Ok(held.ok()),
    }
}

/// Gives an image its name, and before that its checksums and its manifest, if they have not got them yet. One that
/// somebody has removed before it had its name is none: then the answer is no.
pub(crate) fn publish(folder: &Path, entry: &RunEntry) -> Result<bool, Error> {
    check_entry(folder, entry)?;
    let (partial, image) = (folder.join(&entry.partial), folder.join(&entry.image));
    let manifest = Manifest::path(&image);
    let is_gone = |path: &Path| path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    // the manifest goes before the image
    if is_gone(&partial) && (!is_gone(&Manifest::path(&partial)) || is_gone(&image)) {
        if is_gone(&Checksums::path(&partial)) {
            // they went before the manifest, and an image that has the name is another
            files::remove(&Checksums::path(&image))?;
        }
        if is_gone(&image) {
            files::remove(&manifest)?;
        }
        discard(folder, entry)?;
        return Ok(false);
    }
    // a machine may have been started on what has the name since the run began
    let _held = if is_gone(&partial) { None } else { hold(&image)? };
    match std::fs::rename(Checksums::path(&partial), Checksums::path(&image)) {
        // done before
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => result.map_err(Error::io(&Checksums::path(&image)))?,
    }
    rename(&Manifest::path(&partial), &manifest)?;
    files::sync_folder(manifest.parent().unwrap_or(folder))?;
    rename(&partial, &image)?;
    unlink_levels(&image)?;
    // that of a FULL which had this name before
    Unfinished::remove(&image).map_err(Error::io(&Unfinished::path(&image)))?;
    files::sync_folder(image.parent().unwrap_or(folder))?;
    Ok(true)
}

/// Makes the link beside an image that tells its level, if there is to be one. Some file systems have no links.
pub(crate) fn link(folder: &Path, entry: &RunEntry) -> Result<(), Error> {
    let Some(link) = entry.link.as_ref().map(|link| folder.join(link)) else { return Ok(()) };
    check_entry(folder, entry)?;
    let name = entry.image.file_name().unwrap_or_default();
    storage::set_link(&link, Path::new(name)).map_err(Error::io(&link))
}

/// Removes the links that tell the level of the image that had this name before.
fn unlink_levels(image: &Path) -> Result<(), Error> {
    let Some(name) = image.file_name().filter(|name| ImageName::parse(name).is_none()) else { return Ok(()) };
    for level in [Level::Copy, Level::Full] {
        let mut link = OsString::from(format!("{level}-"));
        link.push(name);
        let link = image.with_file_name(link);
        if link.is_symlink() {
            files::remove(&link)?;
        }
    }
    Ok(())
}

/// Removes an image that has no name yet, and what is known of it. An earlier image may have the name.
pub(crate) fn discard(folder: &Path, entry: &RunEntry) -> Result<(), Error> {
    check_entry(folder, entry)?;
    let partial = folder.join(&entry.partial);
    files::remove(&Checksums::path(&partial))?;
    files::remove(&Manifest::path(&partial))?;
    files::remove(&partial)?;
    // what came back after a power cut would be told by no journal
    chain::sync_names(&partial).map_err(Error::io(&partial))
}

/// Whether all names of an entry are inside of the folder, whoever wrote the journal.
fn check_entry(folder: &Path, entry: &RunEntry) -> Result<(), Error> {
    let names = [Some(&entry.partial), Some(&entry.image), entry.link.as_ref()];
    let below = names.into_iter().flatten().map(|name| name.with_file_name(BOOKKEEPING));
    below.into_iter().try_for_each(|bookkeeping| files::check_inside(folder, &bookkeeping))
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => Ok(()),
        result => result.map_err(Error::io(to)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{Stage, Work};

    #[test]
    fn nothing_is_made_under_a_name_that_qemu_cannot_be_told() {
        let folder = tempfile::tempdir().unwrap();
        let name = std::os::unix::ffi::OsStrExt::from_bytes(b"bad\xff/x");
        assert!(matches!(create(&folder.path().join::<&std::ffi::OsStr>(name)), Err(Error::NotUtf8 { .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_image_that_was_removed_before_it_had_its_name_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let entry = RunEntry {
            disk: "disk".to_owned(),
            partial: "disk.qcow2.partial".into(),
            image: "disk.qcow2".into(),
            link: None,
        };
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path(BOOKKEEPING)).unwrap();
        assert!(!publish(folder.path(), &entry).unwrap());
        // the image of another run has the name
        std::fs::write(path("disk.qcow2"), "old").unwrap();
        std::fs::write(Manifest::path(&path("disk.qcow2.partial")), "new").unwrap();
        assert!(!publish(folder.path(), &entry).unwrap());
        assert!(!Manifest::path(&path("disk.qcow2")).exists());
        // and this is a whole one, twice
        std::fs::write(path("disk.qcow2.partial"), "new").unwrap();
        std::fs::write(Manifest::path(&path("disk.qcow2.partial")), "new").unwrap();
        assert!(publish(folder.path(), &entry).unwrap() && publish(folder.path(), &entry).unwrap());
        assert_eq!(std::fs::read(path("disk.qcow2")).unwrap(), b"new");
        assert!(Manifest::path(&path("disk.qcow2")).exists());
    }

    /// A folder in which the image of an earlier run has the name that another is on its way to.
    fn on_the_way() -> (tempfile::TempDir, RunEntry) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path(BOOKKEEPING)).unwrap();
        for (image, text) in [("disk", "old"), ("disk.partial", "new")] {
            std::fs::write(path(image), text).unwrap();
            std::fs::write(Manifest::path(&path(image)), text).unwrap();
            std::fs::write(Checksums::path(&path(image)), text).unwrap();
        }
        (folder, RunEntry { disk: "disk".to_owned(), partial: "disk.partial".into(), image: "disk".into(), link: None })
    }

    /// What the image, its manifest and its checksums say.
    fn said(image: &Path) -> [String; 3] {
        [image.to_owned(), Manifest::path(image), Checksums::path(image)]
            .map(|path| std::fs::read_to_string(path).unwrap_or_default())
    }

    #[test]
    fn checksums_manifest_and_image_come_together_after_a_crash_between_any_two_names() {
        for done in 0..4 {
            let (folder, entry) = on_the_way();
            let (partial, image) = (folder.path().join("disk.partial"), folder.path().join("disk"));
            let names = |path: &Path| [Checksums::path(path), Manifest::path(path), path.to_owned()];
            for (from, to) in names(&partial).into_iter().zip(names(&image)).take(done) {
                std::fs::rename(from, to).unwrap();
            }
            assert!(publish(folder.path(), &entry).unwrap(), "{done}");
            assert_eq!(said(&image), ["new"; 3], "{done}");
            assert_eq!(said(&partial), [""; 3], "{done}");
        }
    }

    #[test]
    fn a_file_that_a_machine_writes_to_by_now_keeps_its_name() {
        let (folder, entry) = on_the_way();
        let image = folder.path().join("disk");
        let machine = FileStorage::open(&image).unwrap();
        machine.lock(Access::Write).unwrap();
        assert!(matches!(publish(folder.path(), &entry), Err(Error::InUse { path }) if path == image));
        assert_eq!(said(&image), ["old"; 3]);
        drop(machine);
        assert!(publish(folder.path(), &entry).unwrap());
        assert_eq!(said(&image), ["new"; 3]);
    }

    #[test]
    fn an_image_keeps_its_checksums_only_where_those_of_another_did_not_come_over_them() {
        let (folder, entry) = on_the_way();
        std::fs::remove_file(folder.path().join("disk.partial")).unwrap();
        assert!(!publish(folder.path(), &entry).unwrap());
        assert_eq!(said(&folder.path().join("disk")), ["old"; 3]);
        assert_eq!(said(&folder.path().join("disk.partial")), [""; 3]);
        let (folder, entry) = on_the_way();
        let partial = folder.path().join("disk.partial");
        std::fs::rename(Checksums::path(&partial), Checksums::path(&folder.path().join("disk"))).unwrap();
        std::fs::remove_file(&partial).unwrap();
        assert!(!publish(folder.path(), &entry).unwrap());
        assert_eq!(said(&folder.path().join("disk")), ["old", "old", ""]);
        assert_eq!(said(&partial), [""; 3]);
    }

    #[test]
    fn what_was_begun_in_the_image_that_had_the_name_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk");
        let entry =
            RunEntry { disk: "disk".to_owned(), partial: "disk.partial".into(), image: "disk".into(), link: None };
        let unfinished = Unfinished {
            work: Work::Commit,
            stage: Stage::Removing,
            full: "disk".to_owned(),
            incs: vec!["INC-9-disk".to_owned()],
            full_id: None,
        };
        unfinished.write(&image).unwrap();
        std::fs::write(&image, "old").unwrap();
        // one that never comes leaves it
        std::fs::write(Manifest::path(&folder.path().join("disk.partial")), "new").unwrap();
        assert!(!publish(folder.path(), &entry).unwrap());
        assert_eq!(Unfinished::read(&image).unwrap(), Some(unfinished));
        std::fs::write(folder.path().join("disk.partial"), "new").unwrap();
        std::fs::write(Manifest::path(&folder.path().join("disk.partial")), "new").unwrap();
        assert!(publish(folder.path(), &entry).unwrap());
        assert_eq!(Unfinished::read(&image).unwrap(), None);
    }

    #[test]
    fn what_a_journal_says_is_done_inside_of_the_folder_only() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = |name: &str| folder.path().join(name);
        std::fs::write(elsewhere.path().join("precious.partial"), "precious").unwrap();
        std::fs::write(path("own.partial"), "planted").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), path("away")).unwrap();
        std::fs::create_dir(path("disk")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), path("disk/.qmpbackup")).unwrap();
        let entry = |partial: &str, image: &str, link: Option<&str>| RunEntry {
            disk: "disk".to_owned(),
            partial: partial.into(),
            image: image.into(),
            link: link.map(Into::into),
        };
        for entry in [
            entry("away/precious.partial", "own", None),
            entry("own.partial", "away/precious", None),
            entry("own.partial", "own", Some("away/FULL-own")),
            entry("disk/own.partial", "disk/own", None),
        ] {
            for error in [publish(folder.path(), &entry).unwrap_err(), discard(folder.path(), &entry).unwrap_err()] {
                assert!(error.to_string().contains(path("").to_str().unwrap()), "{error}");
            }
        }
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 1);
        assert!(path("own.partial").exists() && !path("own").exists());
    }

    #[test]
    fn an_image_that_somebody_has_exchanged_for_a_link_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let partial = folder.path().join("disk.partial");
        std::os::unix::fs::symlink("/dev/zero", &partial).unwrap();
        assert!(matches!(open(&partial), Err(Error::Io { .. })));
        std::fs::remove_file(&partial).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &partial, 0o600.into()).unwrap();
        assert!(matches!(open(&partial), Err(Error::Io { .. })));
    }

    #[test]
    fn the_link_of_another_level_goes_with_the_image_that_had_the_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("disk", path("COPY-disk")).unwrap();
        std::fs::write(path("FULL-disk"), "no link").unwrap();
        unlink_levels(&path("disk")).unwrap();
        assert!(!path("COPY-disk").is_symlink() && path("FULL-disk").exists());
    }
}
