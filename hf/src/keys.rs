//! The keys of config.json: typed look-ups whose errors name the key.

use serde_json::{Map, Value};

use super::json;
use super::schedule::MAX_LAYERS;
use crate::error::{Error, Result};

/// Names that stand in for others, which may be there as well and mean something else: the width of a vision tower
/// beside that of what it gives, and K beside a capacity.
const OF_ITS_OWN: [&str; 2] = ["embed_dim", "capacity_factor"];

/// One object of config.json, as one layer sees it.
#[derive(Clone)]
pub(super) struct Keys<'a> {
    /// The objects around this one, the outermost first, then this one.
    objects: Vec<&'a Map<String, Value>>,
    /// The keys that lead here, each with a dot behind it.
    path: String,
    /// The number of the layer: a key may be a list by layer, and a model may have exceptions by layer.
    pub layer: usize,
    /// Which element counts where a size is a list.
    pub element: usize,
}

impl<'a> Keys<'a> {
    pub fn new(object: &'a Map<String, Value>, layer: usize) -> Self {
        Self { objects: vec![object], path: String::new(), layer, element: layer }
    }

    /// The object under `names` (the first that is there counts), or this one again where there is none:
    /// configurations without the nested object have its keys at their top.
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

    /// The first of `names` in the innermost of the objects that lead here that has one, with its path.
    pub fn around(&self, names: &[&str]) -> Option<(String, &'a Value)> {
        let here: Vec<&str> = self.path.split_terminator('.').collect();
        self.objects.iter().enumerate().rev().find_map(|(depth, object)| {
            let path = here.get(..depth)?.iter().map(|key| format!("{key}.")).collect::<String>();
            let of = |name: &&str| Some((format!("{path}{name}"), object.get(*name)?));
            names.iter().filter_map(of).find(|(_, value)| !value.is_null())
        })
    }

    /// The first of `names` that is there and is not null, which Python writes for what is absent.
    fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &'a Value)> {
        self.all_where(names, |value| !value.is_null()).first().copied()
    }

    /// The same, where `names` are names of one thing: of different values under them readers of config.json take
    /// different ones.
    pub fn agreed<'n>(&self, names: &[&'n str]) -> Result<Option<(&'n str, &'a Value)>> {
        let found = self.all_where(names, |value| !value.is_null());
        let Some((&(name, value), others)) = found.split_first() else { return Ok(None) };
        let differs = |(other, its): &&(&str, &Value)| {
            !OF_ITS_OWN.contains(&name) && !OF_ITS_OWN.contains(other) && !self.same(value, its)
        };
        match others.iter().find(differs) {
            None => Ok(Some((name, value))),
            Some((other, its)) => {
                let got = format!("{}, where `{other}` is {}", shortened(value), shortened(its));
                Err(self.error_text(name, got, "the same value under both names"))
            }
        }
    }

    /// Whether two values say the same of this layer: one may be a list by layer, and the other one for all.
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

    /// The same as `agreed`, where null says something else than absence.
    fn agreed_or_null<'n>(&self, names: &[&'n str]) -> Result<Option<(&'n str, &'a Value)>> {
        Ok(self.agreed(names)?.or_else(|| self.all_where(names, |_| true).first().copied()))
    }

    /// Those of `names` that `good` accepts, as this layer has them: `per_layer_config` has the exceptions.
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

    /// Whether a key is there and is not null.
    pub fn has(&self, name: &str) -> bool {
        self.find(&[name]).is_some()
    }

    pub fn has_any(&self, names: &[&str]) -> bool {
        self.find(names).is_some()
    }

    /// The first of `names` that is there with its value; else the first of them, as missing.
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
        Error::Json { key: format!("{}{name}", self.path), got, wanted: wanted.into() }
    }

    /// A whole number of at least 1, or `default` where no key is there; 0 is no default.
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

    /// A whole number, or `default` where no key is there; 0 and null say that there is no such thing.
    pub fn count(&self, names: &[&str], default: usize) -> Result<usize> {
        let Some((name, value)) = self.agreed_or_null(names)? else { return Ok(default) };
        self.whole(name, value)
    }

    /// A whole number, or the one of this element in a list; null is 0.
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

    /// A number; null is none.
    pub fn number(&self, names: &[&str], default: Option<f64>) -> Result<Option<f64>> {
        match self.agreed_or_null(names)? {
            None => Ok(default),
            Some((_, Value::Null)) => Ok(None),
            Some((name, value)) => {
                json::number(value).map(Some).ok_or_else(|| self.error(name, value, "a number"))
            }
        }
    }

    /// A number, or `default` where no key is there.
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

    /// A flag that null turns off, as Python's None is false.
    pub fn flag(&self, names: &[&str], default: bool) -> Result<bool> {
        match self.agreed_or_null(names)? {
            Some((_, Value::Null)) => Ok(false),
            _ => self.boolean(names, default),
        }
    }

    /// One of some words, as what it stands for. `default` is one of the words.
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

    /// A text, or `default` where no key is there.
    pub fn text(&self, names: &[&str], default: &'a str) -> Result<&'a str> {
        let Some((name, value)) = self.agreed(names)? else { return Ok(default) };
        value.as_str().ok_or_else(|| self.error(name, value, "a text"))
    }

    /// A list; none where the key is something else.
    pub fn list(&self, name: &str) -> Option<&'a [Value]> {
        self.find(&[name]).and_then(|(_, value)| value.as_array()).map(Vec::as_slice)
    }

    /// The numbers of layers in a list, or in a text between commas; none where the key is not there.
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

    /// The element of a list that belongs to this layer; none where the key is not there.
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

    /// Fails unless a switch is off: what it would add is not computed.
    pub fn off(&self, name: &str, wanted: &str) -> Result<()> {
        if self.boolean(&[name], false)? {
            return Err(self.error(name, &Value::Bool(true), wanted));
        }
        Ok(())
    }
}

/// A value as a message shows it: a long one by its beginning.
fn shortened(value: &Value) -> String {
    const MOST: usize = 80;
    let text = json::word(value).map_or_else(|| value.to_string(), str::to_string);
    match text.char_indices().nth(MOST) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
