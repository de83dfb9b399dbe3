//! The moment that a user asks for: a time in one of several spellings, a name, or the newest there is.

use std::str::FromStr;
use std::time::SystemTime;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use super::Error;

/// The spellings of [`When`], for messages and help.
pub const WHEN_FORMS: &str = "latest, a unix time (1643308928), a file name or its beginning (INC-1643308928), an RFC \
     3339 time (2026-11-22T19:41:33Z), a local time (2026-11-22, 2026-11-22 19:41, 2026-11-22 19:41:33) or a time before \
     now (-90s, -30m, -6h, -2d, -1w)";

/// What is wanted of a disk's restore points.
///
/// A time picks the newest restore point that is not after it. A local time that is cut short means all of the minute
/// or day it names: `19:41` picks what a listing shows as `19:41:33`, `2026-11-22` the last one of that day. Where
/// the clocks were set back, the first of the two equal times is meant; RFC 3339 tells them apart. A day before now is 24
/// hours.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum When {
    /// The newest restore point.
    Latest,
    /// The newest one not after these seconds since 1970.
    At(i64),
    /// The newest one not after this moment in the local zone.
    Local(DateTime),
    /// The newest one that is at least this many seconds old.
    Ago(i64),
    /// The one with this file name or, where no name is exactly that, with this beginning. The path below the folder that
    /// was searched is a name, too.
    Name(String),
}

/// What "now" and "local" mean.
#[derive(Debug, Clone)]
pub struct Clock {
    /// Now.
    pub now: Timestamp,
    /// The zone of local times.
    pub zone: TimeZone,
}

impl Clock {
    /// The clock and zone of this machine. A clock behind the year 9999 stands still at its end.
    #[must_use]
    pub fn system() -> Self {
        Self { now: Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::MAX), zone: TimeZone::system() }
    }

    /// Now, in the zone.
    #[must_use]
    pub fn local(&self) -> Zoned {
        self.now.to_zoned(self.zone.clone())
    }
}

impl When {
    /// The last second that is wanted, since 1970; `None` where no time was given.
    #[must_use]
    pub fn moment(&self, clock: &Clock) -> Option<i64> {
        match self {
            Self::Latest | Self::Name(_) => None,
            Self::At(time) => Some(*time),
            Self::Ago(seconds) => Some(clock.now.as_second().saturating_sub(*seconds)),
            // only the last day of the year 9999 is out of range, in zones west of Greenwich
            Self::Local(local) => Some(clock.zone.to_timestamp(*local).map_or(i64::MAX, Timestamp::as_second)),
        }
    }
}

impl FromStr for When {
    type Err = Error;

    /// Any text that is none of the other forms is a name: disks may be called anything.
    fn from_str(text: &str) -> Result<Self, Error> {
        let syntax = || Error::Syntax { text: text.to_owned() };
        if text.is_empty() {
            Err(syntax())
        } else if text.eq_ignore_ascii_case("latest") {
            Ok(Self::Latest)
        } else if text.bytes().all(|byte| byte.is_ascii_digit()) {
            text.parse().map(Self::At).map_err(|_| syntax())
        } else if let Some(age) = text.strip_prefix('-').filter(|age| age.starts_with(|c: char| c.is_ascii_digit())) {
            seconds(age).map(Self::Ago).ok_or_else(syntax)
        } else if let Some((date, time)) = split_date(text) {
            calendar(text, date, time).ok_or_else(syntax)
        } else {
            Ok(Self::Name(text.to_owned()))
        }
    }
}

/// `6h` as seconds.
fn seconds(age: &str) -> Option<i64> {
    let unit = match age.chars().next_back()? {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        'w' => 7 * 24 * 3600,
        _ => return None,
    };
    decimal::<i64>(age.get(..age.len().checked_sub(1)?)?)?.checked_mul(unit)
}

/// The date that a text begins with, and the time after its `T` or space.
fn split_date(text: &str) -> Option<(&str, Option<&str>)> {
    let (date, rest) = text.split_at_checked(10)?;
    let shape = date
        .bytes()
        .enumerate()
        .all(|(at, byte)| if matches!(at, 4 | 7) { byte == b'-' } else { byte.is_ascii_digit() });
    match rest.chars().next() {
        None if shape => Some((date, None)),
        Some('T' | 't' | ' ') if shape => Some((date, rest.get(1..))),
        _ => None,
    }
}

