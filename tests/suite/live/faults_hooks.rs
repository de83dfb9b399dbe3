//! Where in a run something happens: which commands count, and hooks that wait for the right one.

use rustix::process::Signal;
use serde_json::Value;

use super::proxy::{Action, Hook};

/// All commands count.
pub(super) fn all(_: &str) -> bool {
    true
}

/// Commands count that change something.
pub(super) fn changing(name: &str) -> bool {
    !name.starts_with("query-") && !name.starts_with("x-debug-query-") && name != "qmp_capabilities"
}

/// Whether a command begins the jobs.
pub(super) fn begins_jobs(command: &Value) -> bool {
    let actions = command["arguments"]["actions"].as_array();
    actions.is_some_and(|actions| actions.iter().any(|action| action["type"] == "blockdev-backup"))
}

/// Does something at the first look at jobs that have begun.
pub(super) fn while_copying(mut act: impl FnMut() -> Action + Send + 'static) -> Hook {
    let (mut begun, mut done) = (false, false);
    Box::new(move |command: &Value, _| {
        let now = begun && !done && command["execute"] == "query-jobs";
        begun |= begins_jobs(command);
        if now {
            done = true;
            return act();
        }
        Action::Forward
    })
}

/// Kills the tool while the jobs copy.
pub(super) fn kill_while_copying() -> Hook {
    while_copying(|| Action::KillBefore(Signal::KILL))
}
