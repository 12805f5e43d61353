//! Runs a block of every family on each device, and compares it with the recording of transformers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moe_kernels_hf::model_types;
use serde_json::Value;

use crate::common::{Done, program};

// The configuration of each fixture as a line; a test of moe-kernels-hf checks them.
#[allow(dead_code)]
#[path = "../../../hf/tests/it/lines.rs"]
mod lines;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The recordings in fixtures/, and those whose outputs are within the limit on a device.
fn run(device: &str, dtype: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let fixtures = repository().join("fixtures").display().to_string();
    let arguments = ["run", "--recorded", &fixtures, "--device", device, "--dtype", dtype];
    let Done { stdout, stderr, .. } = program(&arguments);
    let rows = stdout.lines().filter_map(|line| line.strip_prefix(device));
    let (mut all, mut good) = (BTreeSet::new(), BTreeSet::new());
    for row in rows {
        let name = row.trim_start().split(dtype).next().unwrap().trim_end().to_string();
        if row.ends_with(" ok") {
            good.insert(name.clone());
        }
        all.insert(name);
    }
    assert!(!all.is_empty(), "{stdout}{stderr}");
    (all, good)
}

/// Each fixture's folder.
fn fixtures() -> Vec<String> {
    let folders = std::fs::read_dir(repository().join("fixtures")).unwrap();
    let folders = folders.map(|entry| entry.unwrap().path());
    let mut names: Vec<String> = folders
        .filter(|path| path.join("config.json").is_file())
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn devices() -> Vec<&'static str> {
    if cfg!(feature = "emulator") { vec!["cpu", "emulator"] } else { vec!["cpu"] }
}

#[test]
fn every_family_is_close_to_its_recording() {
    let with_capacity = ["nllb-moe-tiny (capacity)", "switch-transformers-tiny (capacity)"];
    let mut wanted: BTreeSet<String> = fixtures().into_iter().collect();
    wanted.extend(with_capacity.map(str::to_string));
    for device in devices() {
        for dtype in ["f32", "bf16", "f16"] {
            let (all, good) = run(device, dtype);
            assert_eq!(all, wanted, "{device} {dtype}");
            let far: Vec<_> = all.difference(&good).collect();
            assert!(far.is_empty(), "{device} {dtype}: {far:?}");
        }
    }
}

/// Describes the computation of a block, without the sizes of its fixture.
fn without_sizes(line: &str) -> String {
    let is_size = |word: &str| {
        let digits = word.trim_end_matches(',').trim_start_matches(['H', 'I', 'E', 'K']);
        digits.len() < word.trim_end_matches(',').len()
            && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    let words: Vec<&str> = line.split(' ').filter(|word| !is_size(word)).collect();
    words.join(" ").replace('|', "and")
}

/// A table of the families, by the computation of their blocks.
fn table(good: &BTreeSet<String>) -> String {
    let mut rows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut left: BTreeSet<&str> = model_types().into_iter().collect();
    for fixture in fixtures().iter().filter(|name| good.contains(*name)) {
        let config = repository().join("fixtures").join(fixture).join("config.json");
        let config: Value = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
        let model_type = config["model_type"].as_str().unwrap();
        let (_, line) = lines::LINES.iter().find(|(name, _)| name == fixture).unwrap();
        rows.entry(without_sizes(line)).or_default().insert(format!("`{model_type}`"));
        left.remove(model_type);
    }
    let mut rows: Vec<(String, String)> = rows
        .into_iter()
        .map(|(line, types)| (types.into_iter().collect::<Vec<_>>().join(", "), line))
        .collect();
    rows.sort();
    let mut text =
        String::from("| families, by `model_type` | what their block computes |\n|---|---|\n");
    for (types, line) in rows {
        text.push_str(&format!("| {types} | {line} |\n"));
    }
    let names: Vec<String> = left.iter().map(|name| format!("`{name}`")).collect();
    if !names.is_empty() {
        let names = names.join(", ");
        text.push_str(&format!(
            "\nRead as one of these, without a checkpoint of their own here: {names}.\n"
        ));
    }
    text
}

/// The table in docs/families.md is generated. After a change: `MOE_UPDATE=1 cargo test
/// -p moe-kernels-cli --test it families`.
#[test]
fn families_page_lists_tested_families() {
    const MARKS: [&str; 2] = ["<!-- families: begin -->\n", "<!-- families: end -->"];
    let mut good: BTreeSet<String> = fixtures().into_iter().collect();
    for device in devices() {
        let (_, here) = run(device, "f32");
        good.retain(|name| here.contains(name));
    }
    let path = repository().join("docs/families.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(MARKS[0]).unwrap();
    let (_, after) = rest.split_once(MARKS[1]).unwrap();
    let fresh = format!("{before}{}{}{}{after}", MARKS[0], table(&good), MARKS[1]);
    if std::env::var_os("MOE_UPDATE").is_some() {
        std::fs::write(&path, &fresh).unwrap();
    }
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(page == fresh, "docs/families.md is stale; this test's comment says how to refresh it");
}
