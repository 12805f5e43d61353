//! The rules of the house, as far as a program can hold them.

mod imports;
mod language;
mod source;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use source::{code, library_code};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files under `folder` whose name ends in one of `endings`, with their text.
fn files(folder: &str, endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut left: Vec<PathBuf> = vec![root().join(folder)];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if endings.iter().any(|ending| path.to_string_lossy().ends_with(ending)) {
            let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no {endings:?} in {folder}");
    found
}

/// The stems of operations: kernels, less second implementations.
fn stems() -> Vec<String> {
    let kernels = files("kernels", &[".cu"]);
    let stems =
        kernels.iter().map(|(name, _)| name["kernels/".len()..name.len() - ".cu".len()].to_owned());
    stems.filter(|stem| !stem.ends_with("_sm90")).collect()
}

#[test]
fn an_operation_has_one_stem_in_every_folder() {
    for stem in stems() {
        for folder in ["src/ops", "src/reference", "tests/it", "benches"] {
            let file = format!("{folder}/{stem}.rs");
            assert!(root().join(&file).is_file(), "kernels/{stem}.cu has no {file}");
        }
    }
}

/// The one file of kernels/ that depends on the compiler, and includes the headers that every
/// kernel needs.
const KERNEL_HEADER: &str = "kernels/kernel.cuh";

/// A kernel file includes kernel.cuh first and then only other .cuh files; a header includes
/// nothing.
#[test]
fn kernel_files_include_headers_and_headers_nothing() {
    let folder = root().join("kernels");
    for (name, text) in files("kernels", &[".cu", ".cuh", ".h"]) {
        let includes: Vec<_> =
            text.lines().filter(|line| line.trim_start().starts_with("#include")).collect();
        if !name.ends_with(".cu") {
            assert!(includes.is_empty() || name == KERNEL_HEADER, "{name}: {includes:?}");
            continue;
        }
        assert_eq!(includes.first(), Some(&"#include \"kernel.cuh\""), "{name}");
        for include in &includes {
            let header =
                include.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
            let is_header =
                header.is_some_and(|file| file.ends_with(".cuh") && folder.join(file).is_file());
            assert!(is_header, "{name}: {include}");
        }
    }
}

#[test]
fn kernels_keep_to_what_both_compilers_have() {
    for (name, text) in files("kernels", &[".cu", ".cuh", ".h"]) {
        if let Some(why) = breach_of_kernel_rules(&name, &text) {
            panic!("{name}: {why}");
        }
    }
}

/// Returns the rule of kernel files that a text breaks.
fn breach_of_kernel_rules(name: &str, text: &str) -> Option<&'static str> {
    let code = code(text);
    let counts = ["atomicAdd(&counters[", "atomicAdd(&next_row["];
    let is_count = |at: usize| counts.iter().any(|count| code[at..].starts_with(count));
    match () {
        () if code.contains("__shared__") && name != KERNEL_HEADER => {
            Some("SHARED_ARRAY and SHARED_DYNAMIC declare shared memory")
        }
        () if code.contains("__activemask") => Some("masks are stated"),
        () if code.match_indices("atomic").any(|(at, _)| !is_count(at)) => {
            Some("an atomic that is not known to add integers")
        }
        () if code.contains("__global__") && !name.ends_with(".cu") => {
            Some("an entry outside of an operation's file")
        }
        () => None,
    }
}

#[test]
fn breaches_of_kernel_rules_are_seen() {
    let breaches = [
        ("a.cuh", "atomicAdd(&sum, x);  // a sum"),
        ("a.cu", "/* by */ atomicMax(&m, x); // integers"),
        ("a.cu", "atomicAdd(&counters[i], 1); atomicAdd(&sum[i], 1.0f);"),
        ("a.cuh", "__shared__ int x[3];  // of the block"),
        ("a.cu", "f(__activemask()); //"),
        ("a.cuh", "extern \"C\" __global__ void f() {}"),
    ];
    for (name, text) in breaches {
        assert!(breach_of_kernel_rules(name, text).is_some(), "{text}");
    }
    for (name, text) in [
        ("a.cu", "// no atomicAdd(&sum, x), no __activemask()"),
        ("a.cuh", "atomicAdd(&counters[column * DIGITS], 1);  // atomics of integers"),
        (KERNEL_HEADER, "#define SHARED_ARRAY(T, name, n) __shared__ T name[n]"),
        ("a.cu", "extern \"C\" __global__ void f() {}"),
    ] {
        assert_eq!(breach_of_kernel_rules(name, text), None, "{text}");
    }
}

#[test]
fn assembly_is_in_one_file() {
    for (name, text) in files("kernels", &[".cu", ".cuh", ".h"]) {
        let code = code(&text);
        let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
        let assembly = words.any(|word| ["asm", "__asm__", "__asm"].contains(&word));
        assert!(name == "kernels/ptx.cuh" || !assembly, "{name}");
        let conditional = code.contains("#ifdef") || code.contains("__CUDACC__");
        assert!(name == KERNEL_HEADER || !conditional, "{name}: only kernel.cuh asks who compiles");
    }
}

