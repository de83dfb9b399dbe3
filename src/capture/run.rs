//! A backup, from the first question to the last bitmap.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::capture::error::Error;
use crate::capture::event::{Event, Observer, Progress};
use crate::capture::folder::files;
use crate::capture::folder::journal;
use crate::capture::folder::lock;
use crate::capture::folder::target;
use crate::capture::jobs::Watch;
use crate::capture::machine::abilities::can_flush;
use crate::capture::machine::observe::{self, Job};
use crate::capture::machine::{Machine, state};
use crate::capture::moment;
use crate::capture::names;
use crate::capture::order;
use crate::capture::order::dismantle::dismantle;
use crate::capture::order::teardown::Teardown;
use crate::capture::plan::{self, FleeceImage, Plan};
use crate::capture::prepare::{Prepared, Target};
use crate::capture::request::{Connection, Request};
use crate::capture::seal::early_sums::EarlySums;
use crate::capture::seal::early_sync::EarlySync;
use crate::capture::seal::pauses::{Pauses, Settled};
use crate::capture::{connect, seal};
use crate::chain::{self, FolderLock, Level, Manifest, Month, RunJournal, partial_path};
use crate::errors;
use crate::qmp::Command;

/// What a backup has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The time of the restore point, seconds since 1970.
    pub time: i64,
    /// The images, and their levels.
    pub images: Vec<(PathBuf, Level)>,
    /// Bytes of the images' files.
    pub bytes: u64,
}

/// Makes a backup.
///
/// Drop the future only when the program ends: what is half done then is put in order by the next run.
///
/// # Errors
/// [`Error`] says what is left behind, if anything is.
pub async fn backup(request: &Request, observer: &dyn Observer) -> Result<Outcome, Error> {
    check(request)?;
    let path = target::folder(&request.target, request.monthly)?;
    // where others have been, who is there now is known before the machine is; else no folder is made for nothing
    let early =
        FolderLock::is_in(&path).then(|| target::create(&path).and_then(|path| lock::take(&path))).transpose()?;
    let machine = connect(&request.connection, observer).await?;
    let lock = early.map_or_else(|| target::create(&path).and_then(|path| lock::take(&path)), Ok)?;
    let folder = lock.folder().to_owned();
    let agent = request.connection.agent.as_ref();
    order::restore(&machine, agent, Some(&lock), None).await?;
    order::tell_strangers(&machine).await?;
    if request.monthly {
        restore_months(&machine, request, &folder).await?;
    }
    let prepared = Prepared::new(&machine, request, &folder).await?;
    let mut journal = prepared.journal(&folder);
    let made = make(&machine, request, &lock, &prepared, &mut journal).await;
    if matches!(made, Err(Error::Standing { .. })) {
        moment::outlast(&machine, request).await;
    }
    let machine = connected(machine, request, &made).await;
    let mut restored = order::restore(&machine, agent, Some(&lock), Some(&journal)).await;
    let machine = connected(machine, request, &restored).await;
    if has_lost_monitor(&restored) {
        // it may have been done with, and is not there then
        let journal = journal::read(&folder)?;
        restored = order::restore(&machine, agent, Some(&lock), journal.as_ref()).await;
    }
    if made.is_err() {
        go_on_after_error(&machine, prepared.running).await;
    }
    let published: Vec<&Target> = prepared.targets.iter().filter(|target| target.is_published()).collect();
    match (made, restored) {
        (Ok(()), Ok(())) => {}
        (Ok(()), Err(left)) if published.len() == prepared.targets.len() => trouble(&machine, &left),
        // it goes on
        (Err(Error::Standing { source }), Ok(())) => return Err(source.into()),
        (Ok(()), Err(error)) => {
            let what =
                "the images are whole, but not all have got their names: the next run or `qmpbackup recover` ends that";
            machine.tell(&Event::Trouble { what: what.to_owned() });
            return Err(error);
        }
        (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(left)) => {
            trouble(&machine, &left);
            return Err(error);
        }
    }
    if published.is_empty() {
        return Err(Error::NoImage { folder });
    }
    tell_published(&machine, &published, prepared.time);
    let images: Vec<_> = published.iter().map(|target| (target.image.clone(), target.level)).collect();
    let lengths = images.iter().filter_map(|(path, _)| path.metadata().ok()).map(|file| file.len());
    let bytes = lengths.fold(0, u64::saturating_add);
    Ok(Outcome { time: prepared.time, images, bytes })
}

/// What would only show when it is written down.
fn check(request: &Request) -> Result<(), Error> {
    match request.uuid.as_ref().filter(|id| !chain::is_chain_id(id)) {
        Some(id) => Err(Error::ChainId { id: id.clone() }),
        None => Ok(()),
    }
}

