//! One disk of a VM: its images in all folders, the chains that they make and the restore points.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::held;
use super::image::Image;
use super::links::{Chain, Failed};
use super::point::Point;
use super::timeless;
use super::{Level, Note};

/// The images of one disk, and what they make.
#[derive(Debug, Clone)]
pub struct Disk {
    label: String,
    node: String,
    name: Option<OsString>,
    images: Vec<Arc<Image>>,
    partials: Vec<Arc<Image>>,
    chains: Vec<Chain>,
    points: Vec<Point>,
    /// Those of chains that are missing as a whole, while older ones are there.
    gone: Vec<Arc<Image>>,
    notes: Vec<Note>,
}

impl Disk {
    /// Puts a disk's images, of any folders and in any order, into order.
    pub(super) fn new(
        label: String,
        node: String,
        name: Option<OsString>,
        (mut images, mut notes): (Vec<Image>, Vec<Note>),
    ) -> Self {
        timeless::place(&mut images);
        images.sort_by(|a, b| (a.made(), a.named, &a.relative).cmp(&(b.made(), b.named, &b.relative)));
        held::refuse_claims(&mut images);
        let (partials, images): (Vec<_>, Vec<_>) = images.into_iter().map(Arc::new).partition(|image| image.partial);
        let (chains, gone) = Chain::build(&images);
        let mut fulls = gone.iter().filter(|image| image.level == Level::Full);
        notes.extend(fulls.next().map(|full| Note::Gone { path: full.path.clone(), more: fulls.count() }));
        notes.extend(chains.iter().filter_map(Chain::untold).map(|inc| Note::Untold { path: inc.path.clone() }));
        notes.extend(
            chains
                .iter()
                .flat_map(Chain::unknown)
                .map(|(image, inc)| Note::Unknown { path: image.path.clone(), inc: inc.display_name() }),
        );
        let images: Vec<_> = images.into_iter().filter(|image| !image.missing).collect();
        let failed = Failed::new(&partials);
        let points = chains.iter().enumerate().flat_map(|(number, chain)| chain.points(number, &failed));
        let mut points: Vec<Point> = points.collect();
        points.sort_by_key(|point| (point.image.moment(), point.depth));
        Self { label, node, name, images, partials, chains, points, gone, notes }
    }

    /// The name that tells this disk from the others that were found.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The name of the folder that QEMU's node or device gave its name to, or of the folder that was searched.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The base name of the disk's file, where images tell it.
    #[must_use]
    pub fn name(&self) -> Option<&OsStr> {
        self.name.as_deref()
    }

    /// The whole images, in the order in which they were made.
    #[must_use]
    pub fn images(&self) -> &[Arc<Image>] {
        &self.images
    }

    /// The images that are not whole, in the same order. They are never read.
    #[must_use]
    pub fn partials(&self) -> &[Arc<Image>] {
        &self.partials
    }

    /// The chains, oldest first.
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// The restore points, oldest first; broken ones too.
    #[must_use]
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The images of chains that are missing as a whole, while older ones are there.
    pub(super) fn gone_images(&self) -> &[Arc<Image>] {
        &self.gone
    }

    /// What was left out of what is known of its images.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Whether one of the disk's names is this text.
    pub(super) fn is(&self, text: &str) -> bool {
        self.names().iter().any(|name| name == text)
    }

    /// Whether one of the disk's names is this text, or this text with an ending.
    pub(super) fn is_called(&self, text: &str) -> bool {
        let is_ending = |rest: &str| rest.is_empty() || rest.starts_with('.');
        self.names().iter().any(|name| name.strip_prefix(text).is_some_and(is_ending))
    }

    /// Whether one of the disk's names contains this text.
    pub(super) fn contains(&self, text: &str) -> bool {
        self.names().iter().any(|name| name.contains(text))
    }

    fn names(&self) -> [String; 3] {
        let name = self.name.as_deref().unwrap_or_default().to_string_lossy().into_owned();
        [self.label.clone(), self.node.clone(), name]
    }
}
