//! The nodes of the block graph and the bitmaps on them, as `query-named-block-nodes` lists them.

use serde_json::Value;

use crate::capture::machine::device::Bitmap;
use crate::capture::machine::reply::{DeviceError, Reply};
use crate::qmp::Command;

pub(crate) const COMMAND: &str = "query-named-block-nodes";

/// A node of the block graph.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// Its name; `#block…` where QEMU chose it, which is another at each start.
    pub name: String,
    /// The driver: a format, a protocol or a filter.
    pub driver: String,
    /// The file name that QEMU made of its options: a path, a URL, or `json:` and the options.
    pub file: String,
    /// Whether nobody can write to it.
    pub read_only: bool,
    /// Its bitmaps, those without a name, too.
    pub bitmaps: Vec<Bitmap>,
    /// QEMU's `ImageInfo` of it; null where the reply has none.
    pub image: Value,
}

pub(crate) fn delete_node(name: &str) -> Command {
    Command::new("blockdev-del").with("node-name", name)
}

/// Reads the reply to `query-named-block-nodes`.
///
/// # Errors
///
/// A reply that does not fit the schema.
pub(crate) fn nodes(reply: &Value) -> Result<Vec<Node>, DeviceError> {
    Reply::new(COMMAND, reply).list("nodes")?.map(node).collect()
}

fn node(reply: Reply<'_>) -> Result<Node, DeviceError> {
    let name = reply.text("node-name")?.to_owned();
    let bitmaps = match reply.get("dirty-bitmaps") {
        Some(list) => bitmaps(list, &name)?,
        None => Vec::new(),
    };
    Ok(Node {
        driver: reply.text("drv")?.to_owned(),
        file: reply.text("file")?.to_owned(),
        read_only: reply.flag("ro")?,
        bitmaps,
        image: reply.get("image").map_or(Value::Null, |image| image.value().clone()),
        name,
    })
}

/// The bitmaps in a list, which are on a node.
pub(crate) fn bitmaps(list: Reply<'_>, node: &str) -> Result<Vec<Bitmap>, DeviceError> {
    list.list("dirty-bitmaps")?.map(|reply| bitmap(reply, node)).collect()
}

fn bitmap(reply: Reply<'_>, node: &str) -> Result<Bitmap, DeviceError> {
    // The only word on it before QEMU 4.0, gone since 6.0; a frozen bitmap records on
    let status = reply.optional("status", Reply::text)?.unwrap_or_default();
    let flag = |field| reply.optional(field, Reply::flag);
    Ok(Bitmap {
        name: reply.optional("name", Reply::text)?.unwrap_or_default().to_owned(),
        node: node.to_owned(),
        count: reply.number("count")?,
        granularity: reply.number("granularity")?,
        recording: flag("recording")?.unwrap_or(matches!(status, "active" | "frozen")),
        busy: flag("busy")?.unwrap_or(matches!(status, "frozen" | "locked")),
        persistent: flag("persistent")?.unwrap_or(false),
        inconsistent: flag("inconsistent")?.unwrap_or(status == "inconsistent"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(bitmap: &Value) -> Result<Bitmap, DeviceError> {
        let reply = json!([{"node-name": "n", "drv": "qcow2", "file": "a", "ro": true, "dirty-bitmaps": [bitmap]}]);
        nodes(&reply).map(|mut nodes| nodes.remove(0).bitmaps.remove(0))
    }

    #[test]
    fn a_bitmap_is_what_its_fields_say() {
        let fields =
            json!({"name": "b", "count": 5, "granularity": 512, "recording": true, "busy": false, "persistent": true});
        let bitmap = Bitmap {
            name: "b".to_owned(),
            node: "n".to_owned(),
            count: 5,
            granularity: 512,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
        };
        assert_eq!(one(&fields), Ok(bitmap));
    }

    #[test]
    fn a_bitmap_may_have_no_name() {
        let nameless = one(&json!({"count": 5, "granularity": 512, "inconsistent": true})).unwrap();
        assert_eq!((nameless.name.as_str(), nameless.inconsistent, nameless.recording), ("", true, false));
    }

    #[test]
    fn the_status_tells_what_old_releases_do_not_say_otherwise() {
        let status = |status: &str| {
            let bitmap = one(&json!({"status": status, "count": 0, "granularity": 1})).unwrap();
            (bitmap.recording, bitmap.busy, bitmap.inconsistent)
        };
        assert_eq!(status("active"), (true, false, false));
        assert_eq!(status("frozen"), (true, true, false));
        assert_eq!(status("locked"), (false, true, false));
        assert_eq!(status("disabled"), (false, false, false));
        assert_eq!(status("inconsistent"), (false, false, true));
        let both = one(&json!({"status": "active", "recording": false, "count": 0, "granularity": 1})).unwrap();
        assert!(!both.recording, "the newer field counts");
    }

    #[test]
    fn a_reply_that_is_no_list_of_nodes_gets_an_error() {
        for reply in [json!(null), json!({}), json!([{}]), json!([{"node-name": 1}]), json!([[]])] {
            assert!(nodes(&reply).is_err(), "{reply}");
        }
        for bitmap in [
            json!({}),
            json!([]),
            json!({"count": -1, "granularity": 1}),
            json!({"name": 1, "count": 1, "granularity": 1}),
        ] {
            assert!(one(&bitmap).is_err(), "{bitmap}");
        }
        assert_eq!(nodes(&json!([])), Ok(Vec::new()));
    }
}
