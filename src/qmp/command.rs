//! One command of QMP, as a value that can be compared, printed and sent.

use serde_json::{Map, Value};

/// A command and its arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    name: String,
    arguments: Map<String, Value>,
}

impl Command {
    /// A command without arguments.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), arguments: Map::new() }
    }

    /// The command with one more argument.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.arguments.insert(key.to_owned(), value.into());
        self
    }

    /// The name in QMP's schema.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The arguments by name.
    #[must_use]
    pub fn arguments(&self) -> &Map<String, Value> {
        &self.arguments
    }

    /// What is sent, without an `id`: `{"execute": …, "arguments": …}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("execute".to_owned(), self.name.clone().into());
        if !self.arguments.is_empty() {
            object.insert("arguments".to_owned(), self.arguments.clone().into());
        }
        object.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_what_qmp_reads() {
        assert_eq!(Command::new("stop").to_json().to_string(), r#"{"execute":"stop"}"#);
        let command = Command::new("job-cancel").with("id", "a");
        assert_eq!(command.to_json().to_string(), r#"{"arguments":{"id":"a"},"execute":"job-cancel"}"#);
    }
}
