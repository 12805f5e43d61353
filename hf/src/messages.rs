//! Lists in messages, and the error of a folder without weights.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::folder::{Folder, INDEX, SINGLE};

/// The largest number of names in a list; the others are counted.
const MAX_NAMES: usize = 4;

/// The error of a folder without weights in safetensors, with the weights that it has.
pub(crate) fn no_weights(folder: &Folder) -> Error {
    let mut why = format!("no such file, and no {INDEX}");
    let files = folder.list();
    let of = |is: fn(&str) -> bool| files.iter().map(String::as_str).filter(move |name| is(name));
    let mut others: Vec<&str> = of(is_of_a_model).collect();
    if others.is_empty() {
        others.extend(of(is_safetensors));
    }
    if let Some(&first) = others.first() {
        let format = match () {
            () if first.ends_with(".gguf") => "GGUF",
            () if is_adapter(first) => "an adapter without its model",
            () if is_safetensors(first) => "another set of names",
            () if first == "original" => "a format of its own",
            () => "pickled tensors of PyTorch",
        };
        why.push_str(&format!(
            "; in its place: {}, which is {format} and not supported",
            list(&others)
        ));
    }
    folder.error(SINGLE, why)
}

/// Names in a message.
pub(crate) fn list(names: &[&str]) -> String {
    // Names that differ in numbers alone, as those of experts do, are shown once.
    let mut short: BTreeMap<String, &str> = BTreeMap::new();
    for name in names {
        let without_numbers: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
        short.entry(without_numbers).or_insert(name);
    }
    let mut shown: Vec<&str> = short.into_values().collect();
    shown.truncate(MAX_NAMES);
    let text = shown.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names.len() - shown.len() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// `0-2, 5` for `[0, 1, 2, 5]`.
pub(crate) fn ranges(sorted: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &value in sorted {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == value => *last = value,
            _ => parts.push((value, value)),
        }
    }
    let part =
        |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    parts.into_iter().map(part).collect::<Vec<_>>().join(", ")
}

/// Returns whether a file or folder of this name has weights of a model in another form.
pub(crate) fn is_of_a_model(name: &str) -> bool {
    let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    is_adapter(name)
        || name == "original"
        || name == INDEX
        || ends(&[".gguf"])
        || starts(&["model", "consolidated"]) && ends(&[".safetensors"])
        || starts(&["pytorch_model", "consolidated"]) && ends(&[".bin", ".pth", ".pt"])
}

pub(crate) fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

pub(crate) fn is_adapter(name: &str) -> bool {
    matches!(name, "adapter_config.json" | "adapter_model.safetensors" | "adapter_model.bin")
}
