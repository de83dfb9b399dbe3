//! Jobs that pause, so that checksums are computed while they run.

use rustix::process::Signal;
use serde_json::Value;

use qmpbackup::chain::{Checksums, block_sums};
use qmpbackup::storage::{FileStorage, Storage};

use super::field::Field;
use super::field_setup::{Setup, releases};
use super::proxy::{Action, Proxy};
use super::tool::Tool;
use super::vm::fleeces;
use crate::support::prng::Prng;

const SIZE: usize = 320 << 20;

/// A machine with a raw disk of noise, in which few clusters can be compressed: those of QEMU then share a cluster of the
/// image that is far behind its end.
fn machine(release: &'static str) -> Field {
    let mut noise = Prng::stream(7, 0).bytes(SIZE);
    for place in (0..SIZE).step_by(70 << 20) {
        noise[place..place + (64 << 10)].fill(7);
    }
    let mut field = Setup::of(release)
        .file("disk.raw", &noise)
        .words("-blockdev node-name=raw0,driver=raw,file.driver=file,file.filename=@/disk.raw")
        .words("-device virtio-blk-pci,id=raw0,drive=raw0")
        .start();
    field.holds("raw0", &noise);
    field
}

/// How often a command was sent.
fn sent(told: &str, command: &str) -> usize {
    told.matches(&format!("\"execute\":\"{command}\"")).count()
}

#[test]
fn what_was_summed_while_jobs_ran_has_the_sums_of_the_image() {
    for release in releases(&["7.2", "10.0", "11"]) {
        let mut field = machine(release);
        for words in ["", "--compress"] {
            let limited = format!("--debug --level copy --include-raw --speed-limit 200M {words}");
            let ended = field.makes(&limited, 0, "raw0 COPY");
            let pauses = sent(&ended.stderr, "job-pause");
            assert_eq!(pauses > 1, fleeces(release) && words.is_empty(), "{release} {words}: {pauses} pauses");
            // a job may end before it pauses
            let resumed = sent(&ended.stderr, "job-resume");
            assert!(resumed == pauses || resumed + 1 == pauses, "{release} {words}: {resumed} of {pauses}");
            let image = field.newest("raw0");
            let sums = Checksums::open(image).unwrap().unwrap();
            let storage = FileStorage::open(image).unwrap();
            assert_eq!(sums.length(), storage.length());
            let all = 0..sums.blocks();
            assert!(sums.read(all.clone()).unwrap() == block_sums(&storage, all).unwrap(), "{release} {words}");
        }
    }
}

#[test]
fn who_is_killed_while_a_job_is_paused_leaves_what_the_next_run_puts_in_order() {
    let tool = Tool::built("qmpbackup");
    for release in releases(&["10.0"]) {
        let mut field = machine(release);
        for command in ["job-pause", "job-resume"] {
            let kill = move |told: &Value, _| {
                if told["execute"] == command { Action::KillBefore(Signal::KILL) } else { Action::Forward }
            };
            let kill_after = move |told: &Value, _| {
                if told["execute"] == command { Action::KillAfter(Signal::INT) } else { Action::Forward }
            };
            let hooks: [(_, super::proxy::Hook); 2] = [(None, Box::new(kill)), (Some(130), Box::new(kill_after))];
            for (code, hook) in hooks {
                let proxy = Proxy::start(&field.vm.path("proxy"), &field.vm.socket(), &tool.victim, hook);
                let words = ["--socket", proxy.path().to_str().unwrap(), "backup", "--level", "copy", "--include-raw"];
                let slow = ["--speed-limit", "200M", "--target", field.target.to_str().unwrap()];
                let ended = tool.run(&[words.as_slice(), &slow].concat());
                assert_eq!(ended.code, code, "{command}: {ended:#?}");
                proxy.end();
                field.run(&format!("recover --target {}", field.target.display())).with(0);
                field.assert_clean();
            }
        }
        field.makes("--level copy --include-raw", 0, "raw0 COPY");
    }
}
