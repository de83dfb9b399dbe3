//! What `qmprestore merge` does not write to.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{args, merge};
use crate::chain::{BOOKKEEPING, Image, ImageName, Inventory, Manifest, UUID, partial_path};
use crate::cli::failure::Failure;
use crate::restore;

/// The output must not take the place of any image that was found, be it one that this merge reads or not, nor become
/// one that a later merge reads; nor be a file that tells of images.
pub(super) fn part_of_backup(arguments: &args::Merge, inventory: &Inventory) -> Result<(), Failure> {
    let images = || inventory.disks.iter().flat_map(|disk| disk.images().iter().chain(disk.partials()));
    let number = |there: Metadata| (there.dev(), there.ino());
    let number_of = |path: &Path| Ok::<_, Failure>(if_there(path, path.metadata())?.map(number));
    let out = if arguments.streams() {
        merge::stdout().and_then(|out| out.metadata()).ok().map(number)
    } else {
        let behind = behind_loop(&arguments.out)?.and_then(|file| file.metadata().ok());
        behind.map_or_else(|| number_of(&arguments.out), |file| Ok(Some(number(file))))?
    };
    let path = || arguments.out.clone();
    if out.is_some() {
        for image in images() {
            if number_of(&image.path)? == out {
                return Err(Failure::OutputIsBackup { path: path() });
            }
        }
    }
    let name = arguments.out.file_name().unwrap_or_default();
    // an image that is not whole tells of a run that failed
    let named = |image: &&Image| {
        image.disk.as_deref().is_some_and(|disk| disk == name || partial_path(disk.as_ref()) == Path::new(name))
    };
    let is_bookkeeping = |path: &Path| path.iter().any(|name| name == BOOKKEEPING);
    let out = folder(&arguments.out)?;
    if is_bookkeeping(&arguments.out) || is_bookkeeping(&out) {
        return Err(Failure::OutputOfBackup { path: path() });
    }
    for image in images().map(AsRef::as_ref).filter(named) {
        if folder(&image.path)? == out {
            return Err(Failure::OutputNamedAsBackup { path: path() });
        }
    }
    // the folder above may be that of a backup of several disks
    let dir = if_there(&inventory.dir, inventory.dir.canonicalize())?;
    let is_inside = dir.is_some_and(|dir| out.starts_with(&dir) || dir.parent() == Some(&out));
    let is_backup = |place: &PathBuf| Ok::<_, Failure>(if_there(place, place.symlink_metadata())?.is_some());
    let is_inside = is_inside || is_backup(&out.join(BOOKKEEPING))? || is_backup(&out.join(UUID))?;
    if is_inside && ImageName::parse(name).is_some() {
        return Err(Failure::OutputNamedAsBackup { path: path() });
    }
    let tells_of_images =
        name == UUID || Path::new(name).extension().is_some_and(|end| end == "config" || end == "partial");
    let manifest = Manifest::path(&out.join(name));
    if is_inside && tells_of_images || if_there(&manifest, manifest.symlink_metadata())?.is_some() {
        return Err(Failure::OutputOfBackup { path: path() });
    }
    Ok(())
}

/// The file that a loop device writes to.
fn behind_loop(out: &Path) -> Result<Option<PathBuf>, Failure> {
    let Some(device) = if_there(out, out.metadata())?.filter(|out| out.file_type().is_block_device()) else {
        return Ok(None);
    };
    let (major, minor) = (rustix::fs::major(device.rdev()), rustix::fs::minor(device.rdev()));
    // of a partition, the device is the folder above
    let device = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    let file = ["loop/backing_file", "../loop/backing_file"]
        .into_iter()
        .find_map(|file| std::fs::read(device.join(file)).ok());
    Ok(file.map(|file| OsString::from_vec(file.strip_suffix(b"\n").unwrap_or(&file).to_vec()).into()))
}

/// The folder of a file, also where parts of it are not there yet.
fn folder(path: &Path) -> Result<PathBuf, Failure> {
    let folder = Path::new(".").join(path.parent().unwrap_or(Path::new("")));
    for there in folder.ancestors() {
        if let Some(real) = if_there(there, there.canonicalize())? {
            return Ok(real.join(folder.strip_prefix(there).unwrap_or(Path::new(""))));
        }
    }
    Ok(folder)
}

/// What is there; only where the system says so, nothing is.
fn if_there<T>(path: &Path, found: io::Result<T>) -> Result<Option<T>, Failure> {
    match found {
        Ok(there) => Ok(Some(there)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(source) => Err(Failure::Restore(restore::Error::Open { path: path.to_owned(), source })),
    }
}
