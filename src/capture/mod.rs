//! Backups of running machines: QEMU itself writes the images, this decides and looks after order.
//!
//! # The protocol
//!
//! A bitmap is named for the image that it starts from: `qmpbackup-<time>-<id>-<chain>` records all that was written since the
//! image of that time and id, and the manifest of the image names it. So an INC may follow the newest image exactly if that
//! bitmap is there and healthy. Images of other tools, and of versions before, name none: then it is the one with their time.
//!
//! ```text
//! prepare   the machine's lock (a node that exists once); NEW bitmaps, before anything else; images; filters
//! moment    [freeze] stop, exchange the drives of all devices for their filters, cont [thaw]
//! start     a node that shows the disk as it was; what OLD records is copied from there, or all of it
//! copy      jobs pause at times, so that what they have written gets its checksums
//! dismantle when all jobs have concluded: everything in QEMU but the bitmaps goes
//! seal      images go to stable storage, and get the checksums that they lack
//! publish   journal, names; then OLD goes
//! ```
//!
//! NEW records from before the moment on, so no write can fall between two bitmaps; what it records too much is copied once
//! more. When a run fails, NEW is poured into OLD. Where QEMU has no filters for that, or with [`Fleece::Off`], the moment
//! is one transaction that begins all jobs.
//!
//! # Order
//!
//! Whatever a run was doing when it ended, the next one finds it out by looking: at jobs, nodes and bitmaps in QEMU, and at
//! the journal in the folder. What brings order back is the same in all cases, success among them.
//!
//! # Modules
//!
//! - `run`: a backup from the first question to the last bitmap. `prepare` finds out, `decide` takes FULL or INC, `fleecing`
//!   the way, `plan` makes the commands of it, `moment` takes the snapshot
//! - `machine`: what QEMU says of its disks, nodes, bitmaps and jobs
//! - `jobs`: they are waited for
//! - `folder`: what a backup folder holds, and what a run writes there
//! - `seal`: images go to stable storage and get their checksums, also while jobs run
//! - `order`: what brings order back
//! - `maintain`: disks and bitmaps are shown, bitmaps removed
//!
//! Futures are for a tokio runtime with IO and time, and may be spawned.
//!
//! ```no_run
//! use std::sync::Mutex;
//! use std::time::Duration;
//!
//! use qmpbackup::capture::{Connection, Event, Observer, Request, Severity, RequestedLevel, backup};
//!
//! /// Keeps what is not as it should be.
//! #[derive(Default)]
//! struct Troubles(Mutex<Vec<Event>>);
//!
//! impl Observer for Troubles {
//!     fn event(&self, event: &Event) {
//!         if event.severity() == Severity::Warning {
//!             self.0.lock().unwrap().push(event.clone());
//!         }
//!     }
//! }
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let monitor = "/run/vm/backup.qmp".parse()?;
//! let connection = Connection { monitor, agent: None, timeout: Duration::from_secs(60) };
//! let request = Request { compress: true, ..Request::new(connection, RequestedLevel::Auto, "/backup/vm".into()) };
//! let troubles = Troubles::default();
//! let outcome = backup(&request, &troubles).await?;
//! assert!(outcome.images.iter().all(|(image, _)| image.starts_with("/backup/vm")));
//! # Ok(())
//! # }
//! ```

mod decide;
mod error;
mod event;
mod fleecing;
mod folder;
mod jobs;
mod machine;
mod maintain;
mod moment;
mod names;
mod order;
mod plan;
mod prepare;
mod request;
mod run;
mod seal;

pub use error::Error;
pub use event::{Event, Observer, Progress, Severity};
pub use machine::device::{Bitmap, Device, Skipped, Why};
pub use machine::file_name::FileName;
pub use machine::reply::DeviceError;
pub use machine::selection::Selection;
pub use maintain::{disks, remove_bitmaps};
pub use plan::Plan;
pub use request::{Aio, Connection, Fleece, Request, RequestedLevel};
pub use run::{Outcome, backup, dry_run, recover};

use self::machine::Machine;
use crate::qmp::{Command, Features, Limits, Monitor};

/// Connects to a machine.
async fn connect<'a>(connection: &Connection, observer: &'a dyn Observer) -> Result<Machine<'a>, Error> {
    let limits = Limits { connect: connection.timeout.min(Limits::default().connect), command: connection.timeout };
    let monitor = Monitor::connect(&connection.monitor, limits).await?;
    observer.event(&Event::Connected { version: monitor.version().clone() });
    let features = Features::parse(&monitor.execute(&Command::new("query-qmp-schema")).await?);
    Ok(Machine { monitor, observer, features })
}
