//! The restore points of chains that are broken: what is there of them, in its order.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use super::Error;
use super::disk::Disk;
use super::image::Image;
use super::journal::{Taken, Unfinished};
use super::lineage::Lineage;
use super::links::Chain;
use super::point::{Fault, Point, RestorePoint, State};
use super::when::{Clock, When};

/// An image of a restore point, or the place of one that is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Member {
    /// An image.
    There(Arc<Image>),
    /// An image that is not there.
    Missing {
        /// Where it should be; only the folder, where its name is unknown.
        path: PathBuf,
        /// Bytes of its disk, where its manifest is there.
        size: Option<u64>,
    },
}

/// As much as there is of a restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SalvagePoint {
    /// The restore point with the images that are there.
    pub point: RestorePoint,
    /// These, and the places of those that are missing, oldest first.
    pub members: Vec<Member>,
    /// Why the restore point is broken, if it is.
    pub fault: Option<Fault>,
    /// What manifests and checksums of its images say against each other, but that some are missing.
    pub contradictions: Vec<Lineage>,
}

impl Disk {
    /// Finds what there is of the restore point that is meant: as [`select`](Self::select) does, also where it is doubtful or
    /// broken.
    ///
    /// Where manifests tell which image was made after which, those are its members, else all in their order.
    ///
    /// # Errors
    /// No restore point, or more than one, is meant; [`Error::Broken`] with [`Fault::NoFull`] where no image of it is there.
    pub fn select_salvage(&self, when: &When, clock: &Clock) -> Result<SalvagePoint, Error> {
        let point = self.meant(when, clock)?;
        let chain = self.chains().get(point.chain);
        let full = chain.and_then(Chain::full);
        let incs = chain.map(Chain::incs).unwrap_or_default();
        let (incs, later) = incs.split_at_checked(point.depth(full)).unwrap_or((incs, &[]));
        let all: Vec<&Arc<Image>> = full.into_iter().chain(incs).collect();
        let mut members = lineage(&all);
        if full.is_none() {
            let folder = point.image.path.parent().unwrap_or(&point.image.path);
            // a manifest may have told its name
            if !matches!(members.first(), Some(Member::Missing { .. })) {
                members.insert(0, Member::Missing { path: folder.to_owned(), size: None });
            }
        }
        match self.missing_after(point, when, clock) {
            Some(Fault::Lineage(Lineage::Missing { parent, .. })) => {
                members.push(Member::Missing { path: point.image.path.with_file_name(parent), size: None });
            }
            Some(Fault::Lineage(Lineage::Gone(image))) => members.push(Member::of(&image)),
            _ => {}
        }
        let there: Vec<Arc<Image>> = members.iter().filter_map(Member::image).cloned().collect();
        if there.is_empty() {
            return Err(Fault::NoFull.into_error(&point.image));
        }
        let (doubt, fault) = match &point.state {
            State::Sound => (None, None),
            State::Doubtful(doubt) => (Some(doubt.clone()), None),
            State::Broken(fault) => (None, Some(fault.clone())),
        };
        let unfinished = chain.and_then(Chain::unfinished).cloned();
        let contradictions = contradictions(&members, unfinished.as_ref().map(Unfinished::taken).as_ref());
        let point = RestorePoint { doubt, unfinished, ..self.point_of(point, there, later) };
        Ok(SalvagePoint { point, members, fault, contradictions })
    }
}

impl Point {
    /// How many INCs it takes.
    fn depth(&self, full: Option<&Arc<Image>>) -> usize {
        // without a FULL the first INC is the first of all
        if full.is_some() { self.depth } else { self.depth + 1 }
    }
}

impl Member {
    /// The image, if it is there.
    #[must_use]
    pub fn image(&self) -> Option<&Arc<Image>> {
        match self {
            Self::There(image) => Some(image),
            Self::Missing { .. } => None,
        }
    }

    fn of(image: &Arc<Image>) -> Self {
        if image.missing {
            let size = image.known().map(|known| known.virtual_size);
            return Self::Missing { path: image.path.clone(), size };
        }
        Self::There(Arc::clone(image))
    }
}

/// What speaks against the images of a restore point, but what members that are missing tell.
fn contradictions(members: &[Member], taken: Option<&Taken<'_>>) -> Vec<Lineage> {
    let is_missing = |name: &str| {
        members.iter().any(|member| match member {
            Member::There(_) => false,
            Member::Missing { path, .. } => path.file_name() == Some(OsStr::new(name)),
        })
    };
    let mut before = Vec::new();
    let mut all = Vec::new();
    for image in members.iter().filter_map(Member::image) {
        let found = Lineage::of(image, taken).or_else(|| Lineage::after(&before, image, taken));
        all.extend(found.filter(|found| !matches!(found, Lineage::Missing { parent, .. } if is_missing(parent))));
        before.push(image);
    }
    all
}

/// The images that the last one builds on, as far as manifests tell, else the one before each.
fn lineage(all: &[&Arc<Image>]) -> Vec<Member> {
    let mut members = Vec::new();
    let mut next = all.len().checked_sub(1);
    while let Some((place, image)) = next.and_then(|place| Some((place, *all.get(place)?))) {
        members.push(Member::of(image));
        next = place.checked_sub(1);
        let Some(parent) = image.known().and_then(|known| known.parent.as_deref()) else { continue };
        let before = all.get(..place).unwrap_or_default();
        match before.iter().rposition(|image| is_named(image, parent)) {
            Some(parent) => next = Some(parent),
            None => members.push(Member::Missing { path: image.path.with_file_name(parent), size: None }),
        }
    }
    members.reverse();
    members
}

/// Whether an image has a name, or had it when it was made.
fn is_named(image: &Image, name: &str) -> bool {
    image.name() == OsStr::new(name) || image.known().is_some_and(|known| known.image == name)
}
