//! The task that owns a monitor's socket. It waits for nobody but the socket: a caller that is slow or gone is no reason
//! to stop reading.

use std::collections::{HashMap, VecDeque};
use std::io::Cursor;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, sleep};

use super::codec::{Decoder, Message};
use super::error::End;
use super::event::Event;
use super::socket::Stream;

/// Bytes of one read at most.
const CHUNK: usize = 64 << 10;

/// How long what was answered before is read where nothing can be sent any more.
const DRAIN: Duration = Duration::from_secs(1);

/// A command on its way.
pub(super) struct Request {
    pub(super) id: String,
    pub(super) line: Vec<u8>,
    pub(super) reply: oneshot::Sender<Reply>,
}

/// What QEMU said to a command.
pub(super) enum Reply {
    Return(Value),
    Error { class: String, desc: String },
}

/// What is known of the connection outside of the task.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Set before the waiting commands are let go.
    pub(super) end: OnceLock<End>,
    /// Replies that nobody waited for.
    pub(super) unclaimed: AtomicU64,
}

pub(super) struct Task {
    pub(super) stream: Box<dyn Stream>,
    pub(super) decoder: Decoder,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) state: Arc<State>,
}

impl Task {
    /// Serves until the connection ends or the last monitor is dropped.
    pub(super) async fn serve(self) {
        let Self { stream, decoder, mut requests, events, state } = self;
        let mut replies = Replies { waiting: HashMap::new(), events, state };
        let end = exchange(stream, decoder, &mut requests, &mut replies).await;
        // whoever is let go by the drops that follow looks here for the reason
        if let Some(end) = end {
            let _ = replies.state.end.set(end);
        }
    }
}

/// `None` when nobody sends commands any more.
async fn exchange(
    stream: Box<dyn Stream>,
    mut decoder: Decoder,
    requests: &mut mpsc::UnboundedReceiver<Request>,
    replies: &mut Replies,
) -> Option<End> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut queue = VecDeque::new();
    let mut sending = Cursor::new(Vec::new());
    let mut broken = None;
    let drained = sleep(DRAIN);
    tokio::pin!(drained);
    loop {
        if let Err(error) = replies.take(&mut decoder) {
            return Some(End::Undecodable(error));
        }
        if done(&sending) {
            sending = Cursor::new(replies.next_line(&mut queue));
        }
        tokio::select! {
            request = requests.recv() => queue.push_back(request?),
            read = reader.read_buf(&mut chunk) => match read {
                Ok(0) => return Some(End::Lost(broken)),
                Ok(_) => {
                    decoder.feed(&chunk);
                    chunk.clear();
                }
                Err(error) => return Some(End::Lost(Some(Arc::new(error)))),
            },
            // what was answered before the other side closed is still read
            written = writer.write_buf(&mut sending), if broken.is_none() && !done(&sending) => {
                if let Err(error) = written {
                    broken = Some(Arc::new(error));
                    drained.as_mut().reset(Instant::now() + DRAIN);
                }
            }
            // the other side need not have closed: the system may have had no memory
            () = &mut drained, if broken.is_some() => return Some(End::Lost(broken)),
        }
    }
}

fn done(sending: &Cursor<Vec<u8>>) -> bool {
    usize::try_from(sending.position()).is_ok_and(|position| position >= sending.get_ref().len())
}

/// Who gets what comes.
struct Replies {
    waiting: HashMap<String, oneshot::Sender<Reply>>,
    events: broadcast::Sender<Event>,
    state: Arc<State>,
}

impl Replies {
    /// The next command to be sent, or nothing. One whose caller has given up is not sent any more.
    fn next_line(&mut self, queue: &mut VecDeque<Request>) -> Vec<u8> {
        self.waiting.retain(|_, reply| !reply.is_closed());
        queue.retain(|request| !request.reply.is_closed());
        let Some(request) = queue.pop_front() else { return Vec::new() };
        self.waiting.insert(request.id, request.reply);
        request.line
    }

    fn take(&mut self, decoder: &mut Decoder) -> Result<(), super::DecodeError> {
        while let Some(message) = decoder.next_message()? {
            match message {
                Message::Return { id, value } => self.answer(id.as_ref(), Reply::Return(value)),
                Message::Error { id, class, desc } => self.answer(id.as_ref(), Reply::Error { class, desc }),
                // without subscribers it goes nowhere
                Message::Event(event) => drop(self.events.send(event)),
                Message::Greeting(_) => {}
            }
        }
        Ok(())
    }

    fn answer(&mut self, id: Option<&Value>, reply: Reply) {
        let waiting = id.and_then(Value::as_str).and_then(|id| self.waiting.remove(id));
        // the caller may have given up, and the id may be of a client before us, or missing
        if waiting.is_none_or(|waiting| waiting.send(reply).is_err()) {
            self.state.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
    }
}
