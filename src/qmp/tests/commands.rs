use std::os::fd::AsFd;

use serde_json::json;

use super::*;
use crate::qmp::Error;

#[tokio::test]
async fn a_command_has_its_arguments_and_its_reply() {
    let (monitor, mut client) = connected().await;
    let command = Command::new("job-cancel").with("id", "a");
    let (reply, heard) = tokio::join!(monitor.execute(&command), client.serve(json!({"done": 1})));
    assert_eq!(reply.unwrap(), json!({"done": 1}));
    assert_eq!((&heard["execute"], &heard["arguments"]), (&json!("job-cancel"), &json!({"id": "a"})));
}

#[tokio::test]
async fn replies_find_their_commands_in_any_order() {
    let (monitor, mut client) = connected().await;
    let names = ["a", "b", "c"].map(Command::new);
    let [a, b, c] = names.each_ref().map(|command| monitor.execute(command));
    let (a, b, c, ()) = tokio::join!(a, b, c, async {
        let heard = [client.hear().await, client.hear().await, client.hear().await];
        for command in heard.iter().rev() {
            client.answer(command, command["execute"].clone()).await;
        }
    });
    assert_eq!([a, b, c].map(Result::unwrap), [json!("a"), json!("b"), json!("c")]);
}

#[tokio::test]
async fn a_refusal_has_class_and_description() {
    let (monitor, mut client) = connected().await;
    let (reply, ()) = tokio::join!(monitor.execute(stop()), async {
        let id = client.hear().await["id"].take();
        let error = json!({"class": "DeviceNotFound", "desc": "Device 'a' not found"});
        client.say(format!("{}\r\n", json!({"id": id, "error": error}))).await;
    });
    let error = reply.unwrap_err();
    assert_eq!(error.refused(), Some(("DeviceNotFound", "Device 'a' not found")));
    assert_eq!(error.to_string(), "stop: QEMU refuses: Device 'a' not found (DeviceNotFound)");
    assert!(!error.is_lost());
}

#[tokio::test]
async fn a_late_reply_disturbs_nobody() {
    let (monitor, mut client) = connected().await;
    let error = monitor.execute_within(stop(), SHORT).await.unwrap_err();
    assert_eq!(error.to_string(), "stop: QEMU has not answered within 250ms");
    assert!(!error.is_lost());
    let late = client.hear().await;
    let cont = Command::new("cont");
    let (reply, ()) = tokio::join!(monitor.execute(&cont), async {
        client.answer(&late, json!("late")).await;
        client.serve(json!("in time")).await;
    });
    assert_eq!(reply.unwrap(), json!("in time"));
    assert_eq!(monitor.unclaimed(), 1);
}

#[tokio::test]
async fn a_reply_without_a_waiter_is_dropped() {
    let (monitor, mut client) = connected().await;
    for stray in [
        json!({"return": {}, "id": "0-0"}),
        json!({"return": {}, "id": 0}),
        json!({"return": {}}),
        json!({"error": {"class": "GenericError", "desc": "JSON parse error, expecting value"}}),
    ] {
        client.say(format!("{stray}\r\n")).await;
    }
    let (reply, _) = tokio::join!(monitor.execute(stop()), client.serve(json!(1)));
    assert_eq!(reply.unwrap(), json!(1));
    assert_eq!(monitor.unclaimed(), 4);
}

#[tokio::test]
async fn two_connections_never_use_the_same_id() {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let (monitor, mut client) = connected().await;
        let (_, heard) = tokio::join!(monitor.execute(stop()), client.serve(json!({})));
        ids.push(heard["id"].to_string());
    }
    assert_ne!(ids[0], ids[1]);
}

/// More than the kernel takes from a writer whose reader does not read.
fn big(name: &str) -> Command {
    Command::new(name).with("data", "x".repeat(4 << 20))
}

#[tokio::test]
async fn a_command_that_was_given_up_before_it_was_sent_is_not_sent() {
    let (monitor, mut client) = connected().await;
    let first = big("first");
    let (first, second) = tokio::join!(monitor.execute_within(&first, SHORT), monitor.execute_within(stop(), SHORT));
    assert!(matches!(first, Err(Error::Timeout { .. })) && matches!(second, Err(Error::Timeout { .. })));
    let third = Command::new("third");
    let (third, heard) = tokio::join!(monitor.execute(&third), async {
        [client.hear().await, client.serve(json!(3)).await].map(|heard| heard["execute"].clone())
    });
    assert_eq!(third.unwrap(), json!(3));
    assert_eq!(heard, [json!("first"), json!("third")]);
}

