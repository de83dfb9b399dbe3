//! Without fleecing the images of several disks are of one moment, though writes are on their way when it comes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qmpbackup::qcow2::{Content, Extent, Image, MapBuffer};
use qmpbackup::storage::FileStorage;
use serde_json::json;

use super::field::Field;
use super::field_setup::{Setup, qcow2, releases};
use crate::support::tools;

/// Bytes that a write begins after the one before it.
const STEP: u64 = 65_536;

/// Somebody who writes to a disk of the machine, and is told when each write is done.
struct Client {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    fn of(field: &mut Field, node: &str) -> Self {
        let socket = field.vm.path("nbd");
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true });
        field.execute("block-export-add", &export);
        let url = format!("nbd+unix:///{node}?socket={}", socket.display());
        let mut command = tools::qemu_io();
        command.args(["-f", "raw", &url]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, commands, answers: BufReader::new(answers) }
    }

    fn write(&mut self, step: u64) {
        writeln!(self.commands, "write -P 7 {} 512", step * STEP).unwrap();
        let mut line = String::new();
        while !line.contains("ops/sec") && !line.contains("ops;") {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "qemu-io has ended");
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says that it is over, also where a test fails.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The writes that are in an image.
fn held(image: &Path) -> Vec<u64> {
    let image = Image::open(Arc::new(FileStorage::open(image).unwrap())).unwrap();
    let mut held = Vec::new();
    let each = |extent: Extent| {
        if extent.content != Content::Unallocated {
            held.extend(extent.guest.start / STEP..extent.guest.end.div_ceil(STEP));
        }
    };
    image.map(0..image.size(), &mut MapBuffer::default(), each).unwrap();
    held
}

#[test]
fn a_write_that_followed_another_is_in_no_image_without_that_one() {
    for release in releases(&["5.2", "10.0"]) {
        let drive = |node: &str| format!("-device virtio-blk-pci,id={node},drive={node},share-rw=on");
        let null = |node: &str, latency: u32| {
            format!(
                "-blockdev node-name={node},driver=raw,file.driver=null-co,file.size=67108864,file.latency-ns={latency},\
                 file.read-zeroes=on {}",
                drive(node)
            )
        };
        let setup = Setup::of(release).image("second", "64M", "");
        // the one between takes long to stand still, and all is on its way meanwhile that is not kept back
        let setup = setup.words(&null("first", 1_000_000)).words(&null("between", 20_000_000));
        let words = format!("-blockdev {} {}", qcow2("second", "second"), drive("second"));
        let mut field = setup.words(&words).start();
        let words = "--no-fleece --include-raw";
        // of disks that other machines may write to
        field.backup(&format!("--level full {words}"), 3).says("share-rw");
        let address = json!({ "type": "unix", "data": { "path": field.vm.path("nbd") } });
        field.execute("nbd-server-start", &json!({ "addr": address }));
        let [mut first, mut between, mut second] =
            ["first", "between", "second"].map(|node| Client::of(&mut field, node));
        let is_over = AtomicBool::new(false);
        let steps = || (0..1024).cycle().take_while(|_| !is_over.load(Ordering::Relaxed));
        std::thread::scope(|scope| {
            let _end = Ended(&is_over);
            scope.spawn(|| steps().for_each(|step| between.write(step)));
            scope.spawn(|| {
                for step in steps() {
                    first.write(step);
                    second.write(step);
                }
            });
            let mut done = Vec::new();
            for _ in 0..6 {
                field.backup(&format!("--level inc {words}"), 3);
                done.extend(held(field.newest("first")));
                let followed = held(field.newest("second"));
                let torn: Vec<&u64> = followed.iter().filter(|step| !done.contains(step)).collect();
                assert!(torn.is_empty() && !followed.is_empty(), "{release}: {torn:?} of {followed:?}");
            }
        });
    }
}
