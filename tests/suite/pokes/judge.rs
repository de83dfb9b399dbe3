//! What the engine makes of a damaged image, and what QEMU does.

use std::error::Error as _;
use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qmpbackup::chain::FormatHint;
use qmpbackup::qcow2::{self, Error, GuestOffset, Image, Repair, Writer};
use qmpbackup::restore::{self, Layers, Merge, MergeOptions, Output, OutputFormat, Silent, Source};
use qmpbackup::storage::{MemoryStorage, WritableStorage};

use super::disk::Disk;
use super::fields::{Field, bytes, number};
use super::kinds::{BELOW, Kind, NAME};
use super::small::Small;
use crate::support::edited::memory;
use crate::support::tools;

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// QEMU and the engine read the same.
    Same,
    /// The engine refuses it.
    Refused,
    /// QEMU refuses for a reason that does not matter to who reads; see [`is_no_matter`].
    OnlyQemuRefuses,
}

pub(super) struct Judge<'a> {
    kind: &'a Kind,
    file: File,
    size: u64,
}

impl<'a> Judge<'a> {
    pub(super) fn new(kind: &'a Kind) -> Self {
        let path = kind.bench.path(NAME);
        std::fs::write(&path, &kind.image).unwrap();
        let size = number(&kind.image, 24, 8);
        kind.bench.create("INC-1700000000-disk", "compat=1.1", size);
        Self { kind, file: File::options().write(true).open(path).unwrap(), size }
    }