/// The machine as it was, or by another connection where work on it has lost its own: perhaps it stands still.
async fn connected<'a>(machine: Machine<'a>, request: &Request, worked: &Result<(), Error>) -> Machine<'a> {
    if !has_lost_monitor(worked) {
        return machine;
    }
    connect(&request.connection, machine.observer).await.unwrap_or(machine)
}

fn has_lost_monitor(worked: &Result<(), Error>) -> bool {
    matches!(worked, Err(Error::Monitor(error)) if error.is_lost())
}

/// Puts in order what runs have left in the folders of other months. A folder in which that is not possible keeps nobody from
/// a backup of this month.
async fn restore_months(machine: &Machine<'_>, request: &Request, own: &Path) -> Result<(), Error> {
    for folder in target::with_months(&request.target)?.iter().filter(|folder| *folder != own) {
        let month = |folder: &Path| folder.file_name().and_then(Month::parse);
        if month(folder) > month(own) {
            let folder = folder.display();
            let what = format!("{folder} is of a later month: look at the clock");
            machine.tell(&Event::Trouble { what });
        }
        match restore_month(machine, request, folder).await {
            Ok(()) => {}
            Err(error @ (Error::Monitor(_) | Error::Cancelled)) => return Err(error),
            Err(left) => trouble(machine, &left),
        }
    }
    Ok(())
}

async fn restore_month(machine: &Machine<'_>, request: &Request, folder: &Path) -> Result<(), Error> {
    if journal::read(folder)?.is_none() {
        return Ok(());
    }
    let lock = lock::take(folder)?;
    order::restore(machine, request.connection.agent.as_ref(), Some(&lock), None).await
}

/// Lets a machine go on that has stopped by itself, since a write of its guest waited for a target that was full. If it was
/// another error, it stops again.
async fn go_on_after_error(machine: &Machine<'_>, running: bool) {
    let Ok(reply) = machine.monitor.execute(&Command::new("query-status")).await else { return };
    if running && observe::status(&reply) == "io-error" {
        let what = match machine.send(&Command::new("cont")).await {
            Ok(_) => "the machine had stopped with a write error, and goes on".to_owned(),
            Err(error) => format!("the machine has stopped with a write error: {}", errors::line(&error)),
        };
        machine.tell(&Event::Trouble { what });
    }
}

fn trouble(machine: &Machine<'_>, left: &Error) {
    let what =
        format!("not all is in order yet, the next run or `qmpbackup recover` does the rest: {}", errors::line(left));
    machine.tell(&Event::Trouble { what });
}

/// What a backup would send, without doing any of it.
///
/// # Errors
/// As [`backup`] would say before it begins.
pub async fn dry_run(request: &Request, observer: &dyn Observer) -> Result<Plan, Error> {
    check(request)?;
    let folder = target::folder(&request.target, request.monthly)?;
    let folder = folder.canonicalize().or_else(|_| std::path::absolute(&folder));
    let folder = folder.map_err(Error::io(&request.target))?;
    let machine = connect(&request.connection, observer).await?;
    let found = machine.observe().await?;
    if found.node(names::LOCK).is_some() || !Teardown::new(&found).is_empty() {
        return Err(Error::Busy {
            what: "another backup goes on, or was killed: then `recover` puts its remains in order".to_owned(),
        });
    }
    let prepared = Prepared::new(&machine, request, &files::utf8(folder)?).await?;
    Ok(prepared.plan(&machine.features))
}

/// Puts in order what runs have left that are no more. `target` is a backup folder; without one, the one that the machine
/// knows of.
///
/// # Errors
/// Somebody is at work, or it cannot be done.
pub async fn recover(connection: &Connection, target: Option<&Path>, observer: &dyn Observer) -> Result<(), Error> {
    let (folders, unread) = match target.map(target::with_months).transpose() {
        Ok(folders) => (folders.unwrap_or_default(), None),
        // what the folder has can wait, the machine need not
        Err(error) => {
            observer.event(&Event::Trouble { what: errors::line(&error) });
            (Vec::new(), Some(error))
        }
    };
    // who is there now is known before the machine is
    folders.iter().try_for_each(|folder| lock::take(folder).map(drop))?;
    let machine = connect(connection, observer).await?;
    order::tell_strangers(&machine).await?;
    let agent = connection.agent.as_ref();
    if folders.is_empty() {
        order::recover(&machine, agent, None, None).await?;
        return unread.map_or(Ok(()), Err);
    }
    let mut recovered = Ok(());
    for folder in &folders {
        // one at a time: what the machine knows of may be another of them, and is locked with this one
        let lock = lock::take(folder)?;
        recovered = match order::recover(&machine, agent, Some(&lock), None).await {
            // all else is in order
            Err(frozen @ Error::Frozen { .. }) => Err(frozen),
            other => other.and(recovered),
        };
        if !matches!(recovered, Ok(()) | Err(Error::Frozen { .. })) {
            break;
        }
    }
    recovered
}

