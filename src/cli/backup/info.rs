//! `qmpbackup info`.

use serde_json::{Map, Value};

use super::args::{self, Show};
use super::follow::Follower;
use crate::capture::{self, Bitmap, Connection, Device};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::text;

pub(super) fn run(arguments: &args::Info, connection: &Connection, console: &Console) -> Result<Exit, Failure> {
    let follower = Follower::new(console);
    let disks = follower.follow(capture::disks(connection, &follower))?;
    let (event, field, shown) = match arguments.show {
        Show::Blockdev => ("blockdev", "disks", disks.iter().map(Device::to_json).collect()),
        Show::Bitmaps => ("bitmaps", "nodes", bitmaps(&disks)),
    };
    if console.is_json() {
        console.event(event, &[(field, shown)]);
    } else {
        console.result(&text::json_lines(&shown))?;
    }
    Ok(console.done(&[]))
}

/// The bitmaps of each node that can have some.
fn bitmaps(disks: &[Device]) -> Value {
    let of_disk = |disk: &Device| (disk.format_node.clone(), disk.bitmaps.iter().map(Bitmap::to_json).collect());
    Value::Object(disks.iter().map(of_disk).collect::<Map<String, Value>>())
}
