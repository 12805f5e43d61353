//! The keys of config.json: typed look-ups whose errors name the key.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

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
        if value.is_null() {
            return Ok(self);
        }
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
            names.iter().filter_map(of).find(|(_, value)| value.is_object())
        })
    }

    /// The first of `names` that is there, as this layer has it: `per_layer_config` has the exceptions.
    fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &'a Value)> {
        let here = self.objects.last()?;
        let exceptions = here
            .get("per_layer_config")
            .and_then(|layers| layers.get(self.layer.to_string()))
            .and_then(Value::as_object);
        let of = |object: &'a Map<String, Value>| {
            names.iter().find_map(|name| Some((*name, object.get(*name)?)))
        };
        exceptions.and_then(of).or_else(|| of(here))
    }

    /// Whether a key is there and is not null.
    pub fn has(&self, name: &str) -> bool {
        self.find(&[name]).is_some_and(|(_, value)| !value.is_null())
    }

    pub fn error(&self, name: &str, got: &Value, wanted: impl Into<String>) -> Error {
        self.error_text(name, shortened(got), wanted)
    }

    pub fn error_text(&self, name: &str, got: String, wanted: impl Into<String>) -> Error {
        Error::Json { key: format!("{}{name}", self.path), got, wanted: wanted.into() }
    }

    /// A whole number, or `default` where no key is there; 0 is no default.
    pub fn size(&self, names: &[&str], default: usize) -> Result<usize> {
        self.count(names, default).and_then(|size| match size {
            0 => {
                let name = names.first().copied().unwrap_or_default();
                let (name, got) = self
                    .find(names)
                    .map_or((name, "missing".into()), |(name, got)| (name, shortened(got)));
                Err(self.error_text(name, got, "a whole number of at least 1"))
            }
            size => Ok(size),
        })
    }

    /// The same where 0 and null say that there is no such thing.
    pub fn count(&self, names: &[&str], default: usize) -> Result<usize> {
        let Some((name, value)) = self.find(names) else { return Ok(default) };
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
        match self.find(names) {
            None => Ok(default),
            Some((_, Value::Null)) => Ok(None),
            Some((name, value)) => {
                value.as_f64().map(Some).ok_or_else(|| self.error(name, value, "a number"))
            }
        }
    }

    /// A number that has to be there.
    pub fn f32(&self, names: &[&str], default: f64) -> Result<f32> {
        let value = self.number(names, Some(default))?;
        let name = names.first().copied().unwrap_or_default();
        let number = value.ok_or_else(|| self.error(name, &Value::Null, "a number"))?;
        Ok(number as f32)
    }

    pub fn boolean(&self, names: &[&str], default: bool) -> Result<bool> {
        match self.find(names) {
            None => Ok(default),
            Some((_, Value::Bool(value))) => Ok(*value),
            Some((name, value)) => Err(self.error(name, value, "true or false")),
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
        match self.find(names) {
            None => {
                let name = names.first().copied().unwrap_or_default();
                find(default).ok_or_else(|| self.error_text(name, "missing".into(), wanted()))
            }
            Some((name, value)) => {
                value.as_str().and_then(find).ok_or_else(|| self.error(name, value, wanted()))
            }
        }
    }

    /// The element of a list that belongs to this layer; none where the key is not there, or null.
    pub fn by_layer(&self, name: &str) -> Result<Option<&'a Value>> {
        match self.find(&[name]) {
            None | Some((_, Value::Null)) => Ok(None),
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
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