/// `__launch_bounds__(X)` of an entry and `EXPORT_KERNEL(entry, X)` agree, and every entry is
/// exported.
#[test]
fn launch_bounds_are_exported() {
    for (name, text) in files("kernels", &[".cu"]) {
        let mut bounds = BTreeSet::new();
        for part in text.split("extern \"C\" __global__ void __launch_bounds__(").skip(1) {
            let (bound, rest) = part.split_once(')').unwrap();
            let bound = bound.split(',').next().unwrap().trim();
            let symbol = rest.trim_start().split('(').next().unwrap().trim();
            bounds.insert(format!("EXPORT_KERNEL({symbol}, {bound})"));
        }
        let exports: BTreeSet<_> = text
            .lines()
            .filter(|line| line.starts_with("EXPORT_KERNEL("))
            .map(str::to_owned)
            .collect();
        assert_eq!(bounds, exports, "{name}");
        assert_eq!(
            text.matches("__global__").count(),
            exports.len(),
            "{name}: an entry without bounds"
        );
    }
}

#[test]
fn primitives_have_twins() {
    let names = |text: &str| -> BTreeSet<String> {
        let code = code(text);
        let inside = code.split_once("namespace ptx {").expect("a namespace ptx").1;
        let mut names = BTreeSet::new();
        for line in inside.lines() {
            for (marker, _) in line.match_indices("inline") {
                let rest = &line[marker..];
                if let Some((head, _)) = rest.split_once('(') {
                    names.extend(head.split_whitespace().last().map(str::to_owned));
                }
            }
        }
        names
    };
    let device = names(&fs::read_to_string(root().join("kernels/ptx.cuh")).unwrap());
    let twin = names(&fs::read_to_string(root().join("emulator/simt/simt_ptx.h")).unwrap());
    assert!(device.len() > 10, "{device:?}");
    assert_eq!(device, twin);
}

#[test]
fn levels_are_kept() {
    let forbid = |folder: &str, words: &[&str], but: &[&str]| {
        for (name, text) in files(folder, &[".rs"]) {
            if but.iter().any(|file| name.ends_with(file)) {
                continue;
            }
            for (number, line) in library_code(&text).lines().enumerate() {
                for word in words {
                    assert!(
                        !line.contains(word),
                        "{name}:{}: {word} does not belong here",
                        number + 1
                    );
                }
            }
        }
    };
    forbid("src/reference", &["cudarc", "device::"], &[]);
    forbid("src/ops", &["reference::", "layer::", "super::"], &[]);
    forbid(
        "src",
        &["sys::", " sys,", " sys}", "driver::result", " result,"],
        &["device.rs", "driver.rs"],
    );
    let may_be_unsafe = [
        "buffer.rs",
        "device.rs",
        "driver.rs",
        "workspace.rs",
        "routing_plan.rs",
        "reference/matmul.rs",
    ];
    let operations = files("src/ops", &[".rs"]);
    let operations = operations.iter().map(|(name, _)| &name["src/".len()..]);
    let may_be_unsafe: Vec<&str> = may_be_unsafe.into_iter().chain(operations).collect();
    forbid("src", &["unsafe "], &may_be_unsafe);
    // The element type names two marker traits of cudarc, and nothing else of it.
    forbid(
        "src/dtype.rs",
        &["unsafe", "device::", "crate::ops", "crate::layer", "CudaView", "CudaSlice"],
        &[],
    );
    let no_driver = ["shape.rs", "config", "tensors", "error.rs"];
    for file in no_driver {
        forbid(
            &format!("src/{file}"),
            &["cudarc", "unsafe", "device::", "crate::ops", "crate::layer"],
            &[],
        );
    }
    for file in ["layer.rs", "layer"] {
        forbid(&format!("src/{file}"), &["unsafe", "Launch", ".launch("], &[]);
    }
    // hf/ uses the library's public items alone; files are mapped in one place.
    forbid("hf/src", &["unsafe "], &["bytes.rs"]);
    forbid("hf/src", &["cudarc"], &[]);
}

#[test]
fn the_libraries_do_not_panic() {
    let sources = [files("src", &[".rs"]), files("hf/src", &[".rs"])].concat();
    let tests: Vec<String> =
        sources.iter().flat_map(|(name, text)| source::test_modules(name, text)).collect();
    assert!(tests.iter().any(|name| name == "src/reference/sample.rs"), "{tests:?}");
    for (name, text) in sources {
        if tests.contains(&name) {
            continue; // Unit tests and their inputs; no part of the library.
        }
        for (number, line) in library_code(&text).lines().enumerate() {
            for word in [".unwrap()", ".expect(", "panic!(", "todo!(", "unimplemented!("] {
                assert!(!line.contains(word), "{name}:{}: {word}", number + 1);
            }
        }
    }
}

#[test]
fn files_stay_readable() {
    let folders = ["kernels", "src", "tests", "benches", "examples", "emulator", "hf", "cli"];
    for folder in folders {
        for (name, text) in files(folder, &[".rs", ".cu", ".cuh", ".h", ".cpp"]) {
            if name == "src/abi.rs" {
                continue; // Generated.
            }
            let lines = text.lines().count();
            assert!(lines <= 500, "{name} has {lines} lines: split it by idea");
            for (number, line) in text.lines().enumerate() {
                let comment =
                    ["//", "/*", "*"].iter().any(|mark| line.trim_start().starts_with(mark));
                let most = if comment { 100 } else { 126 };
                let length = line.chars().count();
                assert!(length <= most, "{name}:{}: {length} columns, at most {most}", number + 1);
            }
        }
    }
}

#[test]
fn examples_are_short() {
    for (name, text) in files("examples", &[".rs"]) {
        assert!(text.lines().count() <= 60, "{name}");
    }
}
