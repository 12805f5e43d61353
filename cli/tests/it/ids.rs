//! Ids in files that are out of range: the error names the element.

use std::collections::HashMap;

use crate::common::{Folder, Stored, check_failure, fails, find_mut, program, write_with};

const INPUT: &str = "recorded.safetensors";
const HASH: &str = "deepseek-v4-hash-tiny";
const TABLE: &str = "layers.1.ffn.gate.tid2eid";

fn shape_of(folder: &Folder, file: &str, name: &str) -> Vec<usize> {
    find_mut(&mut folder.tensors(file), name).shape.clone()
}

/// Replaces one element of a tensor of i64.
fn with(fixture: &str, file: &str, name: &str, element: usize, id: i64) -> Folder {
    let folder = Folder::of(fixture);
    folder.change(file, |tensors| {
        let tensor = find_mut(tensors, name);
        assert_eq!(tensor.dtype, safetensors::Dtype::I64, "{name}");
        tensor.data[element * 8..][..8].copy_from_slice(&id.to_le_bytes());
    });
    folder
}

#[test]
fn rejects_token_id_outside_of_table() {
    let [vocabulary, _] = shape_of(&Folder::of(HASH), "model.safetensors", TABLE)[..] else {
        panic!("a table is a matrix");
    };
    let wanted = format!("rows of the table of expert ids, from 0 and below {vocabulary}");
    for id in [-1, vocabulary as i64, 1 << 31, 1 << 32, i64::MAX] {
        let folder = with(HASH, INPUT, "token_ids", 2, id);
        fails(&folder, &[INPUT, &format!("`token_ids` is {id} at [2]"), &wanted]);
    }
    let last = with(HASH, INPUT, "token_ids", 2, vocabulary as i64 - 1);
    assert_eq!(crate::common::run(&last, 1, &["--device", "cpu"]).status, Some(0));
}

#[test]
fn rejects_table_with_invalid_expert_id() {
    let folder = Folder::of(HASH);
    let [_, top_k] = shape_of(&folder, "model.safetensors", TABLE)[..] else {
        panic!("a table is a matrix");
    };
    let [experts, _] = shape_of(&folder, "model.safetensors", "layers.1.ffn.gate.weight")[..]
    else {
        panic!("a router's weights are a matrix");
    };
    for id in [-1, experts as i64, i64::from(u32::MAX)] {
        let folder = with(HASH, "model.safetensors", TABLE, top_k + 1, id);
        let words = [
            format!("`{TABLE}` is {id} at [1, 1]"),
            format!("ids of experts, from 0 and below {experts}"),
        ];
        fails(&folder, &["model.safetensors", &words[0], &words[1]]);
    }
}

#[test]
fn rejects_token_type_without_block() {
    for kind in [-1, 2] {
        let folder = with("ernie4-5-vl-moe-tiny", INPUT, "token_types", 0, kind);
        let words = format!("`token_types` is {kind} at [0]");
        fails(&folder, &[&words, "numbers of the layer's blocks, from 0 and below 2"]);
    }
}

/// Ids of a recording have to be integers of 4 or 8 bytes.
#[test]
fn rejects_recorded_ids_of_unsupported_type() {
    for dtype in [safetensors::Dtype::F64, safetensors::Dtype::U64] {
        let folder = Folder::of("mixtral-tiny");
        let mut tensors = folder.tensors(INPUT);
        find_mut(&mut tensors, "expert_ids").dtype = dtype;
        let notes = HashMap::from([("layer".to_string(), "1".to_string())]);
        write_with(&folder.path(INPUT), &tensors, Some(notes));
        let of = folder.dir().to_str().unwrap();
        let done = program(&["run", "--recorded", of, "--device", "cpu", "--dtype", "f32"]);
        check_failure(&done, &["`expert_ids` is ", "wanted i32 or i64"]);
    }
}

#[test]
fn rejects_recorded_ids_and_kept_flags_out_of_range() {
    let cases = [
        ("mixtral-tiny", "expert_ids", 5, "ids of experts, from 0 and below 5"),
        ("longcat-flash-tiny", "expert_ids", 99, "ids of experts"),
        ("switch-transformers-tiny", "kept", 2, "1 for a slot that is kept"),
        ("switch-transformers-tiny", "expert_ids", -1, "ids of experts"),
    ];
    for (fixture, name, id, words) in cases {
        let folder = Folder::of(fixture);
        let mut tensors: Vec<Stored> = folder.tensors(INPUT);
        let tensor = find_mut(&mut tensors, name);
        let wide = tensor.dtype == safetensors::Dtype::I64;
        let bytes = if wide { 8 } else { 4 };
        tensor.data[bytes..2 * bytes].copy_from_slice(&i64::to_le_bytes(id)[..bytes]);
        let notes = HashMap::from([("layer".to_string(), "1".to_string())]);
        write_with(&folder.path(INPUT), &tensors, Some(notes));
        let of = folder.dir().to_str().unwrap();
        let done = program(&["run", "--recorded", of, "--device", "cpu", "--dtype", "f32"]);
        check_failure(&done, &[&format!("`{name}` is {id} at ["), words]);
    }
}
