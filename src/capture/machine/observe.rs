//! What is going on in a machine: jobs, nodes, and what its devices read and write.

use serde_json::Value;

use crate::capture::error::Error;
use crate::capture::machine::Machine;
use crate::capture::machine::abilities::is_fragile;
use crate::capture::machine::device::Device;
use crate::capture::machine::devices::{Devices, devices};
use crate::capture::machine::graph::Graph;
use crate::capture::machine::live::Live;
use crate::capture::machine::nodes::{Node, nodes};
use crate::capture::machine::selection::Selection;
use crate::capture::names;
use crate::qmp::Command;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    /// Its name.
    pub id: String,
    /// `backup`, `mirror`, …
    pub kind: String,
    /// `running`, `concluded`, …
    pub status: String,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes that are done, about.
    pub done: u64,
    /// Bytes that there are, about.
    pub total: u64,
}

impl Job {
    /// Whether nothing happens in it any more.
    pub(crate) fn is_concluded(&self) -> bool {
        self.status == "concluded"
    }

    /// Whether it copies disks or changes what is below them: a filter between device and disk could take its place.
    pub(crate) fn moves_disks(&self) -> bool {
        let moves = ["backup", "commit", "mirror", "stream"].contains(&self.kind.as_str());
        (moves || self.kind.starts_with("snapshot-")) && !self.is_concluded()
    }

    /// Whether it has been told to end, or ends by itself.
    pub(crate) fn is_ending(&self) -> bool {
        ["concluded", "aborting", "null"].contains(&self.status.as_str())
    }
}

/// Reads `query-jobs`.
pub(crate) fn jobs(reply: &Value) -> Vec<Job> {
    let text = |job: &Value, key: &str| job.get(key).and_then(Value::as_str).map(str::to_owned);
    let number = |job: &Value, key: &str| job.get(key).and_then(Value::as_u64).unwrap_or_default();
    let jobs = reply.as_array().into_iter().flatten();
    jobs.filter_map(|job| {
        Some(Job {
            id: text(job, "id")?,
            kind: text(job, "type").unwrap_or_default(),
            status: text(job, "status")?,
            error: text(job, "error"),
            done: number(job, "current-progress"),
            total: number(job, "total-progress"),
        })
    })
    .collect()
}

/// What a machine says of its disks, in three answers.
#[derive(Debug, Clone)]
pub(crate) struct Replies {
    blocks: Value,
    nodes: Value,
    graph: Value,
}

impl Replies {
    /// Asks for them.
    pub(crate) async fn ask(machine: &Machine<'_>) -> Result<Self, Error> {
        Ok(Self {
            blocks: machine.monitor.execute(&Command::new("query-block")).await?,
            nodes: ask_nodes(machine).await?,
            graph: machine.monitor.execute(&Command::new("x-debug-query-block-graph")).await?,
        })
    }

    /// The disks that are asked for.
    pub(crate) fn devices(&self, selection: &Selection) -> Result<Devices, Error> {
        Ok(devices(&self.blocks, &self.nodes, &self.graph, selection)?)
    }

    /// The files of all nodes.
    pub(crate) fn live(&self, machine: &Machine<'_>) -> Result<Live, Error> {
        Ok(Live::of(&nodes(&self.nodes)?, machine.cwd().as_deref()))
    }

    /// All disks.
    pub(crate) fn disks(&self) -> Result<Vec<Device>, Error> {
        let all = Selection { include_raw: true, ..Selection::default() };
        Ok(self.devices(&all)?.disks)
    }
}

/// A device and the node that it reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// The device.
    pub qdev: String,
    /// The node.
    pub node: String,
}

/// What is going on in a machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observed {
    /// All jobs.
    pub jobs: Vec<Job>,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// All devices with something in their drive.
    pub drives: Vec<Attachment>,
    /// What is below each node.
    pub graph: Graph,
    /// `running`, `paused`, …
    pub status: String,
}

impl Observed {
    /// Asks for all of it.
    pub(crate) async fn ask(machine: &Machine<'_>) -> Result<Self, Error> {
        let jobs = jobs(&machine.monitor.execute(&Command::new("query-jobs")).await?);
        let Replies { blocks, nodes: all, graph } = Replies::ask(machine).await?;
        Ok(Self {
            jobs,
            nodes: nodes(&all)?,
            drives: drives(&blocks),
            graph: Graph::parse(&graph)?,
            status: status(&machine.monitor.execute(&Command::new("query-status")).await?),
        })
    }

    /// The jobs of a run of this tool.
    pub(crate) fn own_jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.iter().filter(|job| names::disk_of(&job.id).is_some())
    }

    /// The node with this name.
    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }
}

/// All disks of the machine.
pub(crate) async fn all_disks(machine: &Machine<'_>) -> Result<Vec<Device>, Error> {
    Replies::ask(machine).await?.disks()
}

/// Asks for all nodes, without those below them in the answer; not where that would be QEMU's end.
pub(crate) async fn ask_nodes(machine: &Machine<'_>) -> Result<Value, Error> {
    if is_fragile(&machine.features) {
        let jobs = jobs(&machine.monitor.execute(&Command::new("query-jobs")).await?);
        if let Some(job) = jobs.into_iter().find(Job::is_concluded) {
            return Err(Error::Fragile { job: job.id });
        }
    }
    Ok(machine.monitor.execute(&Command::new("query-named-block-nodes").with("flat", true)).await?)
}

/// Reads `query-status`.
pub(crate) fn status(reply: &Value) -> String {
    reply.get("status").and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The size of the disk whose node is on top of a device, as `query-block` tells.
pub(crate) fn size_of(blocks: &Value, node: &str) -> Option<u64> {
    let mut inserted = blocks.as_array()?.iter().filter_map(|block| block.get("inserted"));
    let own = inserted.find(|inserted| inserted.get("node-name").and_then(Value::as_str) == Some(node))?;
    own.pointer("/image/virtual-size")?.as_u64()
}

/// Reads `query-block`.
pub(crate) fn drives(blocks: &Value) -> Vec<Attachment> {
    let blocks = blocks.as_array().into_iter().flatten();
    blocks
        .filter_map(|block| {
            let qdev = block.get("qdev")?.as_str()?.to_owned();
            let node = block.get("inserted")?.get("node-name")?.as_str()?.to_owned();
            Some(Attachment { qdev, node })
        })
        .collect()
}
