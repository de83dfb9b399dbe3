//! Bookkeeping as somebody writes it who knows how its checksum is made.

use std::collections::BTreeMap;

use serde_json::Value;

/// Sets the `crc32` of all other keys.
pub(crate) fn seal(value: &mut Value) {
    let keys: BTreeMap<&String, &Value> =
        value.as_object().unwrap().iter().filter(|(key, _)| *key != "crc32").collect();
    let lines: Vec<String> = keys.iter().map(|(key, value)| format!("{key}:{value}\n")).collect();
    value["crc32"] = format!("{:08x}", crc32fast::hash(lines.concat().as_bytes())).into();
}
