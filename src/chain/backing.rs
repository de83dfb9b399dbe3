//! Which image a backing name inside another one means, as far as names tell.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use serde_json::Value;

use crate::json;

/// Whether a backing name is that of an image in the same folder.
pub(crate) fn leads_to(backing: &str, image: &OsStr) -> bool {
    name_in(backing).as_deref() == Some(image)
}

/// The last part of the file's name in a backing name, which may have options of QEMU's.
pub(crate) fn name_in(backing: &str) -> Option<OsString> {
    let told = backing.strip_prefix("json:").and_then(|options| file_of(&json::parse(options.as_bytes()).ok()?));
    let backing = told.as_deref().unwrap_or(backing);
    // the protocol that QEMU takes where none is named
    Path::new(backing.strip_prefix("file:").unwrap_or(backing)).file_name().map(OsStr::to_owned)
}

/// The file that options name, below any formats and filters: nested, or with dots in their keys.
fn file_of(options: &Value) -> Option<String> {
    let mut options = options;
    while let Some(below) = options.get("file").filter(|below| below.is_object()) {
        options = below;
    }
    let is_name = |key: &str| key.rsplit_once('.').map_or(key, |(_, last)| last) == "filename";
    let (_, name) = options.as_object()?.iter().find(|(key, _)| is_name(key))?;
    name.as_str().map(str::to_owned)
}