fn calendar(text: &str, date: &str, time: Option<&str>) -> Option<When> {
    let mut parts = date.splitn(3, '-');
    let date = Date::new(decimal(parts.next()?)?, decimal(parts.next()?)?, decimal(parts.next()?)?).ok()?;
    let Some(time) = time else { return Some(When::Local(date.at(23, 59, 59, 0))) };
    if time.ends_with(['Z', 'z']) || time.contains(['+', '-']) {
        return text.parse::<Timestamp>().ok().map(|time| When::At(time.as_second()));
    }
    let parts: Vec<&str> = time.split(':').collect();
    let (hour, minute, second) = match parts.as_slice() {
        [hour, minute] => (*hour, *minute, "59"),
        [hour, minute, second] => (*hour, *minute, *second),
        _ => return None,
    };
    let time = Time::new(decimal(hour)?, decimal(minute)?, decimal(second)?, 0).ok()?;
    Some(When::Local(date.to_datetime(time)))
}

/// A number of digits only: no sign, no spaces.
fn decimal<T: FromStr>(digits: &str) -> Option<T> {
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-22 18:41:33 UTC, in a zone one hour ahead.
    fn clock() -> Clock {
        Clock { now: Timestamp::from_second(1_795_372_893).unwrap(), zone: TimeZone::fixed(jiff::tz::offset(1)) }
    }

    fn moment(text: &str) -> i64 {
        text.parse::<When>().unwrap().moment(&clock()).unwrap()
    }

    #[test]
    fn digits_are_a_unix_time() {
        assert_eq!("1643308928".parse::<When>().unwrap(), When::At(1_643_308_928));
        assert_eq!(moment("0"), 0);
        assert!("99999999999999999999".parse::<When>().is_err());
    }

    #[test]
    fn times_with_a_zone_are_that_moment() {
        assert_eq!(moment("2026-11-22T18:41:33Z"), 1_795_372_893);
        assert_eq!(moment("2026-11-22T19:41:33+01:00"), 1_795_372_893);
        assert_eq!(moment("2026-11-22t13:41:33-05:00"), 1_795_372_893);
        assert_eq!(moment("2026-11-22T18:41:33.9Z"), 1_795_372_893);
    }

    #[test]
    fn local_times_mean_all_of_the_unit_they_name() {
        assert_eq!(moment("2026-11-22 19:41:33"), 1_795_372_893);
        assert_eq!(moment("2026-11-22T19:41:33"), 1_795_372_893);
        assert_eq!(moment("2026-11-22 19:41"), 1_795_372_893 + 26);
        assert_eq!(moment("2026-11-22"), moment("2026-11-23 00:00:00") - 1);
    }

    #[test]
    fn a_time_that_clocks_showed_twice_is_the_first() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let clock = Clock { now: Timestamp::UNIX_EPOCH, zone };
        let when: When = "2026-10-25 02:30:00".parse().unwrap();
        assert_eq!(when.moment(&clock), "2026-10-25T02:30:00+02:00".parse::<When>().unwrap().moment(&clock));
    }

    #[test]
    fn ages_count_back_from_now() {
        for (text, age) in [("-90s", 90), ("-30m", 1800), ("-6h", 21_600), ("-2d", 172_800), ("-1w", 604_800)] {
            assert_eq!(moment(text), 1_795_372_893 - age, "{text}");
        }
    }

    #[test]
    fn anything_else_is_a_name() {
        for text in ["INC-1643308928", "my disk.qcow2", "2026-11-22.qcow2", "2021-11/ide0-hd0/disk", "-x", "yesterday"]
        {
            assert_eq!(text.parse::<When>().unwrap(), When::Name(text.to_owned()));
        }
    }

    #[test]
    fn broken_times_say_which_forms_there_are() {
        for text in [
            "",
            "-2x",
            "-2",
            "-9223372036854775807w",
            "2026-13-01",
            "2026-02-30",
            "2026-11-22 ",
            "2026-11-22 7",
            "2026-11-22 25:00",
            "2026-11-22 19:41:33:00",
            "2026-11-22 19:41Zulu",
            "2026-11-22T19:41:33+99:00",
        ] {
            let error = text.parse::<When>().unwrap_err();
            assert!(error.to_string().contains("INC-1643308928"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,30}") {
            if let Ok(when) = text.parse::<When>() {
                let _ = when.moment(&clock());
            }
        }

        #[test]
        fn no_almost_time_makes_it_panic(text in "-?[0-9]{0,5}-[0-9]{2}-[0-9]{2}[ Tt]?[0-9:+.Zz-]{0,14}[smhdw]?") {
            if let Ok(when) = text.parse::<When>() {
                let _ = when.moment(&clock());
            }
        }

        #[test]
        fn a_second_that_was_printed_is_read_back(second in 0..=253_402_207_199_i64) {
            let time = Timestamp::from_second(second).unwrap();
            prop_assert_eq!(moment(&time.to_string()), second);
            let local = clock().zone.to_datetime(time).strftime("%Y-%m-%d %H:%M:%S").to_string();
            prop_assert_eq!(moment(&local), second);
        }
    }
}
