//! Manifests and checksums for images that have none: those of other tools, and of versions of this program before them.
//!
//! They say of a chain what is known now, so it is found to be sound first. What an image has already stays as it is.

use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::check;
use super::error::{Error, Result};
use super::layer::{Format, Layer};
use super::layers::Layers;
use super::observer::{Observer, Phase};
use super::pool;
use super::resolve::Mapped;
use super::source::Source;
use crate::chain::{
    self, Chain, Checksums, FormatHint, Image, ImageId, KnownSums, Level, Manifest, UUID, chain_id,
    create_checksums_watched,
};
use crate::storage;

/// A chain whose images get what they lack.
#[derive(Debug)]
pub struct Describe {
    images: Vec<Described>,
    layers: Option<Layers>,
    pool: rayon::ThreadPool,
}

/// An image, and what it lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Described {
    /// The image.
    pub path: PathBuf,
    /// What it holds.
    pub level: Level,
    /// The moment that it holds, seconds since 1970, where that is known.
    pub time: Option<i64>,
    /// The manifest that it is to get, if it has none.
    pub manifest: Option<Manifest>,
    /// Whether it has no checksums, and is to get some.
    pub checksums: bool,
}

impl Described {
    /// Whether the image has both already.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.manifest.is_none() && !self.checksums
    }
}

impl Describe {
    /// Looks what the images of a chain lack, which must be whole as far as names and manifests tell. Those of a chain in
    /// which something is lacking are opened, for reading only, and locked. Threads are at most 256, and all that the machine
    /// has by default.
    ///
    /// # Errors
    /// As with [`Layers::open`]; [`Error::Manifest`] where one cannot be used; [`Error::MarkedCorrupt`].
    pub fn plan(chain: &Chain, threads: Option<NonZeroUsize>) -> Result<Self> {
        let pool = pool::start(threads)?;
        let images: Vec<&Arc<Image>> = chain.images().collect();
        let known = images.iter().map(|image| Manifest::read(&image.path)).collect::<Result<Vec<_>, _>>()?;
        let mut described: Vec<Described> = images
            .iter()
            .map(|image| Described {
                path: image.path.clone(),
                level: image.level,
                time: image.time,
                manifest: None,
                checksums: Checksums::path(&image.path).symlink_metadata().is_err(),
            })
            .collect();
        if known.iter().all(Option::is_some) && described.iter().all(Described::is_done) {
            return Ok(Self { images: described, layers: None, pool });
        }
        let sources: Vec<Source> = images.iter().map(|image| Source::from(&***image)).collect();
        let layers = Layers::open(&sources)?;
        if let Some(layer) = layers.as_slice().iter().find(|layer| layer.is_marked_corrupt()) {
            return Err(Error::MarkedCorrupt { path: layer.path().to_owned() });
        }
        let id = match known.iter().flatten().find_map(|manifest| manifest.chain.clone()) {
            Some(id) => Some(id),
            None => images.first().map(|image| id_of(&image.path)).transpose()?.flatten(),
        };
        let mut before: Option<(&Image, Option<ImageId>)> = None;
        // by which an INC that has a manifest knows the image before it
        let expected = |at: usize, image: &Image| {
            let next = known.get(at + 1)?.as_ref()?;
            next.parent_id.filter(|_| next.parent.as_deref().map(OsStr::new) == Some(image.name()))
        };
        let chain = images.iter().zip(layers.as_slice()).zip(&known).enumerate();
        for ((at, ((image, layer), known)), described) in chain.zip(&mut described) {
            let own = if let Some(known) = known {
                known.id
            } else {
                let parent = before.filter(|_| image.level == Level::Inc);
                let chain = id.clone().filter(|_| image.level != Level::Copy);
                described.manifest.insert(manifest(image, parent, layer, (chain, expected(at, image)))?).id
            };
            before = Some((image, own));
        }
        Ok(Self { images: described, layers: Some(layers), pool })
    }

    /// The images, oldest first.
    #[must_use]
    pub fn images(&self) -> &[Described] {
        &self.images
    }

