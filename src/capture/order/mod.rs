//! Order after a run, however it has ended: the guest goes on, nothing of the run is left in QEMU, its images have their
//! names or are gone, and each disk has the bitmap that the next INC needs.

pub(crate) mod dismantle;
pub(crate) mod frozen;
pub(crate) mod settle;
pub(crate) mod teardown;

use std::path::{Path, PathBuf};

use self::dismantle::dismantle;
use self::settle::Bitmaps;
use self::teardown::Teardown;
use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::capture::folder::files;
use crate::capture::folder::history::{Histories, Newest};
use crate::capture::folder::journal;
use crate::capture::folder::lock;
use crate::capture::folder::target;
use crate::capture::machine::Machine;
use crate::capture::machine::device::{Bitmap, Device};
use crate::capture::machine::nodes::Node;
use crate::capture::machine::observe::{Observed, Replies};
use crate::capture::names::{self, NodeRole};
use crate::chain::{FolderLock, RunJournal};
use crate::errors;
use crate::qmp::Address;

/// How often is looked who has left something, while others put it in order.
const LOOKS: usize = 3;

/// [`recover`] for those who go on: a guest that may be frozen is told, and no reason to fail.
pub(crate) async fn restore(
    machine: &Machine<'_>,
    agent: Option<&Address>,
    own: Option<&FolderLock>,
    run: Option<&RunJournal>,
) -> Result<(), Error> {
    match recover(machine, agent, own, run).await {
        Err(frozen @ Error::Frozen { .. }) => {
            machine.tell(&Event::Trouble { what: frozen.to_string() });
            Ok(())
        }
        recovered => recovered,
    }
}

/// Puts in order what a run leaves, one of the caller's or one that is no more. `own` is the folder that the caller has
/// locked, and `run` what it has begun itself; else each thing that was out of order is told.
///
/// # Errors
/// Somebody is at work, or QEMU refuses; [`Error::Frozen`] where all is in order but the guest.
pub(crate) async fn recover(
    machine: &Machine<'_>,
    agent: Option<&Address>,
    own: Option<&FolderLock>,
    run: Option<&RunJournal>,
) -> Result<(), Error> {
    let told = |what: String| {
        if run.is_none() {
            machine.tell(&Event::Recovered { what });
        }
    };
    let (observed, other) = look(machine, own).await?;
    let locks = [own, other.as_ref()];
    let left = !Teardown::new(&observed).is_empty();
    let dismantled = if left { dismantle(machine).await } else { Ok(()) };
    // not before: a machine that stands still has no agent that answers
    let thawed = frozen::thaw(machine, &observed, agent).await;
    dismantled?;
    if left {
        told("jobs, filters and images in QEMU".to_owned());
    }
    for lock in locks.into_iter().flatten() {
        let own_run = run.filter(|_| own.is_some_and(|own| own.path() == lock.path()));
        let closed = async {
            if let Some(journal) = own_run.cloned().map_or_else(|| journal::read(lock.folder()), |run| Ok(Some(run)))? {
                told(format!("the run of {}", journal.time));
                close(machine, lock.folder(), &journal, own_run.is_some()).await
            } else if left || observed.node(names::LOCK).is_some() {
                settle(machine, lock.folder(), target::chain(lock.folder())?, None, false).await
            } else {
                Ok(())
            }
        };
        match closed.await {
            Ok(()) => {}
            Err(error @ (Error::Monitor(_) | Error::Cancelled)) => return Err(error),
            // what is left there, its own next run finds
            Err(error) if own.is_some_and(|own| own.path() != lock.path()) => {
                let folder = lock.folder().display();
                let what = format!("{folder}, another target, stays as a killed run left it: {}", errors::line(&error));
                machine.tell(&Event::Trouble { what });
            }
            Err(error) => return Err(error),
        }
    }
    // one that has come since is that of a run that goes on
    if observed.node(names::LOCK).is_some() {
        machine.remove_node(names::LOCK).await?;
    }
    thawed
}

/// Tells what a run of the Python tool has left that was killed: a filter goes on for ever, and nobody but that run knows what
/// stood where before.
pub(crate) async fn tell_strangers(machine: &Machine<'_>) -> Result<(), Error> {
    let observed = machine.observe().await?;
    let is_left = |node: &&Node| {
        node.name.starts_with(names::PREFIX)
            && NodeRole::of(&node.name).is_none()
            && (node.driver == "copy-before-write" || [".partial", ".fleece"].iter().any(|end| node.file.contains(end)))
    };
    let strangers: Vec<&str> = observed.nodes.iter().filter(is_left).map(|node| node.name.as_str()).collect();
    if !strangers.is_empty() {
        let what = format!(
            "the machine has nodes of another tool, which perhaps was killed: {}; filters among them go on copying what the \
             guest overwrites: `qom-set` gives a device its drive back, then `blockdev-del` removes them",
            strangers.join(", ")
        );
        machine.tell(&Event::Trouble { what });
    }
    Ok(())
}

/// What is in the machine, and the lock of the run that has left it, as [`foreign`] takes it over.
async fn look(machine: &Machine<'_>, own: Option<&FolderLock>) -> Result<(Observed, Option<FolderLock>), Error> {
    let mut observed = machine.observe().await?;
    for _ in 0..LOOKS {
        let other = foreign(&observed, own)?;
        if other.is_none() {
            return Ok((observed, other));
        }
        // before its folder was locked, somebody else could put all in order and begin
        let again = machine.observe().await?;
        if again.node(names::LOCK).map(|node| &node.file) == observed.node(names::LOCK).map(|node| &node.file) {
            return Ok((again, other));
        }
        observed = again;
    }
    Err(Error::Busy { what: "others begin and end all the time".to_owned() })
}

