//! What the hand writes is on the disks, on every release and every kind of disk, and what it cannot write is not.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;

use super::hand::Written;
use super::history::{History, Kind, Write};
use super::spec::{Bus, DiskSpec, Format, Given};
use super::vm::{Builder, RELEASES, Vm};
use crate::support::oracle::convert;
use crate::support::tools;

const SIZE: u64 = 4 << 20;

fn fill(disk: usize, byte: u8) -> Write {
    Write { disk, offset: 0, length: 256 << 10, kind: Kind::Fill(byte) }
}

/// What is on the disks of a machine that has ended.
fn contents(vm: &Vm) -> Vec<Vec<u8>> {
    let content = |disk: &DiskSpec| {
        let path = vm.path(&disk.name);
        if disk.format == Format::Raw {
            return std::fs::read(path).unwrap();
        }
        let raw = vm.path("raw");
        convert(&path, &raw);
        std::fs::read(raw).unwrap()
    };
    vm.disks.iter().map(content).collect()
}

fn disks() -> [DiskSpec; 5] {
    let cluster_size = 4096;
    [
        DiskSpec::new("a,b.qcow2", SIZE),
        DiskSpec::new("drive.raw", SIZE).given(Given::Drive).format(Format::Raw),
        DiskSpec::new("old.qcow2", SIZE).on(Bus::VirtioScsi).format(Format::OldQcow2 { cluster_size }),
        DiskSpec::new("ide.qcow2", SIZE).on(Bus::Ide).given(Given::Drive).format(Format::Qcow2 { cluster_size }),
        DiskSpec::new("ide.raw", SIZE).on(Bus::Ide).format(Format::Raw),
    ]
}

#[test]
fn every_release_takes_writes_to_every_kind_of_disk() {
    for release in RELEASES {
        let mut vm = disks().into_iter().fold(Vm::builder(release), Builder::disk).start();
        let history = History::zeroes(&[SIZE; 5]);
        let mut hand = vm.hand(&history);
        let kinds = [Kind::Fill(7), Kind::Zeroes, Kind::Unmap, Kind::Discard];
        for (disk, (number, kind)) in (0..5).flat_map(|disk| (0..).zip(kinds).map(move |pair| (disk, pair))) {
            assert_eq!(hand.guest_write(fill(disk, 9)), Written::Done);
            let write = Write { disk, offset: number * (64 << 10), length: 64 << 10, kind };
            assert_eq!(hand.guest_write(write), Written::Done, "{release}: {write:?}");
        }
        vm.quit();
        let history = history.lock().unwrap();
        assert_eq!(history.now(), 40, "{release}: a discard was not done");
        assert!(history.moments(&contents(&vm)).unwrap().contains(&40), "{release}");
    }
}

#[test]
fn a_machine_that_does_not_run_has_no_guest_that_writes() {
    let mut vm = Vm::builder("7.2").disk(DiskSpec::new("disk.qcow2", SIZE)).prelaunch().start();
    let history = History::zeroes(&[SIZE]);
    let mut hand = vm.hand(&history);
    assert_eq!(hand.guest_write(fill(0, 1)), Written::Impossible);
    assert_eq!(history.lock().unwrap().now(), 0);
    hand.write(fill(0, 2));
    vm.monitor.execute("cont", &json!({})).unwrap();
    assert_eq!(hand.guest_write(fill(0, 3)), Written::Done);
    vm.monitor.execute("stop", &json!({})).unwrap();
    assert_eq!(hand.guest_write(fill(0, 4)), Written::Impossible);
    vm.quit();
    assert_eq!(history.lock().unwrap().moments(&contents(&vm)), Ok(vec![2]));
}

#[test]
fn a_machine_that_was_killed_starts_again_with_its_disks() {
    let mut vm = Vm::builder("11").disk(DiskSpec::new("disk.raw", SIZE).format(Format::Raw)).start();
    let history = History::zeroes(&[SIZE]);
    for byte in 1..4 {
        vm.hand(&history).write(fill(0, byte));
        vm.kill();
        vm.restart();
    }
    vm.quit();
    assert_eq!(history.lock().unwrap().moments(&contents(&vm)), Ok(vec![3]));
}

