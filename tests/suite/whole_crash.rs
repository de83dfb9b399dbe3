//! Crashes while a writer is asked everything at once: leaks at most, all that was flushed, and snapshots whole or not at all.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::support::edited::{faults, memory};
use crate::support::prng::Prng;
use crate::support::recorder::Recorder;
use crate::support::seeds::{self, shared_seeds};
use crate::support::world::{Sight, Start, World, assert_is_one_of};

shared_seeds! {
    judge, 32;
    a_crash_amid_everything_leaks_at_most_0 = 0,
    a_crash_amid_everything_leaks_at_most_1 = 1,
    a_crash_amid_everything_leaks_at_most_2 = 2,
    a_crash_amid_everything_leaks_at_most_3 = 3,
    a_crash_amid_everything_leaks_at_most_4 = 4,
    a_crash_amid_everything_leaks_at_most_5 = 5,
    a_crash_amid_everything_leaks_at_most_6 = 6,
    a_crash_amid_everything_leaks_at_most_7 = 7,
}

/// What there was after something was done.
#[derive(Clone)]
struct Moment {
    steps: usize,
    sight: Sight,
    flushed: bool,
}

fn judge(seed: u64) {
    let start = Start::make(seed, 128 << 10, 16, &[512]);
    let prng = &mut Prng::stream(seed, 92);
    let recorder = Arc::new(Recorder::new(start.image.clone()));
    let mut world = World::open(&start, recorder.clone());
    let mut moments = vec![Moment { steps: 0, sight: world.now.clone(), flushed: true }];
    for _ in 0..prng.between(3, 40) {
        world.step(prng);
        world.said.push(format!("-> {} steps", recorder.count()));
        moments.push(Moment { steps: recorder.count(), sight: world.now.clone(), flushed: world.is_flushed() });
    }
    world.finish();
    moments.push(Moment { steps: recorder.count(), sight: world.now.clone(), flushed: true });
    let said = world.said();
    let count = recorder.count();
    let most = if seeds::are_many() { 200 } else { 40 };
    for number in 0..most {
        let steps = if count <= most { number.min(count) } else { prng.below(count as u64 + 1) as usize };
        let left = recorder.crashed(steps, prng);
        let said = format!("{said}\ncrashed after {steps} steps");
        assert_eq!(faults(&left).0, 0, "{said}");
        let flushed = moments.iter().rposition(|moment| moment.flushed && moment.steps <= steps).unwrap();
        // what the crash came into counts as well
        let begun = moments.iter().position(|moment| moment.steps > steps).unwrap_or(moments.len() - 1);
        let sight = assert_holds(&moments[flushed..=begun.max(flushed)], &left, &start, &said);
        go_on(&start, prng, &left, &sight, number % 20 == 19);
    }
}

fn assert_holds(may_be: &[Moment], left: &[u8], start: &Start, said: &str) -> Sight {
    let sight = Sight::of(left, &start.base);
    let mut may_be = may_be.to_vec();
    if !sight.disk.has_backing() {
        // a backing file goes at once, whatever is flushed
        for moment in &mut may_be {
            moment.sight.lose_backing();
        }
    }
    assert_is_one_of(&sight.disk.bytes, &may_be.iter().map(|moment| &moment.sight.disk), said);
    let names = |sight: &Sight| sight.snapshots.iter().map(|kept| kept.name.clone()).collect::<Vec<_>>();
    let same = may_be.iter().find(|moment| names(&moment.sight) == names(&sight));
    let same = same.unwrap_or_else(|| panic!("snapshots {:?}\n{said}", names(&sight)));
    sight.assert_same_snapshots(&same.sight.snapshots, said);
    assert_bitmaps(&may_be, &sight, said);
    sight
}

/// A bitmap that is not in use knows what it knew when all was flushed last, and what is different since.
fn assert_bitmaps(may_be: &[Moment], sight: &Sight, said: &str) {
    let names = |sight: &Sight| sight.bitmaps.iter().map(|marks| marks.name.clone()).collect::<BTreeSet<_>>();
    assert!(may_be.iter().any(|moment| names(&moment.sight) == names(sight)), "{said}");
    let flushed = &may_be[0].sight;
    for marks in sight.bitmaps.iter().filter(|marks| !marks.lost) {
        let Some(before) = flushed.bitmaps.iter().find(|before| before.name == marks.name) else { continue };
        assert!(!before.lost, "{} is not in use any more\n{said}", marks.name);
        let sectors = sight.disk.bytes.chunks(512).zip(flushed.disk.bytes.chunks(512));
        for (sector, (is, was)) in sectors.enumerate() {
            let cut = is.len().min(was.len());
            let must = before.must[sector] || (marks.auto && is[..cut] != was[..cut]);
            assert!(marks.must[sector] || !must, "{} has lost sector {sector}\n{said}", marks.name);
        }
    }
}

/// The next writer does not care about what the crash has left.
fn go_on(start: &Start, prng: &mut Prng, left: &[u8], sight: &Sight, judged: bool) {
    let mut world = World::open(start, memory(left));
    world.now = sight.clone();
    if judged {
        world.judge(false);
    }
    for _ in 0..prng.below(6) {
        world.step(prng);
    }
    world.finish();
    if judged {
        world.judge(false);
    }
}
