//! SIGINT and SIGTERM: the first one asks the work to stop, the second one of its kind ends the program at once.

use std::sync::atomic::{AtomicU8, Ordering};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::Exit;
use super::failure::Failure;

/// The exit code of the signal that came first, or zero.
static CAUGHT: AtomicU8 = AtomicU8::new(0);

/// The end that a signal asks for.
pub(super) fn caught() -> Option<Exit> {
    let code = CAUGHT.load(Ordering::Relaxed);
    [Exit::Interrupted, Exit::Terminated].into_iter().find(|exit| exit.code() == code)
}

/// Begins to watch, for the rest of the process. Only for work that looks at [`caught`] again and again.
///
/// # Errors
/// What the system says.
pub(super) fn watch() -> Result<(), Failure> {
    start().map_err(|source| Failure::Signals { source })
}

fn start() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    // from here on, signals no longer end the process by themselves
    let (interrupt, terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let serve = move || {
        runtime.spawn(serve(interrupt, Exit::Interrupted));
        runtime.block_on(serve(terminate, Exit::Terminated));
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(serve)?;
    Ok(())
}

async fn serve(mut signal: Signal, exit: Exit) {
    let mut first = true;
    while signal.recv().await.is_some() {
        if !first {
            std::process::exit(exit.code().into());
        }
        first = false;
        // the first signal decides, whatever its kind
        let _ = CAUGHT.compare_exchange(0, exit.code(), Ordering::Relaxed, Ordering::Relaxed);
    }
}
