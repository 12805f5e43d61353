//! `tune` on the emulator, which ignores the images and runs its own kernels: a variant has the
//! right bits if it is launched with the constants of the built-in kernels.

use serde_json::{Value, json};

use crate::common::{Folder, program};

/// A folder with one variant. Its grid is right if `block_n` is 128 as in the built-in kernels.
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

/// Runs `tune`. Returns the exit status, the output, and tune.json.
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
fn variant_with_equal_bits_is_timed() {
    let (status, printed, written) = tune(&variant(128), &[]);
    assert_eq!(status, Some(0), "{printed}");
    assert!(printed.contains("1 rows, 0 not reached"), "{printed}");
    let row = &written["rows"][0];
    assert_eq!((&row["variant"], &row["same_bits"]), (&json!("one"), &json!(true)), "{row}");
    assert_eq!((&row["model"], &row["tokens"]), (&json!("mixtral-8x7b-div32"), &json!(9)), "{row}");
    assert!(row["seconds"]["median"].as_f64() > Some(0.0), "{row}");
    assert_eq!(row["built_in_seconds"]["samples"], 14, "{row}");
}

#[test]
fn control_characters_in_names_are_escaped() {
    let folder = variant(128);
    folder.edit("variants.json", "\"name\":\"one\"", "\"name\":\"\\u001b[31m\\u009b1m\"");
    let (status, printed, _) = tune(&folder, &[]);
    assert_eq!(status, Some(0), "{printed}");
    assert!(printed.contains("\\u{1b}[31m\\u{9b}1m"), "{printed}");
    assert!(!printed.contains(|c: char| c.is_control() && c != '\n'), "{printed}");
}

#[test]
fn variant_with_other_bits_is_not_timed() {
    let (status, printed, written) = tune(&variant(1024), &[]);
    assert_eq!(status, Some(1), "{printed}");
    assert!(printed.contains("other bits"), "{printed}");
    let row = &written["rows"][0];
    assert_eq!((&row["same_bits"], &row["seconds"]), (&json!(false), &json!(null)), "{row}");
}

#[test]
fn time_limit_of_zero_times_nothing() {
    let (status, printed, _) = tune(&variant(128), &["--time-limit", "0"]);
    assert_eq!(status, Some(0), "{printed}");
    assert!(printed.contains("0 rows, 1 not reached"), "{printed}");
}

/// Each case with a part of its message. The program ends before it loads an image.
#[test]
fn rejects_invalid_variant_lists() {
    let refused = |folder: &Folder, wanted: &str| {
        let (status, printed, written) = tune(folder, &[]);
        assert_eq!((status, written), (Some(2), Value::Null), "{wanted}: {printed}");
        assert!(printed.contains(wanted), "{wanted}: {printed}");
    };
    let edited = |from: &str, to: &str, wanted: &str| {
        let folder = variant(128);
        folder.edit("variants.json", from, to);
        // A file above the folder, which a name in the list must not reach.
        std::fs::create_dir(folder.path("in")).unwrap();
        std::fs::rename(folder.path("variants.json"), folder.path("in/variants.json")).unwrap();
        std::fs::copy(folder.path("one.image"), folder.path("in/one.image")).unwrap();
        let path = folder.path("in");
        let arguments = ["tune", "--device", "emulator", "--variants", path.to_str().unwrap()];
        let output = folder.path("out");
        let shape = ["--output", output.to_str().unwrap(), "--tokens", "9"];
        let done = program(&[&arguments[..], &shape].concat());
        let printed = done.stdout + &done.stderr;
        assert_eq!(done.status, Some(2), "{wanted}: {printed}");
        assert!(printed.contains(wanted) && !output.exists(), "{wanted}: {printed}");
    };
    edited(
        "\"GEMM_BLOCK_M\":128",
        "\"GEMM_BLOCK_M\":64",
        "GEMM_BLOCK_M is 64, wanted 128, the rows of the plan's tiles",
    );
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
        let wanted = format!("`image` is {image:?}, wanted the name of a file in the folder");
        edited("\"one.image\"", &format!("{image:?}"), &wanted);
    }
    edited("\"one.image\"", "7", "wanted the name of a file in the folder");
    edited("\"name\":\"one\"", "\"name\":1", "no `name`");
    edited("\"variants\"", "\"others\"", "no list `variants`");
    edited("\"one.image\"", "\"absent.image\"", "cannot read");

    let folder = variant(128);
    std::fs::remove_file(folder.path("one.image")).unwrap();
    std::fs::create_dir(folder.path("one.image")).unwrap();
    refused(&folder, "not a regular file");
    let folder = variant(128);
    std::fs::rename(folder.path("one.image"), folder.path("other")).unwrap();
    std::os::unix::fs::symlink(folder.path("other"), folder.path("one.image")).unwrap();
    refused(&folder, "not a regular file");

    // One byte more than the limit, in a sparse file.
    for (file, most) in [("variants.json", 16 << 20), ("one.image", 256 << 20)] {
        let folder = variant(128);
        let longer = std::fs::OpenOptions::new().write(true).open(folder.path(file)).unwrap();
        longer.set_len(most + 1).unwrap();
        refused(&folder, &format!("{} bytes, wanted at most {most}", most + 1));
    }

    let (status, printed, _) = tune(&variant(128), &["--model", "absent"]);
    assert_eq!(status, Some(2), "{printed}");
}

/// A fat binary with parts of these lengths, and `total` as the length in its header.
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

/// The driver takes an image without its length, and reads as much as its headers state.
#[test]
fn rejects_images_with_wrong_lengths() {
    let outcome = |image: &[u8]| {
        let folder = variant(128);
        std::fs::write(folder.path("one.image"), image).unwrap();
        let (status, printed, _) = tune(&folder, &[]);
        (status, printed)
    };
    for (image, wanted) in [
        (fat_binary(129, &[40, 40]), "a fat binary whose length differs from that in its header"),
        (fat_binary(127, &[40, 40]), "a fat binary whose length differs from that in its header"),
        (
            fat_binary(u64::MAX, &[40, 40]),
            "a fat binary whose length differs from that in its header",
        ),
        (fat_binary(128, &[40, 41]), "a fat binary with a part that ends after the file"),
        (fat_binary(128, &[40, u64::MAX]), "a fat binary with a part that ends after the file"),
        (fat_binary(128, &[39, 40]), "a fat binary with a part that ends after the file"),
        (
            fat_binary(0, &[])[..10].to_vec(),
            "a fat binary whose length differs from that in its header",
        ),
        (b".version 7.0\n\0.target sm_80\n\0".to_vec(), "PTX with a zero byte before its end"),
        (b"\x7fELF\x02\x01\x01".to_vec(), "neither a fat binary nor PTX"),
        (Vec::new(), "neither a fat binary nor PTX"),
    ] {
        let (status, printed) = outcome(&image);
        assert_eq!(status, Some(2), "{wanted}: {printed}");
        assert!(printed.contains(wanted), "{wanted}: {printed}");
    }
    for image in [fat_binary(128, &[40, 40]), b".version 7.0\n.target sm_80\n".to_vec()] {
        let (status, printed) = outcome(&image);
        assert_eq!(status, Some(0), "{printed}");
    }
}
