//! A monitor against servers that do what QEMU does, and what it does not.

mod commands;
mod connect;
mod events;

use std::sync::LazyLock;
use std::time::Duration;

use super::fake::{Client, Server};
use super::{Command, Limits, Monitor};

/// Nothing that is waited for in vain takes longer.
const SHORT: Duration = Duration::from_millis(250);

const LIMITS: Limits = Limits { connect: Duration::from_secs(10), command: Duration::from_secs(10) };

/// Both ends of a connection.
async fn connected() -> (Monitor, Client) {
    let server = Server::new();
    let (monitor, client) = tokio::join!(Monitor::connect(&server.address, LIMITS), async {
        let mut client = server.accept().await;
        client.greet().await;
        client
    });
    (monitor.unwrap(), client)
}

fn stop() -> &'static Command {
    static STOP: LazyLock<Command> = LazyLock::new(|| Command::new("stop"));
    &STOP
}
