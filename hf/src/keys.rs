//! The keys of config.json: typed look-ups with errors that name the key.

use serde_json::{Map, Value};

use super::json;
use crate::error::{Error, Result};

/// The names of one key.
pub(super) type Names = &'static [&'static str];

/// The largest supported number of layers: each of them reads the keys for all of them.
pub(super) const MAX_LAYERS: usize = 1 << 10;

/// Names that are alternatives to others and may also have a meaning of their own: the width of a
/// vision tower in addition to that of its output, and a capacity in addition to K.
const OWN_MEANING: [&str; 2] = ["embed_dim", "capacity_factor"];

/// One object of config.json, for one layer.
#[derive(Clone)]
pub(super) struct Keys<'a> {
    /// The objects on the path, the outermost first and this one last.
    objects: Vec<&'a Map<String, Value>>,
    /// The keys on the path, each followed by a dot.
    path: String,
    /// The number of the layer: a value may be a list by layer, and a model may have exceptions by
    /// layer.
    pub layer: usize,
    /// The index of the element that is read if a size is a list.
    pub element: usize,
}

impl<'a> Keys<'a> {
    pub fn new(object: &'a Map<String, Value>, layer: usize) -> Self {
        Self { objects: vec![object], path: String::new(), layer, element: layer }
    }

    /// The object under the first of `names` that exists, else this one: configurations without the
    /// nested object have its keys at the top.
    pub fn nested(mut self, names: &[&str]) -> Result<Self> {
        let Some((name, value)) = self.find(names) else { return Ok(self) };
        let Value::Object(object) = value else {
            return Err(self.error(name, value, "an object"));
        };
        self.path = format!("{}{name}.", self.path);
        self.objects.push(object);
        Ok(self)
    }

    /// The keys at the top of config.json.
    pub fn top(&self) -> Self {
        let objects = self.objects.first().copied().into_iter().collect();
        Self { objects, path: String::new(), layer: self.layer, element: self.element }
    }

    /// The first of `names` in the innermost object on the path that has one, with its path.
    pub fn around(&self, names: &[&str]) -> Option<(String, &'a Value)> {
        let here: Vec<&str> = self.path.split_terminator('.').collect();
        self.objects.iter().enumerate().rev().find_map(|(depth, object)| {
            let path = here.get(..depth)?.iter().map(|key| format!("{key}.")).collect::<String>();
            let of = |name: &&str| Some((format!("{path}{name}"), object.get(*name)?));
            names.iter().filter_map(of).find(|(_, value)| !value.is_null())
        })
    }

