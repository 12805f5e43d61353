//! `tune` on the emulator, which runs its own kernels whatever an image holds: a variant is then good
//! exactly if it is launched as the built-in kernel is.

use serde_json::{Value, json};

use crate::common::{Folder, program};

/// A folder with one variant, whose grid is right if its blocks have the 128 columns of the built-in.
fn variant(block_n: usize) -> Folder {
    let folder = Folder::new();
    let constants = json!({
        "GEMM_BLOCK_M": 128, "GEMM_BLOCK_N": block_n, "GEMM_TILE_GROUP": 8,
        "GEMM_THREADS_MMA": 128, "GROUPED_GEMM_SMEM_BYTES": 99328,
    });
    let skipped = json!({ "name": "none", "constants": {}, "image": null, "skipped": "spills" });
    let listed = json!({ "name": "one", "constants": constants, "image": "one.image" });
    let list = json!({ "compiler": "13.0.0", "variants": [skipped, listed] });
    std::fs::write(folder.path("variants.json"), list.to_string()).unwrap();
    let image = b".version 7.0\n.target sm_80\n.address_size 64\n\0";
    std::fs::write(folder.path("one.image"), image).unwrap();
    folder
}

/// The exit status, what was printed, and tune.json.
fn tune(folder: &Folder, more: &[&str]) -> (Option<i32>, String, Value) {
    let path = folder.dir().to_str().unwrap();
    let output = folder.path("out");
    let fixed = ["tune", "--device", "emulator", "--variants", path, "--output"];
    let shape = [output.to_str().unwrap(), "--model", "mixtral-8x7b", "--tokens", "9"];
    let done = program(&[&fixed[..], &shape, more].concat());
    let written = std::fs::read(output.join("tune.json")).unwrap_or_else(|_| b"null".to_vec());
    (done.status, done.stdout + &done.stderr, serde_json::from_slice(&written).unwrap())
}

#[test]
fn a_variant_with_the_same_bits_is_timed() {
    let (status, said, written) = tune(&variant(128), &[]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("1 rows, 0 not reached"), "{said}");
    let row = &written["rows"][0];
    assert_eq!((&row["variant"], &row["same_bits"]), (&json!("one"), &json!(true)), "{row}");
    assert_eq!((&row["model"], &row["tokens"]), (&json!("mixtral-8x7b-div32"), &json!(9)), "{row}");
    assert!(row["seconds"]["median"].as_f64() > Some(0.0), "{row}");
    assert_eq!(row["built_in_seconds"]["samples"], 14, "{row}");
}

#[test]
fn a_variant_with_other_bits_is_not() {
    let (status, said, written) = tune(&variant(1024), &[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("other bits"), "{said}");
    let row = &written["rows"][0];
    assert_eq!((&row["same_bits"], &row["seconds"]), (&json!(false), &json!(null)), "{row}");
}

#[test]
fn a_time_limit_leaves_variants_out() {
    let (status, said, _) = tune(&variant(128), &["--time-limit", "0"]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("0 rows, 1 not reached"), "{said}");
}

#[test]
fn what_cannot_be_tuned() {
    let folder = variant(128);
    folder.edit("variants.json", "\"GEMM_BLOCK_M\":128", "\"GEMM_BLOCK_M\":64");
    let (status, said, _) = tune(&folder, &[]);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("a variant whose tiles are not the plan's"), "{said}");
    let (status, said, _) = tune(&variant(128), &["--model", "absent"]);
    assert_eq!(status, Some(2), "{said}");
}
