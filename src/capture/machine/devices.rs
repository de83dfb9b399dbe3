//! The disks of a machine, out of three replies of its monitor. Pure: nothing is asked, opened or resolved.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::capture::machine::device::{Device, Skipped};
use crate::capture::machine::file_name::{FileName, component, is_protocol};
use crate::capture::machine::graph::{Graph, Nodes};
use crate::capture::machine::nodes::{self, Node};
use crate::capture::machine::reply::{DeviceError, Reply};
use crate::capture::machine::selection::{Drive, Selection};
use crate::capture::names;
use crate::chain::{BOOKKEEPING, ImageName, Level, UUID};

const COMMAND: &str = "query-block";

/// The disks of a machine.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Devices {
    /// Those to back up.
    pub disks: Vec<Device>,
    /// Those that are left out.
    pub skipped: Vec<Skipped>,
    /// What `include` and `exclude` ask for and no drive is called.
    pub unmatched: Vec<String>,
}

/// Reads the replies to `query-block`, `query-named-block-nodes` and `x-debug-query-block-graph`. A disk that two
/// devices share is listed once, as the first's.
///
/// # Errors
///
/// A reply that does not fit its schema or the other replies.
pub(crate) fn devices(
    blocks: &Value,
    nodes: &Value,
    graph: &Value,
    selection: &Selection,
) -> Result<Devices, DeviceError> {
    let nodes = nodes::nodes(nodes)?;
    let graph = Graph::parse(graph)?;
    let block_graph =
        BlockGraph { nodes: nodes.iter().map(|node| (node.name.as_str(), node)).collect(), graph: &graph };
    let mut drives: Vec<Drive> = Vec::new();
    let mut by_node: HashMap<String, usize> = HashMap::new();
    for block in Reply::new(COMMAND, blocks).list("devices")? {
        let drive = block_graph.drive(block)?;
        if let Some(disk) = &drive.disk {
            let at = *by_node.entry(disk.format_node.clone()).or_insert(drives.len());
            if let Some(first) = drives.get_mut(at) {
                first.removable &= drive.removable;
                first.keys.extend(drive.keys);
                continue;
            }
        }
        drives.push(drive);
    }
    let mut devices = Devices { unmatched: selection.unmatched(&drives), ..Devices::default() };
    for drive in drives {
        match selection.choose(drive) {
            Ok(disk) => devices.disks.push(disk),
            Err(skipped) => devices.skipped.push(skipped),
        }
    }
    Ok(devices)
}

/// The nodes of a machine, and what is below which.
struct BlockGraph<'a> {
    nodes: Nodes<'a>,
    graph: &'a Graph,
}

impl<'a> BlockGraph<'a> {
    fn drive(&self, block: Reply<'a>) -> Result<Drive, DeviceError> {
        let device = block.text("device")?;
        let qdev = block.optional("qdev", Reply::text)?.filter(|qdev| !qdev.is_empty());
        let has_tray = block.get("tray_open").or(block.get("tray-open")).is_some();
        let is_removable = block.flag("removable")? || has_tray;
        let (disk, path) = match block.get("inserted") {
            Some(inserted) => self.disk(block, inserted, device, qdev).map(|(disk, path)| (Some(disk), path))?,
            None => (None, Vec::new()),
        };
        let id = qdev.and_then(qdev_id);
        let names = [Some(device), id, path.first().copied(), qdev];
        // A writable disk on USB or SCSI may be removable, too, and QEMU shows even a tray; without a device QEMU says
        // so of every drive
        let is_medium = |disk: &Device| qdev.is_some() && (disk.read_only || disk.format == "raw");
        let files = disk.as_ref().map(|disk| [disk.base.as_str(), disk.file.as_str()]);
        let keys = names.into_iter().flatten().chain(files.into_iter().flatten()).chain(path.iter().copied());
        Ok(Drive {
            label: names.into_iter().flatten().find(|name| !name.is_empty()).unwrap_or_default().to_owned(),
            keys: keys.filter(|key| !key.is_empty()).map(str::to_owned).collect(),
            removable: is_removable && disk.as_ref().is_none_or(is_medium),
            is_flash: device.starts_with("pflash")
                || qdev.is_some_and(|qdev| qdev.starts_with("/machine/system.flash")),
            disk,
        })
    }

