//! What QEMU's file names mean: paths, `protocol:` names, URLs, and `json:` with options. Nothing is opened.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::json;

/// A file name in a folder of backups has at most 255 bytes; level, time and `.partial` want some.
const MAX_BYTES: usize = 200;

/// Options of that many files inside each other are no file name of QEMU's.
const MAX_NESTING: usize = 64;

/// Drivers of protocols whose files are files here.
const LOCAL: [&str; 4] = ["file", "host_device", "host_cdrom", "io_uring"];

/// Drivers that store bytes as they are: a disk that has one of them on top has no format, it is raw.
const PROTOCOLS: [&str; 24] = [
    "fat",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "io_uring",
    "iscsi",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "nvme-io_uring",
    "rbd",
    "sheepdog",
    "ssh",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
    "vvfat",
];

/// The options, beside `filename`, that name what a protocol opens.
const NAMING: [&str; 6] = ["image", "export", "path", "lun", "vdi", "device"];

/// What a file name means.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileName {
    /// The protocol, where the file is not local.
    pub driver: Option<String>,
    /// The path of a local file, perhaps relative to QEMU's working directory.
    pub path: Option<String>,
    /// The last part of the name, fit for a file name.
    pub base: Option<String>,
}

impl FileName {
    /// Reads a file name as QEMU prints it.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        parse(name, MAX_NESTING)
    }

    /// The path, where the file is local; a relative one starts in QEMU's working directory, and is none where that is not
    /// known.
    #[must_use]
    pub(crate) fn absolute(&self, cwd: Option<&Path>) -> Option<PathBuf> {
        let path = PathBuf::from(self.path.as_ref()?);
        if path.is_absolute() { Some(path) } else { cwd.map(|cwd| cwd.join(path)) }
    }

    /// The path, where the file is local, else the name as QEMU prints it. Read again, it means the same.
    #[must_use]
    pub fn short(&self, name: &str) -> String {
        match &self.path {
            Some(path) if protocol(path).is_some() => format!("file:{path}"),
            Some(path) => path.clone(),
            None => name.to_owned(),
        }
    }

    fn local(path: &str) -> Self {
        // A descriptor that was passed to QEMU, by number: no path of ours, and another disk's at the next start
        if path.starts_with("/dev/fdset/") {
            return Self::default();
        }
        Self { driver: None, path: Some(path.to_owned()), base: path.rsplit('/').next().and_then(component) }
    }

    fn remote(driver: &str, last: Option<&str>) -> Self {
        Self { driver: Some(driver.to_owned()), path: None, base: last.and_then(component) }
    }
}

/// Whether a driver is that of a protocol, not of a format.
pub(crate) fn is_protocol(driver: &str) -> bool {
    PROTOCOLS.contains(&driver)
}

/// The name, made fit for a file name, where anything of it is left.
pub(crate) fn component(name: &str) -> Option<String> {
    let mut name = name.replace(|c: char| c == '/' || c.is_control(), "_");
    while name.len() > MAX_BYTES {
        name.pop();
    }
    if matches!(name.as_str(), "" | "." | "..") { None } else { Some(name) }
}

/// The protocol that a name begins with, and the rest: what stands before a colon and has no slash.
fn protocol(name: &str) -> Option<(&str, &str)> {
    name.split_once(':').filter(|(protocol, _)| !protocol.is_empty() && !protocol.contains('/'))
}

fn parse(name: &str, nesting: usize) -> FileName {
    let Some(nesting) = nesting.checked_sub(1) else { return FileName::default() };
    let Some((protocol, rest)) = protocol(name) else { return FileName::local(name) };
    match protocol {
        "json" => match json::parse(rest.as_bytes()) {
            Ok(Value::Object(options)) => from_options(&options, nesting),
            _ => FileName::default(),
        },
        "rbd" => FileName::remote("rbd", rbd_image(rest).as_deref()),
        "blkdebug" | "blkverify" => {
            rest.split_once(':').map_or_else(FileName::default, |(_, file)| parse(file, nesting))
        }
        _ => match rest.strip_prefix("//") {
            Some(url) => FileName::remote(protocol.split('+').next().unwrap_or(protocol), url_base(url)),
            None if LOCAL.contains(&protocol) => FileName::local(rest),
            None if protocol == "nbd" => FileName::remote("nbd", nbd_export(rest)),
            None if is_protocol(protocol) => FileName::remote(protocol, rest.rsplit(['/', ':']).next()),
            // No protocol of ours: a relative path with a colon is likelier
            None => FileName::local(name),
        },
    }
}

