//! `qmprestore merge`.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::fs::OFlags;
use serde_json::{Value, json};

use super::args::{self, FormatName};
use super::by_hand::{self, ByHand};
use super::place;
use super::progress::Reporter;
use super::{refuse, salvage};
use crate::chain::{Clock, Disk, Image, RestorePoint};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::signals::{self, Patience};
use crate::cli::table::{Align, table};
use crate::cli::units;
use crate::restore::{Format, Layer, Layers, Losses, Merge, MergeOptions, Merged, Output, OutputFormat};

pub(super) fn run(arguments: &args::Merge, console: &Console) -> Result<Exit, Failure> {
    let format = output_format(arguments)?;
    if arguments.streams() && !arguments.dry_run {
        if io::stdout().is_terminal() {
            return Err(Failure::Usage("the disk does not go to a terminal: send stdout to a file or a pipe"));
        }
        if may_be_closed(io::stdout()) {
            console.warning("the disk is lost: stdout is closed, or it is /dev/null");
        }
    }
    signals::watch(if arguments.streams() { Patience::Short } else { Patience::Two })?;
    let start = Instant::now();
    let filter = arguments.place.filter.as_deref();
    let not_opened = |failure, disk: &Disk| {
        let newest = disk.images().last().map_or(arguments.place.dir.as_path(), |image| &image.path);
        place::not_opened(failure, newest)
    };
    let (inventory, found) = place::with_current(&arguments.place.dir, |inventory| {
        refuse::part_of_backup(arguments, inventory)?;
        let disk = inventory.disk(filter)?;
        // a salvage fails for nothing that somebody changes
        let opened = (!arguments.salvage).then(|| open(arguments, disk)).transpose();
        opened.map_err(|failure| not_opened(failure, disk))
    })?;
    place::warn(&inventory, filter, console)?;
    let (point, layers) = if let Some(opened) = found? {
        opened
    } else {
        let disk = inventory.disk(filter)?;
        let opened = salvage::open(arguments, disk, console).map_err(Failure::of_salvage);
        opened.map_err(|failure| not_opened(failure, disk))?
    };
    if let Some(lineage) = point.doubted_by_next() {
        console.warning(&lineage.to_string());
    }
    if let Some(doubt) = point.doubt.as_ref().filter(|_| !arguments.salvage) {
        console.warning(&format!("{} may lack changes: {doubt}", point.name()));
    }
    let format = format.unwrap_or_else(|| default_format(&layers));
    let is_named_raw = arguments.out.extension().is_some_and(|end| end == "raw" || end == "img");
    if is_named_raw && arguments.format.is_none() && matches!(format, OutputFormat::Qcow2 { .. }) {
        console.info("NOTE: the output is a qcow2 image, whatever its name: --format raw makes a raw one");
    }
    if layers.has_raw_increments() {
        console.info(
            "NOTE: zeroes in raw INC images cannot be told from holes where a file was copied without them; what was \
             a hole shows the image before it",
        );
    }
    let reporter = Reporter::new(console, arguments.progress.progress_interval);
    reporter.follow(|| {
        let merge = Merge::plan(layers, options(arguments, format)?, &reporter)?;
        let planned = Planned { arguments, format, point: &point, merge: &merge };
        planned.event(console)?;
        if !arguments.skip_check && !arguments.salvage {
            merge.check(&reporter)?;
        }
        if arguments.dry_run {
            let losses = if arguments.salvage { merge.losses(&reporter)? } else { Losses::default() };
            salvage::tell(&losses, merge.summary().size, console)?;
            return planned.print(&losses, console);
        }
        for (image, layer) in planned.members() {
            console.debug(&format!("reading {} ({})", layer.path().display(), image.level));
        }
        let stays = arguments.streams() || by_hand::is_block_device(&arguments.out);
        let failed = if stays { Failure::Unfinished } else { Failure::Restore };
        if arguments.salvage {
            let (merged, losses) = merge.salvage(&reporter).map_err(failed)?;
            salvage::tell(&losses, merged.size, console)?;
            report(arguments, &point, merged, start, &salvage::summary(&losses), console);
        } else {
            let merged = merge.run(&reporter).map_err(failed)?;
            report(arguments, &point, merged, start, &[], console);
        }
        Ok(())
    })?;
    Ok(console.exit())
}

/// Finds the restore point and opens its images.
fn open(arguments: &args::Merge, disk: &Disk) -> Result<(RestorePoint, Layers), Failure> {
    let selected = disk.select(&arguments.until, &Clock::system(), arguments.allow_partial);
    let point = selected.map_err(place::not_selected)?;
    let layers = Layers::open_point(&point, arguments.source_format.map(Into::into), arguments.verify)?;
    Ok((point, layers))
}

