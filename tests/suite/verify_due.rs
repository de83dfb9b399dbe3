//! Parts that are due: over many days all is verified, and nothing twice before all was.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmpbackup::chain::{self, Checksums, FormatHint, Level, Manifest, Verifications, segments};
use qmpbackup::restore::{Due, Share, VerifyOptions};
use qmpbackup::storage::FileStorage;

use crate::support::program::{Backup, Ended};
use crate::verify::{kept, verified_with};

const DAY: i64 = 24 * 3600;
const SEGMENT: u64 = 16 << 20;

/// Beside the recorded chain, a raw disk that is long and has nothing but holes.
fn long() -> (Backup, PathBuf) {
    let backup = kept();
    let image = backup.root.path().join("backup/disk1/FULL-100-long.raw");
    fs::create_dir(image.parent().unwrap()).unwrap();
    File::create(&image).unwrap().set_len(20 * SEGMENT - 7).unwrap();
    let manifest = Manifest {
        image: "FULL-100-long.raw".to_owned(),
        level: Level::Full,
        time: Some(100),
        chain: None,
        parent: None,
        id: None,
        parent_id: None,
        bitmap: None,
        format: FormatHint::Raw,
        virtual_size: 20 * SEGMENT - 7,
        qemu: String::new(),
    };
    manifest.write(&image).unwrap();
    chain::create_checksums(&image, &FileStorage::open(&image).unwrap()).unwrap();
    (backup, image)
}

fn options(sample: Option<u32>, max_age: Option<i64>, now: i64) -> VerifyOptions {
    let max_age = max_age.map(|age| Duration::from_secs(age.unsigned_abs()));
    let sample = sample.map(|percent| Share::millionths(percent * 10_000).unwrap());
    VerifyOptions { threads: None, due: Some(Due { sample, max_age, now }) }
}

fn run(backup: &Backup, options: &VerifyOptions) -> u64 {
    let verified = verified_with(&backup.root.path().join("backup"), options);
    assert!(verified.flaws.is_empty(), "{verified:#?}");
    verified.images.iter().map(|image| image.compared).sum()
}

/// When each segment of an image was found right.
fn times(image: &Path) -> Vec<Option<i64>> {
    let sums = Checksums::open(image).unwrap().unwrap();
    let name = image.file_name().unwrap().to_str().unwrap();
    let known = Verifications::read(image.parent().unwrap()).times(name, sums.list_sum(), sums.length());
    known.into_iter().map(|times| times.right).collect()
}

/// The same of all images.
fn all_times(backup: &Backup, long: &Path) -> Vec<Option<i64>> {
    backup.images.iter().map(PathBuf::as_path).chain([long]).flat_map(times).collect()
}

#[test]
fn samples_cover_all_before_anything_is_verified_again() {
    let (backup, long) = long();
    let total = 20 * SEGMENT - 7 + backup.images.iter().map(|path| path.metadata().unwrap().len()).sum::<u64>();
    let mut before = all_times(&backup, &long);
    assert_eq!(before, vec![None; 24]);
    let mut days = 0;
    for day in 1..30 {
        let read = run(&backup, &options(Some(10), None, day * DAY));
        let now = all_times(&backup, &long);
        let chosen: Vec<usize> = (0..now.len()).filter(|at| now[*at] != before[*at]).collect();
        assert!(chosen.iter().all(|at| now[*at] == Some(day * DAY)));
        // nothing that was left is older
        let newest = chosen.iter().map(|at| before[*at]).max().unwrap();
        assert!((0..now.len()).all(|at| chosen.contains(&at) || before[at] >= newest), "day {day}: {before:?} {now:?}");
        // about a tenth
        assert!(read * 10 >= total && read <= total / 10 + SEGMENT, "day {day}: {read} of {total}");
        before = now;
        if days == 0 && before.iter().all(Option::is_some) {
            days = day;
        }
    }
    assert!((7..=10).contains(&days), "{days}");
}

#[test]
fn an_image_that_is_damaged_does_not_keep_samples_from_the_others() {
    // one that is too long, one whose manifest tells another size, and blocks
    let break_it: [fn(&Path); 3] = [
        |long| File::options().write(true).open(long).unwrap().set_len(21 * SEGMENT).unwrap(),
        |long| fs::write(Manifest::path(long), "{}").unwrap(),
        |long| (0..20).for_each(|at| write(long, at * SEGMENT)),
    ];
    for break_it in break_it {
        let (backup, long) = long();
        break_it(&long);
        for day in 1..=25 {
            let verified = verified_with(&backup.root.path().join("backup"), &options(Some(10), None, day * DAY));
            assert!(verified.images.iter().map(|image| image.compared).sum::<u64>() > 0, "day {day}");
        }
        for image in &backup.images {
            // again, after all had their first turn
            assert!(times(image).iter().all(|time| *time > Some(10 * DAY)), "{}", image.display());
        }
        assert_eq!(times(&long), vec![None; 20]);
    }
}

