//! Text that goes to terminals, to shells and into JSON lines: names of files may hold anything.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;

use serde_json::Value;

/// Characters that move the cursor, change what stands there already, turn the direction of what follows or are not seen.
fn is_control(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}')
        || matches!(letter, '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

/// The text with control characters as escapes: it cannot do anything to a terminal, and is one line.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_control) {
        return text.into();
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if is_control(letter) { clean.extend(letter.escape_default()) } else { clean.push(letter) }
    }
    clean.into()
}

/// The text with something else for each control character: an escape would be printable ASCII.
pub(super) fn replaced(text: &str) -> String {
    text.replace(is_control, "\u{fffd}")
}

/// A value as JSON without any control character.
pub(super) fn json(value: &Value) -> String {
    without_control(value.to_string())
}

/// A value as JSON for people, in lines.
pub(super) fn json_lines(value: &Value) -> Vec<String> {
    let text = format!("{value:#}");
    // line ends and spaces at the beginning of a line are never in a string
    let indented = |line: &str| {
        let rest = line.trim_start_matches(' ');
        " ".repeat(line.len() - rest.len()) + &without_control(line.to_owned())
    };
    text.lines().map(indented).collect()
}

/// JSON text with control characters as escapes.
fn without_control(text: String) -> String {
    if !text.contains(is_control) {
        return text;
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        // such characters stand in strings only, and all are of the basic plane
        if is_control(letter) {
            let _ = write!(clean, "\\u{:04x}", u32::from(letter));
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

/// A word for a POSIX shell, printable whatever it holds.
pub(super) fn shell_word(word: &OsStr) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "-_./+@%".contains(letter);
    match word.to_str() {
        Some(text) if !text.is_empty() && text.chars().all(plain) => text.to_owned(),
        Some(text) if !text.contains(is_control) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => {
            let mut quoted = String::from("\"$(printf '");
            for byte in word.as_bytes() {
                if byte.is_ascii_alphanumeric() || b"-_./ ".contains(byte) {
                    quoted.push(char::from(*byte));
                } else {
                    let _ = write!(quoted, "\\{byte:03o}");
                }
            }
            quoted + "')\""
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_characters_become_escapes() {
        assert_eq!(printable("größe 'a'"), "größe 'a'");
        assert_eq!(printable("a\x1b[31m\n\u{9b}\u{202e}b"), r"a\u{1b}[31m\n\u{9b}\u{202e}b");
        assert_eq!(
            event("x", &[("path", "a\x1b\u{9b}\"".into())]),
            "{\"event\":\"x\",\"path\":\"a\\u001b\\u009b\\\"\"}"
        );
    }

    #[test]
    fn a_shell_gets_back_what_was_quoted() {
        let words: [&[u8]; 7] =
            [b"", b"plain", b"it's $HOME `x` \\ \"q\"", b"a,b:c", b"new\nline\x1b[0m", b"\xff\xfe%d\\n'", b"-n"];
        for word in words {
            let quoted = shell_word(OsStr::from_bytes(word));
            assert_eq!(printable(&quoted), quoted);
            let script = format!("for word in {quoted}; do printf '[%s]' \"$word\"; done");
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(output.stdout, [b"[", word, b"]"].concat(), "{quoted}");
        }
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
        fn json_stays_json_and_has_no_control_characters(text: String) {
            let line = event("e", &[("text", text.clone().into())]);
            prop_assert!(!line.contains(is_control));
            let parsed: Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(parsed["text"].as_str(), Some(text.as_str()));
        }
    }
}
