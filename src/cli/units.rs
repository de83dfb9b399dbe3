//! Sizes, rates and times as people read and write them.

use std::time::Duration;

use crate::chain::When;
use crate::restore::Share;

const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Reads `65536`, `64K`, `64KiB`, `1.5G`; units are powers of 1024 but for `KB`, `MB` and so on.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write 65536, 64K, 64KiB or 1.5G");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end).ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || number.ends_with('.') || fraction.len() > 9 || fraction.contains('.') {
        return Err(wrong());
    }
    let unit = unit_bytes(unit.trim_start()).ok_or_else(wrong)?;
    let scale = (0..fraction.len()).fold(1, |scale, _| scale * 10_u128);
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| wrong())?;
    let bytes = digits.checked_mul(u128::from(unit)).map(|bytes| bytes / scale);
    if bytes == Some(0) && digits > 0 {
        return Err(format!("{text:?} is less than a byte"));
    }
    bytes.and_then(|bytes| u64::try_from(bytes).ok()).ok_or_else(|| format!("{text:?} is more than any disk has"))
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let lower = unit.to_ascii_lowercase();
    let (letter, base) = match (lower.strip_suffix("ib"), lower.strip_suffix('b')) {
        (Some(letter), _) if !letter.is_empty() => (letter, 1024_u64),
        (_, Some(letter)) if !letter.is_empty() => (letter, 1000),
        (_, Some(_)) => return Some(1),
        _ => (lower.as_str(), 1024),
    };
    if letter.is_empty() {
        return Some(1);
    }
    let power = ["k", "m", "g", "t", "p", "e"].iter().position(|known| *known == letter)?;
    base.checked_pow(u32::try_from(power).ok()? + 1)
}

/// Reads `5%`, `0.5%`, `5`.
pub(super) fn parse_share(text: &str) -> Result<Share, String> {
    let wrong = || format!("{text:?} is not a part of all from 0.0001% to 100%");
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) || fraction.len() > 4 {
        return Err(wrong());
    }
    let millionths = format!("{whole}{fraction:0<4}").parse().ok().and_then(Share::millionths);
    millionths.ok_or_else(wrong)
}

/// Reads `90s`, `30m`, `6h`, `30d`, `4w`, as `--until` does.
pub(super) fn parse_age(text: &str) -> Result<Duration, String> {
    match format!("-{text}").parse() {
        Ok(When::Ago(seconds)) => Ok(Duration::from_secs(seconds.unsigned_abs())),
        _ => Err(format!("{text:?} is not an age: write 90s, 30m, 6h, 30d or 4w")),
    }
}

/// Reads seconds, `0.5` too.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    seconds(text)
        .filter(|seconds| *seconds >= Duration::from_millis(10))
        .ok_or_else(|| format!("{text:?} is not a number of seconds from 0.01 on"))
}

/// Reads seconds, none too.
pub(super) fn parse_delay(text: &str) -> Result<Duration, String> {
    seconds(text).ok_or_else(|| format!("{text:?} is not a number of seconds"))
}

/// More than a hundred years cannot be waited for: clocks end somewhere.
fn seconds(text: &str) -> Option<Duration> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|seconds| seconds.as_secs() < 100 * 365 * 24 * 3600)
}

/// `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    let mut scaled = (bytes, "B");
    let mut unit: u128 = 1;
    let mut tenths = 0;
    for name in UNITS {
        if u128::from(bytes) < unit * 1024 {
            break;
        }
        unit *= 1024;
        let all = u128::from(bytes) * 10 / unit;
        tenths = all % 10;
        scaled = (u64::try_from(all / 10).unwrap_or(u64::MAX), name);
    }
    match (scaled, tenths) {
        ((whole, name), 0) => format!("{whole} {name}"),
        ((whole, name), tenths) => format!("{whole}.{tenths} {name}"),
    }
}

/// Bytes in a second.
pub(super) fn rate(bytes: u64, time: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000 / time.as_micros().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// How many there are of something whose name gets an `s`.
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// `45.3 %`.
pub(super) fn percent(done: u64, total: u64) -> String {
    let tenths = u128::from(done) * 1000 / u128::from(total.max(1));
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// `2 h 05 min`.
pub(super) fn duration(time: Duration) -> String {
    match time.as_secs() {
        0..10 => format!("{}.{} s", time.as_secs(), time.subsec_millis() / 100),
        seconds @ 10..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_not_many() {
        assert_eq!([0, 1, 2].map(|number| count(number, "image")), ["0 images", "1 image", "2 images"]);
    }

    #[test]
    fn sizes_are_read_with_any_usual_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("64 KiB", 65536),
            ("50M", 50 << 20),
            ("50MB", 50_000_000),
            ("1.5GiB", 3 << 29),
            ("7b", 7),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "K",
            ".5K",
            "1.",
            "1.2.3M",
            "0.5",
            "0.0001K",
            "-1",
            "+1",
            "1X",
            "1KK",
            "16E",
            "1i",
            "1ib",
            "0x10",
            "1e3",
            "99999999999999999999999999999999999999999999",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn parts_and_ages_are_read() {
        for (text, millionths) in [("5%", 50_000), ("5", 50_000), ("0.5 %", 5000), ("100%", 1_000_000), ("0.0001%", 1)]
        {
            assert_eq!(parse_share(text).ok(), Share::millionths(millionths), "{text}");
        }
        for text in ["", "%", "0", "0%", "100.1%", "-5%", "5%%", "1e1", ".5", "5.", "0.00001", "99999999999", "+5"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
        assert_eq!(parse_age("30d"), Ok(Duration::from_secs(30 * 24 * 3600)));
        assert_eq!(parse_age("90s"), Ok(Duration::from_secs(90)));
        for text in ["", "30", "d", "-1d", "1y", "2026-01-01", "99999999999999999999d"] {
            assert!(parse_age(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(u64::MAX), "15.9 EiB");
        assert_eq!(percent(0, 0), "0.0 %");
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(duration(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 05 s");
        assert_eq!(duration(Duration::from_secs(7500)), "2 h 05 min");
        assert_eq!(rate(1000, Duration::from_millis(500)), 2000);
        assert!(parse_seconds("0").is_err() && parse_seconds("nan").is_err() && parse_seconds("-1").is_err());
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        assert!(parse_seconds("1e10").is_err() && parse_delay("-1").is_err());
        assert_eq!(parse_delay("0"), Ok(Duration::ZERO));
    }
}
