//! Whether a file could be removed, which only removing it tells for sure.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, StatxAttributes, StatxFlags, accessat, statx};
use rustix::io::Errno;

use super::parent;

/// What speaks against removing or replacing a file; nothing where it is not there. Locks of the file system that it does
/// not tell of are not found.
///
/// # Errors
/// What the system says.
pub(crate) fn why_unremovable(path: &Path) -> io::Result<Option<&'static str>> {
    let there = match path.symlink_metadata() {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        there => there?,
    };
    let folder = parent(path);
    let above = folder.metadata()?;
    let user = rustix::process::geteuid();
    let is_owner = user.is_root() || [there.uid(), above.uid()].contains(&user.as_raw());
    let refused = if is_fixed(path, AtFlags::SYMLINK_NOFOLLOW) {
        Some("must not change (chattr -i -a), and would have to be removed")
    } else if is_fixed(folder, AtFlags::empty()) {
        Some("is in a folder that must not change (chattr -i -a), and would have to be removed")
    } else if above.mode() & 0o1000 != 0 && !is_owner {
        Some("is another user's in a sticky folder, and would have to be removed")
    } else if is_closed(folder) {
        Some("is in a folder that cannot be written to, and would have to be removed")
    } else {
        None
    };
    Ok(refused)
}

/// Whether the system says that nothing can be changed in a folder; not every one can be asked.
fn is_closed(folder: &Path) -> bool {
    let open = accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
    matches!(open, Err(Errno::ACCESS | Errno::ROFS))
}

/// Whether somebody has said that a file must not change; not every system and file system tells.
fn is_fixed(path: &Path, how: AtFlags) -> bool {
    let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    statx(CWD, path, how, StatxFlags::empty()).is_ok_and(|there| there.stx_attributes.intersects(fixed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_our_own_can_be_removed_and_one_that_is_gone_needs_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        assert_eq!(why_unremovable(&file).unwrap(), None);
        assert_eq!(why_unremovable(&file.join("below")).unwrap(), None);
        std::fs::write(&file, "").unwrap();
        assert_eq!(why_unremovable(&file).unwrap(), None);
        std::os::unix::fs::symlink("nowhere", folder.path().join("link")).unwrap();
        assert_eq!(why_unremovable(&folder.path().join("link")).unwrap(), None);
    }
}