    pub(super) fn poke(&mut self, field: Field, value: u64) -> Verdict {
        let (old, new) = (&self.kind.image[field.at..field.at + field.width], bytes(value, field.width));
        let mut image = self.kind.image.clone();
        image[field.at..field.at + field.width].copy_from_slice(&new);
        FileExt::write_all_at(&self.file, &new, field.at as u64).unwrap();
        let verdict = catch_unwind(AssertUnwindSafe(|| self.judge(&image)));
        FileExt::write_all_at(&self.file, old, field.at as u64).unwrap();
        verdict.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn judge(&self, image: &[u8]) -> Verdict {
        let read = Disk::read(image);
        if let Err(error) = &read {
            assert_tells(error);
        }
        list_and_repair(image, read.as_ref().ok());
        write(image, read.as_ref().ok());
        let merged = self.merge(image);
        let is = match (read, merged) {
            (Err(Error::NeedsBacking { .. }), Ok(merged)) if self.kind.has_backing => merged,
            (Ok(read), Ok(merged)) => {
                assert!(read.resized(merged.size) == merged || self.kind.has_backing, "merged it is another disk");
                if self.kind.has_backing { merged } else { read }
            }
            (Ok(_), Err(error)) if !self.kind.has_backing => panic!("it can be read, but not merged: {error:?}"),
            // all that is damaged lies behind the end of the disk that the INC has
            (Err(_), Ok(merged)) if merged.size < number(image, 24, 8) => return Verdict::Refused,
            (Err(error), Ok(_)) => panic!("it can be merged, but not read: {error:?}"),
            (_, Err(_)) => return Verdict::Refused,
        };
        // QEMU's disks are whole sectors: what is behind the last of them it does not show
        is.resized(is.size / 512 * 512).save(&self.kind.bench.path("ours"));
        let mut compare = tools::qemu_img();
        compare.args(["compare", "-q"]).args(self.seen_by_qemu()).arg("ours");
        let output = tools::output(compare.current_dir(self.kind.bench.path("")));
        match output.status.code() {
            Some(0) => Verdict::Same,
            Some(2) if is_no_matter(&String::from_utf8_lossy(&output.stderr)) => Verdict::OnlyQemuRefuses,
            _ => panic!("{}", tools::told(&compare, &output)),
        }
    }

    /// How QEMU opens the image: what lies below it, the chain says, and not the image.
    fn seen_by_qemu(&self) -> [String; 5] {
        let file = |name| format!(r#""driver":"qcow2","file":{{"driver":"file","filename":"{name}"}}"#);
        let image = if self.kind.has_backing {
            format!(r#"json:{{{},"backing":{{{}}}}}"#, file(NAME), file(BELOW))
        } else {
            NAME.to_owned()
        };
        ["-f", "qcow2", "-F", "raw", &image].map(String::from)
    }

    /// The image and an INC that holds nothing, or the FULL below and the image, as raw bytes.
    fn merge(&self, image: &[u8]) -> Result<Disk, restore::Error> {
        let names = if self.kind.has_backing { [BELOW, NAME] } else { [NAME, "INC-1700000000-disk"] };
        let source = |name| Source { path: self.kind.bench.path(name), format: FormatHint::Qcow2, size: None };
        let room = self.size.next_multiple_of(512) + (64 << 20);
        let bytes = Bytes { room, bytes: Arc::default() };
        let shared = Arc::clone(&bytes.bytes);
        let options = MergeOptions {
            threads: Some(1.try_into().unwrap()),
            ..MergeOptions::new(Output::Stream(Box::new(bytes)), OutputFormat::Raw)
        };
        let merge = Layers::open(&names.map(source)).and_then(|layers| Merge::plan(layers, options, &Silent));
        let merged = merge.and_then(|merge| {
            let _ = merge.check(&Silent);
            merge.run(&Silent)
        });
        match merged {
            Ok(_) => Ok(Disk::of_bytes(&shared.lock().unwrap())),
            Err(error) => {
                // the image itself is the last of the chain, and says how long the output is
                let too_long = self.kind.has_backing && number(image, 24, 8) > room;
                assert!(too_long || error.to_string().contains(NAME) || error.source().is_none(), "{error:?}");
                Err(error)
            }
        }
    }
}

/// A stream that keeps what it gets.
struct Bytes {
    room: u64,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Write for Bytes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.bytes.lock().unwrap();
        if (all.len() + bytes.len()) as u64 > self.room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        all.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An error says where it is, but for files that lie elsewhere.
fn assert_tells(error: &Error) {
    let text = error.to_string();
    assert!(text.contains("offset") || matches!(error, Error::DataFile { .. }), "{error:?}");
}

/// Listings and the check end, and a repair leaves what the guest reads.
fn list_and_repair(image: &[u8], read: Option<&Disk>) {
    if let Ok(open) = Image::open(memory(image)) {
        for error in [open.snapshots().err(), open.bitmaps().err()].into_iter().flatten() {
            assert_tells(&error);
        }
    }
    let mut go_on = |_| ControlFlow::Continue(());
    let report = qcow2::check(&MemoryStorage::new(image.to_vec()), &mut go_on);
    let needs_repair = report.as_ref().is_ok_and(|report| report.corruptions() + report.leaks > 0 || report.dirty);
    for what in [Repair::Leaks, Repair::All] {
        let small = Arc::new(Small::new(image));
        let storage: Arc<dyn WritableStorage> = small.clone();
        let repaired = qcow2::repair(&storage, what, &mut go_on);
        assert!(needs_repair || report.is_err() || small.to_vec() == image || report.as_ref().unwrap().marked_corrupt);
        if let (Some(read), Ok(_)) = (read, &repaired) {
            assert!(Disk::read(&small.to_vec()).ok().as_ref() == Some(read), "{what:?} changed the disk: {repaired:?}");
        }
    }
}

/// A writer does what it is asked or says why not. Where nothing but leaks was wrong, the guest reads after it what it
/// should.
fn write(image: &[u8], read: Option<&Disk>) {
    const MARK: [u8; 700] = [0xa7; 700];
    let report = qcow2::check(&MemoryStorage::new(image.to_vec()), &mut |_| ControlFlow::Continue(()));
    let small = Arc::new(Small::new(image));
    let Ok(mut writer) = Writer::open(small.clone()) else { return };
    let cluster = writer.header().geometry.cluster_size();
    let done = writer.write(&MARK, GuestOffset(1000)).is_ok();
    let discards = writer.discard(0..cluster).is_ok();
    let _ = writer.create_snapshot("new", Duration::from_secs(7));
    let written = writer.write(&MARK, GuestOffset(0)).is_ok();
    let finished = writer.finish().is_ok();
    let is_sound = report.is_ok_and(|report| report.corruptions() == 0);
    let (Some(read), true) = (read, done && discards && written && finished && is_sound) else { return };
    let after = Disk::read(&small.to_vec()).unwrap();
    let mut should = read.resized(read.size);
    let end = cluster.max(1700).next_multiple_of(512).min(read.size);
    should.clear(0..end);
    let mut is = after;
    let mut start = vec![0; MARK.len()];
    is.get(0, &mut start);
    assert_eq!(start, MARK);
    is.clear(0..end);
    assert!(is == should, "the writer has changed more than it should");
}

/// What QEMU wants to know of an image that it opens, and who reads the disk need not: each does no harm there, and
/// listings, the check and work in place look at it.
fn is_no_matter(said: &str) -> bool {
    let reasons = [
        // who reads counts nothing
        "Reference count table",
        // the active disk is none of them
        "napshot table",
        "itmap",
        // of which format the image below is, the chain says
        "Unknown driver",
        // the flag says something of a file that there is not
        "data-file-raw requires a data file",
    ];
    reasons.iter().any(|reason| said.contains(reason))
}
