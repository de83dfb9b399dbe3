//! `qmprestore check`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::list::without_path;
use super::progress::Reporter;
use super::{args, place};
use crate::chain::{Chain, FormatHint, Image, discover};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::signals::{self, Patience};
use crate::cli::units;
use crate::errors;
use crate::errors::ErrorKind;
use crate::qcow2::{Features, Header, Report, Severity};
use crate::restore::{self, Checked, CheckedImage, Source};

pub(super) fn run(arguments: &args::Check, console: &Console) -> Result<Exit, Failure> {
    signals::watch(Patience::Two)?;
    let (chains, missing) = chains(arguments, console)?;
    let reporter = Reporter::new(console, arguments.progress.progress_interval);
    let results = reporter.follow(|| restore::check(&chains, arguments.repair.map(Into::into), &reporter))?;
    let mut verdicts = vec![if console.has_warned() { Verdict::Leaks } else { Verdict::Clean }];
    for (source, result) in chains.iter().flatten().zip(results) {
        let verdict = match &result {
            // the chain lacks it
            Err(_) if missing.contains(&source.path) => Verdict::Unreadable(Exit::Damaged),
            result => Verdict::of(result),
        };
        if console.is_json() {
            event(console, &source.path, verdict, &result);
        } else {
            console.result(&lines(&source.path, verdict, &result))?;
        }
        verdicts.push(verdict);
    }
    let exit = verdicts.into_iter().map(Verdict::exit).fold(Exit::Success, Exit::worse);
    Ok(console.done_with(exit, &[]))
}

/// What is to be checked, and those of them of which only the manifest is there. Images that are named belong to no chain.
fn chains(arguments: &args::Check, console: &Console) -> Result<(Vec<Vec<Source>>, BTreeSet<PathBuf>), Failure> {
    let Some(dir) = &arguments.dir else {
        let alone = |path: &PathBuf| vec![Source { format: FormatHint::Qcow2, ..Source::new(path.clone()) }];
        return Ok((arguments.images.iter().map(alone).collect(), BTreeSet::new()));
    };
    let inventory = discover(dir)?;
    place::warn(&inventory, arguments.filter.as_deref(), console)?;
    let disks = inventory.matching(arguments.filter.as_deref())?;
    let chains = disks.iter().flat_map(|disk| disk.chains());
    let images = chains.map(Chain::images);
    let source = |image: &Arc<Image>| {
        let leads_away = arguments.repair.is_some() && image.path.is_symlink();
        if leads_away {
            let path = image.path.display();
            console.warning(&format!("{path} is left out, it is a link: name what it leads to, to repair that"));
        }
        (!leads_away).then(|| Source::from(&**image))
    };
    let missing = images.clone().flatten().filter(|image| image.missing).map(|image| image.path.clone()).collect();
    Ok((images.map(|images| images.filter_map(source).collect()).collect(), missing))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Clean,
    Raw,
    Leaks,
    Dirty,
    MarkedCorrupt,
    Damaged,
    /// Somebody writes to it.
    InUse,
    /// With the exit code.
    Unreadable(Exit),
}

impl Verdict {
    fn of(result: &restore::Result<Checked>) -> Self {
        match result {
            Err(error) => match error.kind() {
                ErrorKind::Locked => Self::InUse,
                ErrorKind::Damaged => Self::Unreadable(Exit::Damaged),
                ErrorKind::Full => Self::Unreadable(Exit::Full),
                _ => Self::Unreadable(Exit::Error),
            },
            Ok(Checked::Qcow2(image)) => Self::of_report(&image.report),
            Ok(_) => Self::Raw,
        }
    }

    fn of_report(report: &Report) -> Self {
        if report.is_corrupt() {
            Self::Damaged
        } else if report.marked_corrupt {
            Self::MarkedCorrupt
        } else if report.refcount_errors > 0 || report.dirty {
            Self::Dirty
        } else if report.has_leaks() {
            Self::Leaks
        } else {
            Self::Clean
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Raw => "raw",
            Self::Leaks => "leaks",
            Self::Dirty => "dirty",
            Self::MarkedCorrupt => "marked corrupt",
            Self::Damaged => "damaged",
            Self::InUse => "in use",
            Self::Unreadable(_) => "unreadable",
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Raw => "raw, there is nothing to check",
            Self::Leaks => "good, but space is lost",
            Self::Dirty => "good, but it was not closed: its refcounts may be stale",
            Self::MarkedCorrupt => "marked as corrupt by some program, but nothing was found now",
            Self::Damaged => "DAMAGED",
            Self::InUse => "NOT CHECKED",
            Self::Unreadable(_) => "UNREADABLE",
        }
    }

    fn exit(self) -> Exit {
        match self {
            Self::Clean | Self::Raw => Exit::Success,
            Self::Leaks | Self::Dirty | Self::MarkedCorrupt => Exit::Warnings,
            Self::Damaged => Exit::Damaged,
            Self::InUse => Exit::Locked,
            Self::Unreadable(exit) => exit,
        }
    }
}

