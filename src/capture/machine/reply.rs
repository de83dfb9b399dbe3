//! Fields of QMP replies. A reply that is not what QEMU's schema promises gets an error, never a guess.

use serde_json::Value;

/// A reply of QEMU's that does not fit its schema, or another reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A field is missing or has another type.
    #[error("the reply to {reply} has no {want} {field}")]
    Field {
        /// The command.
        reply: &'static str,
        /// The field's name.
        field: &'static str,
        /// Its type.
        want: &'static str,
    },
    /// One reply names a node that another does not have: the graph changed in between, perhaps.
    #[error("{reply} does not know the node {node}")]
    NoNode {
        /// The command.
        reply: &'static str,
        /// The node's name.
        node: String,
    },
    /// The graph goes round in circles, or deeper than any that a machine runs on.
    #[error("more than {limit} nodes lie below {node}")]
    Depth {
        /// The node at the top.
        node: String,
        /// How many nodes are walked.
        limit: usize,
    },
}

/// A part of the reply to a command.
#[derive(Clone, Copy)]
pub(crate) struct Reply<'a> {
    command: &'static str,
    value: &'a Value,
}

impl<'a> Reply<'a> {
    pub(crate) const fn new(command: &'static str, value: &'a Value) -> Self {
        Self { command, value }
    }

    /// The members of the list that this is.
    pub(crate) fn list(self, field: &'static str) -> Result<impl Iterator<Item = Self>, DeviceError> {
        let members = self.value.as_array().ok_or_else(|| self.error(field, "list"))?;
        Ok(members.iter().map(move |value| Self::new(self.command, value)))
    }

    pub(crate) fn get(self, field: &str) -> Option<Self> {
        self.value.get(field).map(|value| Self::new(self.command, value))
    }

    /// The list or object that a field holds.
    pub(crate) fn part(self, field: &'static str, want: &'static str) -> Result<Self, DeviceError> {
        self.get(field).ok_or_else(|| self.error(field, want))
    }

    pub(crate) fn text(self, field: &'static str) -> Result<&'a str, DeviceError> {
        self.part(field, "string")?.value.as_str().ok_or_else(|| self.error(field, "string"))
    }

    pub(crate) fn number(self, field: &'static str) -> Result<u64, DeviceError> {
        self.part(field, "number")?.value.as_u64().ok_or_else(|| self.error(field, "number"))
    }

    pub(crate) fn flag(self, field: &'static str) -> Result<bool, DeviceError> {
        self.part(field, "bool")?.value.as_bool().ok_or_else(|| self.error(field, "bool"))
    }

    /// A field that may be missing, but not have another type.
    pub(crate) fn optional<T>(
        self,
        field: &'static str,
        read: impl FnOnce(Self, &'static str) -> Result<T, DeviceError>,
    ) -> Result<Option<T>, DeviceError> {
        self.get(field).map(|_| read(self, field)).transpose()
    }

    pub(crate) const fn value(self) -> &'a Value {
        self.value
    }

    fn error(self, field: &'static str, want: &'static str) -> DeviceError {
        DeviceError::Field { reply: self.command, field, want }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_error_names_the_command_and_the_field() {
        let value = json!({"count": "many", "name": "b"});
        let reply = Reply::new("query-block", &value);
        assert_eq!(reply.text("name"), Ok("b"));
        let error = reply.number("count").unwrap_err();
        assert_eq!(error, DeviceError::Field { reply: "query-block", field: "count", want: "number" });
        assert_eq!(error.to_string(), "the reply to query-block has no number count");
        assert_eq!(reply.flag("busy").unwrap_err().to_string(), "the reply to query-block has no bool busy");
        assert_eq!(reply.optional("busy", Reply::flag), Ok(None));
        assert!(reply.optional("count", Reply::flag).is_err());
        assert!(reply.list("devices").is_err());
    }
}
