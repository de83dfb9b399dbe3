//! What is said of each event of a run: a line for people, fields for JSON.

use std::time::Duration;

use serde_json::{Value, json};

use crate::capture::{Event, Why};
use crate::cli::units;

/// The line for the log: of sizes and times as people read them.
pub(super) fn line(event: &Event) -> String {
    match event {
        Event::Target { disk, path, size } => {
            format!("{disk}: a disk of {}, its image is {}", units::size(*size), path.display())
        }
        Event::Level { disk, level, reason, changed: Some(changed), .. } => {
            format!("{disk}: {level} {reason}, {} have changed", units::size(*changed))
        }
        Event::Copied { bytes, elapsed } => format!(
            "the jobs are done with {} of the disks in {}, {}/s",
            units::size(*bytes),
            units::duration(*elapsed),
            units::size(units::rate(*bytes, *elapsed))
        ),
        Event::Sealing { done, total } => {
            format!("checksums: {}, {} of {}", units::percent(*done, *total), units::size(*done), units::size(*total))
        }
        Event::Sealed { bytes, elapsed } => {
            format!("{} are synced and have checksums, after {}", units::size(*bytes), units::duration(*elapsed))
        }
        other => other.to_string(),
    }
}

/// The name of the JSON event and its fields, of events that have one of their own.
pub(super) fn fields(event: &Event) -> Option<(&'static str, Vec<(&'static str, Value)>)> {
    Some(match event {
        Event::Connected { version } => {
            ("connected", vec![("qemu", version.to_string().into()), ("package", version.package.as_str().into())])
        }
        Event::Machine { name, status } => {
            ("machine", vec![("name", name.as_deref().into()), ("status", status.as_str().into())])
        }
        Event::Skipped(skipped) => {
            ("skipped", vec![("disk", skipped.name.as_str().into()), ("why", why(skipped.why).into())])
        }
        Event::Level { disk, level, reason, changed, .. } => (
            "level",
            vec![
                ("disk", disk.as_str().into()),
                ("level", level.as_str().into()),
                ("reason", reason.as_str().into()),
                ("changed", (*changed).into()),
            ],
        ),
        Event::Target { disk, path, size } => (
            "target",
            vec![("disk", disk.as_str().into()), ("path", path.to_string_lossy().into()), ("size", (*size).into())],
        ),
        Event::Moment { stopped, frozen } => (
            "moment",
            vec![
                ("stopped_ms", stopped.map(milliseconds).into()),
                ("frozen_ms", frozen.map(|(time, _)| milliseconds(time)).into()),
                ("file_systems", frozen.map(|(_, count)| count).into()),
            ],
        ),
        Event::Copied { bytes, elapsed } => (
            "copied",
            vec![
                ("bytes", (*bytes).into()),
                ("seconds", elapsed.as_secs_f64().into()),
                ("rate", units::rate(*bytes, *elapsed).into()),
            ],
        ),
        Event::Sealing { done, total } => ("sealing", vec![("done", (*done).into()), ("total", (*total).into())]),
        Event::Sealed { bytes, elapsed } => {
            ("sealed", vec![("bytes", (*bytes).into()), ("seconds", elapsed.as_secs_f64().into())])
        }
        Event::Published { disk, path, level, time } => (
            "image",
            vec![
                ("disk", disk.as_str().into()),
                ("path", path.to_string_lossy().into()),
                ("level", level.as_str().into()),
                ("time", (*time).into()),
            ],
        ),
        Event::Recovered { what } => ("recovered", vec![("what", what.as_str().into())]),
        Event::BitmapRemoved { name, node } => {
            ("bitmap_removed", vec![("name", name.as_str().into()), ("node", node.as_str().into())])
        }
        _ => return None,
    })
}

/// The disks of a progress event.
pub(super) fn disks(disks: &[crate::capture::Progress]) -> Value {
    disks.iter().map(|disk| json!({ "disk": disk.disk, "done": disk.done, "total": disk.total })).collect()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn why(why: Why) -> &'static str {
    match why {
        Why::Empty => "empty",
        Why::Removable => "removable",
        Why::Raw => "raw",
        Why::Excluded => "excluded",
        Why::NotIncluded => "not included",
    }
}
