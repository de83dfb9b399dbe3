//! Chains: which INC belongs to which FULL, and what may be wrong between them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use super::checksums::Checksums;
use super::image::Image;
use super::journal::Unfinished;
use super::layout::Told;
use super::lineage::Lineage;
use super::name::Level;
use super::point::{Doubt, Fault, Point, State};

/// A FULL and the INCs after it in its folder, oldest first; or a COPY by itself.
#[derive(Debug, Clone)]
pub struct Chain {
    full: Option<Arc<Image>>,
    incs: Vec<Arc<Image>>,
    /// Another FULL with the time of this one: which of them the INCs build on is unknown.
    rival: Option<Arc<Image>>,
}

impl Chain {
    /// The FULL or COPY, also one of which only the manifest is there; `None` where the chain is broken because there is none.
    #[must_use]
    pub fn full(&self) -> Option<&Arc<Image>> {
        self.full.as_ref()
    }

    /// The INCs, oldest first, also those of which only the manifest is there.
    #[must_use]
    pub fn incs(&self) -> &[Arc<Image>] {
        &self.incs
    }

    /// All of these, oldest first.
    #[must_use]
    pub fn images(&self) -> impl DoubleEndedIterator<Item = &Arc<Image>> {
        self.full.iter().chain(&self.incs)
    }

    /// Work in the FULL that was begun and has not ended, if its journal can be read: see
    /// [`Fault::Journal`] and [`Fault::JournalUnread`].
    #[must_use]
    pub fn unfinished(&self) -> Option<&Unfinished> {
        self.full.as_ref()?.in_place.as_ref()?.as_ref().ok().map(Arc::as_ref)
    }

    /// The images that have neither manifest nor checksums any more, with the INCs that know them by an id.
    pub(super) fn unknown(&self) -> impl Iterator<Item = (&Arc<Image>, &Arc<Image>)> {
        let is_unknown = |image: &Image, inc: &Image| {
            let known =
                inc.known().filter(|known| image.name() == OsStr::new(known.parent.as_deref().unwrap_or_default()));
            known.is_some_and(|known| known.parent_id.is_some())
                && !image.missing
                && image.manifest.is_none()
                && Checksums::path(&image.path).symlink_metadata().is_err()
        };
        // what is about to go loses them first
        let taken = self.unfinished().map(Unfinished::taken).unwrap_or_default();
        let pairs = self.images().zip(self.images().skip(1));
        pairs.filter(move |(image, inc)| !taken.contains(image) && is_unknown(image, inc))
    }

