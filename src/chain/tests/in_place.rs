//! FULLs that INCs were written into, and those where that has not ended.

use std::sync::Arc;

use super::super::{Doubt, FormatHint, Image, Manifest, Stage, Unfinished, Work};
use super::*;
use crate::errors::ErrorKind;

impl Tree {
    /// Says what moment an image holds.
    pub(super) fn holds(&self, image: &str, time: i64) {
        self.recorded(image, Level::Full, time);
    }

    /// Writes the manifest of an image that was made.
    fn recorded(&self, image: &str, level: Level, time: i64) {
        let manifest = Manifest {
            image: String::new(),
            id: None,
            parent_id: None,
            bitmap: None,
            format: FormatHint::Qcow2,
            level,
            time: Some(time),
            chain: None,
            parent: None,
            virtual_size: 1 << 20,
            qemu: String::new(),
        };
        manifest.write(&self.path(image)).unwrap();
    }

    /// Says that work in a FULL was begun.
    fn begun(&self, full: &str, stage: Stage, incs: &[&str]) {
        let full = self.path(full);
        let unfinished = Unfinished {
            work: Work::Commit,
            stage,
            full: text(full.file_name().unwrap()),
            incs: incs.iter().map(|inc| (*inc).to_owned()).collect(),
            full_id: None,
        };
        unfinished.write(&full).unwrap();
    }
}

fn in_place(disk: &Disk, when: &str) -> Result<RestorePoint, Error> {
    disk.select_in_place(&when.parse()?, &clock(), false)
}

/// The members, those after them, and whether unfinished work leads there.
fn work(disk: &Disk, when: &str) -> (Vec<String>, Vec<String>, bool) {
    let point = in_place(disk, when).unwrap();
    let later = point.later.iter().map(|image| text(image.relative.as_os_str())).collect();
    (paths(&point), later, leads(&point))
}

/// Whether unfinished work takes all INCs of a restore point, and none that is later.
fn leads(point: &RestorePoint) -> bool {
    let taken = |inc: &Arc<Image>| point.unfinished.iter().any(|work| work.incs.contains(&inc.display_name()));
    point.unfinished.is_some() && point.members.iter().skip(1).all(taken) && !point.later.iter().any(taken)
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

const INCS: [&str; 3] = ["INC-200-d", "INC-300-d", "INC-400-d"];

#[test]
fn a_full_that_incs_were_written_into_is_of_the_time_of_the_last() {
    let tree = Tree::new(["FULL-100-d", "INC-500-d", "INC-600-d"]);
    tree.holds("FULL-100-d", 400);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-500-d", "INC-600-d"]);
    assert_eq!((disk.images()[0].time, disk.images()[0].named), (Some(400), Some(100)));
    assert!(matches!(select(&disk, "399"), Err(Error::TooEarly { .. })));
    let point = select(&disk, "400").unwrap();
    assert_eq!((point.time, paths(&point)), (Some(400), owned(&["FULL-100-d"])));
    assert_eq!(members(&disk, "550"), ["FULL-100-d", "INC-500-d"]);
    assert_eq!(members(&disk, "latest"), ["FULL-100-d", "INC-500-d", "INC-600-d"]);
    assert_eq!(members(&disk, "FULL-100"), ["FULL-100-d"]);
}

#[test]
fn a_manifest_never_makes_an_image_older() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "COPY-300-d"]);
    tree.holds("FULL-100-d", 50);
    // and of other images it tells no time
    tree.holds("INC-200-d", 900);
    tree.holds("COPY-300-d", 900);
    let disk = tree.disk();
    assert_eq!(disk.images().iter().map(|image| image.time).collect::<Vec<_>>(), [Some(100), Some(200), Some(300)]);
    assert_eq!(members(&disk, "100"), ["FULL-100-d"]);
    assert_eq!(members(&disk, "250"), ["FULL-100-d", "INC-200-d"]);
}

