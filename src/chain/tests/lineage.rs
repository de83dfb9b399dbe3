//! Chains whose manifests say that an image is missing, foreign or out of order.

use std::path::Path;

use super::super::{FormatHint, ImageId, Lineage, Manifest, Member, Note, Stage, Unfinished, Work};
use super::*;

impl Tree {
    /// Gives an image a manifest, as the run that made it would.
    fn made(&self, image: &str, chain: &str, parent: Option<&str>) {
        Self::made_in(&self.path(""), image, chain, parent);
    }

    fn made_in(folder: &Path, image: &str, chain: &str, parent: Option<&str>) {
        let parsed = super::super::ImageName::parse(image.as_ref()).unwrap();
        let manifest = Manifest {
            image: image.to_owned(),
            level: parsed.level,
            time: Some(parsed.time),
            chain: Some(chain.to_owned()),
            parent: parent.map(str::to_owned),
            id: None,
            parent_id: None,
            bitmap: None,
            format: FormatHint::Qcow2,
            virtual_size: 1 << 20,
            qemu: String::new(),
        };
        manifest.write(&folder.join(image)).unwrap();
    }

    /// A chain of these names, the FULL first, each with the one before it as parent.
    fn chain(names: &[&str]) -> Self {
        let tree = Self::new(names.iter().copied());
        let before = std::iter::once(None).chain(names.iter().copied().map(Some));
        names.iter().zip(before).for_each(|(name, parent)| tree.made(name, "c", parent));
        tree
    }

    fn remove(&self, image: &str) {
        fs::remove_file(self.path(image)).unwrap();
    }
}

const CHAIN: [&str; 4] = ["FULL-100-d", "INC-200-d", "INC-300-d", "INC-400-d"];

fn fault(disk: &Disk, name: &str) -> String {
    let point = disk.points().iter().find(|point| point.image().display_name() == name).unwrap();
    match point.state() {
        State::Broken(Fault::Lineage(lineage)) => lineage.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chain_as_it_was_made_is_sound() {
    assert_eq!(points(&Tree::chain(&CHAIN).disk()), CHAIN);
}

#[test]
fn a_missing_image_breaks_the_chain_from_there() {
    let tree = Tree::chain(&CHAIN);
    tree.remove("INC-300-d");
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-300-d!", "INC-400-d!"]);
    assert_eq!(disk.images().len(), 3);
    assert_eq!(members(&disk, "INC-200"), ["FULL-100-d", "INC-200-d"]);
    let error = select(&disk, "latest").unwrap_err();
    assert!(matches!(&error, Error::Broken { fault: Fault::Lineage(Lineage::Gone(_)), .. }), "{error}");
    assert!(error.to_string().contains("INC-300-d is missing, only its manifest is there"), "{error}");
    // and without its manifest
    fs::remove_file(Manifest::path(&tree.path("INC-300-d"))).unwrap();
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-400-d!"]);
    assert!(fault(&disk, "INC-400-d").ends_with("INC-400-d builds on INC-300-d, which is missing"));
}

#[test]
fn the_newest_image_that_is_missing_is_not_passed_over() {
    let tree = Tree::chain(&CHAIN);
    tree.remove("INC-400-d");
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-300-d", "INC-400-d!"]);
    for when in ["latest", "400", "INC-400"] {
        assert!(matches!(select(&disk, when), Err(Error::Broken { fault: Fault::Lineage(_), .. })), "{when}");
    }
    assert_eq!(members(&disk, "399"), ["FULL-100-d", "INC-200-d", "INC-300-d"]);
    // what is being published is not missing
    tree.add("INC-400-d.partial");
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-200-d", "INC-300-d"]);
}

#[test]
fn what_somebody_has_removed_with_its_full_is_not_missed() {
    let tree = Tree::chain(&["FULL-100-d", "INC-200-d"]);
    for (name, parent) in [("FULL-300-d", None), ("INC-400-d", Some("FULL-300-d")), ("COPY-450-d", None)] {
        tree.made(name, "c", parent);
    }
    tree.add("FULL-500-d");
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-200-d", "FULL-500-d"]);
    // nor are INCs that the FULL holds
    tree.made("INC-600-d", "c", Some("FULL-500-d"));
    let held = Manifest { time: Some(600), ..manifest_of("FULL-500-d") };
    held.write(&tree.path("FULL-500-d")).unwrap();
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-200-d", "FULL-500-d"]);
}

fn manifest_of(full: &str) -> Manifest {
    let tree = Tree::chain(&[full]);
    Manifest::read(&tree.path(full)).unwrap().unwrap()
}

#[test]
fn the_newest_full_that_is_missing_is_missed_with_its_incs() {
    let tree = Tree::chain(&["FULL-100-d", "INC-200-d"]);
    for (name, parent) in [("FULL-300-d", None), ("INC-400-d", Some("FULL-300-d"))] {
        tree.made(name, "c", parent);
    }
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "FULL-300-d!", "INC-400-d!"]);
    assert!(fault(&disk, "INC-400-d").contains("FULL-300-d is missing, only its manifest is there"));
    assert!(matches!(select(&disk, "latest"), Err(Error::Broken { fault: Fault::Lineage(_), .. })));
    assert_eq!(members(&disk, "299"), ["FULL-100-d", "INC-200-d"]);
}