    /// Builds the chains of images that are whole, or missing, and in the order in which they were made. And tells the images
    /// of chains that are missing as a whole, but for those that are older than all that is there.
    pub(super) fn build(images: &[Arc<Image>]) -> (Vec<Self>, Vec<Arc<Image>>) {
        let (mut chains, mut gone): (Vec<Self>, Vec<Arc<Image>>) = (Vec::new(), Vec::new());
        let oldest = images.iter().position(|image| !image.missing);
        // of each folder, the chain that the next INC belongs to
        let mut open: BTreeMap<&Path, usize> = BTreeMap::new();
        // and whether the FULL of the next INC that is missing is missing, too: somebody has removed them all
        let mut removed: BTreeSet<&Path> = BTreeSet::new();
        // which one does with old chains only
        let newest = images.iter().rposition(|image| !image.missing && image.level == Level::Full);
        for (at, image) in images.iter().enumerate() {
            if image.missing {
                let full = open.get(image.folder()).and_then(|at| chains.get_mut(*at));
                let full = full.filter(|chain| chain.full.as_ref().is_some_and(|full| image.time > full.time));
                match (image.level, full) {
                    (Level::Inc, Some(chain)) if !removed.contains(image.folder()) => {
                        chain.incs.push(Arc::clone(image));
                    }
                    (Level::Full, _) if Some(at) > newest => {
                        open.insert(image.folder(), chains.len());
                        chains.push(Self { full: Some(Arc::clone(image)), incs: Vec::new(), rival: None });
                    }
                    (Level::Copy, _) => {}
                    (level, _) => {
                        if level == Level::Full {
                            removed.insert(image.folder());
                        }
                        gone.extend(oldest.is_some_and(|oldest| oldest < at).then(|| Arc::clone(image)));
                    }
                }
                continue;
            }
            let last = open.get(image.folder()).copied();
            let current = last.and_then(|at| chains.get_mut(at));
            match (image.level, current) {
                (Level::Inc, Some(chain)) => {
                    chain.incs.push(Arc::clone(image));
                }
                (Level::Inc, None) => {
                    open.insert(image.folder(), chains.len());
                    chains.push(Self { full: None, incs: vec![Arc::clone(image)], rival: None });
                }
                (Level::Full, current) => {
                    let before = current.and_then(|chain| chain.full.clone());
                    let rival = before.filter(|full| full.named == image.named);
                    removed.remove(image.folder());
                    open.insert(image.folder(), chains.len());
                    chains.push(Self { full: Some(Arc::clone(image)), incs: Vec::new(), rival });
                }
                (Level::Copy, _) => chains.push(Self { full: Some(Arc::clone(image)), incs: Vec::new(), rival: None }),
            }
        }
        if !gone.is_empty() {
            // somebody may have moved them to another folder
            let there = images.iter().filter(|image| !image.missing).map(|image| image.name());
            let there: BTreeSet<&OsStr> = there.collect();
            gone.retain(|image| !there.contains(image.name()));
        }
        (chains, gone)
    }

    /// The newest image, if it is an INC that has no manifest, while the backup before it wrote one: nobody can tell whether it
    /// is of this chain.
    pub(super) fn untold(&self) -> Option<&Arc<Image>> {
        let inc = self.incs.last().filter(|inc| !inc.missing && inc.manifest.is_none())?;
        let before = self.images().rev().nth(1)?;
        let is_about_to_go = self.unfinished().is_some_and(|work| work.taken().contains(inc));
        // a bitmap for the INC after it says that it was made by a backup of this program
        let is_told = before.known().is_some_and(|known| known.bitmap.is_some());
        (is_told && !is_about_to_go).then_some(inc)
    }

    /// The restore points of the chain with this number.
    pub(super) fn points(&self, number: usize, failed: &Failed<'_>) -> Vec<Point> {
        let doubt = self.doubt(failed);
        let left = self.left_over();
        let full = self.full.iter().map(|full| (full, full_state(full, left, doubt.as_ref()))).collect::<Vec<_>>();
        let mut fault = match (&self.full, &self.rival) {
            (None, _) => Some(Fault::NoFull),
            (Some(full), Some(rival)) => Some(Fault::SameTime(Arc::clone(rival), Arc::clone(full))),
            (Some(full), None) => left
                .map(|inc| Fault::LeftOver { full: Arc::clone(full), inc: Arc::clone(inc) })
                .or_else(|| Lineage::of(full, None).map(Fault::Lineage)),
        };
        let taken = self.unfinished().map(Unfinished::taken);
        let mut before: Vec<&Arc<Image>> = self.full.iter().collect();
        let incs = self.incs.iter().enumerate().map(move |(at, inc)| {
            let same = |other: Option<usize>| {
                other.and_then(|at| self.incs.get(at)).filter(|other| other.time == inc.time).cloned()
            };
            // order is unknown from the first of two equal times on
            if let (None, Some(other)) = (&fault, same(at.checked_add(1))) {
                fault = Some(Fault::SameTime(Arc::clone(inc), other));
            }
            if fault.is_none() {
                let lineage = Lineage::of(inc, taken.as_ref());
                let lineage = lineage.or_else(|| Lineage::after(&before, inc, taken.as_ref()));
                fault = lineage.map(Fault::Lineage);
            }
            before.push(inc);
            let state = match (&fault, &doubt) {
                (Some(fault), _) => State::Broken(fault.clone()),
                (None, Some((since, doubt))) if inc.time >= *since => State::Doubtful(doubt.clone()),
                (None, _) => State::Sound,
            };
            (inc, state)
        });
        let in_place = self.full.as_ref().and_then(|full| in_place(full));
        let unknown = in_place.clone().filter(|fault| !matches!(fault, Fault::Unfinished(_)));
        let members = full.into_iter().chain(incs).enumerate();
        let point = |(depth, (image, otherwise)): (usize, (&Arc<Image>, State))| Point {
            image: Arc::clone(image),
            state: in_place.clone().map_or_else(|| otherwise.clone(), State::Broken),
            otherwise: unknown.clone().map_or(otherwise, State::Broken),
            chain: number,
            depth,
        };
        members.map(point).collect()
    }

