//! An agent's socket with all that can be behind it.

use std::io;
use std::time::Instant;

use serde_json::json;

use super::*;
use crate::qmp::fake::{Client, Server};

const SHORT: Duration = Duration::from_millis(250);
const LONG: Duration = Duration::from_secs(10);

/// Hears the command of a synchronisation, and returns its number.
async fn asked(client: &mut Client) -> Value {
    let line = client.line().await;
    assert_eq!(line.first(), Some(&0xff), "{:?}", String::from_utf8_lossy(&line));
    let mut command: Value = serde_json::from_slice(&line[1..]).unwrap();
    assert_eq!(command["execute"], "guest-sync-delimited");
    command["arguments"]["id"].take()
}

async fn agree(client: &mut Client, id: &Value) {
    client.say([&b"\xff"[..], json!({"return": id}).to_string().as_bytes(), b"\n"].concat()).await;
}

async fn sync(client: &mut Client) {
    let id = asked(client).await;
    agree(client, &id).await;
}

/// Hears a command, and says this.
async fn serve(client: &mut Client, name: &str, reply: Value) {
    assert_eq!(client.hear().await, json!({"execute": name}));
    client.say(format!("{reply}\n")).await;
}

/// Both ends of a connection.
async fn connected(limit: Duration) -> (Agent, Client) {
    let server = Server::new();
    let (agent, client) = tokio::join!(Agent::connect(&server.address, limit), async {
        let mut client = server.accept().await;
        sync(&mut client).await;
        client
    });
    (agent.unwrap(), client)
}

/// What a client is told that says this before it gets in step.
async fn greeted_with(noise: &[u8]) -> Result<FsStatus, Error> {
    let server = Server::new();
    let (status, ()) = tokio::join!(
        async {
            let mut agent = Agent::connect(&server.address, LONG).await?;
            agent.status().await
        },
        async {
            let mut client = server.accept().await;
            let id = asked(&mut client).await;
            client.say(noise).await;
            agree(&mut client, &id).await;
            serve(&mut client, "guest-fsfreeze-status", json!({"return": "thawed"})).await;
        }
    );
    status
}

#[tokio::test]
async fn file_systems_freeze_and_thaw() {
    let (mut agent, mut client) = connected(LONG).await;
    let ((), ()) = tokio::join!(
        async {
            assert_eq!(agent.status().await.unwrap(), FsStatus::Thawed);
            assert_eq!(agent.freeze(LONG).await.unwrap(), 3);
            assert_eq!(agent.status().await.unwrap(), FsStatus::Frozen);
            assert_eq!(agent.thaw().await.unwrap(), 2);
        },
        async {
            serve(&mut client, "guest-fsfreeze-status", json!({"return": "thawed"})).await;
            serve(&mut client, "guest-fsfreeze-freeze", json!({"return": 3})).await;
            serve(&mut client, "guest-fsfreeze-status", json!({"return": "frozen"})).await;
            serve(&mut client, "guest-fsfreeze-thaw", json!({"return": 2})).await;
        }
    );
}

#[tokio::test]
async fn what_was_said_before_the_delimiter_is_not_heard() {
    for noise in [
        &b"{\"return\": \"frozen\"}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n"[..],
        b"{\"return\": {\"half\": \"a li",
        b"\xff{\"return\": 1}\n\xff{\"return\": 2}\n{\"return\": \"frozen\"}\n",
        b"\xff\xff\n\r\n \n{\"a\":\xfe\xff",
        b"login: \x1b[2J\r\n",
    ] {
        let status = greeted_with(noise).await;
        assert!(matches!(status, Ok(FsStatus::Thawed)), "{:?}: {status:?}", String::from_utf8_lossy(noise));
    }
}

#[tokio::test]
async fn megabytes_before_the_delimiter_are_not_kept() {
    assert!(matches!(greeted_with(&vec![b'x'; 5 << 20]).await, Ok(FsStatus::Thawed)));
}

#[tokio::test]
async fn the_number_without_the_delimiter_is_no_answer() {
    let server = Server::new();
    let (agent, _client) = tokio::join!(Agent::connect(&server.address, SHORT), async {
        let mut client = server.accept().await;
        let id = asked(&mut client).await;
        client.say(format!("{}\n", json!({"return": id}))).await;
        client
    });
    assert!(matches!(agent, Err(Error::NoAnswer { .. })), "{agent:?}");
}

#[tokio::test]
async fn a_socket_without_an_agent_behind_it_says_so() {
    let server = Server::new();
    let begun = Instant::now();
    let error = Agent::connect(&server.address, SHORT).await.unwrap_err();
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
    assert!(matches!(error, Error::NoAnswer { waited: SHORT, .. }), "{error:?}");
    assert!(error.to_string().contains("within 250ms: it may not run in the guest"), "{error}");
}

#[tokio::test]
async fn where_nothing_listens_there_is_no_agent() {
    let folder = tempfile::tempdir().unwrap();
    let error = Agent::connect(&Address::Unix(folder.path().join("none")), LONG).await.unwrap_err();
    assert!(matches!(&error, Error::Connect { source, .. } if source.kind() == io::ErrorKind::NotFound), "{error:?}");
}

