//! `qmprestore commit` and `qmprestore snapshotrebase`: restore points go into the FULL.

use std::num::NonZeroU64;
use std::time::Instant;

use super::progress::Reporter;
use super::{args, by_hand, place};
use crate::chain::{self, Clock, Inventory, RestorePoint, Work, discover};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::signals::{self, Patience};
use crate::cli::table::{Align, table};
use crate::cli::text::file_name;
use crate::cli::units;
use crate::restore::{self, Commit, CommitOptions, CommitSummary};

pub(super) fn command(arguments: &args::Commit, work: Work, console: &Console) -> Result<Exit, Failure> {
    run(arguments, work, console, print)
}

/// Commits, or shows what would be done.
pub(in crate::cli) fn run(
    arguments: &args::Commit,
    work: Work,
    console: &Console,
    show: impl FnOnce(&RestorePoint, &CommitSummary, Vec<String>, &Console) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    signals::watch(Patience::Two)?;
    let start = Instant::now();
    let clock = Clock::system();
    let inventory = discover(&arguments.place.dir)?;
    place::warn(&inventory, arguments.place.filter.as_deref(), console)?;
    let point = select(&inventory, arguments, &clock)?;
    if let Some(doubt) = &point.doubt {
        console.warning(&format!("{} may lack changes: {doubt}", point.name()));
    }
    let reporter = Reporter::new(console, arguments.progress.progress_interval);
    let options = CommitOptions {
        work,
        threads: arguments.threads,
        rate_limit: NonZeroU64::new(arguments.rate_limit),
        dry_run: arguments.dry_run,
    };
    reporter.follow(|| {
        let again = || {
            let now = discover(&arguments.place.dir)?;
            let filter = arguments.place.filter.as_deref();
            let known = inventory.notes_of(filter)?;
            let new = now.notes_of(filter)?.into_iter().filter(|note| !known.contains(note));
            new.for_each(|note| console.warning(&note.to_string()));
            select(&now, arguments, &clock)
        };
        let mut commit = Commit::plan(&point, again, options, &reporter).map_err(Failure::Refused)?;
        let summary = commit.summary().clone();
        let commands = by_hand::commit(&summary, &point, &arguments.place);
        plan(arguments, &point, &summary, &commands, console);
        let checked = if arguments.skip_check { commit.check_full(&reporter) } else { commit.check(&reporter) };
        checked.map_err(Failure::Refused)?;
        if arguments.dry_run {
            return show(&point, &summary, commands, console);
        }
        commit.run(&reporter).map_err(|error| unfinished(error, &summary))?;
        report(&summary, &point, start, console);
        Ok(())
    })?;
    Ok(console.exit())
}

/// The restore point that the FULL is to hold.
fn select(inventory: &Inventory, arguments: &args::Commit, clock: &Clock) -> Result<RestorePoint, chain::Error> {
    let disk = inventory.disk_by_whole_name(arguments.place.filter.as_deref())?;
    disk.select_in_place(&arguments.until, clock, arguments.allow_partial)
}

/// What has to be said when work in place stops: whether it must be done again.
fn unfinished(error: restore::Error, summary: &CommitSummary) -> Failure {
    let is_gone = |path: &std::path::PathBuf| matches!(path.try_exists(), Ok(false));
    match chain::Unfinished::read(&summary.full) {
        // the last that was to do is to forget that there was something to do
        Ok(None) if summary.incs.iter().chain(&summary.rest).all(is_gone) => Failure::Undurable(error),
        Ok(None) => Failure::Refused(error),
        Ok(Some(_)) | Err(_) => Failure::InPlace(error),
    }
}

fn plan(
    arguments: &args::Commit,
    point: &RestorePoint,
    summary: &CommitSummary,
    commands: &[String],
    console: &Console,
) {
    let paths = |paths: &[std::path::PathBuf]| paths.iter().map(|path| path.to_string_lossy()).collect();
    let snapshots = summary.full_snapshot.iter().chain(summary.snapshots.iter().flatten()).map(String::as_str);
    console.event(
        "plan",
        &[
            ("disk", point.disk.clone().into()),
            ("restore_point", point.name().into()),
            ("time", point.time.into()),
            ("full", summary.full.to_string_lossy().into()),
            ("incs", paths(&summary.incs)),
            ("rest", paths(&summary.rest)),
            ("snapshots", snapshots.collect()),
            ("size", summary.size.into()),
            ("bytes", summary.bytes.into()),
            ("growth", summary.growth.into()),
            ("dry_run", arguments.dry_run.into()),
            ("commands", commands.into()),
        ],
    );
}

fn print(
    point: &RestorePoint,
    summary: &CommitSummary,
    commands: Vec<String>,
    console: &Console,
) -> Result<(), Failure> {
    if console.is_json() {
        console.done(&[]);
        return Ok(());
    }
    let mut lines = vec![
        format!("disk           {}", point.disk),
        format!("restore point  {}, {}", point.name(), place::local_time(point.time)),
        format!("written to     {}", summary.full.display()),
    ];
    let rows: Vec<Vec<String>> = summary
        .rest
        .iter()
        .map(|path| (path, "removed"))
        .chain(summary.incs.iter().map(|path| (path, "written, then removed")))
        .map(|(path, what)| vec![file_name(path), what.to_owned()])
        .collect();
    lines.extend(table("  ", &[("IMAGE", Align::Left), ("WHAT", Align::Left)], &rows));
    lines.push(format!("disk size      {} ({} bytes)", units::size(summary.size), summary.size));
    lines.push(format!("data to write  {} ({} bytes)", units::size(summary.bytes), summary.bytes));
    lines.push(format!("FULL grows by  at most {} ({} bytes)", units::size(summary.growth), summary.growth));
    lines.push("the same by hand".to_owned());
    lines.extend(commands.into_iter().map(|command| format!("  {command}")));
    console.result(&lines)
}

fn report(summary: &CommitSummary, point: &RestorePoint, start: Instant, console: &Console) {
    let time = start.elapsed();
    let rate = units::rate(summary.bytes, time);
    console.info(&format!(
        "{} of {} is in {}: a disk of {}, {} moved in {}, {}/s",
        point.name(),
        point.disk,
        summary.full.display(),
        units::size(summary.size),
        units::size(summary.bytes),
        units::duration(time),
        units::size(rate),
    ));
    console.done(&[
        ("output", summary.full.to_string_lossy().into()),
        ("size", summary.size.into()),
        ("bytes", summary.bytes.into()),
        ("seconds", time.as_secs_f64().into()),
        ("rate", rate.into()),
    ]);
}
