//! Writes to the disks of a machine as its guest would: through the device, so that all filters above the image see them,
//! asynchronously, and with no guest needed. What is written goes into the history first.
//!
//! `qemu-io` of the human monitor starts a write and tells on QEMU's standard output when it is done. Its synchronous
//! commands are another matter: no monitor gets an answer before they are done, and QEMU 5.2 often hangs for ever in one
//! that a job's end meets. Only discards have no other way; with 5.2 they are zeroes that may unmap. QEMU may also ignore
//! a discard, and does so below a filter that was not told to unmap, such as that of its own backup jobs. So the disk is
//! asked, and history has what was done.
//!
//! There is one write at a time: it is *pending* until it is done, and the next one waits for it. A pending one is in the
//! history: it may have happened or not. One that fails, because the job's target does, leaves the history again: the copy
//! before it failed, and nothing was written.
//!
//! A machine that does not run has no guest that could write. [`Hand::guest_write`] does not write to it, or histories
//! would come about that cannot be.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use super::history::{History, Kind, Write};
use super::monitor::Monitor;

/// How long a write is waited for before other things go on. It takes a millisecond, unless QEMU lets it wait.
const SOON: Duration = Duration::from_secs(2);
/// After this it will never be done.
const EVER: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    Done,
    /// This one or the one before it, which then is the last in the history.
    Pending,
    /// The guest would see an I/O error.
    Failed,
    /// The machine does not run.
    Impossible,
}

pub(crate) struct Hand {
    monitor: Monitor,
    /// The devices' paths in QEMU's object tree.
    devices: Vec<String>,
    discards: bool,
    /// QEMU's standard output, and how much of it was read.
    said: PathBuf,
    heard: u64,
    history: Arc<Mutex<History>>,
    pending: Option<Write>,
    /// How the last write ended.
    failed: bool,
}

impl Hand {
    pub(super) fn new(
        monitor: Monitor,
        devices: Vec<String>,
        discards: bool,
        said: PathBuf,
        history: Arc<Mutex<History>>,
    ) -> Self {
        let heard = std::fs::metadata(&said).unwrap().len();
        Self { monitor, devices, discards, said, heard, history, pending: None, failed: false }
    }

    /// Writes if the machine runs.
    pub(crate) fn guest_write(&mut self, write: Write) -> Written {
        match self.begin_guest_write(write) {
            Written::Impossible => Written::Impossible,
            _ if !self.settle(SOON) => Written::Pending,
            _ if self.failed => Written::Failed,
            _ => Written::Done,
        }
    }

    /// Writes if the machine runs, and does not wait: the write meets whatever QEMU does next.
    pub(crate) fn begin_guest_write(&mut self, write: Write) -> Written {
        if !self.settle(SOON) {
            return Written::Pending;
        }
        let status = self.monitor.execute("query-status", &json!({})).unwrap();
        if status["running"] == false {
            return Written::Impossible;
        }
        self.begin(write);
        Written::Pending
    }

    /// Writes, whether the machine runs or not.
    pub(crate) fn write(&mut self, write: Write) {
        self.finish();
        self.begin(write);
        self.finish();
        assert!(!self.failed, "{write:?} failed");
    }

    /// Waits for the write that is pending.
    pub(crate) fn finish(&mut self) {
        assert!(self.settle(EVER), "this was never done: {:?}", self.pending);
    }

    fn begin(&mut self, mut write: Write) {
        if write.kind == Kind::Discard {
            if self.discards {
                return self.discard(write);
            }
            write.kind = Kind::Unmap;
        }
        self.history.lock().unwrap().push(write);
        let Write { disk, offset, length, .. } = write;
        let how = match write.kind {
            Kind::Fill(byte) => format!("-P {byte}"),
            Kind::Zeroes => "-z".to_owned(),
            Kind::Unmap | Kind::Discard => "-zu".to_owned(),
        };
        self.qemu_io(disk, &format!("aio_write {how} {offset} {length}"));
        self.pending = Some(write);
    }

    fn discard(&mut self, write: Write) {
        self.failed = false;
        let Write { disk, offset, length, .. } = write;
        self.qemu_io(disk, &format!("discard {offset} {length}"));
        let discarded = self.take();
        assert!(discarded.starts_with(&format!("discard {length}/{length} bytes")), "{write:?}: {discarded}");
        self.qemu_io(disk, &format!("read -P 0 {offset} {length}"));
        if !self.take().contains("Pattern verification failed") {
            self.history.lock().unwrap().push(write);
        }
    }

    fn qemu_io(&mut self, disk: usize, command: &str) {
        let error = self.monitor.hmp(&format!("qemu-io -d {} \"{command}\"", self.devices[disk]));
        assert_eq!(error, "", "{command}");
    }

    /// Whether nothing is pending any more.
    fn settle(&mut self, limit: Duration) -> bool {
        let Some(write) = self.pending else { return true };
        let until = Instant::now() + limit;
        // The second line is about speed
        while self.hear().matches('\n').count() < 2 && !self.hear().contains("failed") {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        self.pending = None;
        let said = self.take();
        self.failed = said.contains("failed: ");
        if self.failed {
            self.history.lock().unwrap().take_back(write);
        } else {
            let Write { offset, length, .. } = write;
            assert!(
                said.starts_with(&format!("wrote {length}/{length} bytes at offset {offset}\n")),
                "{write:?}: {said}"
            );
        }
        true
    }

    fn take(&mut self) -> String {
        let said = self.hear();
        self.heard += said.len() as u64;
        said
    }

    /// What QEMU has said since the last command.
    fn hear(&self) -> String {
        let file = File::open(&self.said).unwrap();
        let length = usize::try_from(file.metadata().unwrap().len() - self.heard).unwrap();
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, self.heard).unwrap();
        String::from_utf8(bytes).unwrap()
    }
}
