//! Checksums are computed while jobs run, of what has [settled](crate::capture::seal::pauses) in their images: of an image that is larger
//! than the memory, all would have to be read from the disk later.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::capture::seal::background::Background;
use crate::capture::seal::pauses::Settled;
use crate::chain::{KnownSums, SumError};
use crate::qcow2::{self, Header, Image, Table};

/// Time between two looks at what has settled.
const PAUSE: Duration = Duration::from_millis(20);

/// The work ends when this is dropped.
pub(crate) struct EarlySums {
    running: Sender<()>,
    sums: Background<Vec<KnownSums>>,
}

/// What is known of an image that is being written.
#[derive(Debug)]
struct EarlySum {
    image: Arc<File>,
    /// The L1 and the refcount table when it was made.
    tables: Option<[Table; 2]>,
    known: KnownSums,
}

impl EarlySums {
    /// Begins with images that have just been made.
    pub(crate) fn begin(images: Vec<(Arc<File>, Settled)>) -> Self {
        let (running, end) = channel();
        Self { running, sums: Background::begin(move || sum_until(&end, images)) }
    }

    /// What was computed, for each image, which QEMU has closed; where it cannot be relied on, nothing.
    pub(crate) async fn end(self) -> Vec<KnownSums> {
        drop(self.running);
        self.sums.end().await.unwrap_or_default()
    }
}

fn sum_until(end: &Receiver<()>, images: Vec<(Arc<File>, Settled)>) -> Vec<KnownSums> {
    let (mut images, settled): (Vec<EarlySum>, Vec<Settled>) =
        images.into_iter().map(|(image, settled)| (EarlySum::new(image), settled)).unzip();
    let mut wait = PAUSE;
    while end.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
        let more = images.iter_mut().zip(&settled).fold(false, |more, (image, settled)| {
            // who needs it later reads it again, and says what is wrong
            more | image.extend(settled.bytes()).unwrap_or(false)
        });
        wait = if more { Duration::ZERO } else { PAUSE };
    }
    images.into_iter().map(EarlySum::known).collect()
}

impl EarlySum {
    fn new(image: Arc<File>) -> Self {
        Self { tables: tables(&image).ok(), image, known: KnownSums::default() }
    }

    fn extend(&mut self, settled: u64) -> Result<bool, SumError> {
        self.known.extend(&*self.image, settled)
    }

    /// Of an image that is whole, all but its tables was written once.
    fn known(mut self) -> KnownSums {
        // a table that has moved has left its place to data
        let in_place = tables(&self.image).is_ok_and(|tables| Some(tables) == self.tables);
        let Some(metadata) = self.metadata().ok().filter(|_| in_place) else { return KnownSums::default() };
        self.known.forget(&metadata);
        self.known
    }

    fn metadata(&self) -> qcow2::Result<Vec<Range<u64>>> {
        let mut metadata = Vec::new();
        Image::open(Arc::<File>::clone(&self.image))?.add_metadata(&mut metadata)?;
        Ok(metadata)
    }
}

fn tables(image: &File) -> qcow2::Result<[Table; 2]> {
    let header = Header::read(image)?;
    Ok([header.l1_table, header.refcount_table])
}
