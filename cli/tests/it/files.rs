//! Files that are not regular, have invalid headers, or are too large.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::json;

use crate::common::{Done, Folder, Stored, check_failure, fails, find_mut, run, write};
use crate::model::{Model, zeros};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00003-of-00004.safetensors";

/// Runs layer 1 with a time limit.
fn run_in_time(folder: &Folder) -> Done {
    let [dir, input, output] =
        ["", "recorded.safetensors", "y.safetensors"].map(|file| folder.path(file));
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-kernels"))
        .args(["run", "--layer", "1", "--device", "cpu", "--checkpoint"])
        .arg(dir)
        .arg("--input")
        .arg(input)
        .arg("--output")
        .arg(output)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("the program waits for a file");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    Done {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Each kind of path that is not a regular file, in place of each file.
#[test]
fn rejects_paths_that_are_not_regular_files() {
    let fifo = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    let socket = |path: &Path| drop(std::os::unix::net::UnixListener::bind(path).unwrap());
    let device = |path: &Path| symlink("/dev/zero", path).unwrap();
    let dir = |path: &Path| std::fs::create_dir(path).unwrap();
    type Kind<'k> = (&'k dyn Fn(&Path), &'static str);
    let kinds: [Kind<'_>; 4] =
        [(&fifo, "a FIFO"), (&socket, "a socket"), (&device, "a device"), (&dir, "a folder")];
    for (fixture, files) in [
        ("mixtral-tiny", &["config.json", SINGLE, "recorded.safetensors"][..]),
        ("qwen3-moe-tiny", &[INDEX, SHARD]),
    ] {
        for file in files {
            for (make, kind) in kinds {
                let folder = Folder::of(fixture);
                std::fs::remove_file(folder.path(file)).unwrap();
                make(&folder.path(file));
                check_failure(&run_in_time(&folder), &[file, &format!("is {kind}, wanted a file")]);
            }
        }
    }
}

/// The cache of the Hugging Face Hub consists of links.
#[test]
fn input_links_are_followed() {
    let (folder, elsewhere) = (Folder::of("mixtral-tiny"), Folder::new());
    for file in folder.names() {
        std::fs::rename(folder.path(&file), elsewhere.path(&file)).unwrap();
        symlink(elsewhere.path(&file), folder.path(&file)).unwrap();
    }
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    std::fs::remove_file(elsewhere.path(SINGLE)).unwrap();
    std::fs::remove_file(folder.path("y.safetensors")).unwrap();
    fails(&folder, &[SINGLE, "no such file"]);
    // A link to itself.
    std::fs::remove_file(folder.path(SINGLE)).unwrap();
    symlink(folder.path(SINGLE), folder.path(SINGLE)).unwrap();
    fails(&folder, &[SINGLE]);
}

/// The link is replaced; its target is not written.
#[test]
fn output_link_is_replaced() {
    let folder = Folder::of("mixtral-tiny");
    std::fs::write(folder.path("precious"), "text").unwrap();
    symlink(folder.path("precious"), folder.path("y.safetensors")).unwrap();
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert_eq!(std::fs::read_to_string(folder.path("precious")).unwrap(), "text");
    assert!(!folder.path("y.safetensors").is_symlink());
}

/// A sparse file of this length.
fn sparse(path: &Path, bytes: u64) {
    std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn rejects_json_files_above_size_limit() {
    let folder = Folder::of("mixtral-tiny");
    sparse(&folder.path("config.json"), (16 << 20) + 1);
    fails(&folder, &["config.json: has 16777217 bytes, wanted at most 16777216"]);
    let folder = Folder::of("qwen3-moe-tiny");
    sparse(&folder.path(INDEX), 100_000_001);
    fails(&folder, &[INDEX, "has 100000001 bytes, wanted at most 100000000"]);
}

/// A file with this header, `said` as the header's length, and `data` bytes after it.
fn headed(said: u64, header: &str, data: usize) -> Vec<u8> {
    [&said.to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn rejects_invalid_safetensors_headers() {
    let entry = |shape: &str, begin: u64, end: u64| {
        format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}")
    };
    let two = |a: String, b: String| format!("{{\"a\":{a},\"b\":{b}}}");
    let one = |a: String| format!("{{\"a\":{a}}}");
    let wrong = [
        ("overlapping", two(entry("[2]", 0, 8), entry("[2]", 4, 12)), 12),
        ("the same bytes", two(entry("[2]", 0, 8), entry("[2]", 0, 8)), 8),
        ("a gap", two(entry("[1]", 0, 4), entry("[1]", 8, 12)), 12),
        ("backwards", one(entry("[1]", 4, 0)), 4),
        ("past the end", one(entry("[4]", 0, 16)), 8),
        ("bytes of nothing", one(entry("[1]", 0, 4)), 8),
        ("a product past 2^64", one(entry("[4294967296,4294967296]", 0, 4)), 4),
        ("bits past 2^64", one(entry("[1152921504606846976]", 0, 4)), 4),
        ("a product that wraps to 4", one(entry("[9223372036854775809,2]", 0, 8)), 8),
        ("offsets at the end of 64 bits", one(entry("[1]", u64::MAX - 4, u64::MAX)), 4),
        ("a negative size", one(entry("[-1]", 0, 4)), 4),
        (
            "a type that is none",
            "{\"a\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}".into(),
            4,
        ),
        ("no object", "[]".into(), 0),
        ("no text", "\u{0}".into(), 0),
        ("deep", format!("{{\"a\":{}1{}}}", "[".repeat(20_000), "]".repeat(20_000)), 0),
    ];
    for (what, header, data) in wrong {
        let folder = Folder::of("mixtral-tiny");
        std::fs::write(folder.path(SINGLE), headed(header.len() as u64, &header, data)).unwrap();
        let done = run_in_time(&folder);
        assert_eq!(done.status, Some(2), "{what}: {done:?}");
        assert!(done.stderr.contains("not a complete safetensors file"), "{what}: {}", done.stderr);
    }
    for said in [3, 100, 100_000_000, 100_000_001, 1 << 40, u64::MAX - 7, u64::MAX] {
        let folder = Folder::of("mixtral-tiny");
        std::fs::write(folder.path(SINGLE), headed(said, "{}", 0)).unwrap();
        fails(&folder, &[SINGLE, "not a complete safetensors file"]);
    }
}

#[test]
fn control_characters_in_messages_are_escaped() {
    const EVIL: &str = "\u{1b}[2J\u{9b}31m\r\nerror: none\u{202e}";
    let spelled = "\\u{1b}[2J\\u{9b}31m\\r\\nerror: none\\u{202e}";
    #[track_caller]
    fn clean(folder: &Folder, words: &[&str]) {
        let done = run(folder, 1, &["--device", "cpu"]);
        check_failure(&done, words);
        let text = done.stderr.strip_suffix('\n').unwrap();
        assert!(!text.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text:?}");
    }
    // The names of tensors.
    let folder = Folder::of("mixtral-tiny");
    folder.change(SINGLE, |tensors| {
        let name = format!("model.layers.1.block_sparse_moe.{EVIL}");
        tensors.push(Stored::f32(&name, &[1], &[1.0]));
    });
    clean(&folder, &[spelled, "unused: "]);
    let folder = Folder::of("mixtral-tiny");
    write(&folder.path("recorded.safetensors"), &[Stored::f32(EVIL, &[1], &[1.0])]);
    clean(&folder, &[spelled, "no tensor `x`"]);
    // The names of files, in an index and in a folder.
    let folder = Folder::of("qwen3-moe-tiny");
    let file = serde_json::to_string(&format!("{EVIL}.safetensors")).unwrap();
    folder.edit(INDEX, &format!("\"{SHARD}\""), &file);
    clean(&folder, &[spelled, "no such file"]);
    let folder = Folder::of("qwen3-moe-tiny");
    folder.edit(INDEX, &format!("\"{SHARD}\""), &file.replace("error", "/"));
    clean(&folder, &["wanted the name of a file in the same folder"]);
    // Values of config.json.
    let folder = Folder::of("mixtral-tiny");
    let value = serde_json::to_string(EVIL).unwrap();
    folder.edit("config.json", "\"silu\"", &value);
    clean(&folder, &["`hidden_act` is"]);
    let mut model = Model::of("olmoe-tiny", &[(28, 64), (12, 32)]);
    model.config["quantization_config"] = json!({"quant_method": EVIL});
    model.store("experts", |_, name, shape| vec![zeros(name, Dtype::I8, shape)]);
    clean(&model.write(), &["whose format is"]);
    // The name of a file beside the checkpoint, in a warning.
    let folder = Folder::of("mixtral-tiny");
    std::fs::write(folder.path("\u{1b}[2J.gguf"), "").unwrap();
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stderr.contains("\\u{1b}[2J.gguf") && !done.stderr.contains('\u{1b}'), "{done:?}");
}

/// A sparse input of 256 MB with one value per token would need 2^39 slots, more than any memory.
#[test]
fn rejects_inputs_with_too_many_logits_before_allocation() {
    for (top_k, tokens) in [(4096, 1 << 27), (4096, (1 << 16) + 1), (1, 1 << 26)] {
        of_one_number_each(top_k, tokens);
    }
}

fn of_one_number_each(top_k: usize, tokens: usize) {
    let experts = 4096;
    let folder = Folder::new();
    let config = json!({
        "model_type": "mixtral", "hidden_size": 1, "intermediate_size": 1,
        "num_local_experts": experts, "num_experts_per_tok": top_k,
    });
    std::fs::write(folder.path("config.json"), config.to_string()).unwrap();
    let of =
        |name: &str, shape: &[usize]| zeros(&format!("layers.1.mlp.{name}"), Dtype::F32, shape);
    let tensors = [
        of("gate.weight", &[experts, 1]),
        of("experts.gate_up_proj", &[experts, 2, 1]),
        of("experts.down_proj", &[experts, 1, 1]),
    ];
    write(&folder.path(SINGLE), &tensors);
    let bytes = 2 * tokens;
    let x = json!({ "dtype": "F16", "shape": [tokens, 1], "data_offsets": [0, bytes] });
    let header = json!({ "x": x }).to_string();
    let start = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let path = folder.path("recorded.safetensors");
    std::fs::write(&path, &start).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((start.len() + bytes) as u64).unwrap();
    let wanted = "wanted at most 65536 tokens, for 4096 logits each";
    fails(&folder, &[&format!("`x` is of {tokens} tokens, {wanted}")]);
}

/// One warning for all tensors; the output is written.
#[test]
fn weights_that_are_not_finite_are_a_warning() {
    let of = |expert: usize| format!("model.layers.1.block_sparse_moe.experts.{expert}.w2.weight");
    let set = |folder: &Folder, name: &str, element: usize, value: f32| {
        folder.change(SINGLE, |tensors| {
            find_mut(tensors, name).data[4 * element..][..4].copy_from_slice(&value.to_le_bytes());
        });
    };
    let folder = Folder::of("mixtral-tiny");
    let clean = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!((clean.status, clean.stderr.as_str()), (Some(0), ""), "{clean:?}");
    set(&folder, &of(3), 7, f32::NAN);
    set(&folder, &of(3), 70, f32::NEG_INFINITY);
    // Finite, and too large for f16.
    set(&folder, &of(4), 1, 70_000.0);
    for (dtype, more) in [("f32", ""), ("f16", "; other tensors with some: 1")] {
        let done = run(&folder, 1, &["--device", "cpu", "--dtype", dtype]);
        assert_eq!(done.status, Some(0), "{done:?}");
        let line = format!("warning: tensor `{}` has infinities or NaN: 2 in {dtype}{more}", of(3));
        let (first, rest) = done.stderr.split_once('\n').unwrap();
        assert_eq!(first, line);
        // Another warning, for the output of tokens with this expert.
        assert!(rest.contains("numbers of y are infinite or NaN") && rest.lines().count() == 1);
    }
    // A scale that is NaN.
    let folder = Folder::of("deepseek-v3-fp8-tiny");
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    set(&folder, &format!("{name}_scale_inv"), 1, f32::NAN);
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    let line = format!("warning: tensor `{name}_scale_inv` has infinities or NaN: 1 in f32\n");
    assert!(done.stderr.starts_with(&line), "{}", done.stderr);
}
