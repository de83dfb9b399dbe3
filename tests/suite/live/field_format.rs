//! qcow2 of every kind: cluster sizes, versions, subclusters, data files, sizes that are no multiple of anything.

use serde_json::Value;

use super::field_setup::{Setup, releases};
use crate::support::tools;

/// Three points of a disk whose image is made with these options.
fn comes_back(release: &'static str, size: &str, options: &str, cluster_size: u64) {
    let mut field = Setup::of(release).image("disk.qcow2", size, options).qcow2("disk0", "disk.qcow2").start();
    for (level, made) in [("full", "FULL"), ("inc", "INC"), ("inc", "INC")] {
        field.scribble("disk0");
        field.makes(&format!("--level {level}"), 0, &format!("disk0 {made}"));
        let info = tools::run(tools::qemu_img().args(["info", "--output", "json"]).arg(field.newest("disk0")));
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["cluster-size"], cluster_size, "{options} on {release}");
    }
    field.verify();
}

#[test]
fn images_have_the_cluster_size_of_the_disk() {
    for release in releases(&["10.0"]) {
        for (cluster_size, size) in [(512, "1M"), (4096, "4M"), (2 << 20, "9M")] {
            comes_back(release, size, &format!("cluster_size={cluster_size}"), cluster_size);
        }
    }
}

#[test]
fn clusters_of_512_bytes_come_back_on_old_releases() {
    comes_back("5.2", "1M", "cluster_size=512", 512);
}

#[test]
fn subclusters_come_back() {
    for release in releases(&["5.2", "10.0"]) {
        comes_back(release, "4M", "extended_l2=on,cluster_size=128k", 128 << 10);
    }
}

#[test]
fn a_disk_may_end_within_a_cluster() {
    for release in releases(&["10.0"]) {
        comes_back(release, "3222528", "", 64 << 10);
        comes_back(release, "1537k", "cluster_size=2M", 2 << 20);
    }
}

#[test]
fn a_disk_that_is_kept_in_a_data_file_comes_back() {
    for release in releases(&["10.0"]) {
        for options in ["data_file=@/data.raw", "data_file=@/data.raw,data_file_raw=on"] {
            comes_back(release, "4M", options, 64 << 10);
        }
    }
}

#[test]
fn a_disk_in_version_2_has_incs_until_qemu_ends() {
    for release in releases(&["7.2", "11"]) {
        let mut field = Setup::of(release)
            .image("old.qcow2", "4M", "compat=0.10")
            .qcow2("disk0", "old.qcow2")
            .disk("disk1")
            .start();
        for (level, made) in [("full", "FULL"), ("inc", "INC")] {
            field.scribble("disk0");
            field.makes(&format!("--level {level}"), 0, &format!("disk0 {made}, disk1 {made}"));
        }
        field.restart();
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 FULL, disk1 INC").says("those of this disk end with QEMU");
        field.verify();
    }
}

#[test]
fn a_disk_with_internal_snapshots_is_backed_up_as_it_is_now() {
    for release in releases(&["10.0"]) {
        let setup = Setup::of(release).image("disk.qcow2", "4M", "");
        let mut field = setup.qcow2("disk0", "disk.qcow2").start();
        field.scribble("disk0");
        let words = serde_json::json!({ "device": "disk0", "name": "before" });
        field.execute("blockdev-snapshot-internal-sync", &words);
        field.makes("--level full", 0, "disk0 FULL");
        field.scribble("disk0");
        field.makes("--level inc", 0, "disk0 INC");
        field.verify();
    }
}
