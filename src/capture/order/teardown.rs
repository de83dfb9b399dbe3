//! How order comes back into a machine, whatever a run has left in it and wherever it was when it ended.
//!
//! Pure: from what is going on to the commands. A run that succeeds ends the same way.

use crate::capture::machine::nodes::delete_node;
use crate::capture::machine::observe::Observed;
use crate::capture::names::{self, NodeRole};
use crate::capture::plan::set_drive;
use crate::qmp::Command;

/// What to send, in this order.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Teardown {
    /// Lets a machine go on that a run has stopped.
    pub resume: Vec<Command>,
    /// Tells jobs to end; nothing else may go on before all have.
    pub cancel: Vec<Command>,
    /// Takes filters out from below overlays, since somebody took an external snapshot of the device; these are jobs, too.
    pub bypass: Vec<Command>,
    /// Takes apart what was built, when no job is left that uses it.
    pub dismantle: Vec<Command>,
}

impl Teardown {
    /// Decides what to send. The nodes [`names::LOCK`] and [`frozen::NODE`](crate::capture::order::frozen::NODE) stay: they
    /// go last, when files, bitmaps and the guest are in order too.
    #[must_use]
    pub(crate) fn new(observed: &Observed) -> Self {
        let marked = observed.node(names::MOMENT);
        let stopped = marked.filter(|_| observed.status == "paused").map(|_| Command::new("cont"));
        // when it goes on, who stops it again means it
        let unmark = marked.map(|node| delete_node(&node.name));
        let ours = || observed.own_jobs();
        let cancel = ours().filter(|job| !job.is_ending());
        let dismiss = ours().filter(|job| job.is_concluded());
        let mut dismantle: Vec<Command> =
            dismiss.map(|job| Command::new("job-dismiss").with("id", job.id.clone())).collect();
        dismantle.extend(delete(observed, NodeRole::Snapshot));
        dismantle.extend(observed.drives.iter().filter_map(|drive| {
            (NodeRole::of(&drive.node) == Some(NodeRole::CopyBeforeWrite)).then_some(())?;
            Some(set_drive(&drive.qdev, observed.graph.child(&drive.node, "file")?))
        }));
        for part in [NodeRole::CopyBeforeWrite, NodeRole::Fleece, NodeRole::Target] {
            dismantle.extend(delete(observed, part));
        }
        let filters = observed.nodes.iter().filter(|node| NodeRole::of(&node.name) == Some(NodeRole::CopyBeforeWrite));
        let bypass = filters.filter_map(|node| {
            let overlay = observed.graph.overlay(&node.name)?;
            Some(bypass(overlay, &node.name, observed.graph.child(&node.name, "file")?))
        });
        Self {
            bypass: bypass.collect(),
            resume: stopped.into_iter().chain(unmark).collect(),
            cancel: cancel.map(|job| Command::new("job-cancel").with("id", job.id.clone())).collect(),
            dismantle,
        }
    }

    /// Whether all is in order.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.resume.is_empty() && self.cancel.is_empty() && self.dismantle.is_empty()
    }
}

/// Nothing is copied, since a filter holds nothing; the overlay gets the disk below the filter, in its header too.
fn bypass(overlay: &str, filter: &str, disk: &str) -> Command {
    Command::new("block-stream")
        .with("job-id", format!("{filter}-bypass"))
        .with("device", overlay)
        .with("base-node", disk)
}