    /// The disk, and its nodes from the top to that of the format.
    fn disk(
        &self,
        block: Reply<'a>,
        inserted: Reply<'a>,
        device: &str,
        qdev: Option<&str>,
    ) -> Result<(Device, Vec<&'a str>), DeviceError> {
        let top = inserted.text("node-name")?;
        let path = self.graph.unfiltered(&self.nodes, top)?;
        let node = self.node(path.last().copied().unwrap_or(top))?;
        let is_top = node.name == top;
        // The reply to query-block tells more of the image, but only of the top node's
        let image = inserted.get("image").map(Reply::value).filter(|_| is_top).unwrap_or(&node.image);
        let info = Reply::new(if is_top { COMMAND } else { nodes::COMMAND }, image);
        let bitmaps = match block.get("dirty-bitmaps") {
            Some(list) if is_top && node.bitmaps.is_empty() => nodes::bitmaps(list, top)?,
            _ => node.bitmaps.clone(),
        };
        let below = self.graph.backing(&self.nodes, &node.name)?;
        let nodes_below = below.iter().map(|name| self.node(name)).collect::<Result<Vec<_>, _>>()?;
        let backing = nodes_below.iter().map(|node| self.file(node)).collect::<Result<Vec<_>, _>>()?;
        let bitmaps_below =
            nodes_below.iter().flat_map(|node| &node.bitmaps).map(|bitmap| bitmap.name.clone()).collect();
        let (file, meaning) = self.file(node)?;
        let is_temporary = !backing.is_empty() && meaning.path.as_deref().is_some_and(is_temporary);
        let lowest = if is_temporary { backing.last().map(|(_, meaning)| meaning) } else { None };
        let mut names = names(&path, device, qdev, &below);
        let base = lowest.unwrap_or(&meaning).base.clone().or_else(|| names.first().cloned());
        let base = base.or_else(|| component(&node.name)).unwrap_or_else(|| "disk".to_owned());
        let base = if names_images(&base) && !is_reserved(&base) {
            base
        } else {
            format!("disk_{}", base.replace(['.', '~', '#'], "_"))
        };
        push(&mut names, &base);
        let read_only = inserted.flag("ro")? || node.read_only;
        let compat = image.pointer("/format-specific/data/compat").and_then(Value::as_str);
        let is_version_3 = node.driver == "qcow2" && compat.is_some_and(|compat| compat != "0.10");
        let disk = Device {
            device: device.to_owned(),
            qdev: qdev.map(str::to_owned),
            node: top.to_owned(),
            format_node: node.name.clone(),
            names,
            folder: meaning.path.as_deref().and_then(folder),
            file,
            base,
            format: if is_protocol(&node.driver) { "raw".to_owned() } else { node.driver.clone() },
            virtual_size: info.number("virtual-size")?,
            cluster_size: info.optional("cluster-size", Reply::number)?,
            read_only,
            shared: path.iter().any(|node| self.graph.is_shared(node)),
            persistent: is_version_3 && !read_only && !is_temporary,
            backing: backing.into_iter().map(|(file, _)| file).collect(),
            bitmaps_below,
            bitmaps,
            image: image.clone(),
        };
        Ok((disk, path))
    }

    fn node(&self, name: &str) -> Result<&'a Node, DeviceError> {
        let unknown = || DeviceError::NoNode { reply: nodes::COMMAND, node: name.to_owned() };
        self.nodes.get(name).copied().ok_or_else(unknown)
    }

    /// The file of an image's node: its name and what that means.
    fn file(&self, node: &Node) -> Result<(String, FileName), DeviceError> {
        let meaning = FileName::parse(&node.file);
        if meaning != FileName::default() {
            return Ok((meaning.short(&node.file), meaning));
        }
        // QEMU cuts names off after some kilobytes; the protocol's node has a name of its own
        let stored = self.graph.stored(&node.name)?;
        let lowest = stored.last().and_then(|name| self.nodes.get(name)).map_or(&node.file, |lowest| &lowest.file);
        let meaning = FileName::parse(lowest);
        Ok((meaning.short(lowest), meaning))
    }
}

/// Names that the disk's folder may have, but for the base.
fn names(path: &[&str], device: &str, qdev: Option<&str>, below: &[&str]) -> Vec<String> {
    // `#block123` is another one at each start
    let is_lasting = |node: &&str| !node.starts_with('#') && !node.starts_with(names::PREFIX);
    let mut nodes = path.iter().copied().filter(is_lasting);
    let mut names = Vec::new();
    let top = nodes.next();
    let id = qdev.and_then(qdev_id);
    let below = below.iter().copied().filter(is_lasting);
    for name in top.into_iter().chain([device]).chain(nodes).chain(id).chain(below) {
        push(&mut names, name);
    }
    names
}

fn push(names: &mut Vec<String>, name: &str) {
    if component(name).as_deref() == Some(name) && !is_reserved(name) && !names.iter().any(|other| other == name) {
        names.push(name.to_owned());
    }
}

/// Whether something else than a disk has this name in a backup folder.
fn is_reserved(name: &str) -> bool {
    [BOOKKEEPING, UUID].contains(&name)
}

/// The part of a device's path that its owner chose: `vb0` of `/machine/peripheral/vb0/virtio-backend`. A device
/// without an `id` has only a number, which is another one when the machine changes.
fn qdev_id(qdev: &str) -> Option<&str> {
    let Some(path) = qdev.strip_prefix("/machine/") else { return Some(qdev) };
    match path.split_once('/') {
        None => Some(path),
        Some(("peripheral", rest)) => rest.split('/').next(),
        Some(_) => None,
    }
}

/// Whether a file is one that `snapshot=on` made: `vl.` and six random characters.
fn is_temporary(path: &str) -> bool {
    let name = path.rsplit('/').next().and_then(|name| name.strip_prefix("vl."));
    name.is_some_and(|random| random.len() == 6 && random.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Whether images that bear this name are taken for images: not with one that ends as those of logs or leftovers do.
fn names_images(base: &str) -> bool {
    let name = ImageName { level: Level::Full, time: 0, disk: Some(base.into()), partial: false };
    ImageName::parse(&name.file_name()) == Some(name)
}

fn folder(path: &str) -> Option<PathBuf> {
    let path = Path::new(path);
    if path.is_absolute() { path.parent().map(Path::to_owned) } else { None }
}

#[cfg(test)]
mod tests;
