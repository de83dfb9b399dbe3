//! What a run will do, from what the machine and the backup folder say; and the files that it needs first.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::capture::decide::{Decision, Situation};
use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::capture::fleecing::Fleecing;
use crate::capture::folder::files;
use crate::capture::folder::history::{Histories, History};
use crate::capture::folder::image::Empty;
use crate::capture::folder::place::Place;
use crate::capture::folder::target;
use crate::capture::machine::Machine;
use crate::capture::machine::abilities;
use crate::capture::machine::device::{Device, config};
use crate::capture::machine::live::Live;
use crate::capture::machine::observe::{self, Replies};
use crate::capture::machine::state;
use crate::capture::names;
use crate::capture::order::settle::Bitmaps;
use crate::capture::plan::{self, DiskPlan, FleeceImage, Old, Plan, Settings};
use crate::capture::request::{Request, RequestedLevel};
use crate::chain::{BOOKKEEPING, FormatHint, ImageId, Level, Manifest, RunEntry, RunJournal, partial_path};
use crate::qmp::{Command, Features};
use crate::storage;

/// A disk of the run.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// The disk, for people.
    pub(super) disk: String,
    /// The image, under its last name.
    pub(super) image: PathBuf,
    /// What it will hold.
    pub(super) level: Level,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// The name of the image that an INC builds on.
    pub(super) parent: Option<String>,
    /// The id of that image, where it has one.
    parent_id: Option<ImageId>,
    /// What tells the image from all others.
    id: ImageId,
    /// How its moment is kept.
    pub(super) fleece: Option<FleeceImage>,
    device: Device,
    old: Option<Old>,
    link: Option<PathBuf>,
    config: PathBuf,
    /// Whether there are images of another tool.
    foreign: bool,
}

/// A run, before anything is done.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    /// The time of the restore point.
    pub(super) time: i64,
    /// Whether the machine runs.
    pub(super) running: bool,
    pub(super) targets: Vec<Target>,
    /// The id of the chain, and whether it is a new one; none with COPY.
    chain: Option<(String, bool)>,
    settings: Settings,
}

impl Prepared {
    /// Makes sure that what INCs build on is there.
    ///
    /// # Errors
    /// [`Error::ParentGone`].
    pub(super) fn check_parents(&self) -> Result<(), Error> {
        self.targets.iter().try_for_each(Target::check_parent)
    }

    /// Decides. Nothing is changed, neither in the machine nor in the folder.
    pub(super) async fn new(machine: &Machine<'_>, request: &Request, folder: &Path) -> Result<Self, Error> {
        let status = state::introduce(machine).await?;
        let replies = Replies::ask(machine).await?;
        let disks = replies.disks()?;
        let live = replies.live(machine)?;
        let mut folders = Histories::new(&live);
        let places = Place::all(folder, &disks, request.subdir, &mut folders)?;
        let chosen = choose(machine, request, &replies)?;
        let is_chosen = |device: &Device| chosen.contains(&device.node);
        if !disks.iter().any(is_chosen) {
            return Err(Error::NoDisk);
        }
        let mut histories = Vec::new();
        for (device, place) in disks.iter().zip(&places) {
            // before anything is made there
            let below = place.folder.strip_prefix(folder).unwrap_or(&place.folder);
            if is_chosen(device) && folder.exists() {
                files::check_inside(folder, &below.join(BOOKKEEPING))?;
            }
            histories.push(folders.of(&place.folder, &place.base)?);
        }
        let chain = chain(machine, request, folder)?;
        let time = time(machine, &histories);
        let fleece = Fleecing::new(machine, request, folder);
        let mut targets = Vec::new();
        let all = disks.iter().zip(&places).zip(&histories);
        for ((device, place), history) in all.filter(|((device, _), _)| is_chosen(device)) {
            let id = chain.as_ref().map_or("", |(id, _)| id);
            let bitmaps = Bitmaps::of(&device.bitmaps, id, &device.names);
            let persistent = device.persistent && request.persist;
            let situation = Situation {
                history,
                bitmaps: &bitmaps,
                bitmaps_below: &device.bitmaps_below,
                size: device.virtual_size,
                persistent,
                others_have_images: histories.iter().any(|other| other.newest.is_some()),
            };
            let (level, old) = match Decision::new(request.level, &situation) {
                Decision::Take { level, old, reason, severity } => {
                    let changed = old.map(|old| old.count);
                    machine.tell(&Event::Level { disk: place.disk.clone(), level, reason, changed, severity });
                    (level, old)
                }
                Decision::NoFull => {
                    return Err(Error::NoFull { disk: place.disk.clone(), folder: place.folder.clone() });
                }
                Decision::Broken { reason } => return Err(Error::Broken { disk: place.disk.clone(), reason }),
            };
            let mut image = place.image(level, time, request.timestamp);
            let mut timeless = !request.timestamp && level != Level::Inc;
            if timeless {
                let allowed = history.allows_timeless(&image, level, target::chain(folder)?.is_some());
                match allowed.and_then(|()| check_free(&image, &live, place, folder)) {
                    // nobody asked for this FULL, and without it there would be no backup any more
                    Err(error @ (Error::Replaces { .. } | Error::Timeless { .. } | Error::Ambiguous { .. }))
                        if request.level == RequestedLevel::Auto =>
                    {
                        machine.tell(&Event::Trouble { what: format!("this FULL has a time in its name: {error}") });
                        (image, timeless) = (place.image(level, time, true), false);
                    }
                    allowed => allowed?,
                }
            }
            let partial = partial_path(&image);
            if partial.symlink_metadata().is_ok() {
                return Err(Error::InTheWay { path: partial });
            }
            let link = (timeless && request.symlink).then(|| place.link(level));
            if let Some(path) =
                link.clone().filter(|link| link.symlink_metadata().is_ok_and(|there| !there.is_symlink()))
            {
                return Err(Error::Io { path, source: io::ErrorKind::AlreadyExists.into() });
            }
            tell_foreign(machine, device, place, id);
            tell_writers(machine, device, place, level).await;
            let newest = history.newest.as_ref().filter(|_| level == Level::Inc);
            targets.push(Target {
                disk: place.disk.clone(),
                level,
                size: device.virtual_size,
                parent: newest.and_then(|newest| newest.path.file_name()?.to_str().map(str::to_owned)),
                parent_id: newest.and_then(|newest| newest.id),
                id: ImageId::random().map_err(Error::io(&place.folder))?,
                fleece: fleece.image(machine, device, place, level, time).await?,
                old: old.map(|old| Old { name: old.name.clone(), granularity: old.granularity }),
                link,
                config: place.config.clone(),
                foreign: history.foreign,
                device: Device { persistent, ..device.clone() },
                image,
            });
        }
        let running = status == "running";
        let settings = settings(machine, request, folder, running);
        Ok(Self { time, running, targets, chain, settings })
    }

