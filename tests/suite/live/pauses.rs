//! Jobs that pause, so that checksums are computed while they run.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use qmpbackup::chain::{Checksums, block_sums};
use qmpbackup::storage::{FileStorage, Storage};

use super::field::Field;
use super::field_setup::{Setup, releases};
use super::proxy::{Action, Proxy};
use super::tool::Tool;
use super::vm::fleeces;
use crate::prng::Prng;

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
    for release in releases(&["5.2", "7.2", "10.0", "11"]) {
        let mut field = machine(release);
        let both: &[&str] = if fleeces(release) { &["", "--no-fleece"] } else { &[""] };
        for words in both.iter().chain(&["--compress"]).copied() {
            let limited = format!("--debug --level copy --include-raw --speed-limit 200M {words}");
            let ended = field.makes(&limited, 0, "raw0 COPY");
            let pauses = sent(&ended.stderr, "job-pause");
            assert_eq!(pauses > 1, words != "--compress", "{release} {words}: {pauses} pauses");
            let drains = ended.stderr.matches(r#"{"arguments":{"actions":[]},"execute":"transaction"}"#).count();
            assert_eq!(drains > 0, pauses > 0 && (words == "--no-fleece" || !fleeces(release)), "{release} {words}");
            // a job may end before it pauses
            let resumed = sent(&ended.stderr, "job-resume");
            assert!(resumed == pauses || resumed + 1 == pauses, "{release} {words}: {resumed} of {pauses}");
            assert_summed(field.newest("raw0"));
        }
    }
}

/// An image has the checksums that a second reading gives.
#[track_caller]
fn assert_summed(image: &Path) {
    let sums = Checksums::open(image).unwrap().unwrap();
    let storage = FileStorage::open(image).unwrap();
    assert_eq!(sums.length(), storage.length());
    let all = 0..sums.blocks();
    assert!(sums.read(all.clone()).unwrap() == block_sums(&storage, all).unwrap(), "{}", image.display());
}

#[test]
fn what_was_summed_while_jobs_ran_and_a_guest_wrote_has_the_sums_of_the_image() {
    let tool = Tool::built("qmpbackup");
    for release in releases(&["5.2", "7.2", "10.0", "11"]) {
        let mut field = machine(release);
        let qdev = field.drive("raw0")["qdev"].as_str().unwrap().to_owned();
        let mut prng = Prng::stream(8, 0);
        let (socket, target) = (field.vm.socket(), field.target.clone());
        let words = ["--socket", socket.to_str().unwrap(), "backup", "--json", "--target", target.to_str().unwrap()];
        let copy = ["--level", "copy", "--include-raw", "--speed-limit", "200M", "--no-fleece"];
        let ended = std::thread::scope(|scope| {
            let backup = scope.spawn(|| tool.run(&[words.as_slice(), &copy].concat()));
            // many are on their way at once
            while !backup.is_finished() {
                let offset = prng.below(SIZE as u64 / 512) * 512;
                let command = format!("qemu-io -d {qdev} \"aio_write -P 9 {offset} 4096\"");
                assert_eq!(field.vm.monitor.hmp(&command), "");
            }
            backup.join().unwrap()
        });
        let ended = ended.with(0);
        let image = ended.events().into_iter().find(|event| event["event"] == "image").unwrap();
        assert_summed(Path::new(image["path"].as_str().unwrap()));
    }
}

#[test]
fn who_is_killed_while_a_job_is_paused_leaves_what_the_next_run_puts_in_order() {
    let tool = Tool::built("qmpbackup");
    for release in releases(&["7.2", "10.0"]) {
        let mut field = machine(release);
        let draining: &[&str] = if fleeces(release) { &[] } else { &["transaction"] };
        for command in ["job-pause", "job-resume"].iter().chain(draining).copied() {
            let is_it = move |told: &Value| {
                // not that of the moment
                told["execute"] == command
                    && told["arguments"].get("actions").is_none_or(|actions| *actions == json!([]))
            };
            let kill = move |told: &Value, _| {
                if is_it(told) { Action::KillBefore(Signal::KILL) } else { Action::Forward }
            };
            let kill_after = move |told: &Value, _| {
                if is_it(told) { Action::KillAfter(Signal::INT) } else { Action::Forward }
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
