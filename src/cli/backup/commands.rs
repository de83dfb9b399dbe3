//! `qmpbackup backup`, `cleanup` and `recover`: each is one call of the library, and a summary.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args;
use super::follow::Follower;
use crate::capture::{self, Connection, Outcome};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::units;

/// Time between two looks at the bar.
const FRAME: Duration = Duration::from_millis(200);

pub(super) fn backup(arguments: &args::Backup, connection: &Connection, console: &Console) -> Result<Exit, Failure> {
    let start = Instant::now();
    let interval = if console.draws() { FRAME } else { arguments.progress_interval };
    let request = arguments.request(connection.clone(), interval);
    let follower = Follower::new(console);
    let Outcome { time, images, bytes } = follower.follow(capture::backup(&request, &follower))?;
    let elapsed = start.elapsed();
    console.info(&format!(
        "the backup is done: {} in {}, {} in them, {} in all",
        units::count(images.len(), "image"),
        arguments.target.display(),
        units::size(bytes),
        units::duration(elapsed),
    ));
    let images: Vec<Value> =
        images.iter().map(|(path, level)| json!({ "path": path.to_string_lossy(), "level": level.as_str() })).collect();
    let fields = [
        ("time", time.into()),
        ("images", images.into()),
        ("bytes", bytes.into()),
        ("seconds", elapsed.as_secs_f64().into()),
    ];
    Ok(console.done(&fields))
}

pub(super) fn cleanup(arguments: &args::Cleanup, connection: &Connection, console: &Console) -> Result<Exit, Failure> {
    let follower = Follower::new(console);
    let removed = follower.follow(capture::remove_bitmaps(connection, arguments.uuid.as_deref(), &follower))?;
    match removed.len() {
        0 => console.info("there is no bitmap to remove"),
        count => console.info(&format!("removed {}", units::count(count, "bitmap"))),
    }
    Ok(console.done(&[("removed", removed.len().into())]))
}

pub(super) fn recover(arguments: &args::Recover, connection: &Connection, console: &Console) -> Result<Exit, Failure> {
    let follower = Follower::new(console);
    follower.follow(capture::recover(connection, arguments.target.as_deref(), &follower))?;
    console.info("all is in order");
    Ok(console.done(&[]))
}
