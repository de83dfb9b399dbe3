//! What stands in for QEMU and its guest in tests: a socket that says what it is told to.

use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::Address;

pub(crate) const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian 1:10.0.2"}, "#,
    r#""capabilities": ["oob"]}}"#,
    "\r\n"
);

pub(crate) struct Server {
    listener: UnixListener,
    pub(crate) address: Address,
    _folder: TempDir,
}

impl Server {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        Self { listener: UnixListener::bind(&path).unwrap(), address: Address::Unix(path), _folder: folder }
    }

    pub(crate) async fn accept(&self) -> Client {
        Client { stream: BufReader::new(self.listener.accept().await.unwrap().0) }
    }
}

/// Who has connected.
pub(crate) struct Client {
    pub(crate) stream: BufReader<UnixStream>,
}

impl Client {
    pub(crate) async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// The next line as it came; empty at the end.
    pub(crate) async fn line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        let read = self.stream.read_until(b'\n', &mut line);
        tokio::time::timeout(Duration::from_secs(10), read).await.expect("a line or the end").unwrap();
        line
    }

    /// The next command.
    pub(crate) async fn hear(&mut self) -> Value {
        let line = self.line().await;
        serde_json::from_slice(&line).unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&line)))
    }

    /// Answers a command of QMP.
    pub(crate) async fn answer(&mut self, command: &Value, value: Value) {
        self.say(format!("{}\r\n", json!({"return": value, "id": command["id"]}))).await;
    }

    /// Hears a command, which is returned, and answers it.
    pub(crate) async fn serve(&mut self, value: Value) -> Value {
        let command = self.hear().await;
        self.answer(&command, value).await;
        command
    }

    /// Greets and negotiates.
    pub(crate) async fn greet(&mut self) {
        self.say(GREETING).await;
        assert_eq!(self.serve(json!({})).await["execute"], "qmp_capabilities");
    }
}
