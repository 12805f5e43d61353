//! JSON as Python's `json` module writes and reads it.

use std::borrow::Cow;

use serde_json::{Value, json};

/// The words for numbers that JSON lacks.
const WORDS: [&str; 3] = ["Infinity", "-Infinity", "NaN"];

/// Converts Python's JSON to JSON of RFC 8259.
///
/// Python writes and reads the bare words `Infinity`, `-Infinity` and `NaN` as numbers, and
/// released config.json files have them. Each of them outside of a string is replaced by the object
/// that transformers writes since version 5, `{"__float__": "Infinity"}`; every other byte is
/// unchanged. A parser for RFC 8259 thus accepts and rejects what Python does: the words are
/// values, not keys and not parts of longer words.
///
/// ```
/// let text = moe_kernels_hf::strict_json(r#"{"a": -Infinity, "b": "NaN"}"#);
/// assert_eq!(text, r#"{"a": {"__float__": "-Infinity"}, "b": "NaN"}"#);
/// ```
pub fn strict_json(text: &str) -> Cow<'_, str> {
    let mut strict = String::new();
    let mut copied = 0;
    let mut at = 0;
    let bytes = text.as_bytes();
    while let Some(&byte) = bytes.get(at) {
        at = match byte {
            b'"' => end_of_string(bytes, at),
            b'-' | b'.' | b'_' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                let end = end_of_word(bytes, at);
                if let Some(word) = text.get(at..end).filter(|word| WORDS.contains(word)) {
                    strict += text.get(copied..at).unwrap_or_default();
                    strict += &format!("{{\"__float__\": \"{word}\"}}");
                    copied = end;
                }
                end
            }
            _ => at + 1,
        };
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    strict += text.get(copied..).unwrap_or_default();
    Cow::Owned(strict)
}

/// The end of the string that begins at `start`, quotes included.
fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of the sequence of letters, digits and signs that begins at `start`.
fn end_of_word(bytes: &[u8], start: usize) -> usize {
    let of_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-._".contains(byte);
    let rest = bytes.get(start..).unwrap_or_default();
    start + rest.iter().take_while(|byte| of_word(byte)).count()
}

/// A number, including infinities and NaN.
pub(super) fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| match word(value)? {
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => Some(f64::NAN),
    })
}

/// The word of a number that JSON lacks.
pub(super) fn word(value: &Value) -> Option<&'static str> {
    value.get("__float__")?;
    WORDS.into_iter().find(|word| *value == json!({ "__float__": word }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words are values wherever a value is allowed; strings are unchanged.
    #[test]
    fn words_outside_strings_are_values() {
        let text =
            r#"{"a": [0.0, Infinity,-Infinity , NaN], "NaN": "Infinity \" NaN", "c": {"d":NaN}}"#;
        let value: Value = serde_json::from_str(&strict_json(text)).unwrap();
        let numbers: Vec<_> = value["a"].as_array().unwrap().iter().map(number).collect();
        assert_eq!(numbers[..3], [Some(0.0), Some(f64::INFINITY), Some(f64::NEG_INFINITY)]);
        assert!(numbers[3].unwrap().is_nan() && number(&value["c"]["d"]).unwrap().is_nan());
        assert_eq!(value["NaN"], "Infinity \" NaN");
        assert_eq!(number(&json!("NaN")), None);
        assert_eq!(number(&json!({ "__float__": "NaN", "more": 1 })), None);
    }

    /// Text without the words is unchanged, and an error in Python remains an error.
    #[test]
    fn accepts_nothing_else() {
        let strings = [r#""\" NaN""#, r#"["\\", "NaN \\"]"#, "\"Infinity"];
        for text in [&["", "{\"a\": 1e3, \"b\": [true, null]}"], &strings[..]].concat() {
            assert!(matches!(strict_json(text), Cow::Borrowed(same) if same == text), "{text}");
        }
        let wrong = [
            "{NaN: 1}",
            "[nan]",
            "[NaNs]",
            "[-NaN]",
            "[+Infinity]",
            "[Infinity1]",
            "[1Infinity]",
            "[- Infinity]",
            "[Inf]",
            "[NaN NaN]",
            r#"["\\" NaN]"#,
            "[NaN.0]",
            "[INFINITY]",
        ];
        for text in wrong {
            let read = serde_json::from_str::<Value>(&strict_json(text));
            assert!(read.is_err(), "{text} is read as {read:?}");
        }
    }
}