/// The format that is asked for.
fn output_format(arguments: &args::Merge) -> Result<Option<OutputFormat>, Failure> {
    let explicit_qcow2 = arguments.format == Some(FormatName::Qcow2);
    let qcow2_options = arguments.compress.is_some() || arguments.cluster_size.is_some();
    if arguments.streams() && (explicit_qcow2 || qcow2_options) {
        return Err(Failure::Usage("stdout takes raw bytes only, a qcow2 image needs a file: say --out FILE"));
    }
    if arguments.streams() || arguments.format == Some(FormatName::Raw) {
        if qcow2_options {
            return Err(Failure::Usage("--compress and --cluster-size are for a qcow2 output: leave --format raw out"));
        }
        return Ok(Some(OutputFormat::Raw));
    }
    if !explicit_qcow2 && !qcow2_options {
        return Ok(None);
    }
    let compression = arguments.compress.map(Into::into);
    Ok(Some(OutputFormat::Qcow2 { cluster_size: arguments.cluster_size, compression }))
}

/// That of the images.
fn default_format(layers: &Layers) -> OutputFormat {
    let is_raw = layers.as_slice().iter().all(|layer| layer.format() == Format::Raw);
    if is_raw { OutputFormat::Raw } else { OutputFormat::Qcow2 { cluster_size: None, compression: None } }
}

fn options(arguments: &args::Merge, format: OutputFormat) -> Result<MergeOptions, Failure> {
    let output = if arguments.streams() {
        // without the buffer of the standard library, which looks for ends of lines
        Output::Stream(Box::new(stdout().map_err(|source| Failure::Print { source })?))
    } else {
        Output::File(arguments.out.clone())
    };
    Ok(MergeOptions {
        output,
        format,
        threads: arguments.threads,
        rate_limit: NonZeroU64::new(arguments.rate_limit),
        replace: arguments.force,
        read_back: arguments.verify,
        trust_streams: arguments.skip_check,
        detect_zeroes: arguments.detect_zeroes,
    })
}

/// Whether the program may have been started without a stdout: the standard library has opened `/dev/null` instead then, to
/// read and to write, as hardly anybody does who wants the output to be lost.
fn may_be_closed(stdout: impl AsFd) -> bool {
    /// Major and minor number of `/dev/null`.
    const NULL: (u32, u32) = (1, 3);
    let is_null = rustix::fs::fstat(&stdout).is_ok_and(|there| {
        let device = there.st_rdev;
        (rustix::fs::major(device), rustix::fs::minor(device)) == NULL
    });
    is_null && rustix::fs::fcntl_getfl(&stdout).is_ok_and(|flags| flags.contains(OFlags::RDWR))
}

pub(super) fn stdout() -> io::Result<File> {
    io::stdout().as_fd().try_clone_to_owned().map(File::from)
}

fn report(
    arguments: &args::Merge,
    point: &RestorePoint,
    merged: Merged,
    start: Instant,
    losses: &[(&str, Value)],
    console: &Console,
) {
    let Merged { size, bytes, length } = merged;
    let time = start.elapsed();
    let rate = units::rate(bytes, time);
    console.info(&format!(
        "{} of {} is in {}: a disk of {}, {} moved in {}, {}/s",
        point.name(),
        point.disk,
        if arguments.streams() { "stdout".into() } else { arguments.out.display().to_string() },
        units::size(size),
        units::size(bytes),
        units::duration(time),
        units::size(rate),
    ));
    let fields = [
        ("output", arguments.out.to_string_lossy().into()),
        ("size", size.into()),
        ("bytes", bytes.into()),
        ("length", length.into()),
        ("seconds", time.as_secs_f64().into()),
        ("rate", rate.into()),
    ];
    console.done(&[&fields, losses].concat());
}

/// A merge before it runs.
struct Planned<'a> {
    arguments: &'a args::Merge,
    format: OutputFormat,
    point: &'a RestorePoint,
    merge: &'a Merge,
}