#[tokio::test]
async fn after_a_missing_answer_both_get_in_step_again() {
    let (mut agent, mut client) = connected(SHORT).await;
    let error = agent.freeze(SHORT).await.unwrap_err();
    assert!(matches!(&error, Error::NoAnswer { command, .. } if command == "guest-fsfreeze-freeze"), "{error:?}");
    assert_eq!(client.hear().await["execute"], "guest-fsfreeze-freeze");
    let (thawed, ()) = tokio::join!(agent.thaw(), async {
        let id = asked(&mut client).await;
        client.say("{\"return\": 77}\n").await;
        agree(&mut client, &id).await;
        serve(&mut client, "guest-fsfreeze-thaw", json!({"return": 5})).await;
    });
    assert_eq!(thawed.unwrap(), 5);
    // and once is enough
    let (status, ()) =
        tokio::join!(agent.status(), serve(&mut client, "guest-fsfreeze-status", json!({"return": "thawed"})));
    assert_eq!(status.unwrap(), FsStatus::Thawed);
}

#[tokio::test]
async fn a_dropped_command_is_a_missing_answer() {
    let (mut agent, mut client) = connected(LONG).await;
    assert!(tokio::time::timeout(SHORT, agent.freeze(LONG)).await.is_err());
    client.hear().await;
    let (status, ()) = tokio::join!(agent.status(), async {
        client.say("{\"return\": 77}\n").await;
        sync(&mut client).await;
        serve(&mut client, "guest-fsfreeze-status", json!({"return": "frozen"})).await;
    });
    assert_eq!(status.unwrap(), FsStatus::Frozen);
}

#[tokio::test]
async fn a_refusal_has_a_description_and_leaves_both_in_step() {
    let (mut agent, mut client) = connected(LONG).await;
    let desc = "Command guest-fsfreeze-freeze has been disabled: the command is not allowed";
    let error = json!({"error": {"class": "CommandNotFound", "desc": desc}});
    let (refused, ()) = tokio::join!(agent.freeze(LONG), serve(&mut client, "guest-fsfreeze-freeze", error));
    let refused = refused.unwrap_err();
    assert!(matches!(&refused, Error::Refused { desc: told, .. } if told == desc), "{refused:?}");
    let (thawed, ()) = tokio::join!(agent.thaw(), serve(&mut client, "guest-fsfreeze-thaw", json!({"return": 0})));
    assert_eq!(thawed.unwrap(), 0);
}

#[tokio::test]
async fn a_closed_connection_is_lost_for_good() {
    let (mut agent, mut client) = connected(LONG).await;
    let (thawed, ()) = tokio::join!(agent.thaw(), async {
        client.hear().await;
        client.say("{\"return\":").await;
        drop(client);
    });
    assert!(matches!(thawed, Err(Error::Lost { .. })), "{thawed:?}");
    let status = agent.status().await;
    assert!(matches!(status, Err(Error::Lost { .. })), "{status:?}");
}

#[tokio::test]
async fn answers_that_make_no_sense_are_malformed() {
    for (reply, reason) in [
        ("{\"return\": -1}\n", "it returns \"-1\""),
        ("{\"return\": \"7\"}\n", "it returns"),
        ("frozen\n", "no JSON"),
        ("{\"event\": \"STOP\"}\n", "it is a monitor's event"),
        (&"x".repeat((1 << 20) + 1), "it has more than 1048576 bytes"),
    ] {
        let (mut agent, mut client) = connected(LONG).await;
        let (frozen, ()) = tokio::join!(agent.freeze(LONG), async {
            client.hear().await;
            client.say(reply).await;
        });
        let Err(Error::Malformed { reason: said, .. }) = &frozen else { panic!("{frozen:?}") };
        assert!(said.starts_with(reason), "{said}");
    }
}

#[tokio::test]
async fn after_an_answer_that_is_no_json_both_get_in_step_again() {
    let (mut agent, mut client) = connected(LONG).await;
    let (frozen, ()) = tokio::join!(agent.freeze(LONG), async {
        client.hear().await;
        client.say("{\n\"return\": 1}\n").await;
    });
    assert!(matches!(frozen, Err(Error::Malformed { .. })), "{frozen:?}");
    let (thawed, ()) = tokio::join!(agent.thaw(), async {
        sync(&mut client).await;
        serve(&mut client, "guest-fsfreeze-thaw", json!({"return": 1})).await;
    });
    assert_eq!(thawed.unwrap(), 1);
}

#[tokio::test]
async fn an_agent_supports_the_freeze_if_both_ways_are_enabled() {
    let info = |thaw: Value| {
        let enabled = |name: &str| json!({"name": name, "enabled": true, "success-response": true});
        let commands =
            [enabled("guest-fsfreeze-status"), enabled("guest-fsfreeze-freeze"), enabled("guest-ping"), thaw];
        json!({"return": {"version": "10.0.2", "supported_commands": commands}})
    };
    let (mut agent, mut client) = connected(LONG).await;
    for (thaw, expected) in [
        (json!({"name": "guest-fsfreeze-thaw", "enabled": true}), true),
        (json!({"name": "guest-fsfreeze-thaw", "enabled": false}), false),
        (json!({"name": "guest-fsfreeze-thaw-not", "enabled": true}), false),
        (json!(null), false),
    ] {
        let (supported, ()) =
            tokio::join!(agent.supports_freeze(), serve(&mut client, "guest-info", info(thaw.clone())));
        assert_eq!(supported.unwrap(), expected, "{thaw}");
    }
    let (supported, ()) =
        tokio::join!(agent.supports_freeze(), serve(&mut client, "guest-info", json!({"return": {}})));
    assert!(matches!(supported, Err(Error::Malformed { .. })));
}
