//! What is not a backup: showing disks and bitmaps, and removing bitmaps.

use super::device::{Bitmap, Device};
use super::error::Error;
use super::event::{Event, Observer};
use super::names;
use super::observe::ask_nodes;
use super::order;
use super::request::Connection;
use super::{connect, nodes};
use crate::qmp::Command;

/// All disks of a machine, raw ones too.
///
/// # Errors
/// The machine cannot be reached, or says what cannot be understood.
pub async fn disks(connection: &Connection, observer: &dyn Observer) -> Result<Vec<Device>, Error> {
    let machine = connect(connection, observer).await?;
    order::all_disks(&machine).await
}

/// Removes the bitmaps of this tool, of one chain or of all.
///
/// # Errors
/// A backup goes on, or QEMU refuses.
pub async fn remove_bitmaps(
    connection: &Connection,
    chain: Option<&str>,
    observer: &dyn Observer,
) -> Result<Vec<Bitmap>, Error> {
    let machine = connect(connection, observer).await?;
    order::restore(&machine, connection.agent.as_ref(), None, None).await?;
    let nodes = nodes::nodes(&ask_nodes(&machine.monitor, &machine.features).await?)?;
    let own = |bitmap: &Bitmap| bitmap.name.starts_with(names::PREFIX);
    // an id may be the end of another one
    let disks: Vec<String> = order::all_disks(&machine).await?.into_iter().flat_map(|disk| disk.names).collect();
    let of_chain = |bitmap: &Bitmap| chain.is_none_or(|chain| names::since(&bitmap.name, chain, &disks).is_some());
    let mut removed = Vec::new();
    for bitmap in nodes.into_iter().flat_map(|node| node.bitmaps).filter(own).filter(of_chain) {
        let command = Command::new("block-dirty-bitmap-remove")
            .with("node", bitmap.node.clone())
            .with("name", bitmap.name.clone());
        machine.send(&command).await?;
        machine.tell(&Event::BitmapRemoved { name: bitmap.name.clone(), node: bitmap.node.clone() });
        removed.push(bitmap);
    }
    Ok(removed)
}
