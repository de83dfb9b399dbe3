use super::super::Doubt;
use super::*;
use crate::errors::ErrorKind;

#[test]
fn an_inc_after_a_failed_one_is_doubtful() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "INC-300-d.partial", "INC-400-d", "INC-500-d"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-200-d", "INC-400-d?", "INC-500-d?"]);
    assert_eq!(disk.partials().len(), 1);

    let error = select(&disk, "latest").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    let text = error.to_string();
    assert!(text.contains("INC-300-d.partial") && text.ends_with("without doubt is INC-200-d"), "{text}");
    let point = disk.select(&When::Latest, &clock(), true).unwrap();
    assert_eq!(paths(&point), ["FULL-100-d", "INC-200-d", "INC-400-d", "INC-500-d"]);
    assert!(matches!(point.doubt, Some(Doubt::Partial(_))));
    assert_eq!(select(&disk, "399").unwrap().doubt, None);
}

#[test]
fn a_new_full_ends_the_doubt() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d.partial", "INC-300-d", "FULL-400-d", "INC-500-d"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-300-d?", "FULL-400-d", "INC-500-d"]);
}

#[test]
fn a_failed_full_makes_later_incs_doubtful_too() {
    let tree = Tree::new(["FULL-100-d", "INC-200-d", "FULL-300-d.partial", "INC-400-d"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-200-d", "INC-400-d?"]);
}

#[test]
fn a_failed_copy_harms_nothing() {
    let tree = Tree::new(["FULL-100-d", "COPY-200-d.partial", "INC-300-d"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-d", "INC-300-d"]);
    let tree = Tree::new(["d", "COPY-d -> d", "d.partial", "FULL-100-d", "INC-300-d"]);
    assert_eq!(points(&tree.disk()), ["d", "FULL-100-d", "INC-300-d"]);
}

#[test]
fn a_failed_run_harms_only_its_disk_and_folder() {
    let tree = Tree::new(["FULL-100-a", "INC-200-a.partial", "INC-300-a", "FULL-100-b", "INC-300-b"]);
    let inventory = tree.discover();
    assert_eq!(points(inventory.disk(Some("a")).unwrap()), ["FULL-100-a", "INC-300-a?"]);
    assert_eq!(points(inventory.disk(Some("b")).unwrap()), ["FULL-100-b", "INC-300-b"]);
    let tree =
        Tree::new(["2021-11/FULL-100-a", "2021-11/INC-200-a.partial", "2021-12/FULL-150-a", "2021-12/INC-300-a"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-a", "FULL-150-a", "INC-300-a"]);
}

#[test]
fn a_failed_run_without_a_time_may_have_been_before_any_inc() {
    let tree = Tree::new(["vm.qcow2", "INC-200-vm.qcow2", "INC-300-vm.qcow2", "vm.qcow2.partial"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["vm.qcow2", "INC-200-vm.qcow2?", "INC-300-vm.qcow2?"]);
    assert!(select(&disk, "vm.qcow2").is_ok());
    let tree = Tree::new(["FULL-100-vm", "INC-200-vm", "vm.partial"]);
    assert_eq!(points(&tree.disk()), ["FULL-100-vm", "INC-200-vm?"]);
}

#[test]
fn a_full_that_a_copy_may_have_replaced_is_no_safe_base() {
    let tree = Tree::new(["vm", "FULL-vm -> vm", "COPY-vm -> vm", "INC-200-vm"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["vm", "INC-200-vm?"]);
    assert!(select(&disk, "latest").unwrap_err().to_string().contains("FULL and as COPY"));
}

#[test]
fn what_a_failed_run_left_is_never_a_restore_point() {
    let tree = Tree::new(["hd0/FULL-100-d.partial"]);
    let disk = tree.disk();
    assert!(disk.points().is_empty());
    let error = select(&disk, "latest").unwrap_err();
    assert!(matches!(&error, Error::NoPoint { partials, .. } if partials == &["FULL-100-d.partial"]));
    assert_eq!(error.kind(), ErrorKind::Damaged);
    for name in ["FULL-100-d.partial", "FULL-100", "hd0/FULL-100-d.partial"] {
        assert!(matches!(select(&disk, name), Err(Error::Partial { .. })), "{name}");
    }
}

#[test]
fn an_inc_without_a_full_is_listed_and_refused() {
    let tree = Tree::new(["INC-50-d", "INC-60-d", "FULL-100-d", "INC-200-d"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["INC-50-d!", "INC-60-d!", "FULL-100-d", "INC-200-d"]);
    assert!(disk.chains()[0].full().is_none());
    let error = select(&disk, "60").unwrap_err();
    assert!(matches!(&error, Error::Broken { path, fault: Fault::NoFull } if path.ends_with("INC-60-d")));
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(members(&disk, "latest"), ["FULL-100-d", "INC-200-d"]);
}

#[test]
fn incs_of_the_same_second_have_no_order() {
    let tree = Tree::new(["FULL-100-d", "INC-150-d", "INC-200", "INC-200-d", "INC-300-d"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100-d", "INC-150-d", "INC-200!", "INC-200-d!", "INC-300-d!"]);
    for when in ["latest", "200", "INC-300"] {
        let error = select(&disk, when).unwrap_err().to_string();
        assert!(error.contains("INC-200 ") && error.contains("INC-200-d "), "{error}");
    }
    assert_eq!(members(&disk, "199"), ["FULL-100-d", "INC-150-d"]);
}

#[test]
fn fulls_of_the_same_second_are_no_base() {
    let tree = Tree::new(["FULL-100", "FULL-100-d", "INC-200-d"]);
    let disk = tree.disk();
    assert_eq!(points(&disk), ["FULL-100", "FULL-100-d", "INC-200-d!"]);
    assert!(matches!(select(&disk, "latest"), Err(Error::Broken { fault: Fault::SameTime(..), .. })));
    assert!(matches!(select(&disk, "100"), Err(Error::Broken { fault: Fault::SameTime(..), .. })));
    assert_eq!(members(&disk, "FULL-100"), ["FULL-100"]);
}
