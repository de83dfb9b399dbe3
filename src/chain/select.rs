//! The choice among a disk's restore points.

use std::sync::Arc;

use super::Error;
use super::disk::Disk;
use super::image::Image;
use super::journal::Unfinished;
use super::lineage::Lineage;
use super::links::Chain;
use super::name::{ImageName, Level};
use super::point::{Fault, Point, RestorePoint, State};
use super::when::{Clock, When};

impl Disk {
    /// Finds the restore point that is meant.
    ///
    /// By time, it is the newest that is not after the wanted moment, COPY images as well as chains; it is never an older
    /// one because that one is broken. An image without a time in its name counts as older than all others of its
    /// folder, and as made after the folder's month began; a COPY without a time may be the latest, but no time
    /// picks it.
    ///
    /// # Errors
    /// No restore point, or more than one, is meant; the one that is meant is broken; or it is doubtful and
    /// `allow_partial` is not set.
    pub fn select(&self, when: &When, clock: &Clock, allow_partial: bool) -> Result<RestorePoint, Error> {
        self.restore_point(self.there(self.meant(when, clock)?, when, clock)?, allow_partial)
    }

    /// The restore point that is meant, whatever its state.
    pub(super) fn meant(&self, when: &When, clock: &Clock) -> Result<&Point, Error> {
        if let When::Name(name) = when { self.named(name) } else { self.newest(when.moment(clock), true) }
    }

