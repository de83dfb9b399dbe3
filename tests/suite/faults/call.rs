//! The system calls that are made to fail, and how each can.

use libc::{EDQUOT, EINTR, EIO, ENOLCK, ENOSPC, EOPNOTSUPP, EXDEV, c_int, c_long};

use super::ptrace::Registers;

/// A system call, by what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    Open,
    /// That of a file without a name.
    OpenUnnamed,
    /// One that may make a file.
    OpenCreate,
    Read,
    Write,
    CopyRange,
    Clone,
    Allocate,
    Truncate,
    Sync,
    Seek,
    Stat,
    List,
    Link,
    Rename,
    Unlink,
    MakeFolder,
    RemoveFolder,
    ReadLink,
    Lock,
    Advise,
    Close,
    /// Those that change or tell what else there is to know of a file.
    Other,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// It is not done, and fails.
    Fails(c_int),
    /// It is done, and fails: of `close` the kernel does its work in any case.
    DoneAndFails(c_int),
    /// It moves one byte.
    One,
    /// It moves half of its bytes.
    Half,
    /// It moves nothing, and does not fail.
    Nothing,
}

/// Which argument says what the call is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum About {
    File(usize),
    Path(usize),
    /// A path, below the folder in the argument before it; or that folder or file itself.
    At(usize),
}

impl Call {
    /// The call in these registers; none where it has nothing to do with files.
    pub(super) fn of(registers: &Registers) -> Option<(Self, Vec<About>)> {
        use About::{At, File, Path};
        let arguments = arguments(registers);
        let open = |flags: u64| {
            let has = |wanted: c_int| flags & bits(wanted) == bits(wanted);
            if has(libc::O_TMPFILE) {
                Self::OpenUnnamed
            } else if has(libc::O_CREAT) {
                Self::OpenCreate
            } else {
                Self::Open
            }
        };
        let (call, about) = match number(registers) {
            libc::SYS_open => (open(arguments[1]), vec![Path(0)]),
            libc::SYS_openat => (open(arguments[2]), vec![At(1)]),
            libc::SYS_read | libc::SYS_pread64 | libc::SYS_readv | libc::SYS_preadv | libc::SYS_preadv2 => {
                (Self::Read, vec![File(0)])
            }
            libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_pwritev | libc::SYS_pwritev2 => {
                (Self::Write, vec![File(0)])
            }
            libc::SYS_copy_file_range => (Self::CopyRange, vec![File(2), File(0)]),
            libc::SYS_sendfile | libc::SYS_splice => (Self::CopyRange, vec![File(0), File(1)]),
            libc::SYS_ioctl => (Self::Clone, vec![File(0)]),
            libc::SYS_fallocate => (Self::Allocate, vec![File(0)]),
            libc::SYS_ftruncate => (Self::Truncate, vec![File(0)]),
            libc::SYS_truncate => (Self::Truncate, vec![Path(0)]),
            libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_sync_file_range | libc::SYS_syncfs => {
                (Self::Sync, vec![File(0)])
            }
            libc::SYS_lseek => (Self::Seek, vec![File(0)]),
            libc::SYS_fstat | libc::SYS_fstatfs => (Self::Stat, vec![File(0)]),
            libc::SYS_stat | libc::SYS_lstat | libc::SYS_statfs | libc::SYS_access => (Self::Stat, vec![Path(0)]),
            libc::SYS_statx | libc::SYS_newfstatat | libc::SYS_faccessat | libc::SYS_faccessat2 => {
                (Self::Stat, vec![At(1)])
            }
            libc::SYS_getdents64 => (Self::List, vec![File(0)]),
            libc::SYS_link => (Self::Link, vec![Path(1), Path(0)]),
            libc::SYS_linkat => (Self::Link, vec![At(3), At(1)]),
            libc::SYS_symlink => (Self::Link, vec![Path(1)]),
            libc::SYS_symlinkat => (Self::Link, vec![At(2)]),
            libc::SYS_rename => (Self::Rename, vec![Path(1), Path(0)]),
            libc::SYS_renameat | libc::SYS_renameat2 => (Self::Rename, vec![At(3), At(1)]),
            libc::SYS_unlink => (Self::Unlink, vec![Path(0)]),
            libc::SYS_unlinkat if arguments[2] & bits(libc::AT_REMOVEDIR) != 0 => (Self::RemoveFolder, vec![At(1)]),
            libc::SYS_unlinkat => (Self::Unlink, vec![At(1)]),
            libc::SYS_mkdir => (Self::MakeFolder, vec![Path(0)]),
            libc::SYS_mkdirat => (Self::MakeFolder, vec![At(1)]),
            libc::SYS_rmdir => (Self::RemoveFolder, vec![Path(0)]),
            libc::SYS_readlink => (Self::ReadLink, vec![Path(0)]),
            libc::SYS_readlinkat => (Self::ReadLink, vec![At(1)]),
            // only the standard library's own checks ask for this
            libc::SYS_fcntl if arguments[1] == bits(libc::F_GETFD) => return None,
            libc::SYS_flock | libc::SYS_fcntl => (Self::Lock, vec![File(0)]),
            libc::SYS_fadvise64 => (Self::Advise, vec![File(0)]),
            libc::SYS_close => (Self::Close, vec![File(0)]),
            libc::SYS_fchmod | libc::SYS_fchown => (Self::Other, vec![File(0)]),
            libc::SYS_chmod | libc::SYS_chown | libc::SYS_lchown => (Self::Other, vec![Path(0)]),
            libc::SYS_fchmodat | libc::SYS_fchownat | libc::SYS_utimensat => (Self::Other, vec![At(1)]),
            _ => return None,
        };
        Some((call, about))
    }

