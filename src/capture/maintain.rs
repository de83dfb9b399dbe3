//! What is not a backup: showing disks and bitmaps, and removing bitmaps.

use crate::capture::connect;
use crate::capture::error::Error;
use crate::capture::event::{Event, Observer};
use crate::capture::machine::device::{Bitmap, Device};
use crate::capture::machine::nodes;
use crate::capture::machine::observe::{all_disks, ask_nodes};
use crate::capture::names;
use crate::capture::order;
use crate::capture::request::Connection;
use crate::errors;
use crate::qmp::Command;

/// All disks of a machine, raw ones too.
///
/// # Errors
/// The machine cannot be reached, or says what cannot be understood.
pub async fn disks(connection: &Connection, observer: &dyn Observer) -> Result<Vec<Device>, Error> {
    let machine = connect(connection, observer).await?;
    all_disks(&machine).await
}

/// Removes the bitmaps of this tool, of one chain or of all. Those that QEMU keeps are told.
///
/// # Errors
/// A backup goes on, or the machine cannot be reached.
pub async fn remove_bitmaps(
    connection: &Connection,
    chain: Option<&str>,
    observer: &dyn Observer,
) -> Result<Vec<Bitmap>, Error> {
    let machine = connect(connection, observer).await?;
    order::restore(&machine, connection.agent.as_ref(), None, None).await?;
    let nodes = nodes::nodes(&ask_nodes(&machine).await?)?;
    // whoever begins has it before any bitmap
    if nodes.iter().any(|node| node.name == names::LOCK) {
        return Err(Error::Busy { what: "another run has just begun".to_owned() });
    }
    let own = |bitmap: &Bitmap| bitmap.name.starts_with(names::PREFIX);
    // an id may be the end of another one
    let disks: Vec<String> = all_disks(&machine).await?.into_iter().flat_map(|disk| disk.names).collect();
    let of_chain = |bitmap: &Bitmap| chain.is_none_or(|chain| names::since(&bitmap.name, chain, &disks).is_some());
    let mut removed = Vec::new();
    // what is stored in an image that nobody can write to stays, and records nothing
    let bitmaps = nodes
        .into_iter()
        .flat_map(|node| node.bitmaps.into_iter().filter(move |bitmap| !(node.read_only && bitmap.persistent)));
    for bitmap in bitmaps.filter(own).filter(of_chain) {
        machine.go_on()?;
        let command = Command::new("block-dirty-bitmap-remove")
            .with("node", bitmap.node.clone())
            .with("name", bitmap.name.clone());
        match machine.send(&command).await {
            Ok(_) => {
                machine.tell(&Event::BitmapRemoved { name: bitmap.name.clone(), node: bitmap.node.clone() });
                removed.push(bitmap);
            }
            Err(Error::Monitor(error)) if error.refused().is_some() => {
                let (name, node) = (&bitmap.name, &bitmap.node);
                let what = format!("the bitmap {name} of {node} cannot be removed: {}", errors::line(&error));
                machine.tell(&Event::Trouble { what });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}