impl Planned<'_> {
    fn event(&self, console: &Console) -> Result<(), Failure> {
        // with hundreds of images it takes long to put together
        if !console.is_json() {
            return Ok(());
        }
        let plan = self.merge.summary();
        let (format, cluster_size, compression) = self.output();
        console.event(
            "plan",
            &[
                ("disk", self.point.disk.clone().into()),
                ("restore_point", self.point.name().into()),
                ("time", self.point.time.into()),
                ("images", self.members().map(|(image, layer)| image_json(image, layer)).collect()),
                (
                    "output",
                    json!({
                        "path": self.arguments.out.to_string_lossy(),
                        "format": format,
                        "cluster_size": cluster_size,
                        "compression": compression,
                        "length": self.merge.length()?,
                    }),
                ),
                ("size", plan.size.into()),
                ("bytes", plan.bytes.into()),
                ("dry_run", self.arguments.dry_run.into()),
                ("commands", self.commands().into()),
            ],
        );
        Ok(())
    }

    fn print(&self, losses: &Losses, console: &Console) -> Result<(), Failure> {
        if console.is_json() {
            let summary = salvage::summary(losses);
            console.done(if self.arguments.salvage { &summary } else { &[] });
            return Ok(());
        }
        let plan = self.merge.summary();
        let mut lines = vec![
            format!("disk           {}", self.point.disk),
            format!("restore point  {}, {}", self.point.name(), place::local_time(self.point.time)),
            "images".to_owned(),
        ];
        let columns = [
            ("TIME", Align::Left),
            ("LEVEL", Align::Left),
            ("FORMAT", Align::Left),
            ("DISK", Align::Right),
            ("FILE", Align::Right),
            ("PATH", Align::Left),
        ];
        let rows: Vec<Vec<String>> = self
            .members()
            .map(|(image, layer)| {
                vec![
                    place::local_time(image.time),
                    image.level.to_string(),
                    format_name(layer).to_owned(),
                    units::size(layer.image().map_or_else(|| layer.data().length(), crate::qcow2::Image::size)),
                    units::size(layer.data().length()),
                    layer.path().display().to_string(),
                ]
            })
            .collect();
        lines.extend(table("  ", &columns, &rows));
        let (format, cluster_size, compression) = self.output();
        let details = cluster_size.map(|size| format!(", clusters of {}", units::size(size))).unwrap_or_default();
        let compressed = compression.as_ref().map(|codec| format!(", compressed with {codec}")).unwrap_or_default();
        let at_most = if compression.is_some() { "at most " } else { "" };
        let length = self.merge.length()?;
        lines.push(format!("output         {}", self.arguments.out.display()));
        lines.push(format!("format         {format}{details}{compressed}"));
        lines.push(format!("disk size      {} ({} bytes)", units::size(plan.size), plan.size));
        lines.push(format!("length         {at_most}{} ({length} bytes)", units::size(length)));
        lines.push(format!("data to move   {} ({} bytes)", units::size(plan.bytes), plan.bytes));
        let commands = self.commands();
        lines.push(if self.arguments.salvage {
            "qemu-img cannot read what is damaged".to_owned()
        } else if commands.is_empty() {
            "qemu-img cannot merge raw INC images".to_owned()
        } else {
            "the same by hand".to_owned()
        });
        lines.extend(commands.into_iter().map(|command| format!("  {command}")));
        console.result(&lines)
    }

    fn members(&self) -> impl Iterator<Item = (&Image, &Layer)> {
        // both are in the same order
        let mut members = self.point.members.iter();
        let layers = self.merge.layers().as_slice().iter().filter(|layer| !layer.is_absent());
        layers.filter_map(move |layer| {
            let image = members.find(|image| image.path == layer.path())?;
            Some((image.as_ref(), layer))
        })
    }

    /// Format, cluster size and codec of the output.
    fn output(&self) -> (&'static str, Option<u64>, Option<String>) {
        match self.format {
            OutputFormat::Raw => ("raw", None, None),
            OutputFormat::Qcow2 { compression, .. } => {
                ("qcow2", Some(self.merge.cluster_size()), compression.map(|codec| codec.to_string()))
            }
        }
    }

    fn commands(&self) -> Vec<String> {
        if self.arguments.salvage {
            return Vec::new();
        }
        let layers = self.merge.layers().as_slice();
        let by_hand = ByHand {
            members: layers.iter().map(|layer| (layer.path(), layer.format())).collect(),
            output: (!self.arguments.streams()).then_some(self.arguments.out.as_path()),
            format: self.format,
            cluster_size: self.merge.cluster_size(),
        };
        by_hand.commands()
    }
}

fn format_name(layer: &Layer) -> &'static str {
    if layer.image().is_some() { "qcow2" } else { "raw" }
}

fn image_json(image: &Image, layer: &Layer) -> Value {
    let length = layer.data().length();
    json!({
        "path": layer.path().to_string_lossy(),
        "level": image.level.as_str(),
        "time": image.time,
        "format": format_name(layer),
        "size": layer.image().map_or(length, crate::qcow2::Image::size),
        "cluster_size": layer.image().map(|image| image.header().geometry.cluster_size()),
        "file_length": length,
    })
}
