//! Rebase: each INC names the image before it as its backing file, and the link `image` leads to the restore point.
//!
//! Then QEMU opens the restore point where it lies, also after the folder was moved: names are relative. Guest data is not
//! touched. All is found to be possible before the first change. Each change is atomic, and the chain is right for
//! [`Merge`](super::Merge) before, between and after them.

use std::fs::File;
use std::io::{self, ErrorKind::InvalidInput, ErrorKind::ReadOnlyFilesystem};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::check;
use super::error::{Error, Result};
use super::in_place::{self, OTHER_NAMES, number, refused, relative_name};
use super::layer::Layer;
use super::layers::Layers;
use super::observer::Observer;
use super::renewed::{Renewed, check_renewable, is_unsettled};
use super::source;
use crate::chain::POINT_LINK;
use crate::qcow2::{self, Backing};
use crate::storage::{self, FileStorage};

/// A rebase that is decided.
#[derive(Debug)]
pub struct Rebase {
    layers: Layers,
    images: Vec<Based>,
    link: PointLink,
}

/// An INC, and what it is to name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Based {
    /// The INC.
    pub path: PathBuf,
    /// The name of the image before it, as it will stand in the INC.
    pub backing: String,
    /// Whether it stands there already.
    pub done: bool,
    /// Whether a run that was killed has left its checksums unsettled.
    unsettled: bool,
    /// Device and number of the file.
    file: Option<(u64, u64)>,
}

/// The link that leads to the restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PointLink {
    /// Where it is.
    pub path: PathBuf,
    /// Where it is to lead, in its folder.
    pub target: PathBuf,
    /// Whether it leads there already.
    pub done: bool,
}

impl Rebase {
    /// Looks whether all images can be based on each other. Nothing is written yet.
    ///
    /// # Errors
    /// [`Error::NothingToRebase`] without an INC; [`Error::InPlace`] for raw images, links, images in other folders and
    /// names that are not UTF-8; [`Error::LinkTaken`]; why the header of an image cannot be changed.
    pub fn plan(layers: Layers, observer: &dyn Observer) -> Result<Self> {
        let images = layers.as_slice();
        let raw = images.iter().find(|layer| layer.image().is_none());
        if let Some(layer) = raw {
            return Err(refused(layer.path(), "is raw, and only a qcow2 image names a backing file"));
        }
        if let Some(layer) = images.iter().skip(1).find(|layer| layer.is_marked_corrupt()) {
            return Err(Error::MarkedCorrupt { path: layer.path().to_owned() });
        }
        let pairs = images.iter().zip(images.iter().skip(1));
        let based = pairs.map(|(before, inc)| Based::plan(before.path(), inc)).collect::<Result<Vec<_>>>()?;
        let last = match (images, based.last()) {
            ([], _) => return Err(Error::Empty),
            ([full, ..], None) => return Err(Error::NothingToRebase { path: full.path().to_owned() }),
            (_, Some(last)) => &last.path,
        };
        let link = PointLink::plan(last)?;
        layers.warnings().for_each(|warning| observer.warning(warning));
        Ok(Self { images: based, link, layers })
    }

    /// The images, oldest first.
    #[must_use]
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// The INCs and what they are to name, oldest first.
    #[must_use]
    pub fn images(&self) -> &[Based] {
        &self.images
    }

    /// The link to the restore point.
    #[must_use]
    pub fn link(&self) -> &PointLink {
        &self.link
    }

