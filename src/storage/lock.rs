//! Locks of images, as QEMU's `file` driver takes them.
//!
//! Everybody says by locks on single bytes of the image what he does with it and what others must not do, and looks whether
//! that goes with what others have said. Nothing is in these bytes but guest data or a header: they are numbers only.
//!
//! ```text
//! byte 100 + i   somebody does what permission i allows
//! byte 200 + i   somebody does not share permission i
//! ```
//!
//! All are read locks, so that many can have the same one, also with a file that is open for reading only. They belong to
//! the open file and end with it, however that ends. Whoever opens an image twice is two users of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::FileStorage;

/// What an image is open for, and so what others must not do with it meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is read: others may read it, too.
    Read,
    /// It is changed: nobody else may have it open.
    Write,
}

const USED: i64 = 100;
const NOT_SHARED: i64 = 200;

// QEMU's permissions
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

impl Access {
    /// The permissions that are used.
    fn used(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// The permissions that others must not use.
    fn not_shared(self) -> &'static [i64] {
        match self {
            Self::Read => &[WRITE, RESIZE],
            Self::Write => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }

    /// Takes the locks; `false` where others are in the way.
    fn take(self, file: &File) -> Result<bool, Errno> {
        for (base, permissions) in [(USED, self.used()), (NOT_SHARED, self.not_shared())] {
            for permission in permissions {
                match set(file, libc::F_RDLCK, base + permission, 1) {
                    Err(Errno::AGAIN) => return Ok(false),
                    result => result?,
                }
            }
        }
        // locked first, and looked then: of two who come at once, one sees the other at least
        for (base, permissions) in [(NOT_SHARED, self.used()), (USED, self.not_shared())] {
            for permission in permissions {
                if is_locked(file, base + permission)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

impl FileStorage {
    /// Keeps others from what does not go with `access`, among them all programs of QEMU, until the file is closed. Where a
    /// file system has no such locks, nobody is kept from anything. Where it has run out of them, or its lock service does not
    /// answer, a file that is read stays [without](Self::is_unlocked).
    ///
    /// # Errors
    /// `ResourceBusy` where another open file is in the way, in this process or another, else what the system says; this one
    /// has no locks then.
    pub fn lock(&self, access: Access) -> io::Result<()> {
        let error = match access.take(&self.file) {
            Ok(true) => return Ok(()),
            Err(error) if has_no_locks(error) => return Ok(()),
            Ok(false) => {
                let what = match access {
                    Access::Read => "another process has the image open for writing",
                    Access::Write => "another process has the image open",
                };
                io::Error::new(io::ErrorKind::ResourceBusy, what)
            }
            Err(error) => error.into(),
        };
        // what this does not release ends with the file
        let _ = set(&self.file, libc::F_UNLCK, USED, NOT_SHARED + RESIZE + 1 - USED);
        let is_out_of_locks = error.raw_os_error() == Some(libc::ENOLCK);
        if is_out_of_locks && access == Access::Read {
            self.unlocked.store(true, Ordering::Relaxed);
            return Ok(());
        }
        Err(error)
    }

    /// Whether it was to be locked for reading, and the system had no lock for it: others may write to it meanwhile.
    #[must_use]
    pub fn is_unlocked(&self) -> bool {
        self.unlocked.load(Ordering::Relaxed)
    }
}

/// Whether an error says that the kernel or the file system knows no such locks.
fn has_no_locks(error: Errno) -> bool {
    matches!(error, Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS)
}

/// Locks or unlocks bytes for this open file.
fn set(file: &File, kind: libc::c_int, start: i64, length: i64) -> Result<(), Errno> {
    fcntl(file, libc::F_OFD_SETLK, kind, start, length).map(drop)
}

/// Whether another open file has a lock on a byte.
fn is_locked(file: &File, byte: i64) -> Result<bool, Errno> {
    let found = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

/// One of the commands about locks of open files, and what it has made of its argument.
#[expect(unsafe_code, reason = "rustix has no locks of open files")]
fn fcntl(file: &File, command: libc::c_int, kind: libc::c_int, start: i64, length: i64) -> Result<libc::flock, Errno> {
    rustix::io::retry_on_intr(|| {
        let mut lock = libc::flock {
            l_type: kind.try_into().map_err(|_| Errno::INVAL)?,
            l_whence: libc::SEEK_SET.try_into().map_err(|_| Errno::INVAL)?,
            l_start: start,
            l_len: length,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open for as long as `file` is borrowed, and both commands take a pointer to a `flock`,
        // which lives until they return and which nobody else has
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if result == 0 { Ok(lock) } else { Err(last_error()) }
    })
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn image() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().unwrap()
    }

    fn locked(path: &Path, access: Access) -> io::Result<FileStorage> {
        let storage = match access {
            Access::Read => FileStorage::open(path)?,
            Access::Write => FileStorage::open_writable(path)?,
        };
        storage.lock(access).map(|()| storage)
    }

    #[track_caller]
    fn assert_busy(path: &Path, access: Access, what: &str) {
        let error = locked(path, access).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (io::ErrorKind::ResourceBusy, what));
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let cases: [(Access, &[i64], &[i64]); 2] = [
            (Access::Read, &[100, 201, 203], &[101, 103, 200]),
            (Access::Write, &[100, 101, 103, 200, 201, 202, 203], &[100, 101, 102, 103, 200, 201, 203]),
        ];
        for (access, taken, refused) in cases {
            let image = image();
            let other = File::open(image.path()).unwrap();
            let held = locked(image.path(), access).unwrap();
            let all = (0..1000).filter(|byte| is_locked(&other, *byte).unwrap());
            assert_eq!(all.collect::<Vec<_>>(), taken, "{access:?}");
            drop(held);
            let refuses = |byte: &i64| {
                set(&other, libc::F_RDLCK, *byte, 1).unwrap();
                let refuses = locked(image.path(), access).is_err();
                set(&other, libc::F_UNLCK, *byte, 1).unwrap();
                refuses
            };
            assert_eq!((0..1000).filter(refuses).collect::<Vec<_>>(), refused, "{access:?}");
        }
    }

    #[test]
    fn readers_get_along_and_a_writer_is_alone() {
        let image = image();
        let readers = [locked(image.path(), Access::Read).unwrap(), locked(image.path(), Access::Read).unwrap()];
        assert_busy(image.path(), Access::Write, "another process has the image open");
        drop(readers);
        let writer = locked(image.path(), Access::Write).unwrap();
        assert_busy(image.path(), Access::Read, "another process has the image open for writing");
        assert_busy(image.path(), Access::Write, "another process has the image open");
        drop(writer);
        locked(image.path(), Access::Read).unwrap();
    }

    #[test]
    fn who_was_refused_is_in_nobodys_way() {
        let image = image();
        let refused = FileStorage::open_writable(image.path()).unwrap();
        let reader = locked(image.path(), Access::Read).unwrap();
        refused.lock(Access::Write).unwrap_err();
        locked(image.path(), Access::Read).unwrap();
        drop(reader);
        let writer = locked(image.path(), Access::Write).unwrap();
        refused.lock(Access::Read).unwrap_err();
        drop(writer);
        locked(image.path(), Access::Write).unwrap();
    }

    #[test]
    fn a_lock_that_shuts_all_others_out_is_respected() {
        let image = image();
        let other = File::options().write(true).open(image.path()).unwrap();
        set(&other, libc::F_WRLCK, 0, 0).unwrap();
        assert_busy(image.path(), Access::Read, "another process has the image open for writing");
        assert_busy(image.path(), Access::Write, "another process has the image open");
    }

    #[test]
    fn only_a_file_system_without_locks_is_no_reason_to_stop() {
        for error in [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS] {
            assert!(has_no_locks(error), "{error}");
        }
        for error in [Errno::AGAIN, Errno::ACCESS, Errno::BADF, Errno::IO, Errno::NOLCK] {
            assert!(!has_no_locks(error), "{error}");
        }
    }
}
