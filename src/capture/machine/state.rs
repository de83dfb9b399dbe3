//! What state a machine is in, and what it has that no backup of its disks holds.

use serde_json::Value;

use super::{Machine, observe};
use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::qmp::Command;

/// States of a machine in which its disks are about to be, or already, somebody else's.
const STATES_OUT: [&str; 7] =
    ["inmigrate", "postmigrate", "finish-migrate", "restore-vm", "save-vm", "colo", "preconfig"];

/// States of a migration that goes on.
const MIGRATING: [&str; 10] = [
    "setup",
    "active",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-recover-setup",
    "pre-switchover",
    "device",
    "wait-unplug",
    "colo",
];

/// Makes sure that nobody else has had the disks by now: a machine may be migrated away while its jobs run.
pub(crate) async fn still_here(machine: &Machine<'_>) -> Result<(), Error> {
    check_state(&observe::status(&machine.monitor.execute(&Command::new("query-status")).await?))
}

fn check_state(status: &str) -> Result<(), Error> {
    if STATES_OUT.contains(&status) { Err(Error::State { status: status.to_owned() }) } else { Ok(()) }
}

/// Makes sure that no job copies a disk to where it will be, or changes what is below it. Its filter is between the device
/// and the disk, and QEMU hides it: a filter of ours would take its place, and the copy lack what the guest writes then.
pub(crate) async fn nobody_moves_disks(machine: &Machine<'_>) -> Result<(), Error> {
    let jobs = observe::jobs(&machine.monitor.execute(&Command::new("query-jobs")).await?);
    match jobs.iter().find(|job| job.moves_disks()) {
        Some(job) => Err(Error::Busy { what: format!("the {} job {} of somebody else goes on", job.kind, job.id) }),
        None => Ok(()),
    }
}

/// Says what machine it is, and whether it can be backed up now.
pub(crate) async fn introduce(machine: &Machine<'_>) -> Result<String, Error> {
    let name = machine.monitor.execute(&Command::new("query-name")).await?;
    let status = observe::status(&machine.monitor.execute(&Command::new("query-status")).await?);
    let name = name.get("name").and_then(Value::as_str).map(str::to_owned);
    machine.tell(&Event::Machine { name, status: status.clone() });
    check_state(&status)?;
    let migration = observe::status(&machine.monitor.execute(&Command::new("query-migrate")).await?);
    if MIGRATING.contains(&migration.as_str()) {
        return Err(Error::State { status: "migrating".to_owned() });
    }
    nobody_moves_disks(machine).await?;
    if machine.features.has_command("query-tpm") {
        let tpms = machine.monitor.execute(&Command::new("query-tpm")).await?;
        for id in emulated_tpms(&tpms) {
            machine.tell(&Event::Tpm { id });
        }
    }
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let devices = machine.monitor.execute(&Command::new("qom-list").with("path", folder)).await?;
        for (id, kind) in foreign_disks(&devices) {
            machine.tell(&Event::ForeignDisk { id, kind });
        }
    }
    Ok(status)
}

/// The devices whose disks another program has: QEMU knows of none of their bytes. Their ids and kinds.
fn foreign_disks(reply: &Value) -> Vec<(String, String)> {
    const KINDS: [&str; 3] = ["vhost-user-blk", "vhost-user-scsi", "vhost-scsi"];
    let disk = |device: &Value| {
        let kind = device.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        let is_foreign = KINDS.iter().any(|known| kind.starts_with(known));
        is_foreign.then_some((device.get("name")?.as_str()?.to_owned(), kind.to_owned()))
    };
    reply.as_array().into_iter().flatten().filter_map(disk).collect()
}

/// The TPMs whose state is neither on a disk nor in a chip.
fn emulated_tpms(reply: &Value) -> Vec<String> {
    let emulated = |tpm: &&Value| tpm.pointer("/options/type").is_some_and(|kind| kind == "emulator");
    let name = |tpm: &Value| tpm.get("id").and_then(Value::as_str).unwrap_or("tpm").to_owned();
    reply.as_array().into_iter().flatten().filter(emulated).map(name).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_tpm_that_is_emulated_has_a_state_to_lose() {
        let tpm = |id: &str, kind: &str| json!({"id": id, "model": "tpm-crb", "options": {"type": kind, "data": {}}});
        let reply = json!([tpm("tpm0", "emulator"), tpm("tpm1", "passthrough")]);
        assert_eq!(emulated_tpms(&reply), ["tpm0"]);
        assert!(emulated_tpms(&json!([])).is_empty() && emulated_tpms(&json!({"id": 5})).is_empty());
    }

    #[test]
    fn only_disks_of_other_programs_are_foreign() {
        let device = |name: &str, kind: &str| json!({"name": name, "type": kind});
        let reply = json!([
            device("type", "string"),
            device("data", "child<vhost-user-blk-pci>"),
            device("disk", "child<virtio-blk-pci>"),
            device("device[0]", "child<vhost-scsi-pci>"),
        ]);
        let found = foreign_disks(&reply);
        let ids: Vec<&str> = found.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["data", "device[0]"]);
        assert!(
            foreign_disks(&json!({"name": 5})).is_empty() && foreign_disks(&json!([{"type": "child<"}])).is_empty()
        );
    }
}
