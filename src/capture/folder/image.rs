//! New images that QEMU fills: whole and empty, as large as the disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::capture::error::Error;
use crate::qcow2::{CompressionType, Geometry, HostOffset, Layout, LayoutError, RefcountWriter};
use crate::qmp::Peer;

/// Clusters of images of disks that have none themselves.
const CLUSTER_SIZE: u64 = 1 << 16;

/// The cluster size of a disk's image: that of the disk, if it can be.
pub(crate) fn geometry(cluster_size: Option<u64>) -> Option<Geometry> {
    let fits = |size: &u64| size.is_power_of_two();
    let size = cluster_size.filter(fits).unwrap_or(CLUSTER_SIZE);
    Geometry::new(size.trailing_zeros(), false).or_else(|| Geometry::new(CLUSTER_SIZE.trailing_zeros(), false))
}

/// An image, before anything is in it.
#[derive(Debug)]
pub(crate) struct Empty {
    layout: Layout,
}

impl Empty {
    /// Plans an image for a disk of this size.
    pub(crate) fn new(disk: &str, size: u64, cluster_size: Option<u64>) -> Result<Self, Error> {
        let failed = |source| Error::Layout { disk: disk.to_owned(), source };
        let geometry = geometry(cluster_size).ok_or(failed(LayoutError::ExtendedL2))?;
        let layout = Layout::new(geometry, size, CompressionType::Deflate, 0, 0).map_err(failed)?;
        Ok(Self { layout })
    }

    /// Makes the file, which must not be there.
    pub(crate) fn create(&self, path: &Path, owner: Option<&Peer>) -> Result<(), Error> {
        let create = || {
            let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
            self.write(&file, owner).inspect_err(|_| {
                let _ = std::fs::remove_file(path);
            })
        };
        create().map_err(Error::io(path))
    }

    fn write(&self, file: &File, owner: Option<&Peer>) -> io::Result<()> {
        file.set_len(self.layout.length())?;
        let mut write = |host: HostOffset, bytes: &[u8]| file.write_all_at(bytes, host.0);
        write(HostOffset(0), &self.layout.header())?;
        RefcountWriter::new(&self.layout, &mut write)?.finish(&mut write)?;
        give(file, owner)
    }
}

/// Lets QEMU write to a file of ours, where it runs as somebody else.
fn give(file: &File, owner: Option<&Peer>) -> io::Result<()> {
    match owner {
        Some(owner) if file.metadata()?.uid() != owner.uid => {
            // who is not root cannot give, and QEMU will say that it cannot open the file
            match std::os::unix::fs::fchown(file, Some(owner.uid), Some(owner.gid)) {
                Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(error),
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}
