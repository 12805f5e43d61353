//! Compiles the SIMT runtime, the driver API and every kernel as C++ and links them into the two
//! shared libraries that src/lib.rs embeds: the plain one and, with the feature `counting`, one
//! whose kernels count their memory accesses.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// The files of a directory with one of these endings, in a fixed order; none if the directory does
/// not exist.
fn files(directory: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable directory entry").path())
        .filter(|path| {
            let ending = path.extension().and_then(OsStr::to_str);
            ending.is_some_and(|ending| endings.contains(&ending))
        })
        .collect();
    found.sort();
    found
}

/// Writes one file that includes all sources of a directory. Small sources spend most of their
/// compile time in the standard library's headers and templates.
fn joined(directory: &Path, out: &Path) -> PathBuf {
    let include = |file: &PathBuf| format!("#include \"{}\"\n", file.display());
    let text: String = files(directory, &["cpp"]).iter().map(include).collect();
    let name = directory.file_name().and_then(OsStr::to_str).expect("a directory's name");
    let joined = out.join(format!("{name}.cpp"));
    fs::write(&joined, text).expect("the build directory is writable");
    joined
}

fn main() {
    let emulator = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let kernels = emulator.join("../kernels");
    let simt = emulator.join("simt");
    let driver = emulator.join("driver");
    let counting = emulator.join("counting");
    let own_kernels = emulator.join("kernels");
    for directory in [&kernels, &simt, &driver, &counting, &own_kernels] {
        // Watching the directory covers added and removed files.
        println!("cargo::rerun-if-changed={}", directory.display());
        for file in files(directory, &["cpp", "cu", "cuh", "h"]) {
            println!("cargo::rerun-if-changed={}", file.display());
        }
    }

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .flag("-fvisibility=hidden")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-psabi")
        // Reports give kernel paths relative to the repository. The last match counts.
        .flag(format!("-fmacro-prefix-map={}/=emulator/", emulator.display()))
        .flag(format!("-fmacro-prefix-map={}/../=", emulator.display()))
        .include(&kernels)
        .include(&simt)
        .cargo_warnings(true);
    if env::var("PROFILE").is_ok_and(|profile| profile == "debug") {
        build.flag("-g1"); // Four times the size: in debug builds only.
    }
    let mut sources = build.clone();
    sources.file(joined(&simt, &out)).file(joined(&driver, &out));
    let mut device_sources = build.clone();
    // The compiler does not recognise this file ending.
    device_sources.flag("-xc++");
    // A stack frame larger than a guard page must not skip it.
    device_sources.flag("-fstack-clash-protection");
    // A kernel includes one header for everything and uses a part of it.
    device_sources.flag("-Wno-unused-parameter");
    device_sources.files(files(&kernels, &["cu"])).files(files(&own_kernels, &["cu"]));

    let runtime = sources.compile_intermediates();
    let plain = [&runtime[..], &device_sources.compile_intermediates()].concat();
    link(&build, &plain, &[], &out.join("libcuda.so"));
    if env::var_os("CARGO_FEATURE_COUNTING").is_none() {
        return;
    }

    // The compiler announces each access of a kernel to counting/accesses.cpp, which replaces
    // ThreadSanitizer. Passes that would split, join or invent accesses are disabled.
    device_sources.opt_level(1).flag("-fsanitize=thread").flag("-Wno-tsan");
    for pass in ["tree-sra", "ipa-sra", "tree-vectorize", "store-merging"] {
        device_sources.flag(format!("-fno-{pass}"));
    }
    device_sources.flag("-fno-tree-loop-distribute-patterns");
    device_sources.out_dir(out.join("counting"));
    build.include(&counting).file(joined(&counting, &out));
    let counters = build.compile_intermediates();
    let counting = [&runtime[..], &counters, &device_sources.compile_intermediates()].concat();
    // Without symbols: debuggers use the plain library.
    link(&build, &counting, &["-s"], &out.join("libcuda_counting.so"));
}

/// Links objects, not archives: no symbol references a kernel, so an archive would drop them all.
fn link(build: &cc::Build, objects: &[PathBuf], flags: &[&str], library: &Path) {
    let mut link = build.get_compiler().to_command();
    // A later dlopen("libcuda.so") finds this library by its SONAME.
    link.args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,-z,defs", "-pthread"])
        .args(flags)
        .arg("-o")
        .arg(library)
        .args(objects)
        .arg("-ldl");
    let status = link.status().expect("the C++ compiler starts");
    assert!(status.success(), "linking {} failed: {link:?}", library.display());
}
