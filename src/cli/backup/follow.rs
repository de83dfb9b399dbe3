//! Follows a run of the library: log lines, a bar or progress lines, JSON lines; and asks it to end when a signal came.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use tokio::runtime::Builder;

use super::events;
use crate::capture::{self, Event, Observer, Progress, Severity};
use crate::cli::console::Console;
use crate::cli::failure::Failure;
use crate::cli::pace::{Pace, bar, part};
use crate::cli::signals::{self, Patience};

/// Time between two looks for a signal, where the library does not look.
const GLANCE: Duration = Duration::from_millis(100);

pub(super) struct Follower<'a> {
    console: &'a Console,
    /// From when on the library asks for signals.
    connected: AtomicBool,
    /// When the jobs began.
    copying: OnceLock<Instant>,
    bar: Mutex<Option<ProgressBar>>,
}

/// What is said to somebody who cannot wait. Where file systems are just being frozen, it takes as long as the guest does.
const PATIENCE: &str = "the machine is being put in order, which takes a moment; the same signal once more ends this program at once, \
                        and leaves that to `qmpbackup recover`";

impl<'a> Follower<'a> {
    pub(super) fn new(console: &'a Console) -> Self {
        Self { console, connected: AtomicBool::new(false), copying: OnceLock::new(), bar: Mutex::new(None) }
    }

    /// Does the work of the library.
    pub(super) fn follow<T>(&self, work: impl Future<Output = Result<T, capture::Error>>) -> Result<T, Failure> {
        signals::watch(Patience::Three(PATIENCE))?;
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|source| Failure::Runtime { source })?;
        let result = runtime.block_on(async {
            tokio::select! {
                result = work => result,
                () = self.signal_before_connect() => Err(capture::Error::Cancelled),
            }
        });
        self.set_bar(None);
        Ok(result?)
    }

    /// A signal that came while there was nothing yet to put in order.
    async fn signal_before_connect(&self) {
        while self.connected.load(Ordering::Relaxed) || signals::caught().is_none() {
            tokio::time::sleep(GLANCE).await;
        }
    }

    fn set_bar(&self, bar: Option<ProgressBar>) {
        self.console.set_bar(bar.clone());
        *self.bar() = bar;
    }

    fn bar(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self, disks: &[Progress]) {
        let elapsed = self.copying.get().map(Instant::elapsed).unwrap_or_default();
        let done = disks.iter().fold(0, |done: u64, disk| done.saturating_add(disk.done));
        let total = disks.iter().fold(0, |total: u64, disk| total.saturating_add(disk.total));
        if total == 0 && !self.console.is_json() {
            // an INC of what nobody has written to
            return;
        }
        if self.console.draws() {
            self.draw(done, total);
            return;
        }
        let pace = Pace::new(done, total, elapsed);
        if self.console.is_json() {
            let [done, total, rate, left] = pace.fields();
            self.console.event("progress", &[("disks", events::disks(disks)), done, total, rate, left]);
            return;
        }
        match disks {
            [alone] => self.console.info(&format!("copying {}: {pace}", alone.disk)),
            several => {
                for Progress { disk, done, total } in several {
                    self.console.info(&format!("copying {disk}: {}", part(*done, *total)));
                }
                self.console.info(&format!("copying: {pace}"));
            }
        }
    }

    /// Begins to measure time. The bar measures by itself, from when it is made; it is drawn when there is progress.
    fn begin(&self) {
        self.copying.get_or_init(Instant::now);
        if self.console.draws() {
            self.set_bar(Some(bar("copying", 0)));
        }
    }

    fn draw(&self, done: u64, total: u64) {
        if let Some(bar) = &*self.bar() {
            // the guest's writes can make it more
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Observer for Follower<'_> {
    fn event(&self, event: &Event) {
        match event {
            Event::Connected { .. } => self.connected.store(true, Ordering::Relaxed),
            Event::Copied { .. } => self.set_bar(None),
            Event::Progress(disks) => {
                self.progress(disks);
                return;
            }
            _ => {}
        }
        if let Some((name, fields)) = events::fields(event) {
            self.console.event(name, &fields);
        }
        let line = events::line(event);
        match event.severity() {
            Severity::Debug => self.console.debug(&line),
            Severity::Info => self.console.info(&line),
            Severity::Notice => self.console.notice(&line),
            Severity::Warning => self.console.warning(&line),
        }
        if let Event::Moment { .. } = event {
            self.begin();
        }
    }

    fn is_cancelled(&self) -> bool {
        signals::caught().is_some()
    }
}