#[test]
fn between_the_fulls_of_a_folder_the_older_chain_is_the_newest_before() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "FULL-300-d", "INC-700-d", "COPY-450-d"]);
    tree.holds("FULL-300-d", 600);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "COPY-450-d", "FULL-300-d", "INC-700-d"]);
    assert_eq!(members(&disk, "440"), ["FULL-100-d", "INC-200-d"]);
    assert_eq!(members(&disk, "599"), ["COPY-450-d"]);
    assert_eq!(members(&disk, "600"), ["FULL-300-d"]);
    assert_eq!(members(&disk, "latest"), ["FULL-300-d", "INC-700-d"]);
}

#[test]
fn a_full_that_claims_to_hold_what_is_of_the_next_one_is_not_believed() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "FULL-300-d", "INC-400-d"]);
    for time in [300, 350, 900, i64::MAX] {
        tree.holds("FULL-100-d", time);
        let disk = tree.disk();
        assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "FULL-300-d", "INC-400-d"]);
        assert_eq!(members(&disk, "100"), ["FULL-100-d"]);
        assert_eq!(members(&disk, "latest"), ["FULL-300-d", "INC-400-d"]);
    }
    tree.holds("FULL-100-d", 299);
    assert_eq!(points(&tree.disk()), ["INC-200-d!", "FULL-100-d?", "FULL-300-d", "INC-400-d"]);
}

#[test]
fn an_inc_that_should_be_in_its_full_is_never_put_on_another() {
    let tree = Tree::new(["FULL-50-d", "FULL-100-d", "INC-200-d", "INC-300-d", "INC-500-d"]);
    tree.holds("FULL-100-d", 400);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-50-d", "INC-200-d!", "INC-300-d!", "FULL-100-d?", "INC-500-d!"]);
    for when in ["200", "300", "latest"] {
        let error = select(&disk, when).unwrap_err();
        assert!(
            matches!(&error, Error::Broken { fault: Fault::LeftOver { full, inc }, .. }
            if full.name() == "FULL-100-d" && inc.name() == "INC-200-d"),
            "{error}"
        );
        assert_eq!(error.kind(), ErrorKind::Damaged);
    }
    // it is whole, if that INC is what came back
    assert!(matches!(select(&disk, "400"), Err(Error::Doubtful { .. })));
    let point = disk.select(&"400".parse().unwrap(), &clock(), true).unwrap();
    assert!(matches!(point.doubt, Some(Doubt::LeftOver(_))));
    assert_eq!(paths(&point), ["FULL-100-d"]);
}

