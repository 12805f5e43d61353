//! The checkpoints of fixtures/, part of this binary, and how far from the recording each device may be.

use moe_kernels::DType;

use crate::checkpoint::Folder;
use crate::device::Place;

/// One bundled checkpoint: the files of its folder.
pub struct Fixture {
    pub name: &'static str,
    files: &'static [(&'static str, &'static [u8])],
}

/// A file of fixtures/ with its name.
macro_rules! files {
    ($folder:literal: $($file:literal),* $(,)?) => {
        Fixture {
            name: $folder,
            files: &[$(($file, include_bytes!(concat!("../../fixtures/", $folder, "/", $file)))),*],
        }
    };
}

pub const FIXTURES: &[Fixture] = &[
    files!("mixtral-tiny": "config.json", "model.safetensors", "recorded.safetensors"),
    files!("qwen3-moe-tiny":
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "recorded.safetensors",
    ),
];

/// The file with the input and what transformers made of it.
pub const RECORDED: &str = "recorded.safetensors";

impl Fixture {
    pub fn folder(&self) -> Folder {
        Folder::Bundled(self.name, self.files)
    }
}

/// The largest distance from the recording that is right: the norm of the difference over the norm.
///
/// In f32 it is a few roundings of each product; the devices add in another order than the CPU. In 16
/// bits the weights, the input, the activations and the output are each rounded once.
pub fn limit(place: Place, dtype: DType) -> f64 {
    match (dtype, place) {
        (DType::F32, Place::Cpu) => 1e-6,
        (DType::F32, Place::Cuda | Place::Emulator) => 1e-5,
        (DType::F16, _) => 2e-3,
        (DType::BF16, _) => 1e-2,
    }
}
