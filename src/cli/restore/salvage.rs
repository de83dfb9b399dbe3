//! `qmprestore merge --salvage`: what is opened, and the list of what was lost.

use std::fmt::Display;

use serde_json::Value;

use super::args;
use crate::chain::{Clock, Disk, Fault, Lineage, Member, RestorePoint};
use crate::cli::console::Console;
use crate::cli::failure::Failure;
use crate::cli::table::{Align, table};
use crate::cli::text::file_name;
use crate::restore::{self, Layers, Loss, Losses, Slot, Source};

/// Finds the restore point and opens what there is of it.
pub(super) fn open(arguments: &args::Merge, disk: &Disk, console: &Console) -> Result<(RestorePoint, Layers), Failure> {
    let found = disk.select_salvage(&arguments.until, &Clock::system())?;
    let name = found.point.name();
    if let Some(doubt) = &found.point.doubt {
        console.warning(&format!("{name} may lack changes: {doubt}"));
        anywhere(console, "stale", doubt);
    }
    // what is missing is listed
    let is_listed = |fault: &Fault| match fault {
        Fault::NoFull | Fault::Lineage(Lineage::Gone(_) | Lineage::Missing { .. }) => {
            found.members.iter().any(|member| member.image().is_none())
        }
        Fault::Lineage(Lineage::Unreachable(_)) => true,
        _ => false,
    };
    let mut faults: Vec<Fault> = found.fault.iter().cloned().collect();
    let contradictions = found.contradictions.iter().cloned().map(Fault::Lineage);
    faults.extend(contradictions.filter(|fault| found.fault.as_ref() != Some(fault)));
    for fault in faults.iter().filter(|fault| !is_listed(fault)) {
        console.warning(&format!("{name} may be wrong anywhere: {fault}"));
        anywhere(console, "damaged", fault);
    }
    let slot = |member: &Member| match member {
        Member::There(image) => Slot::Image(Source::of(image, arguments.source_format.map(Into::into))),
        Member::Missing { path, size } => Slot::Missing { path: path.clone(), size: *size },
    };
    let slots: Vec<Slot> = found.members.iter().map(slot).collect();
    let layers = Layers::open_salvage(&slots, arguments.verify)?;
    let manifest_unread = found.point.members.first().is_some_and(|full| matches!(full.manifest, Some(Err(_))));
    match found.fault {
        // a journal that cannot be read is the same at any time
        Some(Fault::Journal { .. } | Fault::JournalUnread { .. }) => {}
        _ if !manifest_unread => restore::check_current(&found.point)?,
        _ if found.point.is_left_alone()? => {}
        _ => return Err(restore::Error::Changed.into()),
    }
    Ok((found.point, layers))
}

/// Says for programs that the list of what was lost is not all of it, and that the rest cannot be listed.
pub(super) fn anywhere(console: &Console, kind: &str, reason: &dyn Display) {
    console.event("anywhere", &[("kind", kind.into()), ("message", reason.to_string().into())]);
}

/// Lists what was lost, which is a warning.
pub(super) fn tell(losses: &Losses, size: u64, console: &Console) -> Result<(), Failure> {
    if losses.is_empty() {
        return Ok(());
    }
    for loss in &losses.list {
        console.event("loss", &fields(loss));
    }
    if let Some(start) = losses.unlisted_from {
        console.event("unlisted", &[("start", start.into()), ("losses", losses.unlisted.into())]);
    }
    if !console.is_json() {
        let columns = [
            ("KIND", Align::Left),
            ("START", Align::Right),
            ("BYTES", Align::Right),
            ("IMAGE", Align::Left),
            ("CAUSE", Align::Left),
        ];
        let rows: Vec<Vec<String>> = losses.list.iter().map(row).collect();
        let mut lines = table("", &columns, &rows);
        if let Some(start) = losses.unlisted_from {
            lines.push(format!("and {} more, from {start:#x} on", losses.unlisted));
        }
        console.result(&lines)?;
    }
    let Losses { lost, stale, damaged, .. } = losses;
    console.warning(&format!(
        "{lost} of {size} bytes are lost and zeroes now, {stale} may be stale, {damaged} may be damaged"
    ));
    Ok(())
}

/// What the last JSON line says of it.
pub(super) fn summary(losses: &Losses) -> [(&'static str, Value); 5] {
    let listed = losses.list.len() as u64;
    [
        ("losses", (listed + losses.unlisted).into()),
        ("unlisted", losses.unlisted.into()),
        ("lost", losses.lost.into()),
        ("stale", losses.stale.into()),
        ("damaged", losses.damaged.into()),
    ]
}

fn fields(loss: &Loss) -> [(&'static str, Value); 6] {
    [
        ("kind", loss.kind.as_str().into()),
        ("start", loss.guest.start.into()),
        ("bytes", (loss.guest.end - loss.guest.start).into()),
        ("image", loss.image.to_string_lossy().into()),
        ("cause", loss.cause.as_str().into()),
        ("message", loss.cause.to_string().into()),
    ]
}

fn row(loss: &Loss) -> Vec<String> {
    vec![
        loss.kind.to_string(),
        format!("{:#x}", loss.guest.start),
        (loss.guest.end - loss.guest.start).to_string(),
        file_name(&loss.image),
        loss.cause.to_string(),
    ]
}
