//! Names that come from others: of images, of moments, of QEMU's files and sockets. What is understood can be written
//! again and means the same.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use qmpbackup::capture::FileName;
use qmpbackup::chain::{Clock, ImageName, When};
use qmpbackup::qmp::Address;

pub(super) fn names(bytes: &[u8]) {
    image(OsStr::from_bytes(bytes));
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    when(text);
    file(text);
    address(text);
}

fn image(name: &OsStr) {
    let Some(parsed) = ImageName::parse(name) else { return };
    assert_eq!(ImageName::parse(&parsed.file_name()).as_ref(), Some(&parsed));
    // what is not whole has the same name but for its end
    let whole = ImageName { partial: false, ..parsed.clone() };
    let partial = ImageName { partial: true, ..parsed };
    let mut name = whole.file_name();
    name.push(".partial");
    assert_eq!(name, partial.file_name());
}

fn when(text: &str) {
    let Ok(when) = text.parse::<When>() else { return };
    for zone in [TimeZone::UTC, TimeZone::fixed(jiff::tz::offset(-12)), TimeZone::fixed(jiff::tz::offset(14))] {
        let moment = when.moment(&Clock { now: Timestamp::UNIX_EPOCH, zone });
        match &when {
            When::Latest => assert_eq!(moment, None),
            When::Name(name) => assert_eq!((moment, name.as_str()), (None, text)),
            When::At(time) => assert_eq!(moment, Some(*time)),
            When::Ago(seconds) => assert_eq!(moment, Some(-seconds)),
            _ => assert!(moment.is_some()),
        }
    }
    if let When::At(time) = when {
        let Ok(digits) = u64::try_from(time) else { return };
        assert_eq!(digits.to_string().parse::<When>().ok(), Some(when));
    }
}

fn file(text: &str) {
    let name = FileName::parse(text);
    if let Some(base) = &name.base {
        let parts: Vec<OsString> = Path::new(base).components().map(|part| part.as_os_str().to_owned()).collect();
        assert_eq!(parts, [OsString::from(base)], "{base:?} is no name of a file");
        assert!(base.len() <= 200 && !matches!(base.as_str(), "." | "..") && !base.contains('\0'), "{base:?}");
    }
    assert_eq!(FileName::parse(&name.short(text)), name, "{:?} means something else", name.short(text));
}

fn address(text: &str) {
    let Ok(address) = text.parse::<Address>() else { return };
    let printed = match &address {
        // a path may begin like something else
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Tcp { .. } => address.to_string(),
    };
    assert_eq!(printed.parse(), Ok(address));
}
