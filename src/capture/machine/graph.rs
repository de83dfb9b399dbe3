//! The block graph: which node is whose child, and under which name. It knows no drivers but filters, and asks nobody.

use std::collections::HashMap;

use serde_json::Value;

use crate::capture::machine::nodes::Node;
use crate::capture::machine::reply::{DeviceError, Reply};

const COMMAND: &str = "x-debug-query-block-graph";

/// More nodes below each other are no machine's: QEMU itself becomes unusable with some hundred overlays.
pub(crate) const MAX_DEPTH: usize = 1024;

/// Drivers that pass on what their one child holds. Jobs insert those whose names have an underscore, and `backup-top`.
const FILTERS: [&str; 13] = [
    "backup-top",
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "replication",
    "throttle",
];

/// The names of the child that has a node's bytes; only filters of jobs have it as `backing` instead.
const STORED: [&str; 3] = ["file", "image", "raw"];

/// Nodes by name.
pub(crate) type Nodes<'a> = HashMap<&'a str, &'a Node>;

/// The nodes of a machine and their children.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Graph {
    children: HashMap<String, HashMap<String, String>>,
    /// How many write to a node, where somebody does.
    writers: HashMap<String, usize>,
}

impl Graph {
    /// Reads the reply to `x-debug-query-block-graph`.
    ///
    /// # Errors
    ///
    /// A reply that does not fit the schema.
    pub(crate) fn parse(graph: &Value) -> Result<Self, DeviceError> {
        let reply = Reply::new(COMMAND, graph);
        let mut names = HashMap::new();
        for node in reply.part("nodes", "list")?.list("nodes")? {
            // Backends and jobs have names of their own, which a node may have, too
            if node.text("type")? == "block-driver" {
                names.insert(node.number("id")?, node.text("name")?);
            }
        }
        let mut children: HashMap<String, HashMap<String, String>> = HashMap::new();
        let mut writers: HashMap<String, usize> = HashMap::new();
        for edge in reply.part("edges", "list")?.list("edges")? {
            let (parent, child, name) = (edge.number("parent")?, edge.number("child")?, edge.text("name")?);
            let Some(child) = names.get(&child) else { continue };
            let permissions = edge.get("perm").and_then(|list| list.value().as_array());
            if permissions.is_some_and(|list| list.iter().any(|permission| permission == "write")) {
                let count = writers.entry((*child).to_owned()).or_default();
                *count = count.saturating_add(1);
            }
            if let Some(parent) = names.get(&parent) {
                children.entry((*parent).to_owned()).or_default().insert(name.to_owned(), (*child).to_owned());
            }
        }
        Ok(Self { children, writers })
    }

    /// The name of a node's child: `file`, `backing`, `target`, `data-file`, …
    #[must_use]
    pub(crate) fn child(&self, node: &str, name: &str) -> Option<&str> {
        self.children.get(node)?.get(name).map(String::as_str)
    }

    /// The overlay that has a node below it.
    #[must_use]
    pub(crate) fn overlay(&self, node: &str) -> Option<&str> {
        let is_below = |below: &HashMap<String, String>| below.get("backing").is_some_and(|backing| backing == node);
        self.children.iter().find(|(_, below)| is_below(below)).map(|(overlay, _)| overlay.as_str())
    }

    /// Whether a node has more than one writer: two devices, or a device and an export.
    pub(crate) fn is_shared(&self, node: &str) -> bool {
        self.writers.get(node).is_some_and(|writers| *writers > 1)
    }

