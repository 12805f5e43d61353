//! The checkpoints of fixtures/ that are embedded in this binary.

use moe_kernels_hf::Folder;

/// An embedded checkpoint: the files of its folder.
pub struct Fixture {
    pub name: &'static str,
    files: &'static [(&'static str, &'static [u8])],
}

/// Embeds files of a folder of fixtures/, each with its name.
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

impl Fixture {
    pub fn folder(&self) -> Folder {
        Folder::Memory { name: format!("bundled {}", self.name), files: self.files }
    }
}
