//! Every field of every kind of image is damaged with all that could lead astray, one at a time. What the engine then
//! reads is what QEMU reads, or an error that says where; it neither panics nor hangs nor takes much memory, and work in
//! place leaves what it does not change.
//!
//! A part of the pokes runs by default, and all of them with `QMPBACKUP_LONG=1`.

mod disk;
mod fields;
mod judge;
mod kinds;
mod small;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use self::fields::Map;
use self::judge::{Judge, Verdict};
use self::kinds::Kind;
use crate::support::prng::Prng;
use crate::support::seeds;

/// The most memory that a poke may take, in KiB.
const MEMORY: u64 = 256 << 10;
const TIME: Duration = Duration::from_secs(5);

/// Pokes all fields of an image: with one value each, or with all.
fn poke_all(kind: &Kind) {
    let map = Map::of(&kind.image);
    let mut judge = Judge::new(kind);
    let mut wrong = Vec::new();
    let prng = &mut Prng::stream(kind.image.len() as u64, 31);
    let mut verdicts: BTreeMap<Verdict, u64> = BTreeMap::new();
    assert!(map.fields().len() >= 25, "{:?}", map.fields());
    // each poke of a long image takes long
    let step = if seeds::are_many() { 1 } else { 1 + (kind.image.len() >> 21) };
    for field in map.fields().iter().step_by(step) {
        let mut values = map.values(*field);
        if !seeds::are_many() {
            values = vec![*prng.pick(&values)];
        }
        for value in values {
            let (began, before) = (Instant::now(), memory_from_now());
            let poked = catch_unwind(AssertUnwindSafe(|| {
                let verdict = judge.poke(*field, value);
                assert!(began.elapsed() < TIME, "{:?}", began.elapsed());
                let taken = status("VmHWM:").saturating_sub(before);
                assert!(taken < MEMORY, "{taken} KiB");
                verdict
            }));
            if let Ok(verdict) = poked {
                *verdicts.entry(verdict).or_default() += 1;
            } else {
                let poke = format!("{} at {:#x} as {value:#x}", field.name, field.at);
                eprintln!("so ended {poke}");
                wrong.push(poke);
            }
        }
    }
    println!("{verdicts:?}");
    assert!(wrong.is_empty(), "{} pokes: {wrong:#?}", wrong.len());
}

/// Begins to measure, and tells what the process has now, in KiB.
fn memory_from_now() -> u64 {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    status("VmRSS:")
}

fn status(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

macro_rules! kinds {
    ($($name:ident = $kind:ident),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                poke_all(&kinds::$kind());
            }
        )+
    };
}

kinds! {
    pokes_at_version_3 = version_3,
    pokes_at_version_2 = version_2,
    pokes_at_clusters_of_512_bytes = small_clusters,
    pokes_at_clusters_of_2_mib = large_clusters,
    pokes_at_subclusters = subclusters,
    pokes_at_subclusters_of_512_bytes = small_subclusters,
    pokes_at_zstd = zstd,
    pokes_at_refcounts_of_1_bit = refcounts_of_1_bit,
    pokes_at_refcounts_of_64_bits = refcounts_of_64_bits,
    pokes_at_an_image_that_was_not_closed = dirty,
    pokes_at_an_inc_on_a_full = on_a_full,
    pokes_at_an_image_with_a_data_file = data_file,
    pokes_at_an_encrypted_image = luks,
}