fn lines(path: &Path, verdict: Verdict, result: &restore::Result<Checked>) -> Vec<String> {
    let path = path.display().to_string();
    let first = format!("{path}: {}", verdict.meaning());
    let image = match result {
        Err(error) => {
            return vec![format!("{first}: {}", without_path(&errors::line(error), Path::new(&path)))];
        }
        Ok(Checked::Qcow2(image)) => image,
        Ok(_) => return vec![first],
    };
    let CheckedImage { header, report, before, snapshots, bitmaps, length } = image.as_ref();
    let mut lines = vec![
        first,
        format!(
            "  qcow2 version {}, disk of {} ({} bytes), file of {}, clusters of {}, {}",
            header.version,
            units::size(header.size),
            header.size,
            units::size(*length),
            units::size(header.geometry.cluster_size()),
            header.codec,
        ),
    ];
    let features = features(header);
    let clusters = report.clusters;
    let percent = |part| units::percent(part, clusters.allocated);
    lines.push(format!(
        "  {} of {} clusters allocated, {} of them compressed, {} fragmented",
        clusters.allocated,
        clusters.total,
        percent(clusters.compressed),
        percent(clusters.fragmented)
    ));
    let names = |what: &str, names: Vec<&str>| (!names.is_empty()).then(|| format!("  {what}: {}", names.join(", ")));
    lines.extend(names("features", features));
    lines.extend(names("backing file", header.backing.iter().map(|backing| backing.name.as_str()).collect()));
    lines.extend(names("snapshots", snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect()));
    lines.extend(names("bitmaps", bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect()));
    let numbers = |report: &Report| {
        let Report { structure_errors, refcount_errors, leaks, .. } = report;
        format!("errors in tables: {structure_errors}, wrong refcounts: {refcount_errors}, leaked clusters: {leaks}")
    };
    match before {
        Some(before) if before != report => lines.push(format!("  before the repair: {}", numbers(before))),
        Some(_) if verdict != Verdict::Clean => lines.push("  nothing was repaired".to_owned()),
        _ => {}
    }
    if report.corruptions() + report.leaks > 0 {
        lines.push(format!("  {}", numbers(report)));
    }
    lines.extend(report.findings.iter().map(|finding| format!("  - {finding}")));
    if report.findings_dropped() > 0 {
        lines.push(format!("  - and {} more", report.findings_dropped()));
    }
    lines
}

/// The features that an image has, by the names of the format.
fn features(header: &Header) -> Vec<&'static str> {
    let Features { incompatible, compatible, autoclear } = header.features;
    [
        (incompatible, Features::DIRTY, "dirty"),
        (incompatible, Features::CORRUPT, "corrupt"),
        (incompatible, Features::DATA_FILE, "external data file"),
        (incompatible, Features::COMPRESSION_TYPE, "compression type"),
        (incompatible, Features::EXTENDED_L2, "extended L2 entries"),
        (compatible, Features::LAZY_REFCOUNTS, "lazy refcounts"),
        (autoclear, Features::BITMAPS, "bitmaps"),
        (autoclear, Features::DATA_FILE_RAW, "raw external data"),
    ]
    .into_iter()
    .filter(|(bits, bit, _)| bits & bit != 0)
    .map(|(_, _, name)| name)
    .collect()
}

fn event(console: &Console, path: &Path, verdict: Verdict, result: &restore::Result<Checked>) {
    let mut fields = vec![("path", path.to_string_lossy().into()), ("verdict", verdict.name().into())];
    match result {
        Err(error) => fields.push(("reason", errors::line(error).into())),
        Ok(Checked::Raw { length }) => fields.push(("file_length", (*length).into())),
        Ok(Checked::Qcow2(image)) => fields.extend(image_fields(image)),
    }
    console.event("check", &fields);
}

fn image_fields(image: &CheckedImage) -> Vec<(&'static str, Value)> {
    let CheckedImage { header, report, before, snapshots, bitmaps, length } = image;
    let severity = |severity| match severity {
        Severity::Leak => "leak",
        Severity::Refcount => "refcount",
        Severity::Structure => "structure",
    };
    let findings = report
        .findings
        .iter()
        .map(|finding| json!({ "severity": severity(finding.severity()), "message": finding.to_string() }));
    let clusters = report.clusters;
    let before = before.as_ref().map(|before| {
        json!({
            "verdict": Verdict::of_report(before).name(),
            "leaks": before.leaks,
            "refcount_errors": before.refcount_errors,
            "structure_errors": before.structure_errors,
        })
    });
    vec![
        ("before", before.into()),
        ("file_length", (*length).into()),
        ("version", header.version.into()),
        ("size", header.size.into()),
        ("cluster_size", header.geometry.cluster_size().into()),
        ("compression", header.codec.to_string().into()),
        ("snapshots", snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect()),
        ("bitmaps", bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect()),
        ("features", features(header).into()),
        ("backing", header.backing.as_ref().map(|backing| backing.name.as_str()).into()),
        (
            "clusters",
            json!({
                "total": clusters.total,
                "allocated": clusters.allocated,
                "compressed": clusters.compressed,
                "fragmented": clusters.fragmented,
            }),
        ),
        ("leaks", report.leaks.into()),
        ("refcount_errors", report.refcount_errors.into()),
        ("structure_errors", report.structure_errors.into()),
        ("findings", findings.collect()),
        ("findings_dropped", report.findings_dropped().into()),
    ]
}
