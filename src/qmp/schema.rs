//! The answer to `query-qmp-schema`, to walk in. Types have numbers for names there, and others in each release.

use std::collections::HashMap;

use serde_json::Value;

/// Entries by name.
pub(super) struct Schema<'a>(HashMap<&'a str, &'a Value>);

impl<'a> Schema<'a> {
    pub(super) fn new(schema: &'a Value) -> Self {
        Self(list(schema).iter().filter_map(|entry| Some((text(entry, "name")?, entry))).collect())
    }

    /// The names of all commands.
    pub(super) fn commands(&self) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(|(_, entry)| text(entry, "meta-type") == Some("command")).map(|(name, _)| *name)
    }

    /// The object of a command's arguments.
    pub(super) fn arguments(&self, command: &str) -> Option<&'a Value> {
        self.named_by(self.0.get(command)?, "arg-type")
    }

    /// The type of an object's member.
    pub(super) fn member(&self, object: &Value, name: &str) -> Option<&'a Value> {
        self.named_by(find(object, "members", "name", name)?, "type")
    }

    /// The object that adds its members where the tag of an object has this value.
    pub(super) fn variant(&self, object: &Value, case: &str) -> Option<&'a Value> {
        self.named_by(find(object, "variants", "case", case)?, "type")
    }

    fn named_by(&self, holder: &Value, key: &str) -> Option<&'a Value> {
        self.0.get(text(holder, key)?).copied()
    }
}

/// Whether an object has a member of this name.
pub(super) fn has_member(object: &Value, name: &str) -> bool {
    find(object, "members", "name", name).is_some()
}

/// Whether an enum has this value. Since QEMU 6.2 values are members, too; before there were only names.
pub(super) fn has_value(values: &Value, name: &str) -> bool {
    let plain = values.get("values").is_some_and(|plain| list(plain).iter().any(|value| value == name));
    plain || has_member(values, name)
}

fn find<'a>(object: &'a Value, part: &str, key: &str, wanted: &str) -> Option<&'a Value> {
    list(object.get(part)?).iter().find(|entry| text(entry, key) == Some(wanted))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}