    /// The node and those that it filters, down to the first that is no filter.
    pub(crate) fn unfiltered<'a>(&'a self, nodes: &Nodes<'a>, top: &'a str) -> Result<Vec<&'a str>, DeviceError> {
        walk(top, |node| if is_filter(nodes, node) { self.filtered(node) } else { None })
    }

    /// The node and what it keeps its bytes in, down to the node that has no file: that of a protocol.
    pub(crate) fn stored<'a>(&'a self, top: &'a str) -> Result<Vec<&'a str>, DeviceError> {
        walk(top, |node| STORED.iter().find_map(|name| self.child(node, name)))
    }

    /// The nodes of the images below an image, nearest first, filters left out.
    pub(crate) fn backing<'a>(&'a self, nodes: &Nodes<'a>, image: &'a str) -> Result<Vec<&'a str>, DeviceError> {
        let below = |node| if is_filter(nodes, node) { self.filtered(node) } else { self.child(node, "backing") };
        let chain = walk(image, below)?;
        Ok(chain.into_iter().skip(1).filter(|node| !is_filter(nodes, node)).collect())
    }

    fn filtered(&self, node: &str) -> Option<&str> {
        STORED.iter().chain(&["backing"]).find_map(|name| self.child(node, name))
    }
}

fn is_filter(nodes: &Nodes<'_>, node: &str) -> bool {
    nodes.get(node).is_some_and(|node| FILTERS.contains(&node.driver.as_str()))
}

