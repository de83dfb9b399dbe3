//! What names and manifests tell against restore points.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::VerifyTarget;
use super::flaw::{Flaw, Flawed};
use crate::chain::{Chain, Disk, Doubt, Fault, Image, Lineage, Point, State};

/// The faults of all chains, each once with the restore points that suffer. Where somebody writes to a FULL, that work in
/// it was begun is none.
pub(super) fn faults(targets: &[VerifyTarget<'_>], is_locked: impl Fn(&Path) -> bool) -> Vec<Flawed> {
    let mut all = Vec::new();
    for target in targets {
        match target {
            VerifyTarget::Disk(disk) => {
                let points: BTreeMap<&Path, &Point> =
                    disk.points().iter().map(|point| (point.image().path.as_path(), point)).collect();
                for chain in disk.chains() {
                    of_chain(disk, chain, &points, &is_locked, &mut all);
                }
            }
            VerifyTarget::Point(disk, point) => {
                let image = point.members.last();
                if let Some((image, doubt)) = image.zip(point.doubt.clone()) {
                    add(disk, image, Against::Doubt(doubt), &mut Vec::new(), &mut all);
                }
            }
        }
    }
    all.into_iter().map(|(flawed, points)| Flawed { points: points.into(), ..flawed }).collect()
}

/// A fault, and the restore points that were found to suffer from it.
type Found = (Flawed, Vec<Arc<Image>>);

#[derive(PartialEq)]
enum Against {
    Fault(Fault),
    Doubt(Doubt),
}

fn of_chain(
    disk: &Disk,
    chain: &Chain,
    points: &BTreeMap<&Path, &Point>,
    is_locked: impl Fn(&Path) -> bool,
    all: &mut Vec<Found>,
) {
    let mut seen = Vec::new();
    let is_busy = chain.full().is_some_and(|full| is_locked(&full.path));
    for image in chain.images() {
        let Some(point) = points.get(image.path.as_path()) else { continue };
        let against = match point.state() {
            State::Broken(Fault::Unfinished(_) | Fault::Journal { .. } | Fault::Lineage(Lineage::Mixed { .. }))
                if is_busy =>
            {
                continue;
            }
            State::Broken(fault) => Against::Fault(fault.clone()),
            State::Doubtful(doubt) => Against::Doubt(doubt.clone()),
            State::Sound => continue,
        };
        // that work is to be ended does not help where an image is missing
        let beside = match point.state_after_work() {
            State::Broken(fault) => Some(Against::Fault(fault.clone())).filter(|fault| *fault != against),
            State::Doubtful(_) | State::Sound => None,
        };
        add(disk, image, against, &mut seen, all);
        if let Some(fault) = beside {
            add(disk, image, fault, &mut seen, all);
        }
    }
}

/// Adds a restore point to what speaks against it; `seen` has what was added of its chain, and where.
fn add(disk: &Disk, image: &Arc<Image>, against: Against, seen: &mut Vec<(Against, usize)>, all: &mut Vec<Found>) {
    let known = seen.iter().find(|(known, _)| *known == against);
    if let Some((_, points)) = known.and_then(|(_, at)| all.get_mut(*at)) {
        points.push(Arc::clone(image));
        return;
    }
    let flaw = match &against {
        Against::Fault(fault) => Flaw::Chain(fault.clone()),
        Against::Doubt(doubt) => Flaw::Doubtful(doubt.clone()),
    };
    seen.push((against, all.len()));
    let flawed = Flawed { disk: disk.label().to_owned(), path: image.path.clone(), flaw, points: Vec::new().into() };
    all.push((flawed, vec![Arc::clone(image)]));
}