    /// The first INC of before the moment that the FULL holds, but for those that are about to go: it was written into
    /// the FULL and came back, or the manifest is wrong.
    fn left_over(&self) -> Option<&Arc<Image>> {
        let full = self.full.as_ref()?;
        let taken = self.unfinished().map(Unfinished::taken).unwrap_or_default();
        self.incs.iter().find(|inc| inc.time < full.time && !taken.contains(inc))
    }

    /// From which time on the INCs are doubtful, and why.
    fn doubt(&self, failed: &Failed<'_>) -> Option<(Option<i64>, Doubt)> {
        let full = self.full.as_ref()?;
        if full.told == Told::Twice {
            return Some((None, Doubt::Overwritten(Arc::clone(full))));
        }
        let first = failed.first_after(full)?;
        Some((first.time, Doubt::Partial(Arc::clone(first))))
    }
}

/// What there is to say of a FULL by itself.
fn full_state(full: &Arc<Image>, left: Option<&Arc<Image>>, doubt: Option<&(Option<i64>, Doubt)>) -> State {
    let was_written_to = full.named.is_some() && full.time > full.named;
    if let Some(lineage) = Lineage::of(full, None) {
        return State::Broken(Fault::Lineage(lineage));
    }
    match (left, doubt) {
        (Some(inc), _) => State::Doubtful(Doubt::LeftOver(Arc::clone(inc))),
        // what the INCs lacked, it lacks now
        (None, Some((since, doubt))) if was_written_to && full.time >= *since => State::Doubtful(doubt.clone()),
        (None, _) => State::Sound,
    }
}

/// Why nothing can be restored while a FULL is written to.
fn in_place(full: &Image) -> Option<Fault> {
    Some(match full.in_place.as_ref()? {
        Ok(unfinished) => Fault::Unfinished(Arc::clone(unfinished)),
        Err(fault) => fault.clone(),
    })
}

/// What failed runs left that makes later INCs doubtful, for each folder in the order of time.
#[derive(Debug)]
pub(super) struct Failed<'a>(BTreeMap<&'a Path, Vec<&'a Arc<Image>>>);

impl<'a> Failed<'a> {
    pub(super) fn new(partials: &'a [Arc<Image>]) -> Self {
        let mut folders: BTreeMap<&Path, Vec<&Arc<Image>>> = BTreeMap::new();
        for partial in partials.iter().filter(|partial| partial.level != Level::Copy) {
            folders.entry(partial.folder()).or_default().push(partial);
        }
        for folder in folders.values_mut() {
            folder.sort_by_key(|partial| partial.time);
        }
        Self(folders)
    }

    /// The first that was not before a FULL, as far as is known.
    fn first_after(&self, full: &Image) -> Option<&'a Arc<Image>> {
        let folder = self.0.get(full.folder())?;
        let timeless = folder.first().filter(|partial| partial.time.is_none());
        timeless.or_else(|| folder.get(folder.partition_point(|partial| partial.time < full.named))).copied()
    }
}