    /// What can happen to it.
    pub(super) fn faults(self) -> Vec<Fault> {
        use Fault::{DoneAndFails, Fails, Half, Nothing, One};
        let more: &[Fault] = match self {
            Self::Read => &[Fails(EINTR), One, Half],
            Self::Write => &[Fails(EINTR), Fails(ENOSPC), Fails(EDQUOT), One, Half],
            Self::CopyRange => &[Fails(EINTR), Fails(ENOSPC), Fails(EDQUOT), Fails(EXDEV), One, Half, Nothing],
            Self::Clone | Self::Allocate => &[Fails(EINTR), Fails(ENOSPC), Fails(EOPNOTSUPP)],
            Self::OpenCreate
            | Self::OpenUnnamed
            | Self::Truncate
            | Self::Sync
            | Self::Link
            | Self::Rename
            | Self::MakeFolder => &[Fails(EINTR), Fails(ENOSPC)],
            Self::Lock => &[Fails(EINTR), Fails(ENOLCK)],
            Self::Close => return vec![DoneAndFails(EIO), DoneAndFails(EINTR)],
            Self::Open
            | Self::Seek
            | Self::Stat
            | Self::List
            | Self::Unlink
            | Self::RemoveFolder
            | Self::ReadLink
            | Self::Advise
            | Self::Other => &[Fails(EINTR)],
        };
        [&[Fails(EIO)], more].concat()
    }

    /// Whether what was asked for is not there when it fails: nobody may say then that all is done.
    pub(super) fn is_essential(self) -> bool {
        matches!(self, Self::Write | Self::Truncate | Self::Sync | Self::Rename)
    }
}

impl Fault {
    /// Whether it is an error that goes away by itself, or none.
    pub(super) fn is_harmless(self) -> bool {
        matches!(
            self,
            Self::One | Self::Half | Self::Nothing | Self::Fails(EINTR | EXDEV | EOPNOTSUPP) | Self::DoneAndFails(_)
        )
    }

    /// Whether it says that there is no room.
    pub(super) fn is_full(self) -> bool {
        matches!(self, Self::Fails(ENOSPC | EDQUOT))
    }

    /// The registers with which the call begins then.
    pub(super) fn begin(self, registers: &Registers) -> Registers {
        let mut changed = *registers;
        let shorter = |count: u64| match self {
            Self::Nothing => 0,
            Self::One => count.min(1),
            _ => count.div_ceil(2),
        };
        match self {
            Self::Fails(_) => changed.orig_rax = u64::MAX,
            Self::DoneAndFails(_) => {}
            Self::One | Self::Half | Self::Nothing if number(registers) == libc::SYS_copy_file_range => {
                changed.r8 = shorter(registers.r8);
            }
            Self::One | Self::Half | Self::Nothing => changed.rdx = shorter(registers.rdx),
        }
        changed
    }

    /// The registers after it; the program finds its arguments as it left them.
    pub(super) fn end(self, before: &Registers, after: &Registers) -> Registers {
        let mut changed = *after;
        (changed.rdx, changed.r8) = (before.rdx, before.r8);
        if let Self::Fails(error) | Self::DoneAndFails(error) = self {
            changed.rax = 0_u64.wrapping_sub(bits(error));
        }
        changed
    }
}

/// The arguments of a call.
pub(super) fn arguments(registers: &Registers) -> [u64; 6] {
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9]
}

/// Where the kind of a file system was written by a call that has just asked for it.
pub(super) fn kind_of_system(after: &Registers) -> Option<u64> {
    (number(after) == libc::SYS_fstatfs && after.rax == 0).then_some(after.rsi)
}

/// The number of a call.
fn number(registers: &Registers) -> c_long {
    registers.orig_rax.try_into().unwrap_or(-1)
}

/// A constant of C that is not negative.
fn bits(value: c_int) -> u64 {
    value.try_into().unwrap()
}