    /// Makes sure that the devices still have the nodes that the plan is made for, and the sizes: somebody may have taken a
    /// snapshot, or resized a disk. QEMU aborts where a guest writes beyond the end of a fleece image. Jobs of others that
    /// move disks cannot begin any more while filters are above those.
    pub(super) async fn same_nodes(&self, machine: &Machine<'_>) -> Result<(), Error> {
        state::nobody_moves_disks(machine).await?;
        // below a filter, the node on top stays the same
        if self.targets.iter().any(|target| target.device.is_filtered()) {
            self.same_format_nodes(machine).await?;
        }
        let blocks = machine.monitor.execute(&Command::new("query-block")).await?;
        let drives = observe::drives(&blocks);
        for target in &self.targets {
            // some filters do not notice it
            let size = observe::size_of(&blocks, &target.device.node).filter(|_| !target.device.is_filtered());
            if size.is_some_and(|size| size != target.size) {
                return Err(Error::Resized { disk: target.disk.clone() });
            }
            let Some(qdev) = &target.device.qdev else { continue };
            if !drives.iter().any(|drive| drive.qdev == *qdev && drive.node == target.device.node) {
                return Err(Error::Exchanged { disk: target.disk.clone() });
            }
        }
        Ok(())
    }

    /// Makes sure that none of the disks has got another image since, whatever is above it by now. It takes longer to ask.
    pub(super) async fn same_format_nodes(&self, machine: &Machine<'_>) -> Result<(), Error> {
        let look = |replies: &Replies| {
            let disks = replies.disks()?;
            self.targets.iter().try_for_each(|target| {
                let device = &target.device;
                let own = |other: &&Device| other.qdev == device.qdev && other.device == device.device;
                let disk = target.disk.clone();
                match disks.iter().find(own) {
                    Some(other) if other.format_node != device.format_node => Err(Error::Exchanged { disk }),
                    Some(other) if other.virtual_size != device.virtual_size => Err(Error::Resized { disk }),
                    _ => Ok(()),
                }
            })
        };
        // a job that ends takes its filter away between the answers: each does so once
        for _ in &self.targets {
            if look(&Replies::ask(machine).await?).is_ok() {
                return Ok(());
            }
        }
        look(&Replies::ask(machine).await?)
    }

    /// What is sent to QEMU.
    pub(super) fn plan(&self, features: &Features) -> Plan {
        let disks: Vec<DiskPlan> = self.targets.iter().map(|target| self.disk(target)).collect();
        Plan::new(&disks, &self.settings, features)
    }

