//! `qmprestore verify`.

use std::fmt::Write;
use std::time::Instant;

use serde_json::{Value, json};

use super::args;
use super::list::without_path;
use super::place;
use super::progress::Reporter;
use crate::chain::{Clock, Disk, Note, RestorePoint, discover};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::signals::{self, Patience};
use crate::cli::units;
use crate::errors;
use crate::errors::ErrorKind;
use crate::qcow2::ImageRegion;
use crate::restore::{Due, Flaw, FlawSeverity, Flawed, Verified, VerifiedImage, VerifyOptions, VerifyTarget, verify};

/// Restore points that a line names before it only counts the rest.
const LISTED: usize = 3;

pub(super) fn run(arguments: &args::Verify, console: &Console) -> Result<Exit, Failure> {
    signals::watch(Patience::Two)?;
    let (dir, filter) = (&arguments.place.dir, arguments.place.filter.as_deref());
    let inventory = discover(dir)?;
    // what is wrong with manifests is found again, and told in more detail
    let notes = inventory.notes_of(filter)?;
    let notes = notes.into_iter().filter(|note| !matches!(note, Note::Manifest { .. }));
    notes.for_each(|note| console.warning(&note.to_string()));
    let disks = match arguments.until {
        None => inventory.matching(filter)?,
        Some(_) => vec![inventory.disk(filter)?],
    };
    let point =
        |disk: &&Disk| arguments.until.as_ref().map(|when| disk.select(when, &Clock::system(), true)).transpose();
    let points: Result<Vec<Option<RestorePoint>>, _> = disks.iter().map(point).collect();
    let points = points.map_err(place::not_selected)?;
    let targets = disks.iter().zip(&points);
    let targets = targets
        .map(|(disk, point)| point.as_ref().map_or(VerifyTarget::Disk(disk), |point| VerifyTarget::Point(disk, point)));
    let targets: Vec<VerifyTarget<'_>> = targets.collect();

    let due = (arguments.sample.is_some() || arguments.max_age.is_some()).then(|| Due {
        sample: arguments.sample,
        max_age: arguments.max_age,
        now: Clock::system().now.as_second(),
    });
    let options = VerifyOptions { threads: arguments.threads, due };
    let reporter = Reporter::new(console, arguments.progress.progress_interval);
    let start = Instant::now();
    let verified = reporter.follow(|| verify(&targets, &options, &reporter))?;
    if console.is_json() {
        verified.flaws.iter().for_each(|flawed| console.event("finding", &fields(flawed)));
        verified.images.iter().for_each(|image| console.event("verified", &image_fields(image)));
    } else {
        console.result(&verified.flaws.iter().map(line).collect::<Vec<_>>())?;
    }
    Ok(finish(&verified, options.due.is_some(), start, console))
}

/// Says how it ended; `may_be_none` where it may be that no image is due.
fn finish(verified: &Verified, may_be_none: bool, start: Instant, console: &Console) -> Exit {
    if verified.images.is_empty() && verified.flaws.is_empty() && !may_be_none {
        console.warning("there is no image to verify: the first backup has not ended yet, or has failed");
    }
    let warned = if console.has_warned() { Exit::Warnings } else { Exit::Success };
    let exit = verified.flaws.iter().map(|flawed| exit(&flawed.flaw)).fold(warned, Exit::worse);
    let time = start.elapsed();
    let images = verified.images.len();
    let compared = verified.images.iter().map(|image| image.compared).sum();
    let total = verified.images.iter().map(|image| image.length).sum();
    let rate = units::rate(compared, time);
    let told = verified.flaws.iter().filter(|flawed| flawed.flaw.severity() > FlawSeverity::Note).count();
    let damage = verified.worst() == Some(FlawSeverity::Damage);
    let result = match (told, damage) {
        (0, _) => "all that was checked is right".to_owned(),
        (told, false) => {
            format!("nothing is damaged, but not all could be checked: {}", units::count(told, "finding"))
        }
        (told, true) => format!("DAMAGED: {}", units::count(told, "finding")),
    };
    console.info(&format!(
        "{}, {} of {} compared with checksums in {}, {}/s: {result}",
        units::count(images, "image"),
        units::size(compared),
        units::size(total),
        units::duration(time),
        units::size(rate),
    ));
    let fields = [
        ("images", images.into()),
        ("findings", verified.flaws.len().into()),
        ("bytes", compared.into()),
        ("total", total.into()),
        ("seconds", time.as_secs_f64().into()),
        ("rate", rate.into()),
    ];
    console.done_with(exit, &fields)
}

