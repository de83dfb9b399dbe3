//! The judge of backups is judged: right ones pass on every release with writes before each command, wrong ones do not.

use super::client::{Client, Way, folder};
use super::draw::draw_disks;
use super::proxy::Victim;
use super::spec::DiskSpec;
use super::stage::Stage;
use super::tool::restore;
use super::vm::RELEASES;
use crate::support::prng::Prng;
use crate::support::seeds::shared_seeds;

const TIMES: [u64; 4] = [1_700_000_000, 1_700_000_100, 1_700_000_200, 1_700_000_300];

/// Backs up a machine that is written to before each command, but for the last INC, and returns what the judge says.
fn judged(release: &'static str, disks: &[DiskSpec], way: Way, seed: u64) -> Result<Vec<usize>, String> {
    let mut stage = Stage::new(release, disks, &Victim::default(), Prng::stream(seed, 1), 12);
    let mut client = Client::new(&mut stage.vm, stage.proxy.path(), &stage.target, way);
    for (number, time) in TIMES.iter().enumerate() {
        if number == TIMES.len() - 1 {
            stage.quiet();
        }
        client.backup(*time);
        stage.assert_clean();
    }
    let image = |disk, time: &u64| restore(&folder(&stage.target, disk), &time.to_string());
    let point = |time| (0..disks.len()).map(|disk| image(disk, time)).collect();
    let points: Vec<Vec<Vec<u8>>> = TIMES.iter().map(point).collect();
    stage.judge(&points)
}

fn two_disks() -> [DiskSpec; 2] {
    [DiskSpec::new("disk0.qcow2", 4 << 20), DiskSpec::new("disk1.qcow2", (3 << 20) + 512)]
}

fn right_is_accepted(release: &'static str) {
    let moments = judged(release, &two_disks(), Way::Right, 0).unwrap();
    // It was written to between all of them
    assert!(moments.is_sorted_by(|a, b| a < b) && moments[0] >= 20, "{moments:?}");
}

fn wrong_is_rejected(release: &'static str) {
    // A few writes between two commands may change nothing: each wrong way gets some chances
    for way in [Way::DiskAfterDisk, Way::BitmapLater] {
        let error = (0..4).find_map(|seed| judged(release, &two_disks(), way, seed).err()).unwrap();
        assert!(error.contains("no moment of"), "{error}");
    }
}

/// Any disks on any release: what the judge expects can be had.
fn right_is_accepted_on_any(seed: u64) {
    let prng = &mut Prng::stream(seed, 0);
    let (release, disks) = (*prng.pick(&RELEASES), draw_disks(prng));
    let judgement = judged(release, &disks, Way::Right, seed);
    assert!(judgement.is_ok(), "seed {seed}, QEMU {release}, {disks:#?}: {judgement:?}");
}

mod right_backups_of_any_disks_pass {
    super::shared_seeds! {
        super::right_is_accepted_on_any, 8;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}

#[test]
fn right_backups_of_qemu_5_2_pass() {
    right_is_accepted("5.2");
}

#[test]
fn right_backups_of_qemu_7_2_pass() {
    right_is_accepted("7.2");
}

#[test]
fn right_backups_of_qemu_10_0_pass() {
    right_is_accepted("10.0");
}

#[test]
fn right_backups_of_qemu_11_pass() {
    right_is_accepted("11");
}

#[test]
fn lost_writes_and_torn_moments_of_qemu_5_2_are_noticed() {
    wrong_is_rejected("5.2");
}

#[test]
fn lost_writes_and_torn_moments_of_qemu_7_2_are_noticed() {
    wrong_is_rejected("7.2");
}

#[test]
fn lost_writes_and_torn_moments_of_qemu_10_0_are_noticed() {
    wrong_is_rejected("10.0");
}

#[test]
fn lost_writes_and_torn_moments_of_qemu_11_are_noticed() {
    wrong_is_rejected("11");
}
