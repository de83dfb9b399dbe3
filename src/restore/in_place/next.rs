//! The INC that follows what is committed: it will build on the FULL.

use std::sync::Arc;

use super::{open, refused};
use crate::chain::{self, Image, RestorePoint};
use crate::qcow2::{self, Backing};
use crate::restore::error::{Error, Result, is_unread};
use crate::restore::source::{self, Source};
use crate::storage::{FileStorage, Storage as _};

/// An INC that builds on the last of some images.
#[derive(Debug)]
pub(super) struct Next {
    pub(super) image: Arc<Image>,
    /// Its file, where its header names that image.
    pub(super) based: Option<Arc<FileStorage>>,
}

impl Next {
    /// The INC after these images of a restore point. One that builds on something else is left alone: it does not belong
    /// there, and nothing may say that it does.
    pub(super) fn find(images: &[Arc<Image>], point: &RestorePoint) -> Result<Option<Self>> {
        let (Some(full), Some(last), Some(image)) = (images.first(), images.last(), &point.next) else {
            return Ok(None);
        };
        let based = if image.missing { None } else { open_based(image)? };
        based.as_ref().map_or(Ok(()), |based| source::check_length(&image.path, based.length()))?;
        let failed = Error::image(&image.path);
        let header = based.as_ref().map(|based| qcow2::Header::read(&**based)).transpose().map_err(failed)?;
        let backing = header.and_then(|header| header.backing);
        // the FULL may have got another id since it was named
        let is_begun = |parent: &Image| point.unfinished.is_some() && parent.path == full.path;
        let follows = |parents: &[&Arc<Image>]| {
            let is_named =
                |backing: &Backing| parents.iter().any(|parent| chain::leads_to(&backing.name, parent.name()));
            let is_after = |parent: &&Arc<Image>| builds_on(image, parent, !is_begun(parent));
            parents.iter().any(is_after) && backing.as_ref().is_none_or(is_named)
        };
        // an earlier run may have ended between naming the FULL and removing the INC before
        let parents = if point.unfinished.is_some() { vec![last, full] } else { vec![last] };
        if follows(&parents) {
            return Ok(Some(Self { image: Arc::clone(image), based }));
        }
        // it would seem to belong to what the FULL holds then
        if follows(&[full]) {
            return Err(refused(&image.path, "builds on the FULL, not on the INC before it: move it away first"));
        }
        Ok(None)
    }
}

/// Whether the manifest of an INC says, if it says anything, that it was made after this image: one of its name, and of its
/// id where that counts.
fn builds_on(inc: &Image, parent: &Image, id_counts: bool) -> bool {
    let Some(known) = inc.known() else { return true };
    let ids = known.parent_id.zip(parent.known().and_then(|parent| parent.id)).filter(|_| id_counts);
    known.parent.as_ref().is_none_or(|name| parent.name() == name.as_str()) && ids.is_none_or(|(known, id)| known == id)
}

/// Opens an INC that names another image; any other one needs no change.
fn open_based(inc: &Image) -> Result<Option<Arc<FileStorage>>> {
    let source = Source::from(inc);
    match qcow2::Header::read(&*source::open(&source)?) {
        Ok(header) if header.backing.is_some() => open(&source).map(Some),
        Err(error) if is_unread(&error) => Err(Error::image(&inc.path)(error)),
        // raw, damaged, or based on nothing
        Ok(_) | Err(_) => Ok(None),
    }
}