/// All but the names: when this is done, the images are whole and on stable storage, and the journal says so.
async fn make(
    machine: &Machine<'_>,
    request: &Request,
    lock: &FolderLock,
    prepared: &Prepared,
    journal: &mut RunJournal,
) -> Result<(), Error> {
    let folder = lock.folder();
    let agent = if request.quiesce { moment::find_agent(machine, request, prepared.running).await } else { None };
    let plan = prepared.plan(&machine.features);
    for command in &plan.lock {
        machine.step(command).await.map_err(lost_race)?;
    }
    journal::write(journal, folder)?;
    prepared.create(machine, folder)?;
    for command in &plan.prepare {
        machine.step(command).await?;
    }
    // QEMU has them open; so no crash can leave one behind
    for path in &journal.fleece {
        files::remove(path)?;
    }
    machine.go_on()?;
    let watch = Watch::new(machine);
    let thawed = moment::take(machine, request, prepared, &plan, agent).await?;
    tokio::select! {
        copied = copy(machine, request, prepared, &plan, watch) => copied?,
        never = moment::keep_thawing(machine, request.connection.agent.as_ref(), thawed) => match never {},
    }
    machine.go_on()?;
    prepared.check_parents()?;
    journal.publishing = true;
    let written = journal::write(journal, folder);
    // names are given only where another run could go on with that
    journal.publishing = written.is_ok();
    written
}

/// What comes after the moment, until the images are whole and on stable storage, and nothing of the run is in QEMU.
async fn copy(
    machine: &Machine<'_>,
    request: &Request,
    prepared: &Prepared,
    plan: &Plan,
    mut watch: Watch,
) -> Result<(), Error> {
    let start = Instant::now();
    for command in &plan.start {
        machine.step(command).await?;
    }
    let open = |target: &Target| {
        let partial = partial_path(&target.image);
        target::open(&partial).map(|image| (partial, image))
    };
    let open_shared = |target: &Target| open(target).map(|(partial, image)| (partial, Arc::new(image)));
    let written = prepared.targets.iter().map(open_shared).collect::<Result<Vec<_>, _>>()?;
    let (mut pauses, sums) = begin_sums(request, prepared, &written);
    let sync = EarlySync::begin(written);
    let jobs = follow(machine, &mut watch, &mut pauses, request.progress_interval, prepared).await?;
    // all that they have read is of this machine then
    state::still_here(machine).await?;
    let bytes = jobs.iter().fold(0, |sum: u64, job| sum.saturating_add(job.done));
    machine.tell(&Event::Copied { bytes, elapsed: start.elapsed() });
    delay(machine, request.remove_delay).await?;
    // opened before QEMU closes it: what the kernel could not write then is told to each file that is open
    let images = prepared.targets.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    flush(machine, prepared).await?;
    dismantle(machine).await?;
    for (target, (partial, image)) in prepared.targets.iter().zip(&images) {
        target::verify(partial, image, target.size)?;
    }
    let qemu = machine.monitor.version().to_string();
    for target in &prepared.targets {
        let manifest = prepared.manifest(target, &qemu);
        let partial = partial_path(&target.image);
        target.write_config()?;
        // before the checksums, which are made for the id that it tells
        manifest.write(&partial).map_err(Error::io(&Manifest::path(&partial)))?;
        // it must be there when the journal says that it is whole
        chain::sync_names(&partial).map_err(Error::io(&partial))?;
    }
    seal::seal(machine, sync, sums, images, request.progress_interval).await
}

/// Has QEMU write what it has of the images, where it can be asked to: else it does so when it closes them.
async fn flush(machine: &Machine<'_>, prepared: &Prepared) -> Result<(), Error> {
    if !can_flush(&machine.features) {
        return Ok(());
    }
    let graph = machine.observe().await?.graph;
    for (number, target) in prepared.targets.iter().enumerate() {
        let Some(file) = graph.child(&names::NodeRole::Target.node(number), "file") else { continue };
        let Err(error) = machine.send(&plan::flush(number, file)).await else { continue };
        let refused = if let Error::Monitor(error) = &error { error.refused() } else { None };
        let full = refused.filter(|(_, reason)| is_full(reason));
        return Err(full.map(|(_, reason)| explain(target.disk.clone(), reason, Some(target))).unwrap_or(error));
    }
    Ok(())
}

