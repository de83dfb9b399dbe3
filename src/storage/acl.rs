//! Lists of who may use a file, beside its mode.

use std::fs::File;
use std::io;

use rustix::io::Errno;

/// The POSIX access control list of a file, where it has one that says more than its mode: that of its group is only the most
/// that the list gives then. The bytes are the kernel's, and the same for the same list.
///
/// # Errors
/// What the system says.
pub(crate) fn access_list(file: &File) -> io::Result<Option<Vec<u8>>> {
    // the most that any attribute holds
    let mut list = vec![0; 1 << 16];
    match rustix::fs::fgetxattr(file, c"system.posix_acl_access", &mut list[..]) {
        Ok(length) => {
            list.truncate(length);
            Ok(Some(list))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
