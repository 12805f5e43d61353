//! Temporary folders, safetensors files, and calls of the program.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// A temporary folder, removed when it is dropped.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("moe-kernels-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of a bundled checkpoint.
    pub fn of(fixture: &str) -> Self {
        let folder = Self::new();
        for entry in std::fs::read_dir(fixture_path(fixture)).unwrap() {
            let from = entry.unwrap().path();
            std::fs::copy(&from, folder.path(from.file_name().unwrap().to_str().unwrap())).unwrap();
        }
        folder
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Replaces text in a file.
    pub fn edit(&self, file: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path(file)).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        std::fs::write(self.path(file), text.replace(from, to)).unwrap();
    }

    /// Truncates a file.
    pub fn cut(&self, file: &str, bytes: usize) {
        let content = std::fs::read(self.path(file)).unwrap();
        std::fs::write(self.path(file), &content[..bytes]).unwrap();
    }

    pub fn tensors(&self, file: &str) -> Vec<Stored> {
        read(&self.path(file))
    }

    /// Changes the tensors of a file. The metadata of its header is lost.
    pub fn change(&self, file: &str, change: impl FnOnce(&mut Vec<Stored>)) {
        let mut tensors = self.tensors(file);
        change(&mut tensors);
        write(&self.path(file), &tensors);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn fixture_path(fixture: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(fixture)
}

/// A tensor in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Stored {
    pub fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.into(), data }
    }

    pub fn values(&self) -> Vec<f64> {
        let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
        match self.dtype {
            Dtype::F64 => {
                self.data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Dtype::F32 => self
                .data
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            Dtype::F16 => {
                self.data.chunks(2).map(|b| half::f16::from_bits(half(b)).into()).collect()
            }
            Dtype::BF16 => {
                self.data.chunks(2).map(|b| half::bf16::from_bits(half(b)).into()).collect()
            }
            other => panic!("{other:?} is used by no test"),
        }
    }
}

pub fn read(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let store = |(name, view): (String, TensorView<'_>)| Stored {
        name,
        dtype: view.dtype(),
        shape: view.shape().into(),
        data: view.data().into(),
    };
    let mut tensors: Vec<Stored> = tensors.tensors().into_iter().map(store).collect();
    // The order in a file is not that of the names.
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

pub fn write(path: &Path, tensors: &[Stored]) {
    write_with(path, tensors, None);
}

/// Writes a file with metadata in its header.
pub fn write_with(path: &Path, tensors: &[Stored], notes: Option<HashMap<String, String>>) {
    let views = tensors.iter().map(|tensor| {
        (&tensor.name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, notes).unwrap()).unwrap();
}

pub fn find<'a>(tensors: &'a [Stored], name: &str) -> &'a Stored {
    tensors.iter().find(|tensor| tensor.name == name).unwrap()
}

pub fn find_mut<'a>(tensors: &'a mut [Stored], name: &str) -> &'a mut Stored {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

/// `|y - wanted| / |wanted|`
pub fn distance(y: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(y.len(), wanted.len());
    let difference: f64 = y.iter().zip(wanted).map(|(y, wanted)| (y - wanted).powi(2)).sum();
    let norm: f64 = wanted.iter().map(|wanted| wanted.powi(2)).sum();
    (difference / norm).sqrt()
}

/// The exit status and output of the program.
#[derive(Debug)]
pub struct Done {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the program in a folder outside of the repository.
pub fn program(arguments: &[&str]) -> Done {
    program_in(&[], arguments)
}

/// Runs the program with these environment variables.
pub fn program_in(environment: &[(&str, &str)], arguments: &[&str]) -> Done {
    let output = Command::new(env!("CARGO_BIN_EXE_moe-kernels"))
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(std::env::temp_dir())
        .output()
        .unwrap();
    Done {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs a layer of a folder with a checkpoint on its recorded.safetensors. Writes y.safetensors
/// there.
pub fn run(folder: &Folder, layer: usize, more: &[&str]) -> Done {
    let (input, output) = (folder.path("recorded.safetensors"), folder.path("y.safetensors"));
    let layer = layer.to_string();
    let mut arguments =
        vec!["run", "--checkpoint", folder.dir().to_str().unwrap(), "--layer", &layer];
    arguments.extend(["--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()]);
    arguments.extend(more);
    program(&arguments)
}

/// Runs layer 1 of the folder. Checks that it fails with these words and writes no file.
#[track_caller]
pub fn fails(folder: &Folder, words: &[&str]) {
    let before = folder.names();
    check_failure(&run(folder, 1, &["--device", "cpu"]), words);
    assert_eq!(folder.names(), before, "a file was written");
}

/// Checks exit status 2 and the words in stderr.
#[track_caller]
pub fn check_failure(done: &Done, words: &[&str]) {
    assert_eq!(done.status, Some(2), "{done:?}");
    assert!(done.stderr.starts_with("error: "), "{}", done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "no '{word}' in: {}", done.stderr);
    }
}
