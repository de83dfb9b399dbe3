//! `qmpbackup backup --dry-run`: the commands that QEMU would get.

use super::args;
use super::follow::Follower;
use crate::capture::{self, Connection};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::text;

pub(super) fn run(arguments: &args::Backup, connection: &Connection, console: &Console) -> Result<Exit, Failure> {
    let request = arguments.request(connection.clone(), arguments.progress_interval);
    let follower = Follower::new(console);
    let plan = follower.follow(capture::dry_run(&request, &follower))?;
    let phases = [
        ("lock", "before there is anything of the run", &plan.lock),
        ("prepare", "while the guest works", &plan.prepare),
        ("moment", "the moment of the snapshot", &plan.moment),
        ("start", "while the guest works again", &plan.start),
    ];
    for (phase, meaning, commands) in phases {
        if console.is_json() {
            for command in commands {
                console.event("command", &[("phase", phase.into()), ("command", command.to_json())]);
            }
        } else if !commands.is_empty() {
            let lines = commands.iter().map(|command| text::json(&command.to_json()));
            console.result(&std::iter::once(format!("# {phase}: {meaning}")).chain(lines).collect::<Vec<_>>())?;
        }
    }
    Ok(console.done(&[]))
}
