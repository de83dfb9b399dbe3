use std::io;

use serde_json::json;
use tokio::net::{TcpListener, UnixSocket, UnixStream};
use tokio::task::JoinSet;

use super::*;
use crate::qmp::fake::GREETING;
use crate::qmp::{Address, Error, Peer};

const IMPATIENT: Limits = Limits { connect: SHORT, command: SHORT };

/// What becomes of a connection to a server that says this first, and hangs up or does not.
async fn told(first: &[u8], stays: bool) -> Error {
    let server = Server::new();
    let (monitor, _) = tokio::join!(Monitor::connect(&server.address, IMPATIENT), async {
        let mut client = server.accept().await;
        client.say(first).await;
        stays.then_some(client)
    });
    monitor.unwrap_err()
}

#[tokio::test]
async fn a_monitor_knows_who_is_there() {
    let (monitor, _client) = connected().await;
    assert_eq!(monitor.version().to_string(), "10.0.2");
    assert_eq!(monitor.version().package, "Debian 1:10.0.2");
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    let pid = i32::try_from(std::process::id()).unwrap();
    assert_eq!(monitor.peer(), Some(&Peer { uid, gid, pid: Some(pid) }));
}

#[tokio::test]
async fn a_greeting_may_come_byte_by_byte() {
    let server = Server::new();
    let (monitor, _) = tokio::join!(Monitor::connect(&server.address, LIMITS), async {
        let mut client = server.accept().await;
        for byte in GREETING.bytes() {
            client.say([byte]).await;
            tokio::task::yield_now().await;
        }
        client.serve(json!({})).await
    });
    assert_eq!(monitor.unwrap().version().major, 10);
}

#[tokio::test]
async fn what_a_client_before_us_asked_for_is_not_the_greeting() {
    let server = Server::new();
    let (monitor, ()) = tokio::join!(Monitor::connect(&server.address, LIMITS), async {
        let mut client = server.accept().await;
        client.say("{\"return\": {}, \"id\": 1}\r\n{\"event\": \"STOP\"}\r\n").await;
        client.greet().await;
    });
    assert_eq!(monitor.unwrap().version().major, 10);
}

#[tokio::test]
async fn a_monitor_that_serves_another_client_says_nothing() {
    let server = Server::new();
    let error = Monitor::connect(&server.address, IMPATIENT).await.unwrap_err();
    assert!(matches!(error, Error::NoGreeting { waited: SHORT, .. }), "{error:?}");
    assert!(error.to_string().contains("no greeting within 250ms"), "{error}");
}

/// Connects until the kernel's queue is full.
async fn crowd(path: &std::path::Path) -> Vec<UnixStream> {
    let mut clients = Vec::new();
    loop {
        match UnixStream::connect(path).await {
            Ok(client) => clients.push(client),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return clients,
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn where_others_wait_already_one_waits_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let socket = UnixSocket::new_stream().unwrap();
    socket.bind(&path).unwrap();
    let listener = socket.listen(0).unwrap();
    let crowd = crowd(&path).await;
    let address = Address::Unix(path);
    let error = Monitor::connect(&address, IMPATIENT).await.unwrap_err();
    assert!(matches!(error, Error::NoGreeting { .. }), "{error:?}");

    let mut served = JoinSet::new();
    served.spawn(async move { Monitor::connect(&address, LIMITS).await });
    tokio::task::yield_now().await;
    for _ in crowd {
        listener.accept().await.unwrap();
    }
    let stream = tokio::io::BufReader::new(listener.accept().await.unwrap().0);
    Client { stream }.greet().await;
    assert_eq!(served.join_next().await.unwrap().unwrap().unwrap().version().major, 10);
}

#[tokio::test]
async fn where_nothing_listens_there_is_no_monitor() {
    let folder = tempfile::tempdir().unwrap();
    let error = Monitor::connect(&Address::Unix(folder.path().join("none")), LIMITS).await.unwrap_err();
    let Error::Connect { source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn other_sockets_are_no_monitors() {
    for (first, what) in [
        (&b"QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) "[..], "\"QEMU 10.0.2 monitor - type"),
        (b"SSH-2.0-OpenSSH_9.2", "it says \"SSH-2.0-OpenSSH_9.2\", and no more"),
        (b"\xff\xfe\r\n", "no UTF-8 from byte 0"),
        (b"{\"hello\": 1}\r\n", "neither greeting, reply nor event"),
    ] {
        let error = told(first, true).await;
        assert!(matches!(error, Error::NotQmp { .. }), "{error:?}");
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[tokio::test]
async fn a_monitor_that_hangs_up_is_lost() {
    for first in ["", "{\"QMP\": {", GREETING] {
        let error = told(first.as_bytes(), false).await;
        assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_monitor_that_stops_after_the_greeting_times_out() {
    let error = told(GREETING.as_bytes(), true).await;
    assert!(matches!(&error, Error::Timeout { command, .. } if command == "qmp_capabilities"), "{error:?}");
}

#[tokio::test]
async fn a_monitor_may_listen_on_tcp() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = Address::Tcp { host: "localhost".to_owned(), port: listener.local_addr().unwrap().port() };
    let (monitor, ()) = tokio::join!(Monitor::connect(&address, LIMITS), async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = listener.accept().await.unwrap().0;
        stream.write_all(GREETING.as_bytes()).await.unwrap();
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            stream.read_buf(&mut line).await.unwrap();
        }
        let command: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let reply = json!({"return": {}, "id": command["id"]}).to_string() + "\r\n";
        stream.write_all(reply.as_bytes()).await.unwrap();
    });
    assert_eq!(monitor.unwrap().peer(), None);
}