/// The lock of the run that has left something in the machine, taken over; fails where that run still goes on.
fn foreign(observed: &Observed, own: Option<&FolderLock>) -> Result<Option<FolderLock>, Error> {
    if let Some(job) = observed.jobs.iter().find(|job| job.id.starts_with(names::PYTHON_JOB) && !job.is_concluded()) {
        return Err(Error::Busy { what: format!("the job {} of another tool goes on", job.id) });
    }
    let Some(node) = observed.node(names::LOCK) else { return Ok(None) };
    let path = Path::new(&node.file);
    if own.is_some_and(|own| own.path() == path) {
        return Ok(None);
    }
    lock::take_over(path, own)
}

/// Ends a run on the side of files and bitmaps: forward if its images are whole, else back.
async fn close(machine: &Machine<'_>, folder: &Path, journal: &RunJournal, is_own: bool) -> Result<(), Error> {
    let trouble = |what: String| machine.tell(&Event::Trouble { what });
    // unmounted, or moved: where it comes back, so do the images, and need what was written since
    let is_gone = || journal::read(folder).map(|there| journal.publishing && there.is_none());
    let gone = || trouble(format!("{} is gone; the bitmaps stay for when it comes back", folder.display()));
    if is_gone()? {
        gone();
        return Ok(());
    }
    for entry in &journal.entries {
        if journal.publishing {
            if !target::publish(folder, entry)? {
                if is_gone()? {
                    gone();
                    return Ok(());
                }
                trouble(format!(
                    "{} was removed before it had its name; the next INC holds it",
                    entry.partial.display()
                ));
            } else if let Err(error) = target::link(folder, entry) {
                trouble(format!("no link tells the level of {}: {}", entry.image.display(), errors::line(&error)));
            }
        } else {
            target::discard(folder, entry)?;
        }
    }
    let chain = journal.chain.clone().map_or_else(|| target::chain(folder), |chain| Ok(Some(chain)))?;
    settle(machine, folder, chain, Some(journal.time), is_own).await?;
    // last, and no reason to fail: all else is in order whatever became of the folder that they should be in
    for path in &journal.fleece {
        if let Err(error) = files::remove_fleece(path) {
            trouble(format!("remove this fleece image by hand: {}", errors::line(&error)));
        }
    }
    journal::remove(folder)
}

/// Brings the bitmaps of all disks of a chain in order. `ended` is the time of a run that has just ended; where that is the
/// caller's own, each disk is told that has got an image of it and has no bitmap for the INC after it.
async fn settle(
    machine: &Machine<'_>,
    folder: &Path,
    chain: Option<String>,
    ended: Option<i64>,
    is_own: bool,
) -> Result<(), Error> {
    let Some(chain) = chain else { return Ok(()) };
    let replies = Replies::ask(machine).await?;
    let live = replies.live(machine)?;
    let mut histories = Histories::new(&live);
    for device in replies.disks()? {
        let newest = newest(folder, &device, &mut histories)?;
        // what is stored in an image that nobody can write to cannot be changed, and records nothing
        let is_stored = |bitmap: &Bitmap| device.read_only && bitmap.persistent;
        let changeable: Vec<Bitmap> = device.bitmaps.iter().filter(|bitmap| !is_stored(bitmap)).cloned().collect();
        let bitmaps = Bitmaps::of(&changeable, &chain, &device.names);
        if let Some(command) = bitmaps.settle(newest, ended) {
            machine.send(&command).await?;
        }
        let made = newest.filter(|_| is_own && newest == ended);
        if made.is_some_and(|time| !Bitmaps::of(&device.bitmaps, &chain, &device.names).record(time)) {
            let disk = device.names.first().unwrap_or(&device.base);
            let what = format!(
                "{disk}: no bitmap records what is written from now on, somebody else has ended it: no INC can follow"
            );
            machine.tell(&Event::Trouble { what });
        }
    }
    Ok(())
}

/// The time of the newest image of a disk, in whatever way the folder is laid out.
fn newest(folder: &Path, device: &Device, histories: &mut Histories<'_>) -> Result<Option<i64>, Error> {
    // other disks may stand on the same files
    let is_own = |base: &str, newest: &Newest| {
        base == device.base || newest.bitmap.as_ref().is_none_or(|bitmap| device.has_bitmap(bitmap))
    };
    let mut since = |folder: PathBuf, base: &str| {
        let history = histories.of(&folder, base)?;
        Ok::<_, Error>(history.since().filter(|_| history.newest.is_some_and(|newest| is_own(base, &newest))))
    };
    let mut newest = None;
    for base in device.bases() {
        newest = newest.max(since(folder.to_owned(), &base)?);
        for name in &device.names {
            newest = newest.max(since(folder.join(name), &base)?);
            newest = newest.max(since(folder.to_owned(), &format!("{name}-{base}"))?);
        }
    }
    for name in &device.names {
        let followed = histories.followed_by(&folder.join(name), device)?;
        newest = newest.max(followed.and_then(|(_, newest)| newest.time));
    }
    Ok(newest)
}
