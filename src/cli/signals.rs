//! SIGINT, SIGTERM and SIGHUP: the first one asks the work to stop, and if it is told again and again, the program ends at
//! once.

use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::Exit;
use super::failure::Failure;

/// The exit code of the signal that came first, or zero.
static CAUGHT: AtomicU8 = AtomicU8::new(0);

/// Signals that come so soon after one of their kind that counted are that one: `timeout` and shells send it to the process and
/// to its group.
const ECHO: Duration = Duration::from_millis(100);

/// How the program ends with each of them.
const ENDS: [Exit; 3] = [Exit::HungUp, Exit::Interrupted, Exit::Terminated];

/// The end that a signal asks for.
pub(super) fn caught() -> Option<Exit> {
    let code = CAUGHT.load(Ordering::Relaxed);
    ENDS.into_iter().find(|exit| exit.code() == code)
}

/// Work that leaves nothing behind has ended so long after the first signal, or is ended: who reads from it may have stalled.
const GRACE: Duration = Duration::from_secs(2);

/// What ends the program, which the first signal asks to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// The second signal of its kind.
    Two,
    /// The third; the second is answered with this warning.
    Three(&'static str),
    /// The second, or that it goes on for [`GRACE`].
    Short,
}

/// Begins to watch, for the rest of the process. Only for work that looks at [`caught`] again and again.
///
/// # Errors
/// What the system says.
pub(super) fn watch(patience: Patience) -> Result<(), Failure> {
    start(patience).map_err(|source| Failure::Signals { source })
}

fn start(patience: Patience) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    // from here on, signals no longer end the process by themselves
    let (hangup, interrupt, terminate, too_large) = {
        let _entered = runtime.enter();
        let hangup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
        // a file that may not grow as far as it has to: that is an error of the write then
        let too_large = signal(SignalKind::from_raw(libc::SIGXFSZ))?;
        (hangup, signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, too_large)
    };
    let serve = move || {
        let _too_large = too_large;
        if let Some(hangup) = hangup {
            runtime.spawn(serve(hangup, Exit::HungUp, patience));
        }
        runtime.spawn(serve(interrupt, Exit::Interrupted, patience));
        runtime.block_on(serve(terminate, Exit::Terminated, patience));
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(serve)?;
    Ok(())
}

/// Whether the program shall outlive its terminal, as with `nohup`.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // the first bit is that of signal 1
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

async fn serve(mut signal: Signal, exit: Exit, mut patience: Patience) {
    let mut last = None;
    while signal.recv().await.is_some() {
        if last.is_some_and(|last: Instant| last.elapsed() < ECHO) {
            continue;
        }
        if last.replace(Instant::now()).is_none() {
            // the first signal decides, whatever its kind
            let _ = CAUGHT.compare_exchange(0, exit.code(), Ordering::Relaxed, Ordering::Relaxed);
            if patience == Patience::Short {
                tokio::time::sleep(ECHO).await;
                // an echo of it that came meanwhile
                let _ = tokio::time::timeout(Duration::ZERO, signal.recv()).await;
                let _ = tokio::time::timeout(GRACE, signal.recv()).await;
                std::process::exit(exit.code().into());
            }
        } else if let Patience::Three(warning) = patience {
            patience = Patience::Two;
            // the terminal may be gone
            let _ = writeln!(std::io::stderr(), "{warning}");
        } else {
            std::process::exit(exit.code().into());
        }
    }
}
