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

/// A name may not steer the terminal.
#[test]
fn a_name_is_escaped() {
    let folder = variant(128);
    folder.edit("variants.json", "\"name\":\"one\"", "\"name\":\"\\u001b[31m\\u009b1m\"");
    let (status, said, _) = tune(&folder, &[]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("\\u{1b}[31m\\u{9b}1m"), "{said}");
    assert!(!said.contains(|c: char| c.is_control() && c != '\n'), "{said}");
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

/// Each with a part of its message; the program ends before it loads anything.
#[test]
fn what_cannot_be_tuned() {
    let refused = |folder: &Folder, wanted: &str| {
        let (status, said, written) = tune(folder, &[]);
        assert_eq!((status, written), (Some(2), Value::Null), "{wanted}: {said}");
        assert!(said.contains(wanted), "{wanted}: {said}");
    };
    let edited = |from: &str, to: &str, wanted: &str| {
        let folder = variant(128);
        folder.edit("variants.json", from, to);
        // A file above the folder, which is no part of what was asked for.
        std::fs::create_dir(folder.path("in")).unwrap();
        std::fs::rename(folder.path("variants.json"), folder.path("in/variants.json")).unwrap();
        std::fs::copy(folder.path("one.image"), folder.path("in/one.image")).unwrap();
        let path = folder.path("in");
        let arguments = ["tune", "--device", "emulator", "--variants", path.to_str().unwrap()];
        let output = folder.path("out");
        let shape = ["--output", output.to_str().unwrap(), "--tokens", "9"];
        let done = program(&[&arguments[..], &shape].concat());
        let said = done.stdout + &done.stderr;
        assert_eq!(done.status, Some(2), "{wanted}: {said}");
        assert!(said.contains(wanted) && !output.exists(), "{wanted}: {said}");
    };
    edited("\"GEMM_BLOCK_M\":128", "\"GEMM_BLOCK_M\":64", "while the plan's tiles have 128 rows");
    for (constant, value, bad) in [
        ("GEMM_BLOCK_N", "128", ["0", "7", "1e3", "4098", "-2"]),
        ("GEMM_TILE_GROUP", "8", ["0", "4097", "\"8\"", "null", "18446744073709551615"]),
        ("GEMM_THREADS_MMA", "128", ["0", "16", "100", "1056", "4294967424"]),
        ("GROUPED_GEMM_SMEM_BYTES", "99328", ["-1", "1048577", "4295066624", "1.5", "[]"]),
    ] {
        for number in bad {
            let line = format!("\"{constant}\":");
            let wanted = format!("variant \"one\": {constant} is ");
            edited(&format!("{line}{value}"), &format!("{line}{number}"), &wanted);
        }
    }
    for image in ["../one.image", "", ".", "..", "/dev/null", "./one.image", "x/../one.image"] {
        let wanted = format!("its image {image:?} is not the name of a file in the folder");
        edited("\"one.image\"", &format!("{image:?}"), &wanted);
    }
    edited("\"one.image\"", "7", "is not the name of a file in the folder");
    edited("\"name\":\"one\"", "\"name\":1", "it has no name");
    edited("\"variants\"", "\"others\"", "without a list `variants`");
    edited("\"one.image\"", "\"absent.image\"", "cannot read");

    let folder = variant(128);
    std::fs::remove_file(folder.path("one.image")).unwrap();
    std::fs::create_dir(folder.path("one.image")).unwrap();
    refused(&folder, "not a regular file");
    let folder = variant(128);
    std::fs::rename(folder.path("one.image"), folder.path("other")).unwrap();
    std::os::unix::fs::symlink(folder.path("other"), folder.path("one.image")).unwrap();
    refused(&folder, "not a regular file");

    // One byte too many, which is on no disk.
    for (file, most) in [("variants.json", 16 << 20), ("one.image", 256 << 20)] {
        let folder = variant(128);
        let longer = std::fs::OpenOptions::new().write(true).open(folder.path(file)).unwrap();
        longer.set_len(most + 1).unwrap();
        refused(&folder, &format!("{} bytes, wanted at most {most}", most + 1));
    }

    let (status, said, _) = tune(&variant(128), &["--model", "absent"]);
    assert_eq!(status, Some(2), "{said}");
}

/// A fat binary of parts with these lengths, of which its own header says `total`.
fn fat_binary(total: u64, parts: &[u64]) -> Vec<u8> {
    let mut image = 0xba55_ed50_u32.to_le_bytes().to_vec();
    image.extend([1, 0, 16, 0]);
    image.extend(total.to_le_bytes());
    for &length in parts {
        image.extend([1, 0, 1, 1, 24, 0, 0, 0]);
        image.extend(length.to_le_bytes());
        image.extend([0; 8 + 40]);
    }
    image
}

/// The driver gets an image without its length, so that the lengths in its headers have to be true.
#[test]
fn images_are_as_long_as_their_headers_say() {
    let outcome = |image: &[u8]| {
        let folder = variant(128);
        std::fs::write(folder.path("one.image"), image).unwrap();
        let (status, said, _) = tune(&folder, &[]);
        (status, said)
    };
    for (image, wanted) in [
        (fat_binary(129, &[40, 40]), "a fat binary of another length than its header says"),
        (fat_binary(127, &[40, 40]), "a fat binary of another length than its header says"),
        (fat_binary(u64::MAX, &[40, 40]), "a fat binary of another length than its header says"),
        (fat_binary(128, &[40, 41]), "a fat binary with a part that ends outside"),
        (fat_binary(128, &[40, u64::MAX]), "a fat binary with a part that ends outside"),
        (fat_binary(128, &[39, 40]), "a fat binary with a part that ends outside"),
        (fat_binary(0, &[])[..10].to_vec(), "a fat binary of another length than its header says"),
        (b".version 7.0\n\0.target sm_80\n\0".to_vec(), "PTX with a zero in it"),
        (b"\x7fELF\x02\x01\x01".to_vec(), "neither a fat binary nor PTX"),
        (Vec::new(), "neither a fat binary nor PTX"),
    ] {
        let (status, said) = outcome(&image);
        assert_eq!(status, Some(2), "{wanted}: {said}");
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    for image in [fat_binary(128, &[40, 40]), b".version 7.0\n.target sm_80\n".to_vec()] {
        let (status, said) = outcome(&image);
        assert_eq!(status, Some(0), "{said}");
    }
}