    /// What is written down of an image.
    pub(super) fn manifest(&self, target: &Target, qemu: &str) -> Manifest {
        Manifest {
            image: target.image.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            id: Some(target.id),
            level: target.level,
            time: Some(self.time),
            chain: self.chain_of(target).map(str::to_owned),
            parent: target.parent.clone(),
            parent_id: target.parent_id,
            bitmap: self.epoch(target),
            format: FormatHint::Qcow2,
            virtual_size: target.size,
            qemu: qemu.to_owned(),
        }
    }

    /// The id of a disk's chain; none with COPY.
    fn chain_of(&self, target: &Target) -> Option<&str> {
        self.chain.as_ref().filter(|_| target.level != Level::Copy).map(|(id, _)| id.as_str())
    }

    /// The bitmap that goes back to a disk's image; none with COPY.
    fn epoch(&self, target: &Target) -> Option<String> {
        self.chain_of(target).map(|chain| names::epoch(self.time, target.id, chain))
    }

    fn disk(&self, target: &Target) -> DiskPlan {
        DiskPlan {
            node: target.device.node.clone(),
            format_node: target.device.format_node.clone(),
            is_overlay: !target.device.backing.is_empty(),
            fleece: target.fleece.clone(),
            target: partial_path(&target.image),
            old: target.old.clone(),
            new: self.epoch(target).map(|name| (name, target.device.persistent)),
        }
    }

    /// What is written down first.
    pub(super) fn journal(&self, folder: &Path) -> RunJournal {
        let below = |path: &Path| path.strip_prefix(folder).unwrap_or(path).to_owned();
        let entries = self.targets.iter().map(|target| RunEntry {
            disk: target.disk.clone(),
            partial: below(&partial_path(&target.image)),
            image: below(&target.image),
            link: target.link.as_deref().map(below),
        });
        RunJournal {
            time: self.time,
            chain: self.chain.as_ref().map(|(chain, _)| chain.clone()),
            publishing: false,
            entries: entries.collect(),
            fleece: self.targets.iter().filter_map(|target| Some(target.fleece.as_ref()?.file.clone())).collect(),
        }
    }

    /// Makes the files that QEMU will open.
    pub(super) fn create(&self, machine: &Machine<'_>, folder: &Path) -> Result<(), Error> {
        if let Some((chain, true)) = &self.chain {
            target::write_chain(folder, chain)?;
        }
        let owner = machine.monitor.peer();
        for target in &self.targets {
            let parent = target.image.parent().unwrap_or(folder);
            storage::create_folders(parent).map_err(Error::io(parent))?;
            let empty = Empty::new(&target.disk, target.size, target.device.cluster_size)?;
            empty.create(&partial_path(&target.image), owner)?;
            if let Some(FleeceImage { file, .. }) = &target.fleece {
                empty.create(file, owner).map_err(|error| no_fleece(error, target, file))?;
            }
            machine.tell(&Event::Target { disk: target.disk.clone(), path: target.image.clone(), size: target.size });
        }
        Ok(())
    }
}

/// What holds for all disks.
fn settings(machine: &Machine<'_>, request: &Request, folder: &Path, running: bool) -> Settings {
    Settings {
        lock: folder.join(BOOKKEEPING).join("lock"),
        running,
        pause: request.pause,
        compress: request.compress,
        speed: request.speed_limit,
        cbw_timeout: request.cbw_timeout,
        direct: request.direct,
        aio: request.aio,
        auto_dismiss: abilities::is_fragile(&machine.features),
    }
}

/// An image without a time comes in the place of a backup that nobody has open: neither this machine nor another. A file of
/// no run, in a folder that none has been in, may be the disk of a machine that is off.
fn check_free(image: &Path, live: &Live, place: &Place, folder: &Path) -> Result<(), Error> {
    if live.has_open(image) {
        return Err(Error::InUse { path: image.to_owned() });
    }
    target::hold(image)?;
    // of a link, the file that it leads to stays
    let is_file = image.symlink_metadata().is_ok_and(|there| there.is_file());
    // the Python tool makes no `uuid` for a COPY, but settings and a link
    let has_link = [Level::Full, Level::Copy].into_iter().any(|level| place.link(level).is_symlink());
    let is_backup = Manifest::path(image).exists() || place.config.exists() || has_link;
    if is_file && !is_backup && target::chain(folder)?.is_none() {
        return Err(Error::NoBackup { path: image.to_owned() });
    }
    Ok(())
}

fn no_fleece(error: Error, target: &Target, file: &Path) -> Error {
    let folder = file.parent().unwrap_or(file).to_owned();
    match error {
        Error::Io { source, .. } => Error::Fleece { disk: target.disk.clone(), folder, source },
        other => other,
    }
}