#[tokio::test]
async fn replies_are_read_while_qemu_does_not_read() {
    let (monitor, mut client) = connected().await;
    let late = big("late");
    let (reply, ()) = tokio::join!(monitor.execute(stop()), async {
        let command = client.hear().await;
        let giving_up = monitor.execute_within(&late, SHORT).await;
        assert!(matches!(giving_up, Err(Error::Timeout { .. })), "{giving_up:?}");
        client.answer(&command, json!("early")).await;
    });
    assert_eq!(reply.unwrap(), json!("early"));
}

#[tokio::test]
async fn a_connection_that_ends_amid_a_line_fails_all_commands_at_once() {
    let (monitor, mut client) = connected().await;
    let cont = Command::new("cont");
    let (a, b, ()) = tokio::join!(monitor.execute(stop()), monitor.execute(&cont), async {
        client.hear().await;
        client.hear().await;
        client.say("{\"return\": {").await;
        drop(client);
    });
    for (error, name) in [(a, "stop"), (b, "cont"), (monitor.execute(stop()).await, "stop")] {
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Lost { command: Some(command), .. } if command == name), "{error:?}");
        assert!(error.is_lost());
        assert!(error.to_string().starts_with(&format!("{name}: the connection")), "{error}");
    }
}

#[tokio::test]
async fn the_last_replies_before_the_end_are_heard() {
    let (monitor, mut client) = connected().await;
    let quit = Command::new("quit");
    let (reply, ()) = tokio::join!(monitor.execute(&quit), async {
        client.serve(json!("bye")).await;
        drop(client);
    });
    assert_eq!(reply.unwrap(), json!("bye"));
    assert!(matches!(monitor.execute(&quit).await, Err(Error::Lost { .. })));
}

/// A system that has no memory for it takes no bytes, while the other side goes on.
#[tokio::test]
async fn a_connection_that_takes_no_more_commands_is_lost_when_the_replies_are_heard() {
    let (monitor, mut client) = connected().await;
    let (first, second, ()) = tokio::join!(monitor.execute(stop()), monitor.execute(stop()), async {
        let first = client.hear().await;
        client.hear().await;
        let stream = client.stream.get_ref().as_fd().try_clone_to_owned().unwrap();
        std::os::unix::net::UnixStream::from(stream).shutdown(std::net::Shutdown::Read).unwrap();
        let third = monitor.execute(stop());
        let (third, ()) = tokio::join!(third, async {
            tokio::time::sleep(SHORT).await;
            client.answer(&first, json!("first")).await;
        });
        assert!(third.unwrap_err().is_lost());
    });
    assert_eq!(first.unwrap(), json!("first"));
    assert!(second.unwrap_err().is_lost());
}

#[tokio::test]
async fn garbage_ends_the_connection_with_a_reason() {
    for (garbage, reason) in [
        (&b"{\"return\": \"\xff\"}\r\n"[..], "no UTF-8 from byte 12"),
        (b"bad\r\n", "no JSON (expected value"),
        (b"[]\r\n", "no JSON object"),
    ] {
        let (monitor, mut client) = connected().await;
        let (reply, ()) = tokio::join!(monitor.execute(stop()), client.say(garbage));
        for error in [reply.unwrap_err(), monitor.execute(stop()).await.unwrap_err()] {
            assert!(matches!(&error, Error::Malformed { reason: said } if said.starts_with(reason)), "{error:?}");
            assert!(error.is_lost());
        }
        let mut rest = client.line().await;
        if !rest.is_empty() {
            rest = client.line().await;
        }
        assert!(rest.is_empty(), "it is still open");
    }
}

#[tokio::test]
async fn a_line_without_end_ends_the_connection() {
    let (monitor, mut client) = connected().await;
    let (reply, ()) = tokio::join!(monitor.execute(stop()), client.say(vec![b' '; (16 << 20) + 1]));
    assert!(matches!(reply, Err(Error::TooLong { limit: 0x0100_0000 })), "{reply:?}");
}

#[tokio::test]
async fn the_socket_is_closed_with_the_last_monitor() {
    let (monitor, mut client) = connected().await;
    let other = monitor.clone();
    let mut events = monitor.events();
    drop(monitor);
    let (reply, _) = tokio::join!(other.execute(stop()), client.serve(json!(1)));
    assert_eq!(reply.unwrap(), json!(1));
    drop(other);
    assert!(client.line().await.is_empty());
    assert!(events.next().await.is_err());
}
