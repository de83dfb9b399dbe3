//! From what was found in an image to flaws, and how far each of them reaches.

use std::ops::Range;
use std::sync::Arc;

use super::flaw::{Flaw, FlawSeverity};
use super::look::{Looked, Subject};
use super::read::{Bad, Found};
use crate::chain::{self, BLOCK};
use crate::qcow2::{Image, ImageRegion, Located, locate};
use crate::restore::error::Error;
use crate::restore::layer::Format;
use crate::restore::source;
use crate::storage::{FileStorage, Storage};

/// Ranges of bad blocks that are told of an image; the others are counted.
const TOLD: usize = 100;

/// What is wrong with an image.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) flaws: Vec<(Flaw, Reach)>,
    /// The blocks that are bad, in order.
    pub(super) bad: Vec<Range<u64>>,
    /// Whether it does not say reliably which parts of the disk it holds.
    pub(super) untrusted: bool,
    pub(super) compared: u64,
    pub(super) structure: bool,
}

/// Which part of the disk a flaw spoils, in this restore point and in those after it that still show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reach {
    Nothing,
    /// All of it, or nobody knows: no later image heals that.
    All,
    Guest(Vec<Range<u64>>),
}

impl Judged {
    /// Whether somebody writes to the image.
    pub(super) fn is_locked(&self) -> bool {
        self.flaws.iter().any(|(flaw, _)| matches!(flaw, Flaw::Unreadable(Error::Locked { .. })))
    }

    /// Whether nothing of the image may be remembered as right.
    pub(super) fn is_lost(&self) -> bool {
        let is_block = |flaw: &Flaw| matches!(flaw, Flaw::Blocks { .. });
        self.flaws.iter().any(|(flaw, _)| flaw.severity() >= FlawSeverity::Failed && !is_block(flaw))
    }
}

/// `other` is the image whose content this one holds, if it is damaged and there is such an image.
pub(super) fn judge(subject: &Subject<'_>, looked: &Looked, found: Found, other: Option<Arc<chain::Image>>) -> Judged {
    let Found { mut flaws, bad: mut runs, mut more, compared, structure } = found;
    let blocks = runs.iter().map(|bad| bad.blocks.clone()).collect();

    let mut content = Vec::new();
    let is_length = |flaw: &Flaw| matches!(flaw, Flaw::Length { .. });
    if let Some(other) = other {
        flaws.retain(|flaw| !is_length(flaw));
        content.push((Flaw::Holds(other), Reach::All));
    } else if !runs.is_empty() {
        let storage = source::open_locked(&subject.source()).ok();
        more += runs.iter().skip(TOLD).map(|bad| bad.blocks.end - bad.blocks.start).sum::<u64>();
        runs.truncate(TOLD);
        content.extend(told(subject, looked, storage, runs));
        content.extend((more > 0).then_some((Flaw::MoreBlocks(more), Reach::All)));
    }
    let mut flaws: Vec<(Flaw, Reach)> = flaws.into_iter().map(with_reach).collect();
    flaws.extend(content);
    let untrusted = flaws.iter().any(|(flaw, reach)| *reach == Reach::All || is_table(flaw));
    Judged { flaws, bad: blocks, untrusted, compared, structure }
}

/// What of the guest is in bad blocks.
fn told(
    subject: &Subject<'_>,
    looked: &Looked,
    storage: Option<Arc<FileStorage>>,
    runs: Vec<Bad>,
) -> Vec<(Flaw, Reach)> {
    let end = looked.sums.as_ref().map_or(looked.length, |sums| sums.length);
    let file = |blocks: &Range<u64>| blocks.start * BLOCK..(blocks.end * BLOCK).min(end);
    let ranges: Vec<Range<u64>> = runs.iter().map(|bad| file(&bad.blocks)).collect();
    let meanings = storage.and_then(|storage| meanings(subject, looked, storage, &ranges));
    let meanings = meanings.map_or_else(
        || ranges.iter().map(|range| unknown(range, looked)).collect(),
        |meanings| meanings.into_iter().map(Some).collect::<Vec<_>>(),
    );
    let flaw = |((bad, file), meaning): ((Bad, Range<u64>), Option<Located>)| {
        let reach = match &meaning {
            Some(meaning) if meaning.parts.contains(&ImageRegion::Header) => Reach::All,
            Some(meaning) if meaning.guest.is_empty() => Reach::Nothing,
            Some(meaning) => Reach::Guest(meaning.guest.clone()),
            None => Reach::All,
        };
        let (guest, parts) = meaning.map_or((None, Vec::new()), |meaning| (Some(meaning.guest), meaning.parts));
        (Flaw::Blocks { file, guest, parts, unreadable: bad.error }, reach)
    };
    runs.into_iter().zip(ranges).zip(meanings).map(flaw).collect()
}

/// What ranges of an image hold; `None` where it cannot be opened.
fn meanings(
    subject: &Subject<'_>,
    looked: &Looked,
    storage: Arc<FileStorage>,
    ranges: &[Range<u64>],
) -> Option<Vec<Located>> {
    if subject.format == Format::Raw {
        let data = |range: &Range<u64>| Located { parts: vec![ImageRegion::Data], guest: vec![range.clone()] };
        return Some(ranges.iter().map(data).collect());
    }
    let is_short = looked.sums.as_ref().is_some_and(|sums| storage.length() < sums.length);
    let image = Image::open(storage).ok().filter(|_| !is_short)?;
    let mut meanings = locate(&image, ranges).ok()?;
    let size = image.size().max(looked.disk_size.unwrap_or_default());
    // what the header says of the size may be wrong itself
    for meaning in meanings.iter_mut().filter(|meaning| meaning.parts.contains(&ImageRegion::Header)) {
        meaning.guest = std::iter::once(0..size).collect();
    }
    Some(meanings)
}

/// What a range of an image holds whose header or tables say nothing.
fn unknown(range: &Range<u64>, looked: &Looked) -> Option<Located> {
    let whole = |size| Located { parts: vec![ImageRegion::Header], guest: std::iter::once(0..size).collect() };
    looked.disk_size.filter(|_| range.start == 0).map(whole)
}

fn with_reach(flaw: Flaw) -> (Flaw, Reach) {
    let all = match &flaw {
        Flaw::Structure { errors, .. } => *errors > 0,
        // a merge refuses all that it is part of, also where nothing is cut off
        Flaw::Length { .. } => true,
        Flaw::Unreadable(_) => flaw.severity() == FlawSeverity::Damage,
        _ => false,
    };
    (flaw, if all { Reach::All } else { Reach::Nothing })
}

/// Whether tables that say what an image holds are damaged.
fn is_table(flaw: &Flaw) -> bool {
    let is_table =
        |part: &ImageRegion| matches!(part, ImageRegion::Header | ImageRegion::L1Table | ImageRegion::L2Table);
    matches!(flaw, Flaw::Blocks { parts, .. } if parts.iter().any(is_table))
}
