//! Compiles each kernels/*.cu with nvcc into a fat binary and writes the table that embeds these
//! images.
//!
//! Without nvcc, on docs.rs, or with MOE_KERNELS_SKIP set, every image is a placeholder: a valid
//! PTX module without kernels. The library then builds and works except for launches on a real GPU.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The targets of portable kernels as machine code; that of 80 runs on all of 8.x.
const DEFAULT_ARCHITECTURES: [&str; 4] = ["80", "90", "100", "120"];
/// The target of portable kernels as PTX, for later architectures.
const DEFAULT_PTX: &str = "90";

/// A module without kernels. The driver requires the terminating zero of a PTX text.
const PLACEHOLDER: &[u8] = b".version 7.0\n.target sm_80\n.address_size 64\n\0";

fn main() {
    for name in [
        "NVCC",
        "NVCC_CCBIN",
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
        "CUDA_HOME",
        "CUDA_PATH",
        "PATH",
        "CUDA_COMPUTE_CAP",
        "MOE_KERNELS_SKIP",
        "DOCS_RS",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // Watching the folder covers added and removed files and every header; a change rebuilds every
    // image.
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    #[cfg(feature = "bindgen")]
    generate_abi(&out_dir);

    let images: Vec<Image> =
        kernel_files().into_iter().map(|file| Image::new(file, &out_dir)).collect();
    let mut toolkit = None;
    match find_nvcc() {
        Ok(nvcc) => {
            let release = release_of(&nvcc);
            compile(&nvcc, release, &images);
            toolkit = Some(release);
        }
        Err(why) => {
            println!("cargo::warning=moe-kernels is built without GPU kernels: {why}");
            for image in &images {
                fs::write(&image.output, PLACEHOLDER).expect("OUT_DIR is writable");
            }
        }
    }
    write_table(&images, toolkit, &out_dir);
}

/// A kernel file and its image.
struct Image {
    stem: String,
    source: PathBuf,
    output: PathBuf,
    /// nvcc's `-gencode` values; empty if the file has none of the requested architectures.
    targets: Vec<String>,
}

impl Image {
    fn new(source: PathBuf, out_dir: &Path) -> Self {
        let stem = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let output = out_dir.join(format!("{stem}.image"));
        let targets = targets(&stem);
        Self { stem, source, output, targets }
    }

    /// The targets for messages, such as `sm_80 sm_90 compute_90`.
    fn architectures(&self) -> String {
        let codes = self.targets.iter().filter_map(|target| target.split("code=").nth(1));
        codes.collect::<Vec<_>>().join(" ")
    }
}

fn kernel_files() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").expect("the package has a folder kernels/");
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    files.sort();
    files
}

/// The targets of a file. `<stem>_sm90.cu` is compiled for compute capability 9.0 only; other files
/// are portable. CUDA_COMPUTE_CAP restricts the targets: `90`, `9.0`, `90a`, or a list of these
/// separated by `,`, `;` or spaces.
fn targets(stem: &str) -> Vec<String> {
    let wanted = env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
    let wanted: Vec<String> = wanted
        .split([',', ';', ' '])
        .map(|item| item.trim().trim_end_matches(['a', 'f']).replace('.', ""))
        .filter(|item| !item.is_empty())
        .collect();
    if let Some(bad) = wanted.iter().find(|item| item.parse::<u32>().map_or(true, |n| n < 80)) {
        panic!(
            "CUDA_COMPUTE_CAP: '{bad}' is not a compute capability from 8.0 on, such as 90 or 9.0"
        );
    }
    if stem.ends_with("_sm90") {
        let hopper = wanted.is_empty() || wanted.iter().any(|item| item == "90");
        return if hopper { vec!["arch=compute_90a,code=sm_90a".into()] } else { Vec::new() };
    }
    let sass = |item: &str| format!("arch=compute_{item},code=sm_{item}");
    let ptx = |item: &str| format!("arch=compute_{item},code=compute_{item}");
    if wanted.is_empty() {
        let mut all: Vec<_> = DEFAULT_ARCHITECTURES.iter().map(|item| sass(item)).collect();
        all.push(ptx(DEFAULT_PTX));
        return all;
    }
    let mut all: Vec<_> = wanted.iter().map(|item| sass(item)).collect();
    all.extend(
        wanted.iter().max_by_key(|item| item.parse::<u32>().unwrap_or(0)).map(|item| ptx(item)),
    );
    all
}

