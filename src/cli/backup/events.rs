//! What is said of each event of a run: a line for people, fields for JSON.

use std::time::Duration;

use serde_json::{Value, json};

use crate::capture::{Event, Progress, Skipped, Why};
use crate::cli::units;

/// The line for the log.
pub(super) fn line(event: &Event) -> String {
    match event {
        Event::Connected { version } => format!("QEMU {version}"),
        Event::Machine { name: Some(name), status } => format!("machine {name} is in state {status}"),
        Event::Machine { name: None, status } => format!("the machine is in state {status}"),
        Event::Sent(command) => format!("sent {}", command.to_json()),
        Event::Skipped(Skipped { name, why, .. }) => format!("{name}: skipped, {}", reason(*why)),
        Event::NoSuchDisk { names, wanted } => {
            let names: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
            format!(
                "no disk is called {}: nothing to {}",
                names.join(", "),
                if *wanted { "include" } else { "exclude" }
            )
        }
        Event::Tpm { id } => {
            format!("{id}: the state of this emulated TPM is on no disk and in no backup: save its folder too")
        }
        Event::ForeignDisk { id, kind } => {
            format!("{id}: this {kind} is the disk of another program, which QEMU cannot back up")
        }
        Event::Recovered { what } => format!("put in order what an earlier run left: {what}"),
        Event::ForeignBitmaps { disk, count } => format!(
            "{disk}: has {} of other chains, which cost the guest time; `cleanup --remove-bitmap --uuid` removes those of a \
             chain that is no longer used",
            units::count(*count, "bitmap")
        ),
        Event::OtherUuid { wanted, chain } => {
            format!("the folder holds the chain {chain}, which goes on; the id {wanted} is not used")
        }
        Event::ClockBehind { time } => format!(
            "the newest image is of a time that has not come yet: the new ones are of {time}, after it; look at the clock, \
             and for `--until` at the times of `qmprestore list`"
        ),
        Event::Level { disk, level, reason, changed: Some(changed), .. } => {
            format!("{disk}: {level} {reason}, {} have changed", units::size(*changed))
        }
        Event::Level { disk, level, reason, .. } => format!("{disk}: {level}, {reason}"),
        Event::NoFleece { disk: Some(disk), reason } => format!("{disk}: no fleece image, {reason}"),
        Event::NoFleece { disk: None, reason } => format!("no fleece images, {reason}"),
        Event::FleeceInTarget { disk, folder } => format!(
            "{disk}: is no file in a folder that is known, so its fleece image is in {}: what the guest overwrites takes room \
             and waits there; --fleece-dir names another folder",
            folder.display()
        ),
        Event::Target { disk, path, size } => {
            format!("{disk}: a disk of {}, its image is {}", units::size(*size), path.display())
        }
        Event::NotFrozen { reason } => format!("the guest's file systems are not frozen: {reason}"),
        Event::Moment { stopped, frozen } => moment(*stopped, *frozen),
        Event::Progress(disks) => {
            let disk = |Progress { disk, done, total }: &Progress| {
                format!("{disk}: {} of {}", units::size(*done), units::size(*total))
            };
            disks.iter().map(disk).collect::<Vec<_>>().join(", ")
        }
        Event::Copied { bytes, elapsed } => format!(
            "the jobs are done: {} of the disks in {}, {}/s",
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
        Event::Published { disk, path, level, .. } => format!("{disk}: {level} is in {}", path.display()),
        Event::BitmapRemoved { name, node } => format!("removed the bitmap {name} of {node}"),
        Event::Trouble { what } => what.clone(),
    }
}

fn moment(stopped: Option<Duration>, frozen: Option<(Duration, u64)>) -> String {
    let stopped = stopped.map(|time| format!(", the machine was stopped for {:.1} ms", milliseconds(time)));
    let frozen = frozen.map(|(time, count)| {
        let what = if count == 1 { "file system was" } else { "file systems were" };
        format!(", {count} {what} frozen for {:.1} ms", milliseconds(time))
    });
    format!("the snapshot is taken{}{}", stopped.unwrap_or_default(), frozen.unwrap_or_default())
}

fn reason(why: Why) -> &'static str {
    match why {
        Why::Empty => "the drive is empty",
        Why::Removable => "a removable medium",
        Why::Raw => "a raw disk: --include-raw includes it, --exclude says that it is left out",
        Why::Excluded => "excluded",
        Why::NotIncluded => "not included",
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
pub(super) fn disks(disks: &[Progress]) -> Value {
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
