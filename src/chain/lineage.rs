//! What the manifests of a chain say of each other: whether each image is the one that was made there.

use std::fmt;
use std::sync::Arc;

use super::checksums::Checksums;
use super::image::Image;
use super::image_id::ImageId;
use super::journal::Taken;

/// Why the images of a chain do not belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lineage {
    /// The manifest of an image is there, and the image is not.
    Gone(Arc<Image>),
    /// An INC builds on an image that is not there.
    Missing {
        /// The INC.
        image: Arc<Image>,
        /// The name of the image that it builds on.
        parent: String,
    },
    /// An INC builds on another image than the one before it.
    Order {
        /// The INC.
        image: Arc<Image>,
        /// The name of the image that it builds on, which is there.
        parent: String,
        /// The image before it.
        before: Arc<Image>,
    },
    /// An INC builds on another image than the one before it, which has the right name.
    Exchanged {
        /// The INC.
        image: Arc<Image>,
        /// The image before it.
        before: Arc<Image>,
    },
    /// An INC is of another chain than its FULL.
    Foreign {
        /// The INC.
        image: Arc<Image>,
        /// The id of its chain.
        chain: String,
        /// The id of the FULL's chain.
        expected: String,
    },
    /// A link that leads to no image now.
    Unreachable(Arc<Image>),
    /// The manifest of an image, and its checksums, are those of two images.
    Mixed {
        /// The image.
        image: Arc<Image>,
        /// The id in the checksums.
        sums: ImageId,
        /// The id in the manifest.
        manifest: ImageId,
    },
    /// The manifest of an image is that of one with another name.
    Renamed {
        /// The image.
        image: Arc<Image>,
        /// The name that it was made with.
        made: String,
    },
}

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone(image) => write!(f, "{} is missing, only its manifest is there", image.path.display()),
            Self::Missing { image, parent } => {
                write!(f, "{} builds on {parent}, which is missing", image.path.display())
            }
            Self::Order { image, parent, before } => {
                write!(f, "{} builds on {parent}, not on {}", image.path.display(), before.display_name())
            }
            Self::Exchanged { image, before } => write!(
                f,
                "{} builds on another image of the name {}: one of the two was exchanged",
                image.path.display(),
                before.display_name()
            ),
            Self::Foreign { image, chain, expected } => {
                write!(f, "{} is of another chain, {chain}, and the FULL of {expected}", image.path.display())
            }
            Self::Unreachable(image) => write!(f, "{} is a link that leads nowhere", image.path.display()),
            Self::Mixed { image, sums, manifest } => write!(
                f,
                "{} has the checksums of image {sums} and the manifest of {manifest}: it was exchanged, or one of the two; where \
                 only the checksums were, remove {}",
                image.path.display(),
                Checksums::path(&image.path).display()
            ),
            Self::Renamed { image, made } => {
                write!(f, "{} was made as {made}: one of the two names is wrong", image.path.display())
            }
        }
    }
}

impl Lineage {
    /// What speaks against an image by itself; not that it is gone where work that has not ended may have removed it.
    pub(super) fn of(image: &Arc<Image>, taken: Option<&Taken<'_>>) -> Option<Self> {
        if image.missing {
            let is_held = taken.is_some_and(|taken| taken.may_be_gone(image));
            return (!is_held).then(|| Self::Gone(Arc::clone(image)));
        }
        if image.path.is_symlink() && !image.path.exists() {
            return Some(Self::Unreachable(Arc::clone(image)));
        }
        let known = image.known()?;
        if !known.image.is_empty() && image.name() != known.image.as_str() {
            return Some(Self::Renamed { image: Arc::clone(image), made: known.image.clone() });
        }
        let manifest = known.id?;
        let sums = Checksums::id_of_another(&image.path, manifest)?;
        Some(Self::Mixed { image: Arc::clone(image), sums, manifest })
    }

    /// What speaks against an INC after these images of its chain, the FULL first. Where the last of them is one that work
    /// takes which has not ended, it may build on another of these still, or on the FULL already.
    pub(super) fn after(before: &[&Arc<Image>], inc: &Arc<Image>, taken: Option<&Taken<'_>>) -> Option<Self> {
        let (Some(full), Some(last), Some(known)) = (before.first(), before.last(), inc.known()) else { return None };
        let chains = known.chain.as_ref().zip(full.known().and_then(|full| full.chain.as_ref()));
        if let Some((chain, expected)) = chains.filter(|(chain, expected)| chain != expected) {
            return Some(Self::Foreign { image: Arc::clone(inc), chain: chain.clone(), expected: expected.clone() });
        }
        let parent = known.parent.clone()?;
        if last.name() == parent.as_str() {
            // where its manifest cannot, its checksums tell it
            let id = |last: &Image| last.known().map_or_else(|| Checksums::id_beside(&last.path), |last| last.id);
            let ids = known.parent_id.and_then(|parent| Some((parent, id(last)?)));
            // made before the work began that gives the FULL another id
            let is_older =
                |id| before.len() == 1 && taken.is_some_and(|taken| taken.contains(inc) && taken.was_full(id));
            return ids
                .is_some_and(|(parent, last)| parent != last && !is_older(parent))
                .then(|| Self::Exchanged { image: Arc::clone(inc), before: Arc::clone(last) });
        }
        let may_change = |taken: &Taken<'_>| before.len() == 1 || taken.contains(last);
        if taken.is_some_and(|taken| may_change(taken) && (full.name() == parent.as_str() || taken.has(&parent))) {
            return None;
        }
        let image = Arc::clone(inc);
        let is_there = before.iter().any(|image| image.name() == parent.as_str());
        Some(if is_there {
            Self::Order { image, parent, before: Arc::clone(last) }
        } else {
            Self::Missing { image, parent }
        })
    }
}