#[test]
fn a_disk_of_which_all_images_are_missing_is_missed() {
    let tree = Tree::chain(&["FULL-100-d", "INC-200-d"]);
    tree.remove("FULL-100-d");
    tree.remove("INC-200-d");
    assert_eq!(points(&tree.disk()), ["FULL-100-d!", "INC-200-d!"]);
}

#[test]
fn a_link_that_leads_nowhere_breaks_what_needs_it() {
    let tree = Tree::chain(&CHAIN);
    tree.remove("INC-400-d");
    symlink("/nowhere/INC-400-d", tree.path("INC-400-d")).unwrap();
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-200-d", "INC-300-d", "INC-400-d!"]);
    // nor does it matter whether manifests tell
    let tree =
        Tree::new(["FULL-100-d", "INC-200-d -> /nowhere/INC-200-d", "INC-300-d", "FULL-400-d -> gone", "INC-500-d"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-200-d!", "INC-300-d!", "FULL-400-d!", "INC-500-d!"]);
}

#[test]
fn an_inc_of_another_image_with_the_name_of_its_parent_is_noticed() {
    let tree = Tree::chain(&CHAIN);
    let ids: Vec<_> = CHAIN.iter().map(|_| ImageId::random().unwrap()).collect();
    let name = |at: usize, id| {
        let path = tree.path(CHAIN[at]);
        let parent_id = at.checked_sub(1).map(|before| ids[before]);
        Manifest { id: Some(id), parent_id, ..Manifest::read(&path).unwrap().unwrap() }.write(&path).unwrap();
    };
    (0..CHAIN.len()).for_each(|at| name(at, ids[at]));
    assert_eq!(points(&tree.disk()), CHAIN);
    name(1, ImageId::random().unwrap());
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-300-d!", "INC-400-d!"]);
    assert!(
        fault(&disk, "INC-300-d")
            .ends_with("builds on another image of the name INC-200-d: one of the two was exchanged")
    );
}

#[test]
fn an_inc_of_a_full_that_is_gone_does_not_follow_the_one_before() {
    let tree = Tree::chain(&["FULL-100-d", "INC-200-d"]);
    tree.add("INC-400-d");
    tree.made("INC-400-d", "c", Some("FULL-300-d"));
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-400-d!"]);
    assert!(fault(&disk, "INC-400-d").contains("builds on FULL-300-d, which is missing"));
}

#[test]
fn an_inc_of_another_chain_is_foreign() {
    let tree = Tree::chain(&CHAIN);
    tree.made("INC-300-d", "other", Some("INC-200-d"));
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-300-d!", "INC-400-d!"]);
    assert!(fault(&disk, "INC-400-d").contains("INC-300-d is of another chain, other, and the FULL of c"));
}

#[test]
fn an_image_between_that_was_not_there_is_noticed() {
    let tree = Tree::chain(&CHAIN);
    tree.add("INC-350-d");
    let disk = tree.disk();
    assert!(fault(&disk, "INC-400-d").contains("INC-400-d builds on INC-300-d, not on INC-350-d"));
    assert_eq!(points(&disk).last().unwrap(), "INC-400-d!");
}

#[test]
fn an_image_with_the_name_of_another_is_noticed() {
    let tree = Tree::chain(&CHAIN);
    fs::rename(tree.path("INC-400-d"), tree.path("INC-500-d")).unwrap();
    fs::rename(Manifest::path(&tree.path("INC-400-d")), Manifest::path(&tree.path("INC-500-d"))).unwrap();
    let disk = tree.disk();
    assert!(fault(&disk, "INC-500-d").contains("INC-500-d was made as INC-400-d"), "{disk:?}");
    // a FULL, too
    let tree = Tree::chain(&CHAIN);
    fs::rename(tree.path("FULL-100-d"), tree.path("FULL-99-d")).unwrap();
    fs::rename(Manifest::path(&tree.path("FULL-100-d")), Manifest::path(&tree.path("FULL-99-d"))).unwrap();
    assert_eq!(points(&tree.disk()), ["FULL-99-d!", "INC-200-d!", "INC-300-d!", "INC-400-d!"]);
}

#[test]
fn a_manifest_that_cannot_be_read_is_told_and_says_nothing() {
    let tree = Tree::chain(&CHAIN);
    tree.write(".qmpbackup/INC-300-d.json", "{");
    let inventory = tree.discover();
    assert!(inventory.disks[0].notes()[0].to_string().contains("INC-300-d.json is ignored"), "{inventory:?}");
    assert_eq!(points(&inventory.disks[0]), CHAIN);
}

/// What work on the FULL has left that takes these INCs and has not ended, as those see it who end it.
fn unfinished(tree: &Tree, incs: &[&str], until: &str) -> Result<Vec<String>, String> {
    let incs = incs.iter().map(|inc| (*inc).to_owned()).collect();
    let full = CHAIN[0].to_owned();
    let unfinished = Unfinished { work: Work::SnapshotRebase, stage: Stage::Writing, full, incs, full_id: None };
    unfinished.write(&tree.path(CHAIN[0])).unwrap();
    let point = tree.disk().select_in_place(&until.parse().unwrap(), &clock(), false);
    point.map(|point| paths(&point)).map_err(|error| error.to_string())
}

#[test]
fn work_that_was_broken_off_can_be_ended_whichever_manifests_and_images_it_has_removed() {
    let incs = &CHAIN[1..3];
    // nothing yet; the first INC's manifest, and the image before it, are gone
    let tree = Tree::chain(&CHAIN);
    assert_eq!(unfinished(&tree, incs, "latest").unwrap(), CHAIN);
    tree.remove("INC-200-d");
    assert_eq!(unfinished(&tree, incs, "latest").unwrap(), CHAIN, "it is seen, to be removed");
    fs::remove_file(Manifest::path(&tree.path("INC-200-d"))).unwrap();
    assert_eq!(unfinished(&tree, incs, "latest").unwrap(), [CHAIN[0], CHAIN[2], CHAIN[3]]);
    // each follows the FULL before the one before it goes
    let tree = Tree::chain(&CHAIN);
    tree.made(CHAIN[2], "c", Some(CHAIN[0]));
    assert_eq!(unfinished(&tree, incs, "latest").unwrap(), CHAIN);
    tree.made(CHAIN[3], "c", Some(CHAIN[0]));
    assert_eq!(unfinished(&tree, incs, "latest").unwrap(), CHAIN);
    // what it does not take has nothing to do with that
    let said = unfinished(&tree, &CHAIN[1..2], "latest").unwrap_err();
    assert!(said.contains("INC-400-d builds on FULL-100-d, not on INC-300-d"), "{said}");
    tree.remove("INC-300-d");
    let said = unfinished(&tree, &CHAIN[1..2], "INC-300").unwrap_err();
    assert!(said.contains("INC-300-d is missing"), "{said}");
}

/// What there is of a restore point, a name with `-` where it is missing.
fn salvaged(disk: &Disk, when: &str) -> Vec<String> {
    let found = disk.select_salvage(&when.parse().unwrap(), &clock()).unwrap();
    let name = |path: &Path| text(path.file_name().unwrap());
    let member = |member: &Member| match member {
        Member::There(image) => image.display_name(),
        Member::Missing { path, .. } => format!("-{}", name(path)),
    };
    assert!(found.point.members.iter().eq(found.members.iter().filter_map(Member::image)));
    found.members.iter().map(member).collect()
}

#[test]
fn what_is_there_of_a_broken_chain_is_found() {
    let tree = Tree::chain(&CHAIN);
    assert_eq!(salvaged(&tree.disk(), "latest"), CHAIN);
    tree.remove("INC-300-d");
    assert_eq!(salvaged(&tree.disk(), "latest"), ["FULL-100-d", "INC-200-d", "-INC-300-d", "INC-400-d"]);
    assert_eq!(salvaged(&tree.disk(), "INC-300"), ["FULL-100-d", "INC-200-d", "-INC-300-d"]);
    fs::remove_file(Manifest::path(&tree.path("INC-300-d"))).unwrap();
    assert_eq!(salvaged(&tree.disk(), "latest"), ["FULL-100-d", "INC-200-d", "-INC-300-d", "INC-400-d"]);
    tree.remove("FULL-100-d");
    let disk = tree.disk();
    assert_eq!(salvaged(&disk, "latest"), ["-FULL-100-d", "INC-200-d", "-INC-300-d", "INC-400-d"]);
    assert_eq!(salvaged(&disk, "INC-200-d"), ["-FULL-100-d", "INC-200-d"]);
}

#[test]
fn an_image_on_which_none_of_the_others_builds_is_left_out() {
    let tree = Tree::chain(&CHAIN);
    tree.made("INC-400-d", "c", Some("INC-200-d"));
    assert_eq!(salvaged(&tree.disk(), "latest"), ["FULL-100-d", "INC-200-d", "INC-400-d"]);
    assert_eq!(salvaged(&tree.disk(), "INC-300"), ["FULL-100-d", "INC-200-d", "INC-300-d"]);
}

#[test]
fn without_manifests_and_without_a_full_the_incs_are_what_there_is() {
    let disk = Tree::new(["v/INC-200-d", "v/INC-300-d"]).disk();
    assert_eq!(salvaged(&disk, "latest"), ["-v", "INC-200-d", "INC-300-d"]);
    assert_eq!(salvaged(&disk, "INC-200"), ["-v", "INC-200-d"]);
}

#[test]
fn a_disk_of_another_machine_is_told() {
    let tree = Tree::new(["hd0/FULL-100-d", "hd0/INC-200-d", "hd1/FULL-100-d"]);
    for image in ["hd0/FULL-100-d", "hd0/INC-200-d", "hd1/FULL-100-d"] {
        let (folder, name) = image.split_once('/').unwrap();
        Tree::made_in(&tree.path(folder), name, "c", None);
    }
    let notes = |tree: &Tree| tree.discover().notes_of(None).unwrap().into_iter().cloned().collect::<Vec<_>>();
    assert_eq!(notes(&tree), [], "nothing tells which machine it is");
    tree.write("uuid", "c\n");
    assert_eq!(notes(&tree), []);
    // as it is after the folder of a disk was exchanged
    let begun = |seconds| {
        let file = fs::File::options().write(true).open(tree.path("uuid")).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).unwrap();
    };
    begun(100);
    Tree::made_in(&tree.path("hd0"), "INC-200-d", "other", None);
    let uuid = fs::canonicalize(tree.path("uuid")).unwrap();
    let foreign = Note::Foreign { path: tree.path("hd0/INC-200-d"), uuid };
    assert_eq!(notes(&tree), [foreign]);
    let alone = discover(&tree.path("hd0")).unwrap();
    assert!(matches!(alone.disks[0].notes(), [Note::Foreign { .. }]));
    begun(201);
    assert_eq!(notes(&tree), [], "the disk has left the machine before it got another id");
    begun(100);
    // what came before a new id is of this machine all the same
    Tree::made_in(&tree.path("hd0"), "INC-200-d", "c", None);
    Tree::made_in(&tree.path("hd0"), "FULL-100-d", "before", None);
    assert_eq!(notes(&tree), []);
}

#[test]
fn a_chain_that_is_missing_between_others_is_told_and_no_time_means_an_older_one_instead() {
    let tree = Tree::chain(&["FULL-100-d", "INC-200-d"]);
    for (name, parent) in [("FULL-300-d", None), ("INC-400-d", Some("FULL-300-d")), ("FULL-500-d", None)] {
        tree.made(name, "c", parent);
    }
    tree.add("FULL-500-d");
    let disk = tree.disk();
    assert_eq!(disk.notes(), [Note::Gone { path: tree.path("FULL-300-d"), more: 0 }]);
    for (when, gone) in [("300", "FULL-300-d"), ("399", "FULL-300-d"), ("400", "INC-400-d"), ("499", "INC-400-d")] {
        let error = select(&disk, when).unwrap_err().to_string();
        assert!(error.contains(&format!("{gone} is missing")), "{when}: {error}");
        assert_eq!(salvaged(&disk, when), ["FULL-100-d".to_owned(), "INC-200-d".to_owned(), format!("-{gone}")]);
    }
    for (when, last) in [("299", "INC-200-d"), ("500", "FULL-500-d"), ("latest", "FULL-500-d")] {
        assert_eq!(members(&disk, when).last().unwrap(), last);
    }
    // a COPY is older, too
    let copy = Tree::new(["COPY-50-d", "FULL-200-d"]);
    copy.made("FULL-100-d", "c", None);
    assert!(matches!(select(&copy.disk(), "150"), Err(Error::Broken { .. })));
    // somebody has moved it
    copy.add("1970-01/FULL-100-d");
    assert_eq!(copy.disk().notes(), []);
    // old ones are removed, and their files perhaps not
    for image in ["FULL-100-d", "INC-200-d"] {
        tree.remove(image);
    }
    assert_eq!(tree.disk().notes(), []);
    assert!(matches!(select(&tree.disk(), "499"), Err(Error::TooEarly { .. })));
}

#[test]
fn an_inc_that_lost_its_manifest_while_the_backup_before_it_wrote_one_is_told() {
    let tree = Tree::chain(&CHAIN);
    let path = tree.path("INC-300-d");
    fs::remove_file(Manifest::path(&tree.path("INC-400-d"))).unwrap();
    assert_eq!(tree.disk().notes(), [], "whoever made the manifests may make none for the next");
    let before = Manifest::read(&path).unwrap().unwrap();
    Manifest { bitmap: Some("qmpbackup-300-c".to_owned()), ..before }.write(&path).unwrap();
    assert_eq!(tree.disk().notes(), [Note::Untold { path: tree.path("INC-400-d") }]);
}

#[test]
fn a_full_of_which_only_files_beside_it_are_left_is_missing() {
    // without a time in its name
    let tree = Tree::new(["hd0/a.qcow2", "hd1/b.qcow2"]);
    let made = Manifest {
        time: Some(100),
        ..Manifest::read(&Tree::chain(&["FULL-100-d"]).path("FULL-100-d")).unwrap().unwrap()
    };
    Manifest { image: "a.qcow2".to_owned(), ..made.clone() }.write(&tree.path("hd0/a.qcow2")).unwrap();
    tree.remove("hd0/a.qcow2");
    let disk = tree.discover().disk(Some("hd0")).unwrap().clone();
    assert!(matches!(disk.points()[0].state(), State::Broken(Fault::Lineage(Lineage::Gone(_)))), "{disk:?}");
    // nothing else is an image, whatever lies there
    tree.write("hd1/.qmpbackup/run.json", "{}");
    tree.write("hd1/.qmpbackup/other.json", "{}");
    Manifest { image: "c.qcow2".to_owned(), ..made }.write(&tree.path("hd1/e.qcow2")).unwrap();
    assert_eq!(points(tree.discover().disk(Some("hd1")).unwrap()), ["b.qcow2"]);
    // nor what its manifest says can be read
    let tree = Tree::chain(&["FULL-100-d"]);
    tree.remove("FULL-100-d");
    tree.write(".qmpbackup/FULL-100-d.json", "damaged");
    tree.write(".qmpbackup/FULL-100-d.in-place.json", "{}");
    assert_eq!(points(&tree.disk()), ["FULL-100-d!"]);
}
