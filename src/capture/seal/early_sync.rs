//! What jobs write goes to stable storage while they run, so that little is left to wait for at their end: a FULL of 1 GiB
//! on a disk that writes 2 GB/s is on it after 0.8 of the time.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::capture::error::Error;
use crate::capture::seal::background::Background;

/// Time between two looks at the images.
const PAUSE: Duration = Duration::from_millis(50);
/// Bytes that an image grows by before it is synced.
const STEP: u64 = 64 << 20;

/// The syncs end when this is dropped.
pub(crate) struct EarlySync {
    running: Sender<()>,
    syncs: Background<Result<u64, Error>>,
}

impl EarlySync {
    /// Syncs these images now and then.
    pub(crate) fn begin(images: Vec<(PathBuf, Arc<File>)>) -> Self {
        let (running, end) = channel();
        Self { running, syncs: Background::begin(move || sync_until(&end, &images)) }
    }

    /// Syncs that have failed.
    #[cfg(test)]
    pub(crate) fn failed(path: PathBuf) -> Self {
        let (running, _) = channel();
        let source = std::io::ErrorKind::QuotaExceeded.into();
        Self { running, syncs: Background::begin(|| Err(Error::Io { path, source })) }
    }

    /// What the kernel could not write: whoever opens an image later is not told.
    pub(crate) async fn end(self) -> Result<(), Error> {
        drop(self.running);
        self.syncs.end().await?.map(|_| ())
    }
}

/// How often an image was synced.
fn sync_until(end: &Receiver<()>, images: &[(PathBuf, Arc<File>)]) -> Result<u64, Error> {
    let mut synced = vec![0; images.len()];
    let mut count = 0;
    while end.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
        for ((path, image), synced) in images.iter().zip(&mut synced) {
            let failed = Error::io(path);
            let length = image.metadata().map_err(failed)?.len();
            if length >= *synced + STEP {
                *synced = length;
                image.sync_data().map_err(failed)?;
                count += 1;
            }
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_synced_when_it_has_grown_and_no_more_after_the_end() {
        let image = tempfile::tempfile().unwrap();
        let (running, end) = channel();
        let syncs = {
            let images = [image.try_clone().unwrap(), tempfile::tempfile().unwrap()];
            let images = images.map(|image| (PathBuf::from("image"), Arc::new(image)));
            std::thread::spawn(move || sync_until(&end, &images))
        };
        for steps in 1..=3 {
            image.set_len(steps * STEP).unwrap();
            std::thread::sleep(PAUSE * 6);
        }
        drop(running);
        let syncs = syncs.join().unwrap().unwrap();
        assert!((1..=3).contains(&syncs), "{syncs}");
    }
}
