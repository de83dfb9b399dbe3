//! Folders in folders that others may write to, too: nobody leads us out of them by a link.
//!
//! What is looked at here can change before it is used, but not by who may not write to the folder anyway.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

/// In a folder with this bit, nobody renames or removes what is another's.
const STICKY: u32 = 0o1000;

/// Whether a path below a folder stays inside: none of its parts that are there is a link. Nor is one in a folder like
/// `/tmp`, where everybody may put something but not change what is another's, of a stranger.
///
/// # Errors
/// `PermissionDenied` where it is not so, else what the system says.
pub(crate) fn check_inside(folder: &Path, below: &Path) -> io::Result<()> {
    if !below.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(refused(&folder.join(below), "leads out of its folder"));
    }
    let mut path = folder.to_owned();
    let mut above = match folder.metadata() {
        // nothing is in it
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        folder => folder?,
    };
    for part in below.components() {
        path.push(part);
        let there = match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            there => there?,
        };
        if there.is_symlink() {
            return Err(refused(&path, "is a link, and may lead out of the backup: put there what it leads to"));
        }
        if above.mode() & STICKY != 0 && !is_trusted(&there, &above) {
            return Err(refused(&path, "is of another user, who may have put it there for us to write to"));
        }
        above = there;
    }
    Ok(())
}

/// Whether a file or folder is ours, the administrator's, or of the owner of the folder that it is in.
pub(crate) fn is_trusted(there: &Metadata, folder: &Metadata) -> bool {
    is_one_of_us(there.uid(), rustix::process::geteuid().as_raw(), folder.uid())
}

fn is_one_of_us(owner: u32, user: u32, owner_of_folder: u32) -> bool {
    [user, 0, owner_of_folder].contains(&owner)
}

fn refused(path: &Path, reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("{} {reason}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[track_caller]
    fn assert_refused(folder: &Path, below: &str, why: &str) {
        let error = check_inside(folder, Path::new(below)).unwrap_err();
        assert!(error.kind() == io::ErrorKind::PermissionDenied && error.to_string().contains(why), "{error}");
    }

    #[test]
    fn no_link_leads_out_but_the_folder_itself_may_be_one() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("target");
        fs::create_dir_all(target.join("disk/.qmpbackup")).unwrap();
        symlink("target", root.path().join("link")).unwrap();
        for folder in ["target", "link"] {
            check_inside(&root.path().join(folder), Path::new("disk/.qmpbackup")).unwrap();
            check_inside(&root.path().join(folder), Path::new("other/.qmpbackup")).unwrap();
            check_inside(&root.path().join(folder), Path::new("")).unwrap();
        }
        symlink("/etc", target.join("away")).unwrap();
        symlink("disk", target.join("near")).unwrap();
        symlink("/nowhere", target.join("disk/nowhere")).unwrap();
        for below in ["away", "away/cron.d", "near", "near/x", "disk/nowhere"] {
            assert_refused(&target, below, "is a link");
        }
        for below in ["..", "disk/../../x", "/etc"] {
            assert_refused(&target, below, "leads out");
        }
    }

    #[test]
    fn a_stranger_is_neither_the_user_nor_root_nor_the_owner_of_the_folder() {
        for (owner, trusted) in [(1000, true), (0, true), (33, true), (12345, false)] {
            assert_eq!(is_one_of_us(owner, 1000, 33), trusted, "{owner}");
        }
    }

    #[test]
    fn what_a_stranger_put_into_a_folder_for_all_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        let put = root.path().join("put");
        fs::create_dir(&put).unwrap();
        // only root makes folders of others
        if chown(&put, Some(12345), None).is_err() {
            return;
        }
        check_inside(root.path(), Path::new("put")).unwrap();
        fs::set_permissions(root.path(), Permissions::from_mode(0o1777)).unwrap();
        assert_refused(root.path(), "put", "of another user");
        // it is all his
        chown(root.path(), Some(12345), None).unwrap();
        check_inside(root.path(), Path::new("put")).unwrap();
    }
}
