//! The choice among a disk's restore points.

use std::sync::Arc;

use super::Error;
use super::disk::Disk;
use super::image::Image;
use super::links::Chain;
use super::name::Level;
use super::point::{Point, RestorePoint, State};
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
        let point = match (when, when.moment(clock)) {
            (When::Name(name), _) => self.named(name)?,
            (_, Some(moment)) => self.newest(Some(moment))?,
            (_, None) => self.newest(None)?,
        };
        self.restore_point(point, allow_partial)
    }

    /// Lists the images that a restore of this point opens.
    ///
    /// # Errors
    /// The point is broken; or it is doubtful and `allow_partial` is not set.
    pub fn restore_point(&self, point: &Point, allow_partial: bool) -> Result<RestorePoint, Error> {
        let doubt = match &point.state {
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
        let incs = chain.map(Chain::incs).unwrap_or_default().iter().take(point.depth);
        let members = chain.and_then(Chain::full).into_iter().chain(incs).cloned().collect();
        let image = &point.image;
        Ok(RestorePoint { disk: self.label().to_owned(), time: image.time, level: image.level, members, doubt })
    }

    /// The newest restore point that is not after a moment.
    fn newest(&self, moment: Option<i64>) -> Result<&Point, Error> {
        let timeless_copy = |point: &&Point| point.image.time.is_none() && point.image.level == Level::Copy;
        let timely = self.points().iter().filter(|point| match moment {
            Some(moment) => point.image.since <= Some(moment) && !timeless_copy(point),
            None => true,
        });
        // the last of equals
        let newest = timely.max_by_key(|point| point.image.moment());
        let Some(newest) = newest else { return Err(self.none_before(moment)) };
        let equal = |other: &&Point| {
            !Arc::ptr_eq(&other.image, &newest.image)
                && other.image.time.is_some()
                && other.image.moment() == newest.image.moment()
        };
        match self.points().iter().find(equal) {
            Some(other) => Err(Error::SameTime { first: other.image.path.clone(), second: newest.image.path.clone() }),
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