fn write(image: &Path, offset: u64) {
    File::options().write(true).open(image).unwrap().write_all_at(&[1], offset).unwrap();
}

#[test]
fn what_was_verified_lately_is_not_due() {
    let (backup, long) = long();
    let total = run(&backup, &options(None, Some(30 * DAY), 100 * DAY));
    assert_eq!(all_times(&backup, &long), vec![Some(100 * DAY); 24]);
    assert_eq!(run(&backup, &options(None, Some(30 * DAY), 130 * DAY - 1)), 0);
    // both: at most the sample of what is due
    let part = run(&backup, &options(Some(20), Some(30 * DAY), 130 * DAY));
    assert!(part >= total / 5 && part <= total / 5 + SEGMENT, "{part}");
    assert_eq!(run(&backup, &options(None, Some(30 * DAY), 130 * DAY)), total - part);
    assert_eq!(run(&backup, &options(None, Some(30 * DAY), 130 * DAY)), 0);
    // a clock that was ahead made no promises
    assert_eq!(run(&backup, &options(None, Some(30 * DAY), 50 * DAY)), total);
}

#[test]
fn damage_is_never_remembered_as_right_and_what_was_renewed_is_due() {
    let (backup, long) = long();
    let root = backup.root.path().join("backup");
    let file = File::options().write(true).open(&long).unwrap();
    file.write_all_at(&[1], 5 * SEGMENT + 99).unwrap();
    for day in [1, 2] {
        let verified = verified_with(&root, &options(None, Some(10 * DAY), day * DAY));
        assert_eq!(verified.flaws.len(), 1, "{verified:#?}");
        let expected: Vec<_> = (0..20).map(|at| (at != 5).then_some(DAY)).collect();
        assert_eq!(times(&long), expected);
    }
    file.write_all_at(&[0], 5 * SEGMENT + 99).unwrap();
    assert_eq!(run(&backup, &options(None, Some(10 * DAY), 3 * DAY)), SEGMENT);
    // a segment that was right once and is not any more
    file.write_all_at(&[1], 7 * SEGMENT).unwrap();
    assert_eq!(verified_with(&root, &options(None, Some(DAY), 4 * DAY)).flaws.len(), 1);
    assert_eq!(times(&long)[7], None);
    // it was changed by who may do so
    chain::create_checksums(&long, &FileStorage::open(&long).unwrap()).unwrap();
    assert_eq!(times(&long), vec![None; 20]);
    assert_eq!(run(&backup, &options(None, Some(10 * DAY), 5 * DAY)), 20 * SEGMENT - 7);
    assert_eq!(segments(20 * SEGMENT - 7).count(), 20);
}

#[test]
fn images_that_are_gone_are_forgotten_and_a_file_that_says_nonsense_says_nothing() {
    let (backup, long) = long();
    let now = options(None, Some(DAY), DAY);
    let total = run(&backup, &now);
    let path = Verifications::path(&backup.dir);
    assert_eq!(fs::read_to_string(&path).unwrap().matches("disk.qcow2").count(), 4);
    for at in [3, 2] {
        for file in [backup.images[at].clone(), Manifest::path(&backup.images[at]), Checksums::path(&backup.images[at])]
        {
            fs::remove_file(file).unwrap();
        }
    }
    assert_eq!(run(&backup, &now), 0);
    assert_eq!(fs::read_to_string(&path).unwrap().matches("disk.qcow2").count(), 2);
    fs::write(&path, "{\"version\": 1, \"images\": 7}").unwrap();
    fs::write(Verifications::path(long.parent().unwrap()), "\u{0}").unwrap();
    let left: u64 = backup.images[..2].iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(run(&backup, &now), left + 20 * SEGMENT - 7);
    assert!(total > left);
}

#[test]
fn the_program_remembers_only_when_it_is_told_to_and_warns_where_it_cannot() {
    let (backup, long) = long();
    let root = backup.root.path().join("backup");
    let verify = |more: &[&str]| Ended::run(["verify", "--dir", root.to_str().unwrap()].iter().chain(more));
    let paths = [Verifications::path(&backup.dir), Verifications::path(long.parent().unwrap())];
    verify(&[]).with(0).says("5 images");
    assert!(paths.iter().all(|path| !path.exists()));
    verify(&["--sample", "5%"]).with(0).says("5 images, ");
    verify(&["--max-age=1h"]).with(0);
    assert!(paths.iter().all(|path| path.exists()));
    let read = verify(&["--max-age=1h", "--json"]).with(0);
    assert_eq!(crate::support::program::event(&read.events(), "done")["bytes"], 0);
    for path in &paths {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    }
    verify(&["--sample", "5%"]).with(3).says("verified.json: what was verified cannot be remembered");
}