#[test]
fn an_inc_of_the_moment_that_its_full_holds_harms_nothing() {
    let tree = Tree::new(["FULL-100-d", "INC-400-d", "INC-500-d"]);
    tree.holds("FULL-100-d", 400);
    assert_eq!(members(&tree.disk(), "latest"), ["FULL-100-d", "INC-400-d", "INC-500-d"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-400-d", "INC-500-d"]);
}

#[test]
fn what_an_inc_may_have_lacked_its_full_may_lack_now() {
    let tree = Tree::new(["FULL-100-d", "INC-300-d.partial", "INC-500-d"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-500-d?"]);
    tree.holds("FULL-100-d", 200);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-500-d?"]);
    tree.holds("FULL-100-d", 400);
    assert_eq!(points(&tree.disk()), ["FULL-100-d?", "INC-500-d?"]);
}

#[test]
fn a_full_without_a_time_in_its_name_is_of_the_moment_that_its_manifest_tells() {
    let tree = Tree::new(["vm", "FULL-vm -> vm", "INC-500-vm"]);
    assert_eq!(members(&tree.disk(), "7"), ["vm"]);
    tree.holds("vm", 400);
    let disk = tree.disk();
    assert_eq!((disk.images()[0].time, disk.images()[0].named), (Some(400), None));
    assert!(matches!(select(&disk, "399"), Err(Error::TooEarly { .. })));
    assert_eq!(members(&disk, "400"), ["vm"]);
    assert_eq!(members(&disk, "latest"), ["vm", "INC-500-vm"]);
    // a COPY stays without one
    let tree = Tree::new(["vm", "COPY-vm -> vm", "FULL-100-vm"]);
    tree.holds("vm", 400);
    assert_eq!(members(&tree.disk(), "latest"), ["FULL-100-vm"]);
    // links do not make a FULL that a COPY may have replaced sound
    let tree = Tree::new(["vm", "COPY-vm -> vm", "FULL-vm -> vm", "INC-500-vm"]);
    tree.holds("vm", 400);
    assert_eq!(points(&tree.disk()), ["vm", "INC-500-vm?"]);
}

#[test]
fn where_no_link_tells_the_level_of_a_name_without_a_time_its_manifest_does() {
    let level = |paths: &[&str]| {
        let tree = Tree::new(paths.iter().copied());
        tree.recorded("vm.qcow2", Level::Copy, 400);
        let image = Arc::clone(tree.disk().images().iter().find(|image| image.named.is_none()).unwrap());
        (image.level, image.time)
    };
    assert_eq!(level(&["vm.qcow2"]), (Level::Copy, Some(400)));
    assert_eq!(level(&["vm.qcow2", "FULL-100-vm.qcow2", "INC-200-vm.qcow2"]), (Level::Copy, Some(400)));
    assert_eq!(level(&["vm.qcow2", "COPY-vm.qcow2 -> vm.qcow2"]), (Level::Copy, Some(400)));
    // another tool has written over it
    assert_eq!(level(&["vm.qcow2", "FULL-vm.qcow2 -> vm.qcow2"]).0, Level::Full);
    assert_eq!(level(&["vm.qcow2", "INC-500-vm.qcow2"]).0, Level::Full);
}

#[test]
fn nothing_of_a_chain_is_whole_while_its_full_is_written_to() {
    let tree = Tree::new(["FULL-50-d", "INC-60-d", "FULL-100-d", "FULL-800-d"].into_iter().chain(INCS));
    tree.begun("FULL-100-d", Stage::Writing, &INCS[..2]);
    let disk = tree.disk();
    let expected = ["FULL-50-d", "INC-60-d", "FULL-100-d!", "INC-200-d!", "INC-300-d!", "INC-400-d!", "FULL-800-d"];
    assert_eq!(points(&disk), expected);
    let unfinished = |at: usize| disk.chains()[at].unfinished().map(Unfinished::last);
    assert_eq!([0, 1, 2].map(unfinished), [None, Some("INC-300-d"), None]);
    for when in ["100", "INC-200-d", "300", "400"] {
        let error = disk.select(&when.parse().unwrap(), &clock(), true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        let text = error.to_string();
        let what = "a commit up to INC-300-d was begun and not finished: unless it goes on, run `qmprestore commit` again with \
                    --until INC-300-d";
        assert!(text.ends_with(what), "{text}");
    }
    assert_eq!(members(&disk, "60"), ["FULL-50-d", "INC-60-d"]);
    assert_eq!(members(&disk, "latest"), ["FULL-800-d"]);
    Unfinished::remove(&tree.path("FULL-100-d")).unwrap();
    assert_eq!(members(&tree.disk(), "400"), ["FULL-100-d", "INC-200-d", "INC-300-d", "INC-400-d"]);
}

#[test]
fn a_journal_that_cannot_be_read_stops_its_chain() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "FULL-300-d"]);
    tree.write(".qmpbackup/FULL-100-d.in-place.json", "{");
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d!", "INC-200-d!", "FULL-300-d"]);
    for point in [select(&disk, "200"), in_place(&disk, "200")] {
        let error = point.unwrap_err();
        assert!(
            matches!(&error, Error::Broken { fault: Fault::Journal { path, .. }, .. } if path.ends_with("FULL-100-d.in-place.json")),
            "{error}"
        );
        assert_eq!(error.kind(), ErrorKind::Damaged);
    }
    assert_eq!(disk.chains()[0].unfinished(), None);
    assert_eq!(members(&disk, "latest"), ["FULL-300-d"]);
}

#[test]
fn work_in_place_finds_what_is_meant_and_what_comes_after() {
    let tree = Tree::new(["FULL-100-d", "FULL-800-d"].into_iter().chain(INCS));
    let whole = owned(&["FULL-100-d", "INC-200-d", "INC-300-d"]);
    let disk = tree.disk();
    assert_eq!(work(&disk, "300"), (whole.clone(), owned(&["INC-400-d"]), false));
    assert_eq!(in_place(&disk, "300").unwrap().unfinished, None);
    tree.begun("FULL-100-d", Stage::Writing, &INCS[..2]);
    let disk = tree.disk();
    assert_eq!(in_place(&disk, "300").unwrap().unfinished.unwrap().incs, owned(&INCS[..2]));
    for when in ["300", "INC-300-d", "INC-300", "399"] {
        assert_eq!(work(&disk, when), (whole.clone(), owned(&["INC-400-d"]), true), "{when}");
    }
    // less or more than what was begun
    assert_eq!(work(&disk, "250"), (owned(&["FULL-100-d", "INC-200-d"]), owned(&INCS[1..]), false));
    assert!(!work(&disk, "400").2 && !work(&disk, "latest").2);
}

#[test]
fn work_goes_on_whatever_of_its_incs_is_left() {
    for left in [&INCS[..2], &INCS[1..2], &INCS[..1], &[]] {
        for (stage, held) in [(Stage::Writing, 100), (Stage::Removing, 100), (Stage::Removing, 300)] {
            let tree = Tree::new(["FULL-50-d", "FULL-100-d", "INC-400-d"].into_iter().chain(left.iter().copied()));
            tree.begun("FULL-100-d", stage, &INCS[..2]);
            tree.holds("FULL-100-d", held);
            let disk = tree.disk();
            let expected: Vec<String> = ["FULL-100-d"].iter().chain(left).map(|name| (*name).to_owned()).collect();
            for when in ["300", "399", "INC-300-d", "INC-3"] {
                let found = work(&disk, when);
                assert_eq!(found, (expected.clone(), owned(&["INC-400-d"]), true), "{left:?} {stage:?} {held} {when}");
            }
            assert!(!work(&disk, "400").2);
            assert!(matches!(select(&disk, "400"), Err(Error::Broken { fault: Fault::Unfinished(_), .. })));
        }
    }
}

#[test]
fn the_newest_of_a_chain_is_the_end_of_its_work_though_that_is_gone() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d"]);
    tree.begun("FULL-100-d", Stage::Removing, &INCS);
    for held in [100, 400] {
        tree.holds("FULL-100-d", held);
        assert_eq!(work(&tree.disk(), "latest"), (owned(&["FULL-100-d", "INC-200-d"]), vec![], true));
    }
    // a name that could be of several is no one's
    tree.add("INC-900-d");
    assert!(matches!(in_place(&tree.disk(), "INC-"), Err(Error::WhichPoint { .. })));
    assert!(matches!(in_place(&tree.disk(), "INC-5"), Err(Error::NoSuchPoint { .. })));
}

#[test]
fn work_in_place_wants_all_else_to_be_right() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "INC-300-d.partial", "INC-400-d", "INC-500-d", "INC-500"]);
    tree.begun("FULL-100-d", Stage::Writing, &["INC-200-d", "INC-400-d"]);
    let disk = tree.disk();
    assert!(matches!(in_place(&disk, "400"), Err(Error::Doubtful { .. })));
    let point = disk.select_in_place(&"400".parse().unwrap(), &clock(), true).unwrap();
    assert!(leads(&point) && point.doubt.is_some());
    assert!(matches!(in_place(&disk, "500"), Err(Error::Broken { fault: Fault::SameTime(..), .. })));
    // an INC that came back is none of the work's
    let tree = Tree::new(["FULL-100-d"].into_iter().chain(INCS));
    tree.begun("FULL-100-d", Stage::Removing, &INCS[1..]);
    tree.holds("FULL-100-d", 400);
    assert!(matches!(in_place(&tree.disk(), "INC-400-d"), Err(Error::Broken { fault: Fault::LeftOver { .. }, .. })));
}