/// Options of QEMU's, nested or with dots in their keys.
fn from_options(options: &Map<String, Value>, nesting: usize) -> FileName {
    let Some(nesting) = nesting.checked_sub(1) else { return FileName::default() };
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    let driver = text("driver").unwrap_or_default();
    if let Some(below) = ["file", "image", "raw", "next"].iter().find_map(|child| child_options(options, child)) {
        return from_options(&below, nesting);
    }
    match (text("filename"), text("url")) {
        (Some(name), _) if LOCAL.contains(&driver) => return FileName::local(name),
        (Some(name), _) | (None, Some(name)) => return parse(name, nesting),
        (None, None) => {}
    }
    // A number is a name, too: that of a unit
    let named = NAMING.iter().find_map(|key| options.get(*key)).map(|value| match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    });
    let last = named.as_deref().and_then(|name| name.trim_end_matches('/').rsplit('/').next());
    FileName {
        driver: Some(driver.to_owned()).filter(|name| !name.is_empty()),
        path: None,
        base: last.and_then(component),
    }
}

/// The options of a child, which stand in an object or under keys that begin with the child's name and a dot.
fn child_options(options: &Map<String, Value>, child: &str) -> Option<Map<String, Value>> {
    if let Some(Value::Object(below)) = options.get(child) {
        return Some(below.clone());
    }
    let dotted = options.iter().filter_map(|(key, value)| {
        let key = key.strip_prefix(child)?.strip_prefix('.')?;
        Some((key.to_owned(), value.clone()))
    });
    Some(dotted.collect::<Map<_, _>>()).filter(|below| !below.is_empty())
}

/// The image in `pool/namespace/image@snapshot:option=value`; a backslash takes the next character's meaning.
fn rbd_image(name: &str) -> Option<String> {
    let mut image = String::new();
    let mut chars = name.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => image.extend(chars.next()),
            ':' | '@' => break,
            '/' => image.clear(),
            c => image.push(c),
        }
    }
    Some(image).filter(|image| !image.is_empty())
}

/// The export in `host:port:exportname=NAME` or `unix:PATH:exportname=NAME`.
fn nbd_export(name: &str) -> Option<&str> {
    name.split_once(":exportname=").and_then(|(_, export)| export.rsplit('/').next())
}