fn exit(flaw: &Flaw) -> Exit {
    match (flaw.severity(), flaw) {
        (FlawSeverity::Note, _) => Exit::Success,
        (FlawSeverity::InPart, _) => Exit::Warnings,
        (FlawSeverity::Failed, Flaw::Unreadable(error)) if error.kind() == ErrorKind::Locked => Exit::Locked,
        (FlawSeverity::Failed, _) => Exit::Error,
        (FlawSeverity::Damage, _) => Exit::Damaged,
    }
}

fn line(flawed: &Flawed) -> String {
    let Flawed { disk, path, flaw, points } = flawed;
    let word = match flaw.severity() {
        FlawSeverity::Note => "note: ",
        FlawSeverity::InPart => "in part: ",
        FlawSeverity::Failed => "FAILED: ",
        FlawSeverity::Damage => "DAMAGED: ",
    };
    let text = errors::line(flaw);
    let mut line = match flaw {
        Flaw::Chain(_) | Flaw::Doubtful(_) => format!("{disk}: {word}{text}"),
        // their texts begin with the path
        Flaw::Manifest(_) | Flaw::Checksums(_) => format!("{word}{text}"),
        _ => format!("{}: {word}{}", path.display(), without_path(&text, path)),
    };
    if !points.is_empty() {
        let names: Vec<String> = points.iter().take(LISTED).map(|image| image.display_name()).collect();
        let _ = write!(line, "; restore points that suffer: {}", names.join(", "));
        if points.len() > LISTED {
            let _ = write!(line, " and {} more", points.len() - LISTED);
        }
    }
    line
}

fn severity(severity: FlawSeverity) -> &'static str {
    match severity {
        FlawSeverity::Note => "note",
        FlawSeverity::InPart => "in part",
        FlawSeverity::Failed => "failed",
        FlawSeverity::Damage => "damage",
    }
}

fn fields(flawed: &Flawed) -> Vec<(&'static str, Value)> {
    let Flawed { disk, path, flaw, points } = flawed;
    let (mut file, mut guest, mut parts) = (Value::Null, Value::Null, Value::Null);
    if let Flaw::Unsettled(range) | Flaw::Blocks { file: range, .. } = flaw {
        file = json!({ "start": range.start, "end": range.end });
    }
    if let Flaw::Blocks { guest: ranges, parts: names, .. } = flaw {
        let range = |range: &std::ops::Range<u64>| json!({ "start": range.start, "end": range.end });
        guest = ranges.as_ref().map(|ranges| ranges.iter().map(range).collect::<Vec<_>>()).into();
        parts = names.iter().copied().map(part).collect();
    }
    vec![
        ("disk", disk.as_str().into()),
        ("path", path.to_string_lossy().into()),
        ("kind", flaw.kind().into()),
        ("severity", severity(flaw.severity()).into()),
        ("message", errors::line(flaw).into()),
        ("file", file),
        ("guest", guest),
        ("parts", parts),
        ("points", points.iter().map(|image| image.path.to_string_lossy().into_owned()).collect()),
    ]
}

fn part(part: ImageRegion) -> &'static str {
    match part {
        ImageRegion::Header => "header",
        ImageRegion::L1Table => "l1 table",
        ImageRegion::L2Table => "l2 table",
        ImageRegion::Data => "data",
        ImageRegion::Compressed => "compressed",
    }
}

fn image_fields(image: &VerifiedImage) -> Vec<(&'static str, Value)> {
    vec![
        ("disk", image.disk.as_str().into()),
        ("path", image.image.path.to_string_lossy().into()),
        ("verdict", image.worst.map_or("right", severity).into()),
        ("file_length", image.length.into()),
        ("bytes", image.compared.into()),
        ("structure", image.structure.into()),
    ]
}
