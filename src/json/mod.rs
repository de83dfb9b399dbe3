//! JSON of others: no more of it is taken in than fits into memory.
//!
//! A small object takes a hundred times the bytes of its text, so the length of a text says little. Counted are the marks
//! that begin a value, before anything is made of them.

use serde_json::Value;

/// Values in one text. A thousand disks have a tenth of it; objects of one key each would need 100 MB.
pub(crate) const VALUES_MAX: usize = 1 << 18;

/// Why there is no value.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JsonError {
    /// It is none.
    #[error(transparent)]
    Syntax(#[from] serde_json::Error),
    /// It would take too much memory.
    #[error("more than {VALUES_MAX} values")]
    TooMany,
}

/// Reads a text.
///
/// # Errors
/// It is no JSON, or too much.
pub(crate) fn parse(text: &[u8]) -> Result<Value, JsonError> {
    if values(text) > VALUES_MAX { Err(JsonError::TooMany) } else { Ok(serde_json::from_slice(text)?) }
}

/// How many values a text has at most, if it is JSON.
fn values(text: &[u8]) -> usize {
    let (mut count, mut inside, mut escaped) = (1, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = inside,
            b'"' => inside = !inside,
            b',' | b'[' | b'{' if !inside => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn number(value: &Value) -> usize {
        1 + match value {
            Value::Array(values) => values.iter().map(number).sum(),
            Value::Object(values) => values.values().map(number).sum(),
            _ => 0,
        }
    }

    #[test]
    fn no_text_has_more_values_than_are_counted() {
        let texts = [
            json!(7),
            json!("a,[{\\\"b,,,\\"),
            json!({"a": [1, 2, {"b": null, "\",[": "\\"}], "c": []}),
            json!([[], [[]], {}, {"": {"": 0}}]),
        ];
        for value in texts {
            let text = value.to_string();
            assert!(number(&value) <= values(text.as_bytes()), "{text}");
            assert_eq!(parse(text.as_bytes()).unwrap(), value);
        }
        assert_eq!(values(br#""a,b\",[{""#), 1);
    }

    #[test]
    fn too_many_are_refused_before_they_take_memory() {
        let text = format!("[{}0]", "{\"\":0},".repeat(VALUES_MAX / 2));
        assert!(matches!(parse(text.as_bytes()), Err(JsonError::TooMany)));
        assert!(matches!(parse(b"{"), Err(JsonError::Syntax(_))));
    }
}
