//! Work beside the thread that talks to the machine.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::capture::error::Error;

type Work<T> = Box<dyn FnOnce() -> T + Send>;

/// Work on a thread of its own; where the system gives none, it is done when it is waited for.
pub(super) struct Background<T> {
    /// What no thread has taken.
    work: Arc<Mutex<Option<Work<T>>>>,
    done: oneshot::Receiver<T>,
}

impl<T: Send + 'static> Background<T> {
    pub(super) fn begin(work: impl FnOnce() -> T + Send + 'static) -> Self {
        let work: Arc<Mutex<Option<Work<T>>>> = Arc::new(Mutex::new(Some(Box::new(work))));
        let (tell, done) = oneshot::channel();
        let taken = Arc::clone(&work);
        let run = move || {
            let result = take(&taken).map(|work| work());
            // who does not wait for it does not want it
            let _ = result.map(|result| tell.send(result));
        };
        // else it is done later
        let _ = thread::Builder::new().name("seal".to_owned()).spawn(run);
        Self { work, done }
    }

    /// The result.
    ///
    /// # Errors
    /// [`Error::Thread`] where the work panicked.
    pub(super) async fn end(self) -> Result<T, Error> {
        match self.done.await {
            Ok(result) => Ok(result),
            Err(_) => take(&self.work).map(|work| work()).ok_or(Error::Thread),
        }
    }
}

fn take<T>(work: &Mutex<Option<Work<T>>>) -> Option<Work<T>> {
    work.lock().unwrap_or_else(PoisonError::into_inner).take()
}
