//! `qmprestore list`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{args, place};
use crate::chain::{Chain, Disk, Image, Point, State, discover};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::table::{Align, table};
use crate::cli::units;
use crate::errors;
use crate::errors::ErrorKind;
use crate::restore::{self, Facts, Source};

pub(super) fn run(arguments: &args::List, console: &Console) -> Result<Exit, Failure> {
    let inventory = discover(&arguments.place.dir)?;
    place::warn(&inventory, arguments.place.filter.as_deref(), console)?;
    let mut all_ok = true;
    for (number, disk) in inventory.matching(arguments.place.filter.as_deref())?.into_iter().enumerate() {
        let listing = Listing::new(disk);
        all_ok &= listing.rows.iter().all(|row| row.verdict == Verdict::Ok);
        if console.is_json() {
            listing.events(console);
        } else {
            if number > 0 {
                console.result(&[String::new()])?;
            }
            console.result(&listing.lines())?;
        }
    }
    let exit = if all_ok && !console.has_warned() { Exit::Success } else { Exit::Warnings };
    Ok(console.done_with(exit, &[]))
}

/// Whether a restore point can be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Ok,
    Doubtful(String),
    /// Said of an image of its chain.
    MarkedCorrupt(String),
    Broken(String),
}

impl Verdict {
    fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Doubtful(_) => "doubtful",
            Self::MarkedCorrupt(_) => "marked corrupt",
            Self::Broken(_) => "broken",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Ok => None,
            Self::Doubtful(reason) | Self::MarkedCorrupt(reason) | Self::Broken(reason) => Some(reason),
        }
    }

    /// The state in one cell.
    fn text(&self) -> String {
        self.reason().map_or_else(|| self.name().to_owned(), |reason| format!("{}: {reason}", self.name()))
    }
}

struct Row {
    image: Arc<Image>,
    /// The number of the chain, from 1 on.
    chain: usize,
    facts: Option<Facts>,
    verdict: Verdict,
}

struct Listing<'a> {
    disk: &'a Disk,
    rows: Vec<Row>,
}

impl<'a> Listing<'a> {
    fn new(disk: &'a Disk) -> Self {
        let points: BTreeMap<&Path, &Point> =
            disk.points().iter().map(|point| (point.image().path.as_path(), point)).collect();
        let rows = disk.chains().iter().zip(1..).flat_map(|(chain, number)| rows(chain, number, &points));
        Self { disk, rows: rows.collect() }
    }

    fn lines(&self) -> Vec<String> {
        let columns = [
            ("CHAIN", Align::Right),
            ("TIME", Align::Left),
            ("LEVEL", Align::Left),
            ("DISK", Align::Right),
            ("ALLOCATED", Align::Right),
            ("FILE", Align::Right),
            ("NAME", Align::Left),
            ("STATE", Align::Left),
        ];
        let cell = |row: &Row, fact: fn(&Facts) -> u64| {
            row.facts.as_ref().map_or_else(|| "?".to_owned(), |facts| units::size(fact(facts)))
        };
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                vec![
                    row.chain.to_string(),
                    place::local_time(row.image.time),
                    row.image.level.to_string(),
                    cell(row, |facts| facts.size),
                    cell(row, |facts| facts.allocated),
                    cell(row, |facts| facts.file_length),
                    row.image.display_name(),
                    row.verdict.text(),
                ]
            })
            .collect();
        let file = self.disk.name().map(|name| format!(" ({})", name.to_string_lossy())).unwrap_or_default();
        let mut lines = vec![format!("{}{file}", self.disk.label())];
        if rows.is_empty() {
            lines.push("  no restore point".to_owned());
        } else {
            lines.extend(table("  ", &columns, &rows));
        }
        for partial in self.disk.partials() {
            lines.push(format!("  {}: left by a run that failed or goes on, never read", partial.display_name()));
        }
        lines
    }

    fn events(&self, console: &Console) {
        for row in &self.rows {
            let facts = row.facts.as_ref();
            console.event(
                "restore_point",
                &[
                    ("disk", self.disk.label().into()),
                    ("chain", row.chain.into()),
                    ("name", row.image.display_name().into()),
                    ("path", row.image.path.to_string_lossy().into()),
                    ("level", row.image.level.as_str().into()),
                    ("time", row.image.time.into()),
                    ("rfc3339", place::rfc3339(row.image.time).into()),
                    ("size", facts.map(|facts| facts.size).into()),
                    ("allocated", facts.map(|facts| facts.allocated).into()),
                    ("file_length", facts.map(|facts| facts.file_length).into()),
                    ("file_usage", facts.map(|facts| facts.file_usage).into()),
                    ("state", row.verdict.name().into()),
                    ("reason", row.verdict.reason().into()),
                ],
            );
        }
        for partial in self.disk.partials() {
            let fields =
                [("disk", self.disk.label().into()), ("path", partial.path.to_string_lossy().into_owned().into())];
            console.event("partial", &fields);
        }
    }
}

/// The restore points of a chain: what is wrong with an image is wrong with all that build on it.
fn rows(chain: &Chain, number: usize, points: &BTreeMap<&Path, &Point>) -> Vec<Row> {
    let images: Vec<&Arc<Image>> = chain.images().collect();
    let sources: Vec<Source> = images.iter().map(|image| Source::from(&***image)).collect();
    let mut below = Verdict::Ok;
    images
        .into_iter()
        .zip(restore::survey(&sources))
        .map(|(image, facts)| {
            let by_name = points.get(image.path.as_path()).map_or(Verdict::Ok, |point| by_name(point.state()));
            let is_damaged = facts.as_ref().err().is_some_and(|error| error.kind() == ErrorKind::Damaged);
            let (facts, own) = match facts {
                Ok(facts) if facts.marked_corrupt => {
                    (Some(facts), Verdict::MarkedCorrupt("some program found damage in it".to_owned()))
                }
                Ok(facts) => (Some(facts), Verdict::Ok),
                Err(error) => (None, Verdict::Broken(without_path(&errors::line(&error), &image.path))),
            };
            let verdict = worse(worse(by_name, own.clone()), below.clone());
            let name = image.display_name();
            below = match own {
                Verdict::Broken(_) => {
                    let what = if is_damaged { "is damaged" } else { "cannot be read" };
                    worse(below.clone(), Verdict::Broken(format!("needs {name}, which {what}")))
                }
                Verdict::MarkedCorrupt(_) => {
                    worse(below.clone(), Verdict::MarkedCorrupt(format!("{name} in its chain is")))
                }
                Verdict::Ok | Verdict::Doubtful(_) => below.clone(),
            };
            Row { image: Arc::clone(image), chain: number, facts, verdict }
        })
        .collect()
}

fn by_name(state: &State) -> Verdict {
    match state {
        State::Sound => Verdict::Ok,
        State::Doubtful(doubt) => Verdict::Doubtful(doubt.to_string()),
        State::Broken(fault) => Verdict::Broken(fault.to_string()),
    }
}

/// The worse of two; the first of equals.
fn worse(one: Verdict, other: Verdict) -> Verdict {
    let badness = |verdict: &Verdict| match verdict {
        Verdict::Ok => 0,
        Verdict::Doubtful(_) => 1,
        Verdict::MarkedCorrupt(_) => 2,
        Verdict::Broken(_) => 3,
    };
    if badness(&other) > badness(&one) { other } else { one }
}

/// The message without the path that the row shows already.
pub(super) fn without_path(message: &str, path: &Path) -> String {
    let path = path.display().to_string();
    message.strip_prefix(&path).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(message).to_owned()
}
