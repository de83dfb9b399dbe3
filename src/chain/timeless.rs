//! The place in time of images whose names have none.

use std::collections::BTreeMap;
use std::path::Path;

use super::image::{Image, Month};

/// Gives images without a time, in monthly folders, a place among those of other months: after all that is in earlier
/// months and not before their month began, but before everything with a time in their folder.
pub(super) fn place(images: &mut [Image]) {
    let mut newest: BTreeMap<Month, i64> = BTreeMap::new();
    let mut oldest: BTreeMap<&Path, i64> = BTreeMap::new();
    for (image, time) in images.iter().filter(|image| !image.partial).filter_map(|image| Some((image, image.named?))) {
        let first = oldest.entry(image.folder()).or_insert(time);
        *first = time.min(*first);
        if let Some(month) = image.month {
            let last = newest.entry(month).or_insert(time);
            *last = time.max(*last);
        }
    }
    let since = |image: &Image| {
        let month = image.month.filter(|_| image.named.is_none());
        let Some(month) = month else { return image.named };
        let earlier = newest.range(..month).map(|(_, time)| *time).max();
        let begin = month.start().max(earlier);
        let first = oldest.get(image.folder()).copied();
        begin.map(|begin| first.map_or(begin, |first| begin.min(first)))
    };
    let places: Vec<Option<i64>> = images.iter().map(since).collect();
    for (image, place) in images.iter_mut().zip(places) {
        image.since = place;
    }
}
