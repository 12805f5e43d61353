//! The checkpoints of fixtures/: each has the configuration of its line in `lines.rs`, and all of
//! its tensors are used.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::MoeConfig;
use moe_kernels_hf::{Array, BlockInfo, Stored, blocks_from_config};
use serde_json::Value;

use crate::lines;

/// The shapes of a checkpoint's tensors.
type Shapes = BTreeMap<String, Vec<usize>>;

/// A file or folder of fixtures/.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// The folders of all checkpoints.
pub fn fixtures() -> Vec<PathBuf> {
    let mut found: Vec<_> =
        fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.join("config.json").is_file());
    found.sort();
    found
}

/// The header of a safetensors file: its length in 8 bytes, then JSON.
pub fn header(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    serde_json::from_slice(&rest[..u64::from_le_bytes(*length) as usize]).unwrap()
}

fn shapes(folder: &Path) -> Shapes {
    let mut shapes = Shapes::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        for (tensor, info) in header(&path).as_object().unwrap() {
            if tensor != "__metadata__" {
                let shape = serde_json::from_value(info["shape"].clone()).unwrap();
                shapes.insert(tensor.clone(), shape);
            }
        }
    }
    shapes
}

/// The tensors of the arrays' parts, with their shapes.
fn tensors(arrays: &[Array]) -> Shapes {
    let mut found = Shapes::new();
    for part in arrays.iter().flat_map(|array| &array.parts) {
        if part.stored == Stored::Mxfp4 {
            let (last, rest) = part.shape.split_last().unwrap();
            found.insert(format!("{}_blocks", part.name), [rest, &[last / 32, 16]].concat());
            found.insert(format!("{}_scales", part.name), [rest, &[last / 32]].concat());
        } else {
            found.insert(part.name.clone(), part.shape.clone());
        }
    }
    found
}

/// The blocks whose tensors the checkpoint has, with their arrays.
fn find<'b>(blocks: &'b [BlockInfo], has: &Shapes) -> Vec<(&'b BlockInfo, MoeConfig, Vec<Array>)> {
    let fits = |block: &'b BlockInfo| {
        for prefix in block.prefixes() {
            for layout in block.layouts() {
                let arrays = layout.arrays(block, &prefix).unwrap();
                if tensors(&arrays).iter().all(|(name, shape)| has.get(name) == Some(shape)) {
                    return Some((block, layout.config(block), arrays));
                }
            }
        }
        None
    };
    blocks.iter().filter_map(fits).collect()
}

#[test]
fn every_fixture_is_read_and_every_tensor_used() {
    let mut wrong = Vec::new();
    for folder in fixtures() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let config = fs::read_to_string(folder.join("config.json")).unwrap();
        let recorded = header(&folder.join("recorded.safetensors"));
        let layer: usize = recorded["__metadata__"]["layer"].as_str().unwrap().parse().unwrap();
        let has = shapes(&folder);
        let blocks =
            blocks_from_config(&config, layer).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = find(&blocks, &has);
        if found.is_empty() {
            let block = &blocks[0];
            let wanted = block.layouts()[0].arrays(block, &block.prefixes()[0]).unwrap();
            panic!("{name} has {has:#?}, wanted {:#?}", tensors(&wanted));
        }
        let parts = found.iter().map(|(block, config, _)| match block.part {
            "" => config.to_string(),
            part => format!("{part}: {config}"),
        });
        let line = parts.collect::<Vec<_>>().join(" | ");
        if !lines::LINES.contains(&(name.as_str(), line.as_str())) {
            wrong.push(format!("    (\"{name}\", \"{line}\"),"));
        }
        let used: Shapes = found.iter().flat_map(|(.., arrays)| tensors(arrays)).collect();
        let here = |tensor: &&String| found.iter().any(|(b, ..)| b.layer_of(tensor) == Some(layer));
        for tensor in has.keys().filter(here) {
            let scales = tensor.strip_suffix("_scale_inv").is_some_and(|of| used.contains_key(of));
            let other = lines::OTHER_TENSORS
                .iter()
                .any(|(fixture, part)| *fixture == name && tensor.contains(part));
            assert!(used.contains_key(tensor) || scales || other, "{name}: {tensor} is not used");
        }
    }
    assert!(wrong.is_empty(), "other than expected:\n{}", wrong.join("\n"));
}
