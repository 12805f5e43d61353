//! Mixture-of-Experts models of the Hugging Face Hub for [`moe_kernels`].
//!
//! - [`from_config`]: from a model's config.json and the number of a layer to a
//!   [`MoeConfig`](moe_kernels::MoeConfig). [`blocks_from_config`] also returns the source of the
//!   logits and the names of the tensors.
//! - [`Checkpoint`]: the MoE blocks of a folder with config.json and safetensors files, in one file
//!   or in shards. Files are mapped into memory; [`Block::load`] converts a block's tensors to the
//!   element type of the layer.
//! - [`mod@format`]: the exact values of FP8, FP4 and MXFP4 codes.
//!
//! Supported are all families of transformers 5.23 whose block is a routed FFN: [`model_types`]
//! lists them. Weights may be f64, f32, f16 or bf16, FP8 E4M3 with scales for blocks, rows or
//! matrices, packed FP4 with a scale for 32 numbers, or MXFP4. Other formats are an error that
//! names the format and the tensors.
//!
//! # Load and run a block
//!
//! ```no_run
//! use moe_kernels::{MoeInputs, reference};
//! use moe_kernels_hf::Checkpoint;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A layer has one block, or two in models with text and vision experts.
//! let block = Checkpoint::open("fixtures/mixtral-tiny")?.blocks(1)?.remove(0);
//! let weights = block.load::<f32>()?;
//! let inputs = MoeInputs::new(vec![0.5; 4 * block.config().hidden]);
//! let (inputs, weights) = (inputs.as_host(), weights.as_host());
//! let y = reference::moe_layer_fwd::<f32, f32>(block.config(), &inputs, &weights)?;
//! # Ok(())
//! # }
//! ```
//!
//! `examples/load_block.rs` is the same program, complete: it runs a layer of a checkpoint on the
//! CPU reference (`cargo run --example load_block -p moe-kernels-hf`). On a GPU,
//! `weights.upload(&stream)` gives the weights of a [`MoeLayer`](moe_kernels::MoeLayer).
//!
//! # Configuration without a checkpoint
//!
//! ```
//! use moe_kernels_hf::{Role, blocks_from_config, from_config};
//!
//! # fn main() -> moe_kernels_hf::Result<()> {
//! let json = r#"{ "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 48 }"#;
//! let config = from_config(json, 0)?;
//! assert_eq!(config.to_string(), "H64 I48 E8 K2, softmax, top-k, renormalised");
//!
//! let blocks = blocks_from_config(json, 0)?;
//! let arrays = blocks[0].layouts()[0].arrays(&blocks[0], "model.layers.0.")?;
//! assert_eq!(arrays[0].role, Role::RouterGate);
//! assert_eq!(arrays[0].parts[0].name, "model.layers.0.block_sparse_moe.gate.weight");
//! # Ok(())
//! # }
//! ```

mod block;
mod block_info;
mod bytes;
mod checkpoint;
mod config;
mod error;
mod families;
mod family;
mod folder;
pub mod format;
mod json;
mod keys;
mod layout;
mod messages;
mod names;
mod quantization;
mod refusal;
mod schedule;
mod source;
mod tensor_file;

pub use block::{Block, Loaded};
pub use block_info::{BlockInfo, LogitsFrom};
pub use checkpoint::Checkpoint;
pub use config::{blocks_from_config, from_config, layers_from_config, model_types};
pub use error::{Error, Result};
pub use folder::Folder;
pub use json::strict_json;
pub use names::{Array, Layout, Part, Role, Stored};
pub use quantization::Quantization;
pub use tensor_file::{Tensor, TensorFile};
