//! What the bytes on a monitor's socket mean, both ways. There is no socket here, and no state but a line's beginning.

use serde_json::{Map, Value};

use super::command::Command;
use super::error::DecodeError;
use super::event::Event;
use super::lines::{Lines, TooLong};
use super::version::Version;
use crate::json;

/// The most bytes of a message. The longest one that QEMU is known to send, its schema, has 250 kB.
const LIMIT: usize = 16 << 20;

/// The most bytes of an event, of which many wait for whoever reads them. QEMU's have some hundreds.
const EVENT_LIMIT: usize = 64 << 10;

/// How much of a line that makes no sense is shown.
const EXCERPT: usize = 80;

/// What QEMU sends.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first one of a connection.
    Greeting(Version),
    /// A command was carried out.
    Return {
        /// The command's `id`, if it had one.
        id: Option<Value>,
        /// What it answers.
        value: Value,
    },
    /// A command was refused, or something that was sent is no command.
    Error {
        /// The command's `id`, if it had one and could be read.
        id: Option<Value>,
        /// `GenericError`, `CommandNotFound`, …
        class: String,
        /// Why, for people.
        desc: String,
    },
    /// Something happened.
    Event(Event),
}

impl Message {
    /// Reads one line.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, DecodeError> {
        Self::read(line).map_err(|what| DecodeError::Malformed { reason: format!("{what}: {}", excerpt(line)) })
    }

    fn read(line: &[u8]) -> Result<Self, String> {
        std::str::from_utf8(line).map_err(|error| format!("no UTF-8 from byte {}", error.valid_up_to()))?;
        if line.trim_ascii_end() == b"{" {
            return Err("JSON over several lines, which is not read: start the monitor without pretty=on".to_owned());
        }
        let value = json::parse(line).map_err(|error| format!("no JSON ({error})"))?;
        let Value::Object(mut object) = value else { return Err("no JSON object".to_owned()) };
        let id = object.remove("id");
        if let Some(value) = object.remove("return") {
            Ok(Self::Return { id, value })
        } else if let Some(error) = object.remove("error") {
            let text = |name: &str| error.get(name).and_then(Value::as_str).map(str::to_owned);
            let (class, desc) = text("class").zip(text("desc")).ok_or("an error without class or description")?;
            Ok(Self::Error { id, class, desc })
        } else if let Some(name) = object.get("event") {
            let name = name.as_str().ok_or("an event without a name")?;
            if line.len() > EVENT_LIMIT {
                return Err(format!("an event of {} bytes", line.len()));
            }
            Ok(Self::Event(Event::read(name, &object)))
        } else if let Some(greeting) = object.get("QMP") {
            let version = greeting.get("version").and_then(Version::parse).ok_or("a greeting without a version")?;
            Ok(Self::Greeting(version))
        } else {
            Err("neither greeting, reply nor event".to_owned())
        }
    }
}

/// The beginning of a line, for people: one line itself.
pub(crate) fn excerpt(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut letters = text.trim().chars();
    let start: String = letters.by_ref().take(EXCERPT).collect();
    format!("{start:?}{}", if letters.next().is_some() { "…" } else { "" })
}

/// Bytes in, messages out, however the stream is split into reads.
#[derive(Debug)]
pub struct Decoder {
    lines: Lines,
}

