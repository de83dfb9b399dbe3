//! What a monitor may send: each line is a message or an error, the same however the stream is split into reads.

use qmpbackup::qmp::{DecodeError, Decoder, Features, Message};

use super::input::Input;

pub(super) fn qmp_line(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let lengths: Vec<usize> = input.take(3).iter().map(|byte| usize::from(*byte) + 1).collect();
    let stream = input.rest();
    let whole = decode(stream, &[usize::MAX]);
    assert_eq!(whole, decode(stream, &lengths), "the messages depend on the reads");
    let lines = stream.split(|byte| *byte == b'\n').count() - 1;
    assert!(whole.len() <= lines, "more messages than lines");
    for message in whole {
        match message {
            Ok(Message::Return { value, .. }) => {
                // whatever it is, it has few features or it is a schema
                let features = Features::parse(&value);
                assert!(value.is_array() || features == Features::default(), "{value} has features");
            }
            Ok(Message::Greeting(version)) => assert!(!version.to_string().is_empty()),
            Ok(Message::Error { .. } | Message::Event(_)) => {}
            Err(DecodeError::Malformed { reason }) => {
                assert!(reason.len() < 2000 && !reason.contains('\n'), "{reason:?} is no line for people");
            }
            Err(DecodeError::TooLong { .. }) => panic!("{} bytes are too long", stream.len()),
        }
    }
}

/// All that is in a stream that is read in these lengths, over and over.
fn decode(mut stream: &[u8], lengths: &[usize]) -> Vec<Result<Message, DecodeError>> {
    let (mut decoder, mut messages) = (Decoder::new(), Vec::new());
    for length in lengths.iter().cycle() {
        if stream.is_empty() {
            break;
        }
        let (read, rest) = stream.split_at((*length).min(stream.len()));
        stream = rest;
        decoder.feed(read);
        while let Some(message) = decoder.next_message().transpose() {
            messages.push(message);
        }
    }
    messages
}
