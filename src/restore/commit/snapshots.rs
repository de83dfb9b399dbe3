//! What the snapshots of restore points are called, and which of them an earlier run has made.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::FULL_SNAPSHOT;
use crate::chain::Image;
use crate::qcow2;
use crate::restore::in_place::{self, InPlace};

/// The name of a snapshot of the FULL before INCs are written into it: it has none yet, or none since other INCs were.
pub(super) fn full_snapshot(chain: &InPlace, there: &[qcow2::Snapshot]) -> Option<String> {
    let names: Vec<String> = there.iter().map(|snapshot| snapshot.name.clone()).collect();
    if !names.iter().any(|name| name == FULL_SNAPSHOT) {
        return Some(FULL_SNAPSHOT.to_owned());
    }
    let time = chain.later_moment()?;
    let date = chain.full_date();
    // later dates than that are none in a snapshot
    let is_held = date.as_secs() > u64::from(u32::MAX) || there.iter().any(|snapshot| snapshot.date == date);
    (!is_held).then(|| snapshot_name(Some(time), &names))
}

/// What the snapshots of INCs are called; none where an earlier run has made them.
pub(super) fn names(
    incs: &[Arc<Image>],
    there: &[qcow2::Snapshot],
    mut taken: Vec<String>,
    resumed: bool,
) -> Vec<Option<String>> {
    let is_made = |inc: &Image| there.iter().any(|made| made.date == date(inc) && made.name != FULL_SNAPSHOT);
    let name = |inc: &Arc<Image>| {
        if resumed && is_made(inc) {
            return None;
        }
        let name = snapshot_name(inc.time, &taken);
        taken.push(name.clone());
        Some(name)
    };
    incs.iter().map(name).collect()
}

/// The date of an INC's snapshot.
pub(super) fn date(inc: &Image) -> Duration {
    in_place::seconds(inc.time).unwrap_or_default()
}

/// What the snapshot of a restore point is called: its local time, with the offset where that is taken, since clocks are
/// set back.
fn snapshot_name(time: Option<i64>, taken: &[String]) -> String {
    let time = Timestamp::from_second(time.unwrap_or_default()).unwrap_or(Timestamp::UNIX_EPOCH);
    let local = time.to_zoned(TimeZone::system());
    let name = local.strftime("%Y-%m-%d-%H:%M:%S").to_string();
    if taken.contains(&name) { local.strftime("%Y-%m-%d-%H:%M:%S%z").to_string() } else { name }
}
