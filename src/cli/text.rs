//! Text that goes to terminals, to shells and into JSON lines: names of files may hold anything.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::Value;

/// Characters that move the cursor, change what stands there already, turn the direction of what follows or are not seen.
/// Variation selectors are none of them: they change how the letter before them looks.
fn is_unprintable(letter: char) -> bool {
    letter.is_control()
        // letters that fill a place and show nothing
        || matches!(letter, '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{3164}' | '\u{ffa0}')
        || matches!(letter, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}')
        || matches!(letter, '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
        // tags
        || matches!(letter, '\u{e0000}'..='\u{e007f}')
}

/// The text with unprintable characters as escapes: it cannot do anything to a terminal, and is one line.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unprintable) {
        return text.into();
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if is_unprintable(letter) { clean.extend(letter.escape_default()) } else { clean.push(letter) }
    }
    clean.into()
}

/// The text with something else for each unprintable character: an escape would be printable ASCII.
pub(super) fn replaced(text: &str) -> String {
    text.replace(is_unprintable, "\u{fffd}")
}

/// The last part of a path.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A value as JSON without any unprintable character.
pub(super) fn json(value: &Value) -> String {
    without_unprintable(value.to_string())
}

/// A value as JSON for people, in lines.
pub(super) fn json_lines(value: &Value) -> Vec<String> {
    let text = format!("{value:#}");
    // line ends and spaces at the beginning of a line are never in a string
    let indented = |line: &str| {
        let rest = line.trim_start_matches(' ');
        " ".repeat(line.len() - rest.len()) + &without_unprintable(line.to_owned())
    };
    text.lines().map(indented).collect()
}

/// JSON text with unprintable characters as escapes.
fn without_unprintable(text: String) -> String {
    if !text.contains(is_unprintable) {
        return text;
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if is_unprintable(letter) {
            // such characters stand in strings only, and JSON has those of other planes as two
            for unit in letter.encode_utf16(&mut [0; 2]) {
                let _ = write!(clean, "\\u{unit:04x}");
            }
        } else {
            clean.push(letter);
        }
    }
    clean
}

/// A JSON line of an event.
pub(super) fn event(name: &str, fields: &[(&str, Value)]) -> String {
    let mut line = format!("{{\"event\":{}", json(&name.into()));
    for (key, value) in fields {
        let _ = write!(line, ",{}:{}", json(&(*key).into()), json(value));
    }
    line + "}"
}

/// A word for a POSIX shell, printable whatever it holds. The shell has no such word for a name that ends in a line feed: it
/// gets an end that no file has, so that the command fails where another file has the name without it.
pub(super) fn shell_word(word: &OsStr) -> String {
    let plain = |letter: char| (letter.is_alphanumeric() && !is_unprintable(letter)) || "-_./+@%".contains(letter);
    match word.to_str() {
        Some(text) if !text.is_empty() && text.chars().all(plain) => text.to_owned(),
        Some(text) if !text.contains(is_unprintable) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => {
            let mut quoted = String::from("\"$(printf '");
            for byte in word.as_bytes() {
                if byte.is_ascii_alphanumeric() || b"-_./ ".contains(byte) {
                    quoted.push(char::from(*byte));
                } else {
                    let _ = write!(quoted, "\\{byte:03o}");
                }
            }
            let end = if word.as_bytes().ends_with(b"\n") { "/" } else { "" };
            quoted + end + "')\""
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unprintable_characters_become_escapes() {
        assert_eq!(printable("größe 'a'"), "größe 'a'");
        assert_eq!(printable("a\x1b[31m\n\u{9b}\u{202e}b"), r"a\u{1b}[31m\n\u{9b}\u{202e}b");
        assert_eq!(
            event("x", &[("path", "a\x1b\u{9b}\"".into())]),
            "{\"event\":\"x\",\"path\":\"a\\u001b\\u009b\\\"\"}"
        );
    }

    #[test]
    fn what_is_not_seen_is_shown() {
        let hidden = [0x200b..=0x200f, 0x2028..=0x202e, 0x2060..=0x206f, 0xfff9..=0xfffb, 0xe0000..=0xe007f];
        let single = [0xad, 0x34f, 0x61c, 0x115f, 0x1160, 0x17b4, 0x17b5, 0x180e, 0x3164, 0xfeff, 0xffa0];
        for letter in hidden.into_iter().flatten().chain(single).map(|letter| char::from_u32(letter).unwrap()) {
            let name = format!("a{letter}b");
            assert_eq!(printable(&name), format!("a\\u{{{:x}}}b", u32::from(letter)));
            assert_eq!(replaced(&name), "a\u{fffd}b");
            let line = event("x", &[("path", name.clone().into())]);
            assert!(line.is_ascii(), "{line}");
            assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["path"], name);
            assert!(shell_word(OsStr::new(&name)).is_ascii(), "{name:?}");
        }
        // that of an emoji, of a Han character, an accent, the space of French
        for name in ["\u{2764}\u{fe0f}", "\u{845b}\u{e0100}", "e\u{301}", "a\u{a0}b"] {
            assert_eq!(printable(name), name);
        }
    }

    #[test]
    fn a_shell_gets_back_what_was_quoted() {
        let unseen = "a\u{200b}b\u{3164}\u{e0041}".as_bytes();
        let words: [&[u8]; 8] = [
            b"",
            b"plain",
            b"it's $HOME `x` \\ \"q\"",
            b"a,b:c",
            b"new\nline\x1b[0m",
            b"\xff\xfe%d\\n'",
            b"-n",
            unseen,
        ];
        for word in words {
            let quoted = shell_word(OsStr::from_bytes(word));
            assert_eq!(printable(&quoted), quoted);
            let script = format!("for word in {quoted}; do printf '[%s]' \"$word\"; done");
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(output.stdout, [b"[", word, b"]"].concat(), "{quoted}");
        }
        assert_eq!(shell_word(OsStr::new("INC-5-d\n")), "\"$(printf 'INC-5-d\\012/')\"");
    }

    #[test]
    fn json_for_people_is_indented_as_that_of_python() {
        let value = serde_json::json!({"b": [1, {"a": "x\n\u{9b}"}], "a": {}});
        let lines = json_lines(&value);
        let expected = [
            "{",
            "    \"a\": {},",
            "    \"b\": [",
            "        1,",
            "        {",
            "            \"a\": \"x\\n\\u009b\"",
            "        }",
            "    ]",
            "}",
        ];
        assert_eq!(lines, expected);
        assert_eq!(serde_json::from_str::<Value>(&lines.join("\n")).unwrap(), value);
    }

    proptest! {
        #[test]
        fn json_stays_json_and_has_nothing_unprintable(text: String) {
            let line = event("e", &[("text", text.clone().into())]);
            prop_assert!(!line.contains(is_unprintable));
            let parsed: Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(parsed["text"].as_str(), Some(text.as_str()));
        }
    }
}
