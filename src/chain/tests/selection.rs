use std::fs::FileTimes;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;

#[test]
fn a_time_picks_the_newest_that_is_not_after_it() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "INC-300-d", "FULL-400-d", "INC-500-d"]);
    let disk = tree.disk();
    assert_eq!(members(&disk, "100"), ["FULL-100-d"]);
    assert_eq!(members(&disk, "299"), ["FULL-100-d", "INC-200-d"]);
    assert_eq!(members(&disk, "300"), ["FULL-100-d", "INC-200-d", "INC-300-d"]);
    assert_eq!(members(&disk, "1970-01-01T00:06:40Z"), ["FULL-400-d"]);
    assert_eq!(members(&disk, "1970-01-01 00:07"), ["FULL-400-d"]);
    assert_eq!(members(&disk, "-10m"), ["FULL-400-d"], "now is 1000");
    assert_eq!(members(&disk, "latest"), ["FULL-400-d", "INC-500-d"]);
}

#[test]
fn a_time_before_the_first_full_lists_what_there_is() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d"]);
    let error = select(&tree.disk(), "99").unwrap_err();
    assert_eq!(error.kind(), crate::errors::ErrorKind::Usage);
    assert!(error.to_string().ends_with("there are: FULL-100-d, INC-200-d"), "{error}");
}

#[test]
fn a_full_is_before_an_inc_of_the_same_second() {
    let disk = Tree::new(["INC-100-d", "FULL-100-d"]).disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-100-d"]);
    assert_eq!(members(&disk, "latest"), ["FULL-100-d", "INC-100-d"]);
}

#[test]
fn a_copy_stands_alone() {
    let disk = Tree::new(["FULL-100-d", "COPY-200-d", "INC-300-d"]).disk();
    assert_eq!(members(&disk, "250"), ["COPY-200-d"]);
    assert_eq!(members(&disk, "latest"), ["FULL-100-d", "INC-300-d"]);
}

#[test]
fn a_copy_without_a_time_is_picked_by_name() {
    let disk = Tree::new(["vm", "COPY-vm -> vm", "FULL-100-vm", "INC-200-vm"]).disk();
    assert_eq!(members(&disk, "vm"), ["vm"]);
    assert_eq!(members(&disk, "latest"), ["FULL-100-vm", "INC-200-vm"]);
    assert!(matches!(select(&disk, "50"), Err(Error::TooEarly { .. })));
    assert_eq!(members(&Tree::new(["vm", "COPY-vm -> vm"]).disk(), "latest"), ["vm"]);
}

#[test]
fn times_of_files_say_nothing() {
    let tree = Tree::new(["INC-300-d", "INC-200-d", "FULL-100-d"]);
    for (name, age) in [("FULL-100-d", 1), ("INC-200-d", 3), ("INC-300-d", 2)] {
        let modified = SystemTime::now() - Duration::from_secs(age * 1000);
        fs::File::open(tree.path(name)).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
    }
    assert_eq!(members(&tree.disk(), "latest"), ["FULL-100-d", "INC-200-d", "INC-300-d"]);
}

#[test]
fn times_are_numbers_not_text() {
    let disk = Tree::new(["FULL-9-d", "INC-10-d", "INC-0011-d"]).disk();
    assert_eq!(members(&disk, "latest"), ["FULL-9-d", "INC-10-d", "INC-0011-d"]);
}

#[test]
fn a_name_or_its_beginning_picks_one() {
    let disk = Tree::new(["FULL-100-d", "INC-200-d", "INC-201-d", "INC-2-x"]).discover();
    let disk = disk.disk(Some("d")).unwrap();
    assert_eq!(members(disk, "INC-200-d"), ["FULL-100-d", "INC-200-d"]);
    assert_eq!(members(disk, "INC-201"), ["FULL-100-d", "INC-200-d", "INC-201-d"]);
    let error = select(disk, "INC-20").unwrap_err();
    assert!(matches!(&error, Error::WhichPoint { points, .. } if points == &["INC-200-d", "INC-201-d"]), "{error}");
}