    /// The first of `names` that exists and is not null, which Python writes for an absent value.
    fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &'a Value)> {
        self.all_where(names, |value| !value.is_null()).first().copied()
    }

    /// The same if `names` are names of one key. Different values under them are an error: readers
    /// of config.json differ in which one they take.
    pub fn agreed<'n>(&self, names: &[&'n str]) -> Result<Option<(&'n str, &'a Value)>> {
        let found = self.all_where(names, |value| !value.is_null());
        let Some((&(name, value), others)) = found.split_first() else { return Ok(None) };
        let differs = |(other, its): &&(&str, &Value)| {
            !OWN_MEANING.contains(&name) && !OWN_MEANING.contains(other) && !self.same(value, its)
        };
        match others.iter().find(differs) {
            None => Ok(Some((name, value))),
            Some((other, its)) => {
                let got = format!("{} and `{other}` is {}", shortened(value), shortened(its));
                Err(self.error_text(name, got, "the same value under both names"))
            }
        }
    }

    /// Returns whether two values are equal for this layer: one may be a list by layer, and the
    /// other for all layers.
    fn same(&self, one: &Value, other: &Value) -> bool {
        match (one, other) {
            (Value::Array(one), Value::Array(other)) => {
                one.len() == other.len() && one.iter().zip(other).all(|(a, b)| self.same(a, b))
            }
            (Value::Array(list), value) | (value, Value::Array(list)) => {
                list.get(self.element).is_some_and(|element| self.same(element, value))
            }
            _ => match (json::number(one), json::number(other)) {
                (Some(one), Some(other)) => one == other,
                _ => one == other,
            },
        }
    }

    /// The same as `agreed`, for keys with another meaning of null than absence.
    fn agreed_or_null<'n>(&self, names: &[&'n str]) -> Result<Option<(&'n str, &'a Value)>> {
        Ok(self.agreed(names)?.or_else(|| self.all_where(names, |_| true).first().copied()))
    }

    /// Those of `names` that `good` accepts, for this layer: `per_layer_config` overrides.
    fn all_where<'n>(
        &self,
        names: &[&'n str],
        good: impl Fn(&Value) -> bool,
    ) -> Vec<(&'n str, &'a Value)> {
        let Some(here) = self.objects.last() else { return Vec::new() };
        let exceptions = here
            .get("per_layer_config")
            .and_then(|layers| layers.get(self.layer.to_string()))
            .and_then(Value::as_object);
        let of = |object: &'a Map<String, Value>| -> Vec<_> {
            let value = |name| object.get(name).filter(|value| good(value));
            names.iter().filter_map(|name| Some((*name, value(*name)?))).collect()
        };
        exceptions.map(&of).filter(|found| !found.is_empty()).unwrap_or_else(|| of(here))
    }

    /// Returns whether a key exists and is not null.
    pub fn has(&self, name: &str) -> bool {
        self.find(&[name]).is_some()
    }

    pub fn has_any(&self, names: &[&str]) -> bool {
        self.find(names).is_some()
    }

    /// The first of `names` that exists, with its value; else the first of them, as missing.
    pub fn shown<'n>(&self, names: &[&'n str], default: &str) -> (&'n str, String) {
        let missing = || {
            let name = names.first().copied().unwrap_or_default();
            (name, format!("missing ({default} by default)"))
        };
        self.find(names).map_or_else(missing, |(name, value)| (name, shortened(value)))
    }

    pub fn error(&self, name: &str, got: &Value, wanted: impl Into<String>) -> Error {
        self.error_text(name, shortened(got), wanted)
    }

    pub fn error_text(&self, name: &str, got: String, wanted: impl Into<String>) -> Error {
        Error::Config { key: format!("{}{name}", self.path), got, wanted: wanted.into() }
    }

    /// A whole number of at least 1, or `default` without a key; a default of 0 makes the key
    /// required.
    pub fn size(&self, names: &[&str], default: usize) -> Result<usize> {
        let found = self.agreed(names)?;
        let size = found.map_or(Ok(default), |(name, value)| self.whole(name, value))?;
        if size > 0 {
            return Ok(size);
        }
        let name = names.first().copied().unwrap_or_default();
        let (name, got) =
            found.map_or((name, "missing".into()), |(name, got)| (name, shortened(got)));
        Err(self.error_text(name, got, "a whole number of at least 1"))
    }

    /// A whole number, or `default` without a key; 0 and null disable the feature.
    pub fn count(&self, names: &[&str], default: usize) -> Result<usize> {
        let Some((name, value)) = self.agreed_or_null(names)? else { return Ok(default) };
        self.whole(name, value)
    }

    /// A whole number, or the element of a list; null is 0.
    fn whole(&self, name: &str, value: &Value) -> Result<usize> {
        let element = match value {
            Value::Array(values) => values.get(self.element).ok_or_else(|| {
                let wanted = format!("a list of at least {} numbers", self.element + 1);
                self.error(name, value, wanted)
            })?,
            value => value,
        };
        if element.is_null() {
            return Ok(0);
        }
        let integer = element.as_u64().and_then(|value| usize::try_from(value).ok());
        integer.ok_or_else(|| self.error(name, value, "a whole number of at least 1"))
    }

    /// A number, or `default` without a key; null is `None`.
    pub fn number(&self, names: &[&str], default: Option<f64>) -> Result<Option<f64>> {
        match self.agreed_or_null(names)? {
            None => Ok(default),
            Some((_, Value::Null)) => Ok(None),
            Some((name, value)) => {
                json::number(value).map(Some).ok_or_else(|| self.error(name, value, "a number"))
            }
        }
    }

    /// A number, or `default` without a key.
    pub fn f64(&self, names: &[&str], default: f64) -> Result<f64> {
        let Some((name, value)) = self.agreed(names)? else { return Ok(default) };
        json::number(value).ok_or_else(|| self.error(name, value, "a number"))
    }

    /// The nearest f32 to such a number.
    pub fn f32(&self, names: &[&str], default: f64) -> Result<f32> {
        Ok(self.f64(names, default)? as f32)
    }

    pub fn boolean(&self, names: &[&str], default: bool) -> Result<bool> {
        match self.agreed(names)? {
            None => Ok(default),
            Some((_, Value::Bool(value))) => Ok(*value),
            Some((name, value)) => Err(self.error(name, value, "true or false")),
        }
    }

    /// A flag; null is false, as Python's None is.
    pub fn flag(&self, names: &[&str], default: bool) -> Result<bool> {
        match self.agreed_or_null(names)? {
            Some((_, Value::Null)) => Ok(false),
            _ => self.boolean(names, default),
        }
    }

    /// The value of one of the known words. `default` is one of the words.
    pub fn word<T: Copy>(&self, names: &[&str], default: &str, known: &[(&str, T)]) -> Result<T> {
        let find =
            |word: &str| known.iter().find(|(name, _)| *name == word).map(|(_, value)| *value);
        let wanted = || {
            let words: Vec<String> = known.iter().map(|(word, _)| format!("{word:?}")).collect();
            format!("one of {}", words.join(", "))
        };
        match self.agreed(names)? {
            None => {
                let name = names.first().copied().unwrap_or_default();
                find(default).ok_or_else(|| self.error_text(name, "missing".into(), wanted()))
            }
            Some((name, value)) => {
                value.as_str().and_then(find).ok_or_else(|| self.error(name, value, wanted()))
            }
        }
    }

    /// A text, or `default` without a key.
    pub fn text(&self, names: &[&str], default: &'a str) -> Result<&'a str> {
        let Some((name, value)) = self.agreed(names)? else { return Ok(default) };
        value.as_str().ok_or_else(|| self.error(name, value, "a text"))
    }

    /// A list; `None` for another type.
    pub fn list(&self, name: &str) -> Option<&'a [Value]> {
        self.find(&[name]).and_then(|(_, value)| value.as_array()).map(Vec::as_slice)
    }

    /// The numbers of layers in a list, or in a text separated by commas; `None` without the key.
    pub fn layer_numbers(&self, name: &str) -> Result<Option<Vec<usize>>> {
        let Some((_, value)) = self.find(&[name]) else { return Ok(None) };
        let of_text = |part: &str| part.trim().parse().ok();
        let of_value = |value: &Value| {
            let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
            number.or_else(|| value.as_str().and_then(of_text))
        };
        let numbers: Option<Vec<_>> = match value {
            Value::Array(values) if values.len() <= MAX_LAYERS => {
                values.iter().map(of_value).collect()
            }
            Value::String(text) if text.len() <= 8 * MAX_LAYERS => {
                text.split(',').filter(|part| !part.trim().is_empty()).map(of_text).collect()
            }
            _ => None,
        };
        let wanted = || format!("a list of at most {MAX_LAYERS} layers' numbers");
        numbers.map(Some).ok_or_else(|| self.error(name, value, wanted()))
    }

    /// The element of a list for this layer; `None` without the key.
    pub fn by_layer(&self, name: &str) -> Result<Option<&'a Value>> {
        match self.find(&[name]) {
            None => Ok(None),
            Some((_, Value::Array(values))) if values.is_empty() => Ok(None),
            Some((_, value @ Value::Array(values))) => {
                let wanted = || format!("a list with an element for layer {}", self.layer);
                values.get(self.layer).map(Some).ok_or_else(|| self.error(name, value, wanted()))
            }
            Some((_, value)) => {
                Err(self.error(name, value, "a list with an element for each layer"))
            }
        }
    }

    /// An error unless a switch is off: its effect is not supported.
    pub fn off(&self, name: &str, wanted: &str) -> Result<()> {
        if self.boolean(&[name], false)? {
            return Err(self.error(name, &Value::Bool(true), wanted));
        }
        Ok(())
    }
}

/// A value in a message: a long one is truncated.
fn shortened(value: &Value) -> String {
    const MAX: usize = 80;
    let text = json::word(value).map_or_else(|| value.to_string(), str::to_string);
    match text.char_indices().nth(MAX) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