fn walk<'a>(top: &'a str, mut below: impl FnMut(&'a str) -> Option<&'a str>) -> Result<Vec<&'a str>, DeviceError> {
    let mut path = vec![top];
    let mut at = top;
    while let Some(node) = below(at) {
        if path.len() >= MAX_DEPTH {
            return Err(DeviceError::Depth { node: top.to_owned(), limit: MAX_DEPTH });
        }
        path.push(node);
        at = node;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Nodes `n0`, `n1`, … of these drivers, a backend that is called `n0`, too, and edges from parent to child.
    fn graph(drivers: &[&str], edges: &[(usize, &str, usize)]) -> (Vec<Node>, Graph) {
        let ids = 1..=drivers.len();
        let mut nodes: Vec<_> =
            ids.map(|at| json!({"id": at, "type": "block-driver", "name": format!("n{}", at - 1)})).collect();
        nodes.push(json!({"id": 1000, "type": "block-backend", "name": "n0"}));
        let mut all: Vec<_> = edges
            .iter()
            .map(|(parent, name, child)| json!({"parent": parent + 1, "name": name, "child": child + 1}))
            .collect();
        all.push(json!({"parent": 1000, "name": "root", "child": 1}));
        let named = |(at, driver): (usize, &&str)| {
            let name = format!("n{at}");
            json!({"node-name": name, "drv": driver, "ro": false, "file": ""})
        };
        let reply = drivers.iter().enumerate().map(named).collect();
        (
            crate::capture::machine::nodes::nodes(&reply).unwrap(),
            Graph::parse(&json!({"nodes": nodes, "edges": all})).unwrap(),
        )
    }

    fn by_name(nodes: &[Node]) -> Nodes<'_> {
        nodes.iter().map(|node| (node.name.as_str(), node)).collect()
    }

    #[test]
    fn a_child_has_a_name_below_its_parent() {
        let (_, graph) = graph(&["copy-before-write", "qcow2", "qcow2"], &[(0, "file", 1), (0, "target", 2)]);
        assert_eq!(graph.child("n0", "file"), Some("n1"));
        assert_eq!(graph.child("n0", "target"), Some("n2"));
        assert_eq!(graph.child("n0", "root"), None, "the backend of that name has it");
        assert_eq!(graph.child("n1", "file"), None);
        assert_eq!(graph.child("n7", "file"), None);
    }

    #[test]
    fn each_filter_leads_to_the_child_that_it_filters() {
        for (driver, child) in [
            ("throttle", "file"),
            ("copy-on-read", "file"),
            ("compress", "file"),
            ("preallocate", "file"),
            ("copy-before-write", "file"),
            ("blkdebug", "image"),
            ("blkverify", "raw"),
            ("mirror_top", "backing"),
            ("commit_top", "backing"),
            ("backup-top", "backing"),
        ] {
            let (nodes, graph) = graph(&[driver, "qcow2", "qcow2"], &[(0, "target", 2), (0, "test", 2), (0, child, 1)]);
            assert_eq!(graph.unfiltered(&by_name(&nodes), "n0"), Ok(vec!["n0", "n1"]), "{driver}");
        }
    }

    #[test]
    fn two_writers_share_a_node() {
        let node = |id: u8| json!({"id": id, "type": "block-driver", "name": format!("n{id}")});
        let edge = |parent: u8, child: u8, perm: &str| json!({"parent": parent, "child": child, "name": "root", "perm": ["consistent-read", perm]});
        let edges = [edge(8, 1, "write"), edge(9, 1, "write"), edge(8, 2, "write"), edge(9, 2, "resize")];
        let graph = Graph::parse(&json!({"nodes": [node(1), node(2)], "edges": edges})).unwrap();
        assert!(graph.is_shared("n1") && !graph.is_shared("n2") && !graph.is_shared("n3"));
    }

    #[test]
    fn a_quorum_or_a_format_is_no_filter() {
        for driver in ["quorum", "qcow2", "raw", "luks", "snapshot-access"] {
            let (nodes, graph) = graph(&[driver, "qcow2"], &[(0, "file", 1), (0, "backing", 1), (0, "children.0", 1)]);
            assert_eq!(graph.unfiltered(&by_name(&nodes), "n0"), Ok(vec!["n0"]), "{driver}");
        }
    }

    #[test]
    fn filters_between_overlays_are_no_images() {
        let drivers = ["qcow2", "copy-on-read", "commit_top", "qcow2", "raw", "file"];
        let edges = [(0, "backing", 1), (1, "file", 2), (2, "backing", 3), (3, "backing", 4), (4, "file", 5)];
        let (nodes, graph) = graph(&drivers, &edges);
        assert_eq!(graph.backing(&by_name(&nodes), "n0"), Ok(vec!["n3", "n4"]));
        assert_eq!(graph.stored("n4"), Ok(vec!["n4", "n5"]));
    }

    #[test]
    fn a_graph_that_goes_round_in_circles_gets_an_error() {
        let (nodes, graph) =
            graph(&["throttle", "throttle", "qcow2"], &[(0, "file", 1), (1, "file", 0), (2, "backing", 2)]);
        let error = |node: &str| Err(DeviceError::Depth { node: node.to_owned(), limit: MAX_DEPTH });
        assert_eq!(graph.unfiltered(&by_name(&nodes), "n0"), error("n0"));
        assert_eq!(graph.stored("n1"), error("n1"));
        assert_eq!(graph.backing(&by_name(&nodes), "n2"), error("n2"));
    }

    #[test]
    fn a_chain_as_long_as_the_limit_is_walked() {
        let drivers = vec!["qcow2"; MAX_DEPTH + 1];
        let edges: Vec<_> = (0..MAX_DEPTH).map(|at| (at, "backing", at + 1)).collect();
        let (nodes, graph) = graph(&drivers, &edges);
        assert_eq!(graph.backing(&by_name(&nodes), "n1").map(|chain| chain.len()), Ok(MAX_DEPTH - 1));
        assert!(graph.backing(&by_name(&nodes), "n0").is_err());
    }

    #[test]
    fn a_reply_that_is_no_graph_gets_an_error() {
        for reply in [
            json!(null),
            json!([]),
            json!({"nodes": []}),
            json!({"nodes": [{}], "edges": []}),
            json!({"nodes": [{"type": "block-driver", "id": -1, "name": "a"}], "edges": []}),
            json!({"nodes": [], "edges": [{"parent": 1, "child": 2}]}),
        ] {
            assert!(Graph::parse(&reply).is_err(), "{reply}");
        }
        assert_eq!(Graph::parse(&json!({"nodes": [], "edges": []})), Ok(Graph::default()));
    }
}