    /// The restore point that a time means, unless a manifest tells that a newer one was made by then, which is missing.
    fn there<'a>(&self, point: &'a Point, when: &When, clock: &Clock) -> Result<&'a Point, Error> {
        let Some(fault) = self.missing_after(point, when, clock) else { return Ok(point) };
        let image = match &fault {
            Fault::Lineage(Lineage::Gone(image)) => Arc::clone(image),
            _ => Arc::clone(&point.image),
        };
        Err(fault.into_error(&image))
    }

    /// The newest image of a chain that is missing and that a time means rather than this point.
    pub(super) fn missing_after(&self, point: &Point, when: &When, clock: &Clock) -> Option<Fault> {
        if matches!(when, When::Name(_)) {
            return None;
        }
        let moment = when.moment(clock)?;
        let is_copy = point.image.level == Level::Copy;
        let is_near =
            |other: &&Point| other.chain == point.chain || (is_copy && other.image.folder() == point.image.folder());
        let missing = self.points().iter().filter(is_near).filter_map(|other| {
            let State::Broken(fault @ Fault::Lineage(Lineage::Missing { parent, .. })) = &other.state else {
                return None;
            };
            let time = ImageName::parse(parent.as_ref())?.time;
            (time <= moment && point.image.moment().0 < Some(time)).then_some((time, fault))
        });
        let missing = missing.map(|(time, fault)| (time, fault.clone()));
        let gone = self.gone_images().iter().filter_map(|image| {
            let time = image.time.filter(|time| *time <= moment && point.image.moment().0 < Some(*time))?;
            Some((time, Fault::Lineage(Lineage::Gone(Arc::clone(image)))))
        });
        missing.chain(gone).max_by_key(|(time, _)| *time).map(|(_, fault)| fault)
    }

    /// As [`select`](Self::select), but a time picks a COPY only where there is nothing else: for work on chains.
    ///
    /// # Errors
    /// As with [`select`](Self::select).
    pub fn select_of_chain(&self, when: &When, clock: &Clock, allow_partial: bool) -> Result<RestorePoint, Error> {
        let point = if let When::Name(name) = when { self.named(name) } else { self.newest(when.moment(clock), false) };
        self.restore_point(self.there(point?, when, clock)?, allow_partial)
    }

    /// Finds the restore point that work in its FULL is to lead to: as [`select_of_chain`](Self::select_of_chain) does, also
    /// where such work was begun and has not ended.
    ///
    /// INCs that it takes may be gone by then. The last of them is meant by its name all the same, and by times from it on
    /// to the next INC; members are the FULL and those that are left.
    ///
    /// # Errors
    /// As with [`select`](Self::select), but for [`Error::Broken`] with [`Fault::Unfinished`].
    pub fn select_in_place(&self, when: &When, clock: &Clock, allow_partial: bool) -> Result<RestorePoint, Error> {
        let point = if let When::Name(name) = when {
            self.named(name).or_else(|error| {
                let gone = self.gone(name).filter(|_| matches!(error, Error::NoSuchPoint { .. }));
                gone.ok_or(error)
            })?
        } else {
            let moment = when.moment(clock);
            let newest = self.newest(moment, false)?;
            let left = self.left(newest.chain, |end| self.has_gone(newest, end, moment));
            left.map_or_else(|| self.there(newest, when, clock), Ok)?
        };
        let chain = self.chains().get(point.chain);
        let unfinished = chain.and_then(Chain::unfinished).cloned();
        Ok(RestorePoint { unfinished, ..self.open(point, &point.otherwise, allow_partial)? })
    }

    /// Lists the images that a restore of this point opens.
    ///
    /// # Errors
    /// The point is broken; or it is doubtful and `allow_partial` is not set.
    pub fn restore_point(&self, point: &Point, allow_partial: bool) -> Result<RestorePoint, Error> {
        self.open(point, &point.state, allow_partial)
    }

    fn open(&self, point: &Point, state: &State, allow_partial: bool) -> Result<RestorePoint, Error> {
        let doubt = match state {
            State::Broken(fault) => return Err(fault.clone().into_error(&point.image)),
            State::Doubtful(doubt) if !allow_partial => {
                let older = self.points().iter().take_while(|other| other.image.moment() < point.image.moment());
                let sound = older.filter(|other| other.state == State::Sound).last();
                return Err(Error::Doubtful {
                    path: point.image.path.clone(),
                    doubt: doubt.clone(),
                    sound: sound.map(|point| point.image.display_name()),
                });
            }
            State::Doubtful(doubt) => Some(doubt.clone()),
            State::Sound => None,
        };
        let chain = self.chains().get(point.chain);
        let incs = chain.map(Chain::incs).unwrap_or_default();
        let (incs, later) = incs.split_at_checked(point.depth).unwrap_or((incs, &[]));
        let members = chain.and_then(Chain::full).into_iter().chain(incs).cloned().collect();
        Ok(RestorePoint { doubt, ..self.point_of(point, members, later) })
    }

    /// A restore point with these images, which INCs follow that are `later`.
    pub(super) fn point_of(&self, point: &Point, members: Vec<Arc<Image>>, later: &[Arc<Image>]) -> RestorePoint {
        RestorePoint {
            disk: self.label().to_owned(),
            time: point.image.time,
            level: point.image.level,
            members,
            doubt: None,
            later: later.iter().filter(|image| !image.missing).cloned().collect(),
            next: later.first().cloned(),
            unfinished: None,
        }
    }

    /// Where unfinished work leads to whose last INC has, or begins with, this name and is gone.
    fn gone(&self, name: &str) -> Option<&Point> {
        (0..self.chains().len()).find_map(|chain| self.left(chain, |end| end.last().starts_with(name)))
    }

    /// Whether a moment for which this point was found is that of the end of unfinished work, whose last INC is gone.
    fn has_gone(&self, newest: &Point, end: &Unfinished, moment: Option<i64>) -> bool {
        let last = ImageName::parse(end.last().as_ref()).map(|last| last.time);
        let is_there =
            self.points().iter().any(|point| point.chain == newest.chain && point.image.name() == end.last());
        let before = newest.depth == 0 || end.taken().contains(&newest.image);
        !is_there && before && (moment.is_none() || moment >= last)
    }

    /// The last INC that the unfinished work of a chain takes and that is still there, else the FULL; if `wanted`.
    fn left(&self, chain: usize, wanted: impl Fn(&Unfinished) -> bool) -> Option<&Point> {
        let unfinished = self.chains().get(chain)?.unfinished().filter(|unfinished| wanted(unfinished))?;
        let taken = unfinished.taken();
        let of_chain = self.points().iter().filter(|point| point.chain == chain);
        of_chain.filter(|point| point.depth == 0 || taken.contains(&point.image)).max_by_key(|point| point.depth)
    }

    /// The newest restore point that is not after a moment; a COPY only where that is wanted, or there is nothing else.
    fn newest(&self, moment: Option<i64>, with_copies: bool) -> Result<&Point, Error> {
        let is_copy = |point: &Point| point.image.level == Level::Copy;
        let timely = |point: &&Point| match moment {
            Some(moment) => point.image.moment().0 <= Some(moment) && !(point.image.time.is_none() && is_copy(point)),
            None => true,
        };
        let all = || self.points().iter().filter(timely);
        let chained = || all().filter(|point| !is_copy(point));
        let timely: Vec<&Point> =
            if with_copies || chained().next().is_none() { all().collect() } else { chained().collect() };
        // the last of equals
        let newest = timely.iter().copied().max_by_key(|point| point.image.moment());
        let Some(newest) = newest else { return Err(self.none_before(moment)) };
        let equal = |other: &Point| {
            !Arc::ptr_eq(&other.image, &newest.image)
                && other.image.time.is_some()
                && other.image.moment() == newest.image.moment()
        };
        match timely.into_iter().find(|other| equal(other)) {
            Some(other) => {
                let fault = Fault::SameTime(Arc::clone(&other.image), Arc::clone(&newest.image));
                Err(fault.into_error(&newest.image))
            }
            None => Ok(newest),
        }
    }

    fn none_before(&self, moment: Option<i64>) -> Error {
        match moment {
            Some(wanted) if !self.points().is_empty() => {
                Error::TooEarly { disk: self.label().to_owned(), wanted, points: self.point_names() }
            }
            _ => {
                let partials = self.partials().iter().map(|image| image.display_name()).collect();
                Error::NoPoint { disk: self.label().to_owned(), partials }
            }
        }
    }

    /// The restore point with this name or, where there is none, with this beginning.
    fn named(&self, name: &str) -> Result<&Point, Error> {
        let images = || self.points().iter().map(|point| &point.image).chain(self.partials());
        let exact: Vec<&Arc<Image>> = images().filter(|image| names(image).iter().any(|known| known == name)).collect();
        let begun = || images().filter(|image| names(image).iter().any(|known| known.starts_with(name)));
        let whole = || begun().filter(|image| !image.partial);
        let matches = match (exact.is_empty(), whole().next()) {
            (false, _) => exact,
            (true, Some(_)) => whole().collect(),
            (true, None) => begun().collect(),
        };
        match matches.as_slice() {
            [] => Err(Error::NoSuchPoint {
                disk: self.label().to_owned(),
                name: name.to_owned(),
                points: self.point_names(),
            }),
            [image] if !image.partial => {
                let point = self.points().iter().find(|point| Arc::ptr_eq(&point.image, image));
                point.ok_or_else(|| Error::Partial { path: image.path.clone() })
            }
            [image, ..] if image.partial => Err(Error::Partial { path: image.path.clone() }),
            several => {
                let points = several.iter().map(|image| image.relative.to_string_lossy().into_owned()).collect();
                Err(Error::WhichPoint { name: name.to_owned(), points })
            }
        }
    }

    fn point_names(&self) -> Vec<String> {
        self.points().iter().map(|point| point.image.display_name()).collect()
    }
}

fn names(image: &Image) -> [String; 2] {
    [image.display_name(), image.relative.to_string_lossy().into_owned()]
}
