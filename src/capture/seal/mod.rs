//! Images that QEMU has closed go to stable storage and get their checksums, both at once: the one waits for the device,
//! the other reads what is in memory still.
//!
//! Neither is done on the thread that talks to the machine, where there can be others. A run that ends meanwhile leaves
//! neither behind: the sums stop at the next few blocks.

mod background;
pub(crate) mod early_sums;
pub(crate) mod early_sync;
pub(crate) mod pauses;

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use self::background::Background;
use self::early_sums::EarlySums;
use self::early_sync::EarlySync;
use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::capture::machine::Machine;
use crate::chain::{Checksums, KnownSums, SumError, create_checksums_watched};
use crate::storage::FileStorage;

/// Time between two looks at whether the run shall end.
const GLANCE: Duration = Duration::from_millis(100);

/// Brings images to stable storage that were opened before QEMU closed them, and writes their checksums, which ends what has
/// begun of both.
pub(crate) async fn seal(
    machine: &Machine<'_>,
    early_sync: EarlySync,
    early_sums: EarlySums,
    images: Vec<(PathBuf, File)>,
    interval: Duration,
) -> Result<(), Error> {
    let start = Instant::now();
    let total = images.iter().filter_map(|(_, image)| image.metadata().ok()).fold(0, |sum, file| sum + file.len());
    let sums = Waiting::default();
    let known = early_sums.end().await;
    let summed = {
        let again = |(path, image): &(PathBuf, File)| match image.try_clone() {
            Ok(image) => Ok((path.clone(), image)),
            Err(error) => Err(Error::io(path)(error)),
        };
        let (sums, images) = (Arc::clone(&sums.0), images.iter().map(again).collect::<Result<Vec<_>, _>>()?);
        let known = known.into_iter().chain(std::iter::repeat_with(KnownSums::default));
        Background::begin(move || {
            images.into_iter().zip(known).try_for_each(|((path, image), known)| sums.of(&path, image, &known))
        })
    };
    let synced = async {
        let synced = sync_all(early_sync, images).await;
        if synced.is_err() {
            sums.stop();
        }
        synced
    };
    let both = async { tokio::join!(summed.end(), synced) };
    tokio::pin!(both);
    let mut told = start;
    let (summed, synced) = loop {
        tokio::select! {
            done = &mut both => break done,
            () = tokio::time::sleep(GLANCE) => {}
        }
        if machine.go_on().is_err() {
            sums.stop();
        } else if told.elapsed() >= interval {
            told = Instant::now();
            machine.tell(&Event::Sealing { done: sums.done().min(total), total });
        }
    };
    machine.go_on()?;
    synced?;
    summed??;
    machine.tell(&Event::Sealed { bytes: total, elapsed: start.elapsed() });
    Ok(())
}

async fn sync_all(early: EarlySync, images: Vec<(PathBuf, File)>) -> Result<(), Error> {
    early.end().await?;
    Background::begin(move || images.into_iter().try_for_each(|(path, image)| sync(&path, &image))).end().await?
}

fn sync(path: &Path, image: &File) -> Result<(), Error> {
    image.sync_all().map_err(Error::io(path))
}

/// The work on checksums, which ends when the one who waits for it does.
#[derive(Debug, Default)]
struct Waiting(Arc<Sums>);

impl Waiting {
    fn stop(&self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }

    fn done(&self) -> u64 {
        self.0.done.load(Ordering::Relaxed)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.stop();
    }
}

#[derive(Debug, Default)]
struct Sums {
    done: AtomicU64,
    stopped: AtomicBool,
}

impl Sums {
    /// Sums an image that nobody writes to.
    fn of(&self, image: &Path, file: File, known: &KnownSums) -> Result<(), Error> {
        let storage = FileStorage::new(file).map_err(Error::io(image))?;
        let each = |bytes| {
            self.done.fetch_add(bytes, Ordering::Relaxed);
            if self.stopped.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let created = create_checksums_watched(image, &storage, known, &each);
        created.map_err(|error| match error {
            SumError::Image { source, .. } => Error::io(image)(source),
            SumError::Write { source } => Error::io(&Checksums::path(image))(source),
            SumError::Old(error) => Error::io(&Checksums::path(image))(io::Error::other(error)),
            SumError::Cancelled => Error::Cancelled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::event::Observer;
    use crate::errors::ErrorKind;
    use crate::qmp::fake::Server;
    use crate::qmp::{Features, Limits, Monitor};

    fn image() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("FULL-5-disk.partial");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        (folder, path)
    }

    struct Patient;

    impl Observer for Patient {
        fn event(&self, _: &Event) {}
    }

    #[tokio::test]
    async fn when_a_sync_has_failed_the_sums_end_and_the_failure_is_told() {
        let (_folder, path) = image();
        // holes, of which it takes a second to tell what they are
        let image = File::options().read(true).write(true).open(&path).unwrap();
        image.set_len(1 << 40).unwrap();
        let server = Server::new();
        let limits = Limits { connect: Duration::from_secs(10), command: Duration::from_secs(10) };
        let (monitor, _client) = tokio::join!(Monitor::connect(&server.address, limits), async {
            let mut client = server.accept().await;
            client.greet().await;
            client
        });
        let machine = Machine { monitor: monitor.unwrap(), observer: &Patient, features: Features::default() };
        let early = EarlySync::failed(path.clone());
        let sealed =
            seal(&machine, early, EarlySums::begin(Vec::new()), vec![(path.clone(), image)], Duration::from_secs(1))
                .await;
        let error = sealed.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full);
        assert!(matches!(&error, Error::Io { path: failed, .. } if *failed == path), "{error:?}");
        assert!(!Checksums::path(&path).exists());
    }

    #[test]
    fn when_the_one_who_waits_is_gone_the_sums_end_and_leave_nothing() {
        let (_folder, path) = image();
        let sums = Waiting::default();
        let worker = Arc::clone(&sums.0);
        worker.of(&path, File::open(&path).unwrap(), &KnownSums::default()).unwrap();
        assert_eq!(sums.done(), 1 << 20);
        std::fs::remove_file(Checksums::path(&path)).unwrap();
        drop(sums);
        worker.of(&path, File::open(&path).unwrap(), &KnownSums::default()).unwrap_err();
        assert!(!Checksums::path(&path).exists());
    }
}