    /// Whether all is as it is to be.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.link.done && !self.images.iter().any(Based::has_work)
    }

    /// Checks the tables of all images, as [`Merge::check`](super::Merge::check) does.
    ///
    /// # Errors
    /// [`Error::Damaged`], or what makes an image unreadable.
    pub fn check(&self, observer: &dyn Observer) -> Result<()> {
        check::check_layers(self.layers.as_slice(), observer)
    }

    /// Brings to stable storage what is done, where that can be: an earlier run may have been killed before it was.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> Result<()> {
        let done = self.layers.as_slice().iter().skip(1).zip(&self.images).filter(|(_, image)| !image.has_work());
        for (file, image) in done.filter_map(|(layer, image)| Some((layer.file()?, image))) {
            match file.sync_data() {
                // nothing can be written there
                Err(error) if matches!(error.kind(), ReadOnlyFilesystem | InvalidInput) => {}
                synced => synced.map_err(|source| Error::Write { path: image.path.clone(), source })?,
            }
        }
        in_place::sync_names(&self.link.path)
    }

    /// Changes what is not done yet, oldest first, the link last, and calls `each` for every INC that was changed. All
    /// that is done is on stable storage then. The folder is locked meanwhile.
    ///
    /// # Errors
    /// [`Error::Folder`] where somebody else works in the folder, [`Error::Locked`] where somebody has an INC open, or
    /// another reason why it cannot be opened for writing, before anything is changed; [`Error::Changed`] where it is not
    /// the one that was planned with; [`Error::Cancelled`] between two changes; what the system says. What was changed
    /// before stays, and is right.
    pub fn run(self, observer: &dyn Observer, mut each: impl FnMut(&Based)) -> Result<()> {
        let _folders = in_place::lock(&self.link.path)?;
        self.sync()?;
        let Self { images, link, layers } = self;
        // nobody changes the others meanwhile; whoever reads what is to be changed is in its way
        let changes = std::iter::once(false).chain(images.iter().map(Based::has_work));
        let _others: Vec<Layer> = layers
            .into_vec()
            .into_iter()
            .zip(changes)
            .filter_map(|(layer, changes)| (!changes).then_some(layer))
            .collect();
        let images = images.into_iter().filter(Based::has_work);
        let open = images.map(|image| Ok((image.open()?, image))).collect::<Result<Vec<_>>>()?;
        for (storage, image) in open {
            observer.go_on()?;
            let error = Error::image(&image.path);
            let geometry = qcow2::Header::read(&*storage).map_err(error)?.geometry;
            let renewed = Renewed::header(&image.path, &storage, geometry);
            qcow2::set_backing(&renewed, Some(&image.wanted())).map_err(error)?;
            renewed.finish(observer)?;
            if !image.done {
                each(&image);
            }
        }
        if link.done {
            return Ok(());
        }
        storage::set_link(&link.path, &link.target).map_err(|source| Error::Write { path: link.path, source })
    }
}

impl Based {
    fn plan(before: &Path, inc: &Layer) -> Result<Self> {
        let path = inc.path();
        if before.parent() != path.parent() {
            return Err(refused(path, "lies in another folder than the image before it"));
        }
        let itself = path.symlink_metadata().map_err(|source| Error::Open { path: path.to_owned(), source })?;
        if itself.is_symlink() {
            return Err(refused(path, "is a link, and what it leads to would be changed"));
        }
        let Some(name) = before.file_name().and_then(|name| name.to_str()) else {
            return Err(refused(path, "would have to name an image whose name is not UTF-8"));
        };
        check_renewable(path)?;
        let in_folder = format!("./{name}");
        let named = inc.image().and_then(|image| image.header().backing.as_ref()).map(|backing| backing.name.as_str());
        let backing = if named == Some(&in_folder) { in_folder } else { relative_name(name) };
        let file = inc.file().map(File::metadata).transpose();
        let file = file.map_err(|source| Error::Open { path: path.to_owned(), source })?.as_ref().map(number);
        let mut based = Self { path: path.to_owned(), backing, done: true, unsettled: is_unsettled(path), file };
        if let Some(image) = inc.image() {
            let planned = qcow2::plan_backing(image.storage(), Some(&based.wanted()));
            based.done = !planned.map_err(Error::image(path))?;
        }
        if based.has_work() && itself.nlink() > 1 {
            return Err(refused(path, OTHER_NAMES));
        }
        Ok(based)
    }

    fn has_work(&self) -> bool {
        !self.done || self.unsettled
    }

    fn wanted(&self) -> Backing {
        Backing { name: self.backing.clone(), format: Some("qcow2".to_owned()) }
    }

    fn open(&self) -> Result<Arc<FileStorage>> {
        let storage = source::open_writable(&self.path)?;
        let file = storage.file().metadata().map_err(|source| Error::Open { path: self.path.clone(), source })?;
        if self.file == Some(number(&file)) { Ok(storage) } else { Err(Error::Changed) }
    }
}

impl PointLink {
    fn plan(image: &Path) -> Result<Self> {
        let path = image.with_file_name(POINT_LINK);
        let target = PathBuf::from(image.file_name().unwrap_or_default());
        let done = match path.symlink_metadata() {
            Ok(there) if there.is_symlink() => path.read_link().is_ok_and(|found| found == target),
            Ok(_) => return Err(Error::LinkTaken { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(source) => return Err(Error::Open { path, source }),
        };
        Ok(Self { path, target, done })
    }
}
