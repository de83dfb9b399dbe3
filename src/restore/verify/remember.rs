//! Writes down what was verified, so that other parts are due next time: those that are damaged, too, which would else be
//! all that is ever read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::due::Chosen;
use super::judge::Judged;
use super::look::{Looked, Subject};
use crate::chain::{Verifications, segments};
use crate::restore::observer::{Observer, Warning};

/// An image, what was to be done with it, and what came of it.
pub(super) type Outcome<'a> = (&'a Subject<'a>, &'a Looked, &'a Chosen, &'a Judged);

/// Remembers what was tried, and what of it was right.
pub(super) fn remember<'a>(outcomes: impl Iterator<Item = Outcome<'a>>, now: i64, observer: &dyn Observer) {
    let mut folders: BTreeMap<&Path, Vec<Outcome<'_>>> = BTreeMap::new();
    for outcome in outcomes {
        folders.entry(outcome.0.image.path.parent().unwrap_or(Path::new(""))).or_default().push(outcome);
    }
    for (folder, outcomes) in folders {
        let before = Verifications::read(folder);
        let mut known = before.clone();
        known.retain(|name| folder.join(name).exists());
        for outcome in outcomes {
            let (subject, looked, chosen, _) = &outcome;
            if subject.image.name().to_str().is_none() && looked.sums.is_some() && chosen.blocks.is_empty() {
                let reason = "its name is not UTF-8: it is read where all is verified, and only then".to_owned();
                observer.warning(Warning::NotRemembered { path: subject.image.path.clone(), reason });
            }
            one(&mut known, outcome, now);
        }
        let written = if known == before { Ok(()) } else { known.write(folder) };
        if let Err(error) = written {
            let path: PathBuf = Verifications::path(folder);
            observer.warning(Warning::NotRemembered { path, reason: error.to_string() });
        }
    }
}

fn one(known: &mut Verifications, (subject, looked, chosen, judged): Outcome<'_>, now: i64) {
    let Some((name, sums)) = subject.image.name().to_str().zip(looked.sums.as_ref()) else { return };
    let overlaps =
        |one: &std::ops::Range<u64>, other: &std::ops::Range<u64>| one.start < other.end && other.start < one.end;
    let mut times = known.times(name, sums.list, sums.length);
    for (times, blocks) in times.iter_mut().zip(segments(sums.length)) {
        let is_chosen = chosen.blocks.iter().any(|chosen| overlaps(chosen, &blocks));
        let is_bad = judged.is_lost() || judged.bad.iter().any(|bad| overlaps(bad, &blocks));
        // a clock that was wrong says nothing
        times.tried = if is_chosen { Some(now) } else { times.tried.filter(|tried| *tried <= now) };
        times.right = times.right.filter(|right| *right <= now);
        if is_bad || overlaps(&sums.unsettled, &blocks) {
            times.right = None;
        } else if is_chosen {
            times.right = Some(now);
        }
    }
    known.set(name, sums.list, sums.length, times);
}