/// Has jobs pause, and sums what has settled then, where jobs read from snapshots and write each byte once.
fn begin_sums(request: &Request, prepared: &Prepared, images: &[(PathBuf, Arc<File>)]) -> (Pauses, EarlySums) {
    let once = prepared.targets.iter().all(Target::is_written_once);
    let settling = images.iter().filter(|_| once && !request.compress);
    let images: Vec<_> = settling.map(|(_, image)| (Arc::clone(image), Settled::default())).collect();
    (Pauses::new(images.clone()), EarlySums::begin(images))
}

/// A lock that is there already is that of another run, which was faster.
fn lost_race(error: Error) -> Error {
    if error.is_duplicate() { Error::Busy { what: "another run has just begun".to_owned() } } else { error }
}

/// Waits for the jobs, and tells how far they are.
async fn follow(
    machine: &Machine<'_>,
    watch: &mut Watch,
    pauses: &mut Pauses,
    interval: Duration,
    prepared: &Prepared,
) -> Result<Vec<Job>, Error> {
    let name = |job: &Job| {
        let target = names::disk_of(&job.id).and_then(|number| prepared.targets.get(number));
        target.map_or_else(|| job.id.clone(), |target| target.disk.clone())
    };
    let mut told = Instant::now();
    let jobs = watch
        .wait(machine, pauses, |jobs| {
            if told.elapsed() >= interval || jobs.iter().all(Job::is_concluded) {
                told = Instant::now();
                let progress = |job: &Job| Progress { disk: name(job), done: job.done, total: job.total };
                machine.tell(&Event::Progress(jobs.iter().map(progress).collect()));
            }
        })
        .await?;
    // the one that failed, before those that were cancelled for that
    let failed = jobs.iter().filter_map(|job| Some((job, job.error.as_ref()?)));
    if let Some((job, reason)) = failed.min_by_key(|(_, reason)| reason.to_lowercase().contains("cancel")) {
        return Err(explain(name(job), reason, names::disk_of(&job.id).and_then(|at| prepared.targets.get(at))));
    }
    let is_there = |disk: &usize| jobs.iter().any(|job| names::disk_of(&job.id) == Some(*disk));
    let gone = prepared.targets.iter().enumerate().find(|(at, _)| !is_there(at));
    gone.map_or(Ok(()), |(_, target)| {
        let reason = "it is gone, somebody else has ended it".to_owned();
        Err(Error::Job { disk: target.disk.clone(), reason })
    })?;
    Ok(jobs)
}

/// What QEMU means with the error of a job.
fn explain(disk: String, reason: &str, target: Option<&Target>) -> Error {
    let folder = |path: &Path| path.parent().unwrap_or(path).to_owned();
    match target {
        Some(target) if is_full(reason) => Error::TargetFull { disk, folder: folder(&target.image) },
        // the snapshot was broken, so that the guest could go on
        Some(Target { fleece: Some(FleeceImage { file, .. }), .. }) if reason.contains("Permission denied") => {
            Error::FleeceFull { disk, folder: folder(file) }
        }
        _ => Error::Job { disk, reason: reason.to_owned() },
    }
}

/// Whether an error of QEMU says that there is no room, as strerror has it.
fn is_full(reason: &str) -> bool {
    ["No space left", "Disk quota exceeded"].iter().any(|full| reason.contains(full))
}

async fn delay(machine: &Machine<'_>, delay: Duration) -> Result<(), Error> {
    let until = Instant::now() + delay;
    while Instant::now() < until {
        machine.go_on()?;
        tokio::time::sleep(Duration::from_millis(100).min(delay)).await;
    }
    Ok(())
}

fn tell_published(machine: &Machine<'_>, published: &[&Target], time: i64) {
    for target in published {
        machine.tell(&Event::Published {
            disk: target.disk.clone(),
            path: target.image.clone(),
            level: target.level,
            time,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::ErrorKind;

    #[test]
    fn a_quota_that_is_used_up_is_a_full_target() {
        for error in [libc::ENOSPC, libc::EDQUOT].map(std::io::Error::from_raw_os_error) {
            assert!(is_full(&error.to_string()), "{error}");
            let error = Error::Io { path: PathBuf::new(), source: error };
            assert_eq!(error.kind(), ErrorKind::Full, "{error:?}");
        }
        assert!(!is_full("Input/output error"));
    }
}