impl Target {
    /// Makes sure that nobody has removed what the INC builds on, while its bitmap is there for the next one still.
    fn check_parent(&self) -> Result<(), Error> {
        let Some(parent) = &self.parent else { return Ok(()) };
        let path = self.image.with_file_name(parent);
        match path.metadata() {
            Ok(parent) if !parent.is_file() => Err(Error::ParentGone { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::ParentGone { path }),
            _ => Ok(()),
        }
    }

    /// Whether the image has its name; an earlier one may have it instead.
    pub(super) fn is_published(&self) -> bool {
        let manifest = Manifest::read(&self.image).ok().flatten();
        let is_it = manifest.is_some_and(|manifest| manifest.id == Some(self.id));
        is_it && self.image.exists() && !partial_path(&self.image).exists()
    }

    /// Writes down what the disk is. Images of other tools are of the disk that the settings tell which are there.
    pub(super) fn write_config(&self) -> Result<(), Error> {
        if self.foreign && self.config.symlink_metadata().is_ok() {
            return Ok(());
        }
        // in it are names of files as QEMU opens them, passwords of servers among them
        files::write_secret_json(&self.config, &config(&self.device, self.foreign))
    }

    /// Whether its job alone writes to the image, each cluster once.
    pub(super) fn is_written_once(&self) -> bool {
        self.fleece.is_some() || self.device.read_only
    }
}

/// The nodes of the disks that are asked for.
fn choose(machine: &Machine<'_>, request: &Request, replies: &Replies) -> Result<Vec<String>, Error> {
    let found = replies.devices(&request.selection)?;
    found.skipped.into_iter().for_each(|skipped| machine.tell(&Event::Skipped(skipped)));
    let named = request.selection.include.as_ref();
    let is_wanted = |name: &String| named.is_some_and(|named| named.contains(name));
    let (wanted, unwanted): (Vec<_>, Vec<_>) = found.unmatched.into_iter().partition(is_wanted);
    if found.disks.is_empty() && !wanted.is_empty() {
        return Err(Error::NoSuchDisk { names: wanted });
    }
    for (names, wanted) in [(wanted, true), (unwanted, false)] {
        if !names.is_empty() {
            machine.tell(&Event::NoSuchDisk { names, wanted });
        }
    }
    Ok(found.disks.into_iter().map(|device| device.node).collect())
}

/// The id of the chain, and whether this run begins it.
fn chain(machine: &Machine<'_>, request: &Request, folder: &Path) -> Result<Option<(String, bool)>, Error> {
    if request.level == RequestedLevel::Copy {
        return Ok(None);
    }
    let Some(chain) = target::chain(folder)? else {
        let chain = request.uuid.clone().map_or_else(target::new_id, Ok)?;
        return Ok(Some((chain, true)));
    };
    if let Some(uuid) = request.uuid.as_ref().filter(|uuid| **uuid != chain) {
        machine.tell(&Event::OtherUuid { wanted: uuid.clone(), chain: chain.clone() });
    }
    Ok(Some((chain, false)))
}

/// Now, or a second after the newest image of any disk, whatever the clock says.
fn time(machine: &Machine<'_>, histories: &[History]) -> i64 {
    /// Runs that follow each other within a second are ahead of the clock, too.
    const USUAL: i64 = 3600;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let latest = histories.iter().filter_map(|history| history.latest).max();
    let time = latest.map_or(now, |latest| now.max(latest.saturating_add(1)));
    if time.saturating_sub(now) > USUAL {
        machine.tell(&Event::ClockBehind { time });
    }
    time
}

/// Warns of a device that lets other machines and programs write to its disk. Those that have no such property do not, and
/// a monitor that is gone is told by the next command.
async fn tell_writers(machine: &Machine<'_>, device: &Device, place: &Place, level: Level) {
    let Some(qdev) = device.qdev.as_ref().filter(|_| level != Level::Copy) else { return };
    let shares = machine.monitor.execute(&plan::property(qdev, "share-rw")).await;
    if matches!(shares, Ok(Value::Bool(true))) {
        let what = format!(
            "{}: other machines may write to it (share-rw), and what they write is in no INC of it: make FULLs where they \
             do, or --exclude it",
            place.disk
        );
        machine.tell(&Event::Trouble { what });
    }
}

/// Tells of bitmaps of other chains, where there are more than the one of another folder that is usual.
fn tell_foreign(machine: &Machine<'_>, device: &Device, place: &Place, chain: &str) {
    let is_foreign = |name: &str| name.starts_with(names::PREFIX) && names::since(name, chain, &device.names).is_none();
    let count = device.bitmaps.iter().filter(|bitmap| is_foreign(&bitmap.name)).count();
    if count > 1 {
        machine.tell(&Event::ForeignBitmaps { disk: place.disk.clone(), count });
    }
}
