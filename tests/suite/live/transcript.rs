//! What went through a proxy, in order: who said what.

use serde_json::Value;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Entry {
    /// A client has come.
    Connected,
    /// A command, whatever the hook did with it.
    Command(Value),
    /// What the client got for an answer, or would have got.
    Reply(Value),
    Event(Value),
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Transcript(pub(crate) Vec<Entry>);

impl Transcript {
    /// The names of the commands of the last run.
    pub(crate) fn commands(&self) -> Vec<&str> {
        let start = self.0.iter().rposition(|entry| *entry == Entry::Connected).unwrap_or(0);
        self.0[start..].iter().filter_map(Entry::command).collect()
    }
}

impl Entry {
    fn command(&self) -> Option<&str> {
        match self {
            Self::Command(command) => command["execute"].as_str(),
            _ => None,
        }
    }
}