impl Decoder {
    /// A decoder at the beginning of a stream. A message has at most 16 MiB.
    #[must_use]
    pub fn new() -> Self {
        Self { lines: Lines::new(LIMIT) }
    }

    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.lines.feed(bytes);
    }

    /// The next message; `None` until more is fed.
    ///
    /// # Errors
    /// A line that is no message is left out, the one after it can be read; after one that is too long, nothing can.
    pub fn next_message(&mut self) -> Result<Option<Message>, DecodeError> {
        loop {
            match self.lines.next() {
                Ok(Some(line)) if line.iter().all(u8::is_ascii_whitespace) => {}
                Ok(Some(line)) => return Message::parse(&line).map(Some),
                Ok(None) => return Ok(None),
                Err(TooLong { limit }) => return Err(DecodeError::TooLong { limit }),
            }
        }
    }

    /// What has come of a message that is not whole yet.
    pub(super) fn partial(&self) -> &[u8] {
        self.lines.partial()
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

/// A command as it is sent, with its end of line.
#[must_use]
pub fn encode(id: &str, command: &Command) -> Vec<u8> {
    let mut message = Map::new();
    if let Value::Object(parts) = command.to_json() {
        message.extend(parts);
    }
    message.insert("id".to_owned(), id.into());
    let mut line = Value::from(message).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const TRANSCRIPT: &str = include_str!("../../tests/data/qmp/session.txt");

    /// All messages of reads of these lengths, over and over; the last one is an error perhaps.
    fn decode(bytes: &[u8], lengths: &[usize]) -> Vec<Result<Message, DecodeError>> {
        let (mut decoder, mut rest, mut messages) = (Decoder::new(), bytes, Vec::new());
        for length in lengths.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (read, later) = rest.split_at((*length).clamp(1, rest.len()));
            rest = later;
            decoder.feed(read);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => messages.push(Ok(message)),
                    Ok(None) => break,
                    Err(error @ DecodeError::Malformed { .. }) => messages.push(Err(error)),
                    Err(error) => return messages.into_iter().chain([Err(error)]).collect(),
                }
            }
        }
        messages
    }

    fn reason(line: &[u8]) -> String {
        Message::parse(line).unwrap_err().to_string()
    }

    #[test]
    fn a_session_with_qemu_is_read() {
        let messages: Vec<_> = decode(TRANSCRIPT.as_bytes(), &[4096]).into_iter().map(Result::unwrap).collect();
        let package = "Debian 1:7.2+dfsg-7+deb12u18+b3".to_owned();
        let error = |id, class: &str, desc: &str| Message::Error { id, class: class.into(), desc: desc.into() };
        let shutdown = Event {
            name: "SHUTDOWN".into(),
            data: json!({"guest": false, "reason": "host-qmp-quit"}),
            seconds: 1_795_434_940,
            microseconds: 314_145,
        };
        assert_eq!(
            messages,
            [
                Message::Greeting(Version { major: 7, minor: 2, micro: 22, package }),
                Message::Return { id: Some(json!(1)), value: json!({}) },
                error(Some(json!(1)), "CommandNotFound", "The command nope has not been found"),
                error(None, "GenericError", "JSON parse error, expecting value"),
                Message::Event(shutdown),
                Message::Return { id: Some(json!("a-2")), value: json!({}) },
            ]
        );
    }

    #[test]
    fn a_command_is_one_line_with_an_id() {
        let command = Command::new("job-cancel").with("id", "a\nb");
        let line = String::from_utf8(encode("7-1", &command)).unwrap();
        assert_eq!(line, "{\"arguments\":{\"id\":\"a\\nb\"},\"execute\":\"job-cancel\",\"id\":\"7-1\"}\n");
    }

    #[test]
    fn garbage_is_said_to_be_garbage() {
        assert_eq!(reason(b"{\"a\": \xff}"), "no UTF-8 from byte 6: \"{\\\"a\\\": \u{fffd}}\"");
        assert!(reason(b"QEMU 10.0.2 monitor - type 'help'\r").starts_with("no JSON ("));
        assert!(reason(b"[]").starts_with("no JSON object"));
        assert!(reason(b"{}").starts_with("neither"));
        assert!(reason(br#"{"event": 1}"#).starts_with("an event without a name"));
        assert!(
            reason(format!("{{\"event\": {:?}}}", "x".repeat(1 << 16)).as_bytes()).starts_with("an event of 65549 b")
        );
        assert!(reason(br#"{"error": {"class": "GenericError"}}"#).starts_with("an error without"));
        assert!(reason(br#"{"QMP": {"version": {"qemu": {"major": -1}}}}"#).starts_with("a greeting without"));
        assert!(reason("[".repeat(100_000).as_bytes()).starts_with("no JSON (recursion limit"));
        assert!(reason(&vec![b'x'; 1000]).len() < 150);
    }

    #[test]
    fn a_line_without_end_is_an_error_and_needs_little_memory() {
        let mut decoder = Decoder::new();
        let megabyte = vec![b' '; 1 << 20];
        for _ in 0..64 {
            decoder.feed(&megabyte);
            assert!(decoder.partial().len() <= LIMIT);
        }
        assert_eq!(decoder.next_message(), Err(DecodeError::TooLong { limit: LIMIT }));
    }

    proptest! {
        #[test]
        fn messages_do_not_depend_on_how_they_are_split(lengths in prop::collection::vec(1..200usize, 1..20)) {
            prop_assert_eq!(decode(TRANSCRIPT.as_bytes(), &lengths), decode(TRANSCRIPT.as_bytes(), &[usize::MAX]));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..40),
                    prop::sample::select(vec!["{\"QMP\":", "\"event\":", "{\"error\":", "\"id\"", "{", "}", "\r\n", "1"])
                        .prop_map(|text| text.as_bytes().to_vec()),
                ],
                0..40,
            ),
            length in 1..60usize,
        ) {
            let bytes = pieces.concat();
            prop_assert_eq!(decode(&bytes, &[length]), decode(&bytes, &[usize::MAX]));
        }
    }
}
