//! The language of the repository: phrases that no file may contain, and letters with one meaning.

use std::fs;

use super::{files, root};

/// Phrases of riddles and of personified rows, with the plain words to write in their place.
const BANNED: &[(&str, &str)] = &[
    ("nobody", "no thread, no row, unused"),
    ("somebody", "the caller, a thread"),
    ("anybody", "any caller"),
    ("everybody", "all threads"),
    ("answers for", "handles"),
    ("vouches for", "guarantees"),
    ("a launch can meet", "any launch error"),
    ("is no number", "is NaN"),
    ("a deed of", "an operation of"),
    ("is told from", "differs from, is clamped"),
    ("may ask again", "rounds of reassignment"),
    ("says nothing of", "does not enable, does not contain"),
    ("held against", "checked against, compared with"),
    ("holds against", "checks against"),
];

/// Folders and files that the rules do not cover: what is built, recorded or generated, and this
/// list.
const NOT_OURS: &[&str] =
    &["target", ".git", ".cuda", "bench-results", "tests/it/tidy/language.rs", "Cargo.lock"];

const TEXT: &[&str] = &[
    ".rs",
    ".cu",
    ".cuh",
    ".h",
    ".cpp",
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".sh",
    "run",
    "bundle",
    "record",
    "sanitize",
    "cuda-toolchain",
    "static-evidence",
    "emulator-kernels",
    "test-run",
];

/// The text files of the repository.
fn texts() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut left = vec![root().to_path_buf()];
    while let Some(path) = left.pop() {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        if NOT_OURS.iter().any(|skip| name == *skip || name.ends_with(&format!("/{skip}"))) {
            continue;
        }
        if path.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if TEXT.iter().any(|ending| name.ends_with(ending)) {
            found.extend(fs::read_to_string(&path).ok().map(|text| (name, text)));
        }
    }
    assert!(found.len() > 300, "{}", found.len());
    found
}

/// The first banned phrase of a text, with its line.
fn banned(text: &str) -> Option<String> {
    text.lines().enumerate().find_map(|(number, line)| {
        let lower = line.to_lowercase();
        let (phrase, instead) = BANNED.iter().find(|(phrase, _)| lower.contains(phrase))?;
        Some(format!("{}: `{phrase}`; plainer: {instead}", number + 1))
    })
}

/// A comment that begins with a noun clause.
fn opener(text: &str) -> Option<String> {
    text.lines().enumerate().find_map(|(number, line)| {
        let line = line.trim_start();
        let comment = ["//!", "///", "//", "#", "\"\"\""].iter().find_map(|m| line.strip_prefix(m));
        let starts = comment?.trim_start().starts_with("What ");
        starts.then(|| format!("{}: begins with `What`: name the thing", number + 1))
    })
}

#[test]
fn texts_are_plain_technical_english() {
    let texts = texts();
    let breaches = texts.iter().flat_map(|(name, text)| {
        let found = [banned(text), opener(text)].into_iter().flatten();
        found.map(move |breach| format!("{name}:{breach}"))
    });
    let breaches: Vec<String> = breaches.collect();
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn breaches_of_language_are_seen() {
    for text in ["a row that Nobody owns", "fn f() {}\n// Then it answers for it."] {
        assert!(banned(text).is_some(), "{text}");
    }
    for text in ["/// What a layer reads.", "    # What is left", "//! What"] {
        assert_eq!(opener(text).is_some(), text != "//! What", "{text}");
    }
    for text in ["// Whatever comes", "let what = 1;", "/// Unused rows are zeroed."] {
        assert_eq!((banned(text), opener(text)), (None, None), "{text}");
    }
}

/// A dimension named `k` or `n` in a signature, or a shape in a comment in which K is not experts
/// per token.
fn second_k(text: &str) -> Option<String> {
    let of_product = |shape: &str| {
        let dims: Vec<&str> = shape.split(',').map(str::trim).collect();
        let has = |dim: &str| dims.contains(&dim);
        has("N") || has("K") && !has("E") && ["R", "H", "I"].iter().any(|dim| has(dim))
    };
    text.lines().enumerate().find_map(|(number, line)| {
        let (code, comment) = line.split_once("//").unwrap_or((line, ""));
        let named = |name: &str| {
            code.contains(&format!("({name}: usize")) || code.contains(&format!(" {name}: usize"))
        };
        let mut shapes = comment.split('[').skip(1).filter_map(|rest| rest.split_once(']'));
        let breach = named("k") || named("n") || shapes.any(|(shape, _)| of_product(shape));
        breach.then(|| format!("{}: {line}", number + 1))
    })
}

#[test]
fn k_is_experts_per_token() {
    let mut sources = files("src", &[".rs"]);
    sources.extend(files("hf/src", &[".rs"]));
    sources.extend(files("kernels", &["abi.h", ".cu"]));
    let breaches = sources.iter().filter_map(|(name, text)| {
        let library = text.split("#[cfg(test)]").next().unwrap();
        second_k(library).map(|breach| format!("{name}:{breach}"))
    });
    let breaches: Vec<String> = breaches.collect();
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn a_second_k_is_seen() {
    for text in
        ["/// `[E, N, K]`", "fn f(k: usize)", "    n: usize,", "// [R, K]", "int k;  // [K, H]"]
    {
        assert!(second_k(text).is_some(), "{text}");
    }
    for text in ["/// `[T, K]`", "// [T, K, E]", "fn f(top_k: usize, in_features: usize)", "x[i]"] {
        assert_eq!(second_k(text), None, "{text}");
    }
}