    /// Checks the tables of all images, as [`Merge::check`](super::Merge::check) does, and whether the compressed clusters of
    /// those that are to get checksums can be inflated.
    ///
    /// # Errors
    /// [`Error::Damaged`], or what makes an image unreadable.
    pub fn check(&self, observer: &dyn Observer) -> Result<()> {
        let layers = self.layers.as_ref().map(Layers::as_slice).unwrap_or_default();
        if layers.is_empty() {
            return Ok(());
        }
        self.pool.install(|| {
            check::check_layers(layers, observer)?;
            let unsummed = self.images.iter().zip(layers).filter(|(image, _)| image.checksums);
            unsummed.map(|(_, layer)| layer).try_for_each(|layer| check::check_streams(layer, observer))
        })
    }

    /// Makes what is lacking, oldest first, and calls `each` for every image that has all then.
    ///
    /// # Errors
    /// [`Error::Cancelled`], what the system says. What was made before stays, and is right.
    pub fn run(&self, observer: &dyn Observer, mut each: impl FnMut(&Described)) -> Result<()> {
        let layers = self.layers.as_ref().map(Layers::as_slice).unwrap_or_default();
        let work = || self.images.iter().zip(layers).filter(|(image, _)| !image.is_done());
        let lengths = work().filter(|(image, _)| image.checksums).map(|(_, layer)| layer.data().length());
        observer.phase(Phase::Summing { bytes: lengths.sum() });
        for (image, layer) in work() {
            // first: checksums are made for the id that it tells
            if let Some(manifest) = &image.manifest {
                let written = manifest.write(&image.path);
                written.map_err(|source| Error::Write { path: Manifest::path(&image.path), source })?;
            }
            if image.checksums {
                self.pool.install(|| sum(layer, observer))?;
            }
            each(image);
        }
        Ok(())
    }
}

fn sum(layer: &Layer, observer: &dyn Observer) -> Result<()> {
    let each = |bytes| {
        observer.advance(bytes);
        observer.flow()
    };
    let created = create_checksums_watched(layer.path(), layer.data(), &KnownSums::default(), &each);
    created.map_err(|error| Error::sums(layer.path(), error))
}

/// What can be said of an image now.
fn manifest(
    image: &Image,
    before: Option<(&Image, Option<ImageId>)>,
    layer: &Layer,
    (chain, id): (Option<String>, Option<ImageId>),
) -> Result<Manifest> {
    // names that are no text cannot be written down
    let name = |image: &Image| image.name().to_str().map(str::to_owned);
    let (format, virtual_size) = match layer.format() {
        Format::Qcow2 => (FormatHint::Qcow2, layer.size()),
        Format::Raw => (FormatHint::Raw, layer.data().length()),
    };
    // checksums that are there have it already, or never will
    let id = match Checksums::open(&image.path) {
        Ok(None) => match id {
            None => Some(ImageId::random().map_err(|source| Error::Open { path: image.path.clone(), source })?),
            expected => expected,
        },
        sums => sums.ok().flatten().and_then(|sums| sums.id()),
    };
    Ok(Manifest {
        image: name(image).unwrap_or_default(),
        id,
        level: image.level,
        time: image.time,
        chain,
        parent: before.and_then(|(before, _)| name(before)),
        parent_id: before.and_then(|(_, id)| id),
        bitmap: None,
        format,
        virtual_size,
        qemu: String::new(),
    })
}

/// The id of the chain that an image belongs to, if its backup folder has one: that of the image, or the one above.
fn id_of(image: &Path) -> Result<Option<String>> {
    let failed = |folder: &Path| {
        let path = folder.join(UUID);
        |source| Error::Open { path, source }
    };
    let own = std::path::absolute(storage::parent(image)).map_err(failed(image))?;
    let above = own.parent().unwrap_or(&own);
    match chain_id(&own).map_err(failed(&own))? {
        None => chain_id(above).map_err(failed(above)),
        id => Ok(id),
    }
}

/// Keeps others from the folders of chains. Before that, they may have changed them: [discover](chain::discover) the chains
/// again when this returns.
///
/// # Errors
/// [`Error::Folder`].
pub fn lock_folders<'a>(chains: impl IntoIterator<Item = &'a Chain>) -> Result<Vec<chain::FolderLock>> {
    let images = chains.into_iter().flat_map(Chain::images);
    Ok(chain::FolderLock::take_all_of(images.map(|image| storage::parent(&image.path)))?)
}