#[test]
fn a_whole_name_wins_over_beginnings() {
    let disk = Tree::new(["FULL-100", "FULL-100-d", "INC-200-d", "INC-200-d.partial"]).disk();
    assert_eq!(members(&disk, "FULL-100"), ["FULL-100"]);
    assert!(
        matches!(select(&disk, "INC-200"), Err(Error::Broken { fault: Fault::SameTime(..), .. })),
        "what is whole wins, too"
    );
}

#[test]
fn a_name_that_is_none_lists_points_and_forms() {
    let disk = Tree::new(["FULL-100-d"]).disk();
    let text = select(&disk, "yesterday").unwrap_err().to_string();
    assert!(text.contains("there are: FULL-100-d;") && text.contains("-2d"), "{text}");
}

#[test]
fn a_filter_finds_labels_folders_and_files() {
    let tree = Tree::new(["vm/hd0/FULL-1-root.img", "vm/hd1/FULL-1-data.img", "vm/hd10/FULL-1-swap.img"]);
    let inventory = tree.discover();
    let label = |filter: &str| inventory.disk(Some(filter)).map(|disk| disk.label().to_owned());
    assert_eq!(label("vm/hd0").unwrap(), "vm/hd0");
    assert_eq!(label("data").unwrap(), "vm/hd1");
    assert_eq!(label("hd1").unwrap(), "vm/hd1", "what is the whole name wins");
    assert!(matches!(label("sda"), Err(Error::NoSuchDisk { disks, .. }) if disks.len() == 3));
    assert!(matches!(label("a"), Err(Error::WhichDisk { disks, .. }) if disks == ["vm/hd1", "vm/hd10"]));
    let error = inventory.disk(None).unwrap_err().to_string();
    assert!(error.ends_with("--filter: vm/hd0, vm/hd1, vm/hd10"), "{error}");
    // what `list` calls a disk is that one
    let tree = Tree::new(["hd0/FULL-1-root.img", "vm/hd0/FULL-1-root.img"]);
    let inventory = tree.discover();
    assert_eq!(inventory.disk(Some("hd0")).unwrap().label(), "hd0");
    assert!(matches!(inventory.disk(Some("root.img")), Err(Error::WhichDisk { .. })));
}

/// What [`Disk::select`] has to find among images of one folder, in ten lines.
fn model(images: &[(Level, i64)], wanted: i64) -> Option<Vec<(Level, i64)>> {
    let newest = |level: Option<Level>, until: i64| {
        let fit = images.iter().filter(|(l, t)| *t <= until && level.is_none_or(|level| *l == level));
        fit.max_by_key(|(level, time)| (*time, *level)).copied()
    };
    let point = newest(None, wanted)?;
    let base = if point.0 == Level::Inc { newest(Some(Level::Full), point.1)? } else { point };
    let range = base.1..=point.1;
    let mut incs: Vec<_> = images.iter().filter(|(level, time)| *level == Level::Inc && range.contains(time)).collect();
    incs.sort();
    Some(std::iter::once(base).chain(incs.into_iter().filter(|_| point.0 == Level::Inc).copied()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn selection_agrees_with_the_model(
        images in prop::collection::hash_set(
            (prop::sample::select(vec![Level::Copy, Level::Full, Level::Inc, Level::Inc, Level::Inc]), 0..30_i64),
            1..12,
        ),
        wanted in 0..32_i64,
    ) {
        let images: Vec<_> = images.into_iter().collect();
        let name = |(level, time): &(Level, i64)| format!("{level}-{time}-disk");
        let names: Vec<String> = images.iter().map(name).collect();
        let disk = Tree::new(names.iter().map(String::as_str)).disk();
        let expected = model(&images, wanted).map(|members| members.iter().map(name).collect::<Vec<_>>());
        prop_assert_eq!(select(&disk, &wanted.to_string()).ok().map(|point| paths(&point)), expected);
    }
}