/// Searches for nvcc: NVCC, then CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, and `.cuda/` in this
/// package, where scripts/cuda-toolchain installs it. Panics if NVCC is set and does not exist.
fn find_nvcc() -> Result<PathBuf, String> {
    if env::var_os("DOCS_RS").is_some() {
        return Err("DOCS_RS is set".into());
    }
    if env::var_os("MOE_KERNELS_SKIP").is_some_and(|value| value != "0") {
        return Err("MOE_KERNELS_SKIP is set".into());
    }
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    if let Some(nvcc) = env::var_os("NVCC").map(PathBuf::from) {
        let found =
            nvcc.is_file() || env::split_paths(&path()).any(|folder| folder.join(&nvcc).is_file());
        assert!(found, "NVCC is {}, which does not exist", nvcc.display());
        return Ok(nvcc);
    }
    let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let mut folders: Vec<PathBuf> = roots.map(|root| PathBuf::from(root).join("bin")).collect();
    folders.extend(env::split_paths(&path()));
    folders.push("/usr/local/cuda/bin".into());
    folders.push(Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda/nvidia/cu13/bin"));
    folders
        .into_iter()
        .map(|folder| folder.join(&name))
        .find(|nvcc| nvcc.is_file())
        .ok_or_else(|| "no nvcc (set NVCC or CUDA_HOME, or run scripts/cuda-toolchain)".into())
}

fn path() -> OsString {
    env::var_os("PATH").unwrap_or_default()
}

/// The oldest toolkit whose nvcc supports every architecture of [`DEFAULT_ARCHITECTURES`].
const OLDEST_TOOLKIT: (u32, u32) = (12, 8);

/// The version of the toolkit, major and minor. Panics if it is older than [`OLDEST_TOOLKIT`].
fn release_of(nvcc: &Path) -> (u32, u32) {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.unwrap_or_else(|why| panic!("{}: {why}", nvcc.display()));
    let text = String::from_utf8_lossy(&output.stdout);
    let release =
        text.split("release ").nth(1).and_then(|rest| rest.split([',', ' ', '\n']).next());
    let numbers = release.and_then(|release| release.split_once('.'));
    let Some((Ok(major), Ok(minor))) =
        numbers.map(|(major, minor)| (major.parse::<u32>(), minor.trim().parse::<u32>()))
    else {
        panic!("{} --version names no release: {text}", nvcc.display());
    };
    let (oldest_major, oldest_minor) = OLDEST_TOOLKIT;
    assert!(
        (major, minor) >= OLDEST_TOOLKIT,
        "{} is of CUDA {major}.{minor}, and moe-kernels needs {oldest_major}.{oldest_minor} or newer: set NVCC to \
         a newer one (scripts/cuda-toolchain installs one), or MOE_KERNELS_SKIP=1 to build without GPU kernels",
        nvcc.display()
    );
    (major, minor)
}

/// Runs nvcc for all images, with as many processes at a time as cargo allows jobs. Panics with the
/// output of nvcc if one fails.
fn compile(nvcc: &Path, release: (u32, u32), images: &[Image]) {
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    // The longest file first, since it takes the most time. nvcc compiles its architectures in
    // parallel.
    let mut longest_first: Vec<&Image> = images.iter().collect();
    longest_first
        .sort_by_key(|image| fs::metadata(&image.source).map_or(0, |file| u64::MAX - file.len()));
    // nvcc has --compress-mode from 12.8 on, but with CUDA 12 its images need a newer driver than
    // uncompressed ones. Every driver for CUDA 13 reads them, and they have a third of the size.
    let compress = release.0 >= 13;
    let queue: Mutex<VecDeque<&Image>> = Mutex::new(longest_first.into());
    let failures = Mutex::new(Vec::new());
    let next = || queue.lock().expect("no job panics").pop_front();
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, images.len().max(1)) {
            scope.spawn(|| {
                while let Some(image) = next() {
                    if let Err(why) = compile_one(nvcc, image, jobs, compress) {
                        failures.lock().expect("no job panics").push(why);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no job panics");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn compile_one(nvcc: &Path, image: &Image, threads: usize, compress: bool) -> Result<(), String> {
    if image.targets.is_empty() {
        return fs::write(&image.output, PLACEHOLDER).map_err(|why| why.to_string());
    }
    let mut command = Command::new(nvcc);
    command.arg("-fatbin").arg(&image.source).arg("-o").arg(&image.output);
    command.args(["-std=c++17", "-O3", "-Ikernels", "-Xptxas=-v"]);
    command.arg(format!("--threads={threads}"));
    if compress {
        command.arg("--compress-mode=size");
    }
    command.args(image.targets.iter().map(|target| format!("-gencode={target}")));
    if let Some(compiler) = host_compiler() {
        command.arg("-ccbin").arg(compiler);
    }
    let output = command.output().map_err(|why| format!("{}: {why}", nvcc.display()))?;
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{} failed on {}:\n{report}", nvcc.display(), image.source.display()));
    }
    // The registers, spills and warnings that ptxas reports; a test in src/images.rs reads them.
    fs::write(image.output.with_extension("ptxas"), report.as_bytes())
        .map_err(|why| why.to_string())
}

/// The host compiler: NVCC_CCBIN, or the C++ compiler that `cc` finds. On Windows nvcc finds its
/// own.
fn host_compiler() -> Option<OsString> {
    if let Some(compiler) = env::var_os("NVCC_CCBIN") {
        return Some(compiler);
    }
    let compiler = cc::Build::new().cpp(true).cargo_metadata(false).try_get_compiler().ok()?;
    compiler.is_like_gnu().then(|| compiler.path().as_os_str().to_owned())
}

/// Writes `images.rs`, which src/images.rs includes.
fn write_table(images: &[Image], toolkit: Option<(u32, u32)>, out_dir: &Path) {
    let mut table = String::from("pub(crate) static IMAGES: &[Image] = &[\n");
    for image in images {
        let bytes = fs::read(&image.output).expect("every image was written");
        let built = bytes != PLACEHOLDER;
        let architectures = if built { image.architectures() } else { String::new() };
        writeln!(
            table,
            "    Image {{ name: {:?}, architectures: {architectures:?}, bytes: &Aligned(*include_bytes!({:?})).0 }},",
            image.stem, image.output,
        )
        .expect("writing to a String succeeds");
    }
    table.push_str("];\n");
    writeln!(
        table,
        "/// Version of the toolkit that compiled them, major and minor; `None` for placeholders."
    )
    .expect("as above");
    writeln!(table, "pub(crate) static TOOLKIT: Option<(u32, u32)> = {toolkit:?};")
        .expect("as above");
    fs::write(out_dir.join("images.rs"), table).expect("OUT_DIR is writable");
}

/// Generates `abi.rs` from kernels/abi.h. src/abi.rs is the committed copy; tests/it/abi.rs
/// compares the two.
#[cfg(feature = "bindgen")]
fn generate_abi(out_dir: &Path) {
    #[derive(Debug)]
    struct PlainData;
    impl bindgen::callbacks::ParseCallbacks for PlainData {
        fn add_derives(&self, _: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
            vec!["bytemuck::Pod".into(), "bytemuck::Zeroable".into()]
        }
    }
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda/clang/native");
    if env::var_os("LIBCLANG_PATH").is_none() && local.join("libclang.so").is_file() {
        // SAFETY: the build script has one thread at this point.
        unsafe { env::set_var("LIBCLANG_PATH", local) };
    }
    bindgen::Builder::default()
        .header("kernels/abi.h")
        .raw_line(
            "// Generated by bindgen from kernels/abi.h; tests/it/abi.rs says how to refresh it.",
        )
        .disable_header_comment()
        .use_core()
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .derive_default(true)
        .derive_eq(true)
        .layout_tests(true)
        .formatter(bindgen::Formatter::Prettyplease)
        .parse_callbacks(Box::new(PlainData))
        .generate()
        .expect("kernels/abi.h is plain C")
        .write_to_file(out_dir.join("abi.rs"))
        .expect("OUT_DIR is writable");
}