#[test]
fn a_write_that_has_to_wait_is_pending_and_done_later() {
    let mut vm = Vm::builder("5.2").disk(DiskSpec::new("disk.qcow2", SIZE)).start();
    let history = History::zeroes(&[SIZE]);
    let mut hand = vm.hand(&history);
    // Each write waits until the one before it is paid for, three seconds. Firmware that resets the device cancels debts
    let slow = json!({
        "id": vm.device(0)["qdev"], "bps": 0, "bps_rd": 0, "bps_wr": 40 << 10, "iops": 0, "iops_rd": 0, "iops_wr": 0
    });
    vm.monitor.execute("block_set_io_throttle", &slow).unwrap();
    let writes = (1..100)
        .find(|byte| hand.guest_write(Write { length: 128 << 10, ..fill(0, *byte) }) == Written::Pending)
        .unwrap();
    // Meanwhile QEMU does what it is told
    vm.monitor.execute("query-block", &json!({})).unwrap();
    assert_eq!(history.lock().unwrap().now(), usize::from(writes));
    hand.finish();
    vm.quit();
    assert_eq!(history.lock().unwrap().moments(&contents(&vm)), Ok(vec![usize::from(writes)]));
}

/// A backup job that takes very long, with its filter above the disk. The target file has no room past `room`.
fn slow_backup(vm: &mut Vm, room: u64) {
    let target = vm.path("target.qcow2");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&target).arg(SIZE.to_string()));
    let full = json!({ "event": "write_aio", "errno": 28, "sector": room / 512 });
    let file = json!({
        "driver": "blkdebug", "image": { "driver": "file", "filename": target }, "inject-error": [full]
    });
    let target = json!({ "node-name": "target", "driver": "qcow2", "file": file });
    vm.monitor.execute("blockdev-add", &target).unwrap();
    let job = json!({ "device": vm.node(0), "target": "target", "sync": "full", "job-id": "job", "speed": 1024 });
    vm.monitor.execute("blockdev-backup", &job).unwrap();
}

#[test]
fn a_write_that_fails_because_the_target_does_was_not_written() {
    for release in RELEASES {
        let mut vm = Vm::builder(release).disk(DiskSpec::new("disk.qcow2", SIZE)).start();
        let history = History::zeroes(&[SIZE]);
        let mut hand = vm.hand(&history);
        hand.write(Write { length: SIZE, ..fill(0, 1) });
        slow_backup(&mut vm, 3 << 20);
        let mut piece = |number: u64| {
            let offset = SIZE - (number + 1) * (64 << 10);
            let write = Write { disk: 0, offset, length: 64 << 10, kind: Kind::Fill(2) };
            hand.guest_write(write)
        };
        let done = (0..60).position(|number| piece(number) == Written::Failed).unwrap();
        vm.quit();
        assert!(done > 20, "{release}: {done}");
        assert_eq!(history.lock().unwrap().moments(&contents(&vm)), Ok(vec![done + 1]), "{release}");
    }
}

#[test]
fn what_a_guest_discards_while_a_job_copies_stays_on_the_disk() {
    for release in RELEASES.into_iter().filter(|release| *release != "5.2") {
        let mut vm = Vm::builder(release).disk(DiskSpec::new("disk.qcow2", SIZE)).start();
        let history = History::zeroes(&[SIZE]);
        let mut hand = vm.hand(&history);
        hand.write(fill(0, 1));
        slow_backup(&mut vm, SIZE * 2);
        assert_eq!(hand.guest_write(Write { kind: Kind::Discard, ..fill(0, 0) }), Written::Done);
        assert_eq!(history.lock().unwrap().now(), 1, "{release} does it");
        vm.monitor.execute("block-job-cancel", &json!({ "device": "job" })).unwrap();
        let ended = |vm: &mut Vm| vm.monitor.execute("query-jobs", &json!({})).unwrap() == json!([]);
        while !ended(&mut vm) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(hand.guest_write(Write { kind: Kind::Discard, ..fill(0, 0) }), Written::Done);
        assert_eq!(history.lock().unwrap().now(), 2, "{release} does not do it");
        vm.quit();
        assert_eq!(history.lock().unwrap().moments(&contents(&vm)).unwrap().last(), Some(&2));
    }
}

#[test]
#[should_panic(expected = "is past the end")]
fn a_write_past_the_end_is_none() {
    let history: Arc<Mutex<History>> = History::zeroes(&[SIZE]);
    history.lock().unwrap().push(Write { offset: SIZE, ..fill(0, 1) });
}