fn delete(observed: &Observed, part: NodeRole) -> impl Iterator<Item = Command> {
    observed.nodes.iter().filter(move |node| NodeRole::of(&node.name) == Some(part)).map(|node| delete_node(&node.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::capture::machine::graph::Graph;
    use crate::capture::machine::nodes::Node;
    use crate::capture::machine::observe::{Attachment, Job};
    use crate::capture::order::frozen;

    fn node(name: &str) -> Node {
        Node {
            name: name.to_owned(),
            driver: String::new(),
            file: String::new(),
            read_only: false,
            bitmaps: Vec::new(),
            image: serde_json::Value::Null,
        }
    }

    fn job(id: &str, status: &str) -> Job {
        Job { id: id.to_owned(), kind: "backup".to_owned(), status: status.to_owned(), error: None, done: 0, total: 0 }
    }

    fn drive(qdev: &str, node: &str) -> Attachment {
        Attachment { qdev: qdev.to_owned(), node: node.to_owned() }
    }

    fn graph() -> Graph {
        let nodes = json!([
            {"id": 1, "type": "block-driver", "name": "qmpbackup-0-cbw"},
            {"id": 2, "type": "block-driver", "name": "#block123"},
        ]);
        let edges = json!([{"parent": 1, "child": 2, "name": "file", "perm": [], "shared-perm": []}]);
        Graph::parse(&json!({"nodes": nodes, "edges": edges})).unwrap()
    }

    fn lines(commands: &[Command]) -> Vec<String> {
        let line = |command: &Command| {
            let values: Vec<&str> = command.arguments().values().filter_map(|value| value.as_str()).collect();
            format!("{} {}", command.name(), values.join(" "))
        };
        commands.iter().map(line).collect()
    }

    #[test]
    fn a_machine_in_order_is_left_alone() {
        let observed = Observed {
            jobs: vec![job("mine", "running"), job("qmpbackup.x", "running")],
            nodes: vec![node("disk0"), node("qmpbackup-disk0"), node("qmpbackup-0-target-of-mine")],
            drives: vec![drive("/vb0", "disk0")],
            status: "paused".to_owned(),
            ..Observed::default()
        };
        assert!(Teardown::new(&observed).is_empty());
    }

    #[test]
    fn what_a_run_leaves_is_taken_apart_from_the_top() {
        let names = ["cbw", "fleece", "snapshot", "target"].map(|part| node(&format!("qmpbackup-0-{part}")));
        let marks = [node(names::LOCK), node(names::MOMENT)];
        let observed = Observed {
            jobs: vec![job("qmpbackup-0", "running"), job("qmpbackup-1", "concluded"), job("qmpbackup-2", "aborting")],
            nodes: names.into_iter().chain(marks).collect(),
            drives: vec![drive("/vb0", "qmpbackup-0-cbw"), drive("/vb1", "disk1")],
            graph: graph(),
            status: "paused".to_owned(),
        };
        let teardown = Teardown::new(&observed);
        assert_eq!(lines(&teardown.resume), ["cont ", "blockdev-del qmpbackup-moment"]);
        assert_eq!(lines(&teardown.cancel), ["job-cancel qmpbackup-0"]);
        let expected = [
            "job-dismiss qmpbackup-1",
            "blockdev-del qmpbackup-0-snapshot",
            "qom-set /vb0 drive #block123",
            "blockdev-del qmpbackup-0-cbw",
            "blockdev-del qmpbackup-0-fleece",
            "blockdev-del qmpbackup-0-target",
        ];
        assert_eq!(lines(&teardown.dismantle), expected);
    }

    #[test]
    fn a_filter_below_an_overlay_is_bypassed() {
        let nodes = json!([
            {"id": 1, "type": "block-driver", "name": "qmpbackup-0-cbw"},
            {"id": 2, "type": "block-driver", "name": "#block123"},
            {"id": 3, "type": "block-driver", "name": "#block456"},
        ]);
        let edge = |parent: u8, name: &str, child: u8| json!({"parent": parent, "child": child, "name": name, "perm": [], "shared-perm": []});
        let edges = [edge(1, "file", 2), edge(3, "backing", 1)];
        let observed = Observed {
            nodes: vec![node("qmpbackup-0-cbw"), node("#block123"), node("#block456")],
            drives: vec![drive("/vb0", "#block456")],
            graph: Graph::parse(&json!({"nodes": nodes, "edges": edges})).unwrap(),
            ..Observed::default()
        };
        let teardown = Teardown::new(&observed);
        let arguments = json!({"job-id": "qmpbackup-0-cbw-bypass", "device": "#block456", "base-node": "#block123"});
        assert_eq!(serde_json::Value::from(teardown.bypass[0].arguments().clone()), arguments);
        assert_eq!(lines(&teardown.dismantle), ["blockdev-del qmpbackup-0-cbw"]);
    }

    #[test]
    fn only_a_machine_that_a_run_may_have_stopped_is_resumed() {
        let unmark = "blockdev-del qmpbackup-moment";
        for (mark, status, resumed) in [
            (names::MOMENT, "paused", &["cont ", unmark][..]),
            (names::MOMENT, "running", &[unmark]),
            (names::MOMENT, "prelaunch", &[unmark]),
            (frozen::NODE, "paused", &[]),
        ] {
            let observed = Observed { nodes: vec![node(mark)], status: status.to_owned(), ..Observed::default() };
            assert_eq!(lines(&Teardown::new(&observed).resume), resumed, "{mark} {status}");
        }
    }
}
