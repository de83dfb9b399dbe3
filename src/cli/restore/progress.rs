//! Follows the work: a bar on a terminal, log lines elsewhere, JSON lines where they are wanted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::salvage;
use crate::cli::console::Console;
use crate::cli::pace::{Pace, bar};
use crate::cli::signals;
use crate::restore::{Done, Observer, Phase, Warning};

/// Time between two looks at the bar.
const FRAME: Duration = Duration::from_millis(100);

pub(super) struct Reporter<'a> {
    console: &'a Console,
    /// Time between two lines.
    interval: Duration,
    /// Bytes of the phase that are done.
    done: AtomicU64,
    running: Mutex<Option<Running>>,
}

/// A phase that takes long enough to be followed.
#[derive(Clone)]
struct Running {
    name: &'static str,
    total: u64,
    start: Instant,
    bar: Option<ProgressBar>,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(console: &'a Console, interval: Duration) -> Self {
        Self { console, interval, done: AtomicU64::new(0), running: Mutex::new(None) }
    }

    /// Does the work and tells how far it is.
    pub(super) fn follow<R>(&self, work: impl FnOnce() -> R) -> R {
        let period = if self.console.draws() { FRAME } else { self.interval };
        std::thread::scope(|scope| {
            // dropped when the work is done, or was given up
            let (_working, done) = mpsc::channel::<()>();
            let tell = move || {
                while done.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                    self.tell();
                }
            };
            // without this thread there is no progress to see, but the work is done
            let _ = std::thread::Builder::new().name("progress".to_owned()).spawn_scoped(scope, tell);
            let result = work();
            self.set(None);
            result
        })
    }

    fn set(&self, running: Option<Running>) {
        let mut current = self.running();
        self.console.set_bar(running.as_ref().and_then(|running| running.bar.clone()));
        self.done.store(0, Ordering::Relaxed);
        *current = running;
    }

    fn begin(&self, name: &'static str, total: u64) {
        let bar = self.console.draws().then(|| bar(name, total));
        self.set(Some(Running { name, total, start: Instant::now(), bar }));
    }

    fn tell(&self) {
        let Some(Running { name, total, start, bar }) = self.running().clone() else { return };
        let done = self.done.load(Ordering::Relaxed).min(total);
        if let Some(bar) = bar {
            bar.set_position(done);
            return;
        }
        let pace = Pace::new(done, total, start.elapsed());
        if self.console.is_json() {
            let [done, total, rate, left] = pace.fields();
            self.console.event("progress", &[("phase", name.into()), done, total, rate, left]);
        } else {
            self.console.info(&format!("{name}: {pace}"));
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Reporter<'_> {
    fn phase(&self, phase: Phase) {
        let (name, bytes) = match phase {
            Phase::Checking { bytes } => ("checking", Some(bytes)),
            Phase::Summing { bytes } => ("summing", Some(bytes)),
            Phase::Verifying { bytes } => ("verifying", Some(bytes)),
            Phase::Planning => ("planning", None),
            Phase::Copying { bytes } => ("copying", Some(bytes)),
            Phase::Comparing { bytes } => ("comparing", Some(bytes)),
            Phase::Syncing => ("syncing", None),
        };
        match bytes {
            Some(bytes) => self.begin(name, bytes),
            None => self.set(None),
        }
        self.console.event("phase", &[("phase", name.into())]);
        self.console.debug(&format!("phase: {name}"));
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn done(&self, done: Done) {
        match done {
            Done::Snapshot { name } => {
                self.console.info(&format!("the FULL has the snapshot {name}"));
                self.console.event("snapshot", &[("name", name.into())]);
            }
            Done::Removed { path } => {
                self.console.info(&format!("removed {}: the FULL holds it", path.display()));
                self.console.event("removed", &[("path", path.to_string_lossy().into())]);
            }
        }
    }

    fn warning(&self, warning: Warning) {
        self.console.warning(&warning.to_string());
        match &warning {
            Warning::DamagedTables { first, .. } => salvage::anywhere(self.console, "damaged", first),
            Warning::UncheckedTables { reason, .. } => salvage::anywhere(self.console, "damaged", reason),
            Warning::LostClusters { .. } => salvage::anywhere(self.console, "stale", &warning),
            _ => {}
        }
    }

    fn is_cancelled(&self) -> bool {
        signals::caught().is_some()
    }
}