/// The last part of a URL's path; what follows the protocol and `//` begins with the server.
fn url_base(url: &str) -> Option<&str> {
    let (_, path) = url.split(['?', '#']).next()?.split_once('/')?;
    path.trim_end_matches('/').rsplit('/').next()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Protocol, path and base; empty where there is none.
    fn meaning(name: &str) -> (String, String, String) {
        let FileName { driver, path, base } = FileName::parse(name);
        (driver.unwrap_or_default(), path.unwrap_or_default(), base.unwrap_or_default())
    }

    #[test]
    fn a_path_is_local_and_its_last_part_is_the_base() {
        for (name, path, base) in [
            ("/vm/a.qcow2", "/vm/a.qcow2", "a.qcow2"),
            ("a.qcow2", "a.qcow2", "a.qcow2"),
            ("./a:b.qcow2", "./a:b.qcow2", "a:b.qcow2"),
            ("/vm/nbd:a", "/vm/nbd:a", "nbd:a"),
            ("12:30.qcow2", "12:30.qcow2", "12:30.qcow2"),
            ("file:a.qcow2", "a.qcow2", "a.qcow2"),
            ("file:/vm/a.qcow2", "/vm/a.qcow2", "a.qcow2"),
            ("host_device:/dev/vg/lv", "/dev/vg/lv", "lv"),
            ("/dev/vg/lv", "/dev/vg/lv", "lv"),
            ("blkdebug::/vm/a.qcow2", "/vm/a.qcow2", "a.qcow2"),
            ("blkdebug:/etc/rules:/vm/a.qcow2", "/vm/a.qcow2", "a.qcow2"),
            ("/dev/fdset/3", "", ""),
            ("/vm/", "/vm/", ""),
            ("/vm/..", "/vm/..", ""),
        ] {
            assert_eq!(meaning(name), (String::new(), path.to_owned(), base.to_owned()), "{name}");
        }
    }

    #[test]
    fn a_name_of_a_protocol_has_the_last_part_of_path_or_export_as_base() {
        for (name, driver, base) in [
            ("nbd+unix:///exp/data?socket=/vm/nbd.sock", "nbd", "data"),
            ("nbd://host:10809/data", "nbd", "data"),
            ("nbd://host:10809", "nbd", ""),
            ("nbd:unix:/vm/nbd.sock:exportname=exp/data", "nbd", "data"),
            ("nbd:host:10809", "nbd", ""),
            ("iscsi://host/iqn.2001-04.com.example:storage/1", "iscsi", "1"),
            ("https://host/images/a.qcow2?key=/b#c", "https", "a.qcow2"),
            ("gluster+tcp://host/volume/a.qcow2", "gluster", "a.qcow2"),
            ("rbd:pool/image", "rbd", "image"),
            ("rbd:pool/space/image@snap:id=admin:conf=/etc/ceph.conf", "rbd", "image"),
            ("rbd:pool/im\\@a\\:ge\\/x:id=admin", "rbd", "im@a:ge_x"),
            ("rbd:pool/", "rbd", ""),
            ("sheepdog:host:7000:vdi", "sheepdog", "vdi"),
            ("fat:rw:/vm/folder", "fat", "folder"),
        ] {
            assert_eq!(meaning(name), (driver.to_owned(), String::new(), base.to_owned()), "{name}");
        }
    }

    #[test]
    fn options_name_the_file_below_formats_and_filters() {
        for (options, driver, path, base) in [
            (r#"{"driver":"qcow2","file":{"driver":"file","filename":"/vm/a:b"}}"#, "", "/vm/a:b", "a:b"),
            (r#"{"driver":"raw","file":{"driver":"throttle","file":{"driver":"file","filename":"a"}}}"#, "", "a", "a"),
            (r#"{"driver":"qcow2","file.driver":"file","file.filename":"/vm/a"}"#, "", "/vm/a", "a"),
            (r#"{"file.next.driver":"file","file.next.filename":"/vm/a"}"#, "", "/vm/a", "a"),
            (r#"{"file.driver":"host_device","file.filename":"/dev/vg/lv"}"#, "", "/dev/vg/lv", "lv"),
            (r#"{"driver":"blkdebug","image":{"driver":"file","filename":"/vm/a"}}"#, "", "/vm/a", "a"),
            (r#"{"file":{"filename":"/vm/a"},"backing":{"file":{"filename":"/vm/b"}}}"#, "", "/vm/a", "a"),
            (r#"{"filename":"rbd:pool/image:id=x"}"#, "rbd", "", "image"),
            (r#"{"filename":"nbd+unix:///e?socket=/vm/s"}"#, "nbd", "", "e"),
            (r#"{"driver":"file","filename":"nbd:a"}"#, "", "nbd:a", "nbd:a"),
            (r#"{"driver":"raw","file":{"driver":"rbd","pool":"p","image":"i"}}"#, "rbd", "", "i"),
            (r#"{"file":{"driver":"nbd","server":{"path":"/vm/s"},"export":"exp/data"}}"#, "nbd", "", "data"),
            (r#"{"driver":"iscsi","target":"iqn","lun":1}"#, "iscsi", "", "1"),
            (r#"{"driver":"https","url":"https://host/a.qcow2?x"}"#, "https", "", "a.qcow2"),
            (r#"{"driver":"ssh","path":"/srv/a.qcow2","server":{"host":"h"}}"#, "ssh", "", "a.qcow2"),
            (r#"{"driver":"null-co","size":1048576}"#, "null-co", "", ""),
            (r#"{"driver":"quorum","children":[{"file":{"filename":"/vm/a"}}]}"#, "quorum", "", ""),
            (r#"{"file":"node"}"#, "", "", ""),
            ("{", "", "", ""),
            ("[]", "", "", ""),
        ] {
            let expected = (driver.to_owned(), path.to_owned(), base.to_owned());
            assert_eq!(meaning(&format!("json:{options}")), expected, "{options}");
        }
    }

    #[test]
    fn options_inside_each_other_end() {
        let nested =
            |levels| format!("json:{}{{\"filename\":\"/a\"}}{}", "{\"file\":".repeat(levels), "}".repeat(levels));
        assert_eq!(meaning(&nested(MAX_NESTING - 2)).1, "", "the name in the options wants a level, too");
        assert_eq!(meaning(&nested(MAX_NESTING - 3)).1, "/a");
        assert_eq!(FileName::parse(&nested(100_000)), FileName::default());
        assert_eq!(FileName::parse(&"blkdebug::".repeat(100_000)), FileName::default());
    }

    #[test]
    fn a_base_is_fit_for_a_file_name() {
        assert_eq!(component("a\0b\nc/d").as_deref(), Some("a_b_c_d"));
        assert_eq!(component(&"é".repeat(150)), Some("é".repeat(100)));
        assert_eq!(component(&format!("x{}", "é".repeat(150))).map(|name| name.len()), Some(199));
        for nothing in ["", ".", ".."] {
            assert_eq!(component(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_short_name_means_the_same_file() {
        let short = |name: &str| FileName::parse(name).short(name);
        assert_eq!(short(r#"json:{"file":{"driver":"file","filename":"/vm/a"}}"#), "/vm/a");
        assert_eq!(short(r#"json:{"file":{"driver":"file","filename":"nbd:a"}}"#), "file:nbd:a");
        assert_eq!(short("rbd:pool/image"), "rbd:pool/image");
    }

    proptest! {
        #[test]
        fn any_text_has_a_meaning_that_its_short_name_keeps(
            start in prop::sample::select(&["", "json:{\"file\":", "rbd:", "nbd:", "nbd://", "a:", "fat:"][..]),
            text in ".*",
        ) {
            let name = format!("{start}{text}");
            let meaning = FileName::parse(&name);
            if let Some(base) = &meaning.base {
                let count = Path::new(base).components().count();
                prop_assert!(count == 1 && base.len() <= MAX_BYTES && !base.contains(['/', '\0']), "{base:?}");
            }
            prop_assert_eq!(FileName::parse(&meaning.short(&name)), meaning);
        }
    }
}
