//! Chains: which INC belongs to which FULL, and what may be wrong between them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::image::Image;
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
    /// The FULL or COPY; `None` where the chain is broken because there is none.
    #[must_use]
    pub fn full(&self) -> Option<&Arc<Image>> {
        self.full.as_ref()
    }

    /// The INCs, oldest first.
    #[must_use]
    pub fn incs(&self) -> &[Arc<Image>] {
        &self.incs
    }

    /// Builds the chains of images that are whole and in the order of their moments.
    pub(super) fn build(images: &[Arc<Image>]) -> Vec<Self> {
        let mut chains: Vec<Self> = Vec::new();
        // of each folder, the chain that the next INC belongs to
        let mut open: BTreeMap<&Path, usize> = BTreeMap::new();
        for image in images {
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
                    let rival = before.filter(|full| full.time == image.time);
                    open.insert(image.folder(), chains.len());
                    chains.push(Self { full: Some(Arc::clone(image)), incs: Vec::new(), rival });
                }
                (Level::Copy, _) => chains.push(Self { full: Some(Arc::clone(image)), incs: Vec::new(), rival: None }),
            }
        }
        chains
    }

    /// The restore points of the chain with this number.
    pub(super) fn points(&self, number: usize, failed: &Failed<'_>) -> Vec<Point> {
        let full = self.full.iter().map(|image| (image, State::Sound));
        let doubt = self.doubt(failed);
        let mut fault = match (&self.full, &self.rival) {
            (None, _) => Some(Fault::NoFull),
            (Some(full), Some(rival)) => Some(Fault::SameTime(Arc::clone(rival), Arc::clone(full))),
            (Some(_), None) => None,
        };
        let incs = self.incs.iter().enumerate().map(move |(at, inc)| {
            let same = |other: Option<usize>| {
                other.and_then(|at| self.incs.get(at)).filter(|other| other.time == inc.time).cloned()
            };
            // order is unknown from the first of two equal times on
            if let (None, Some(other)) = (&fault, same(at.checked_add(1))) {
                fault = Some(Fault::SameTime(Arc::clone(inc), other));
            }
            let state = match (&fault, &doubt) {
                (Some(fault), _) => State::Broken(fault.clone()),
                (None, Some((since, doubt))) if inc.time >= *since => State::Doubtful(doubt.clone()),
                (None, _) => State::Sound,
            };
            (inc, state)
        });
        let members = full.chain(incs).enumerate();
        members.map(|(depth, (image, state))| Point { image: Arc::clone(image), state, chain: number, depth }).collect()
    }

    /// From which time on the INCs are doubtful, and why.
    fn doubt(&self, failed: &Failed<'_>) -> Option<(Option<i64>, Doubt)> {
        let full = self.full.as_ref()?;
        if full.overwritten {
            return Some((None, Doubt::Overwritten(Arc::clone(full))));
        }
        let first = failed.first_after(full)?;
        Some((first.time, Doubt::Partial(Arc::clone(first))))
    }
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
        timeless.or_else(|| folder.get(folder.partition_point(|partial| partial.time < full.time))).copied()
    }
}
