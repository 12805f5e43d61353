//! The peers: the operations of each, and their calls.

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};

use crate::input::Input;
use crate::layer::Block;
use crate::truth::{self, Rows};

pub const GEMM: &str = "GEMM alone";
pub const FROM_LOGITS: &str = "layer from logits";
pub const FROM_X: &str = "layer from x with the router";

/// Reads of as many other bytes evict weights from a GPU's L2.
const COLD_BYTES: usize = 256 << 20;

pub struct Peers {
    pub input: Input,
    pub device: Device,
    dtype: DType,
}

/// A call with one of several copies of the weights, which the argument selects.
pub type Call = Box<dyn Fn(usize) -> candle_core::Result<Tensor>>;

impl Peers {
    pub fn new(input: Input, device: Device) -> Self {
        // The choice of candle's examples: on the CPU candle has no bf16 product.
        let dtype = match input.x.dtype() {
            DType::BF16 => device.bf16_default_to_f32(),
            other => other,
        };
        Self { input, device, dtype }
    }

    pub fn boundaries(&self, peer: &str) -> Result<&'static [&'static str]> {
        match peer {
            "candle" => Ok(&[GEMM, FROM_LOGITS, FROM_X]),
            "candle-fused" => match self.fused_lacks() {
                None => Ok(&[FROM_X]),
                Some(why) => bail!("candle-fused is unavailable: {why}"),
            },
            _ => bail!("unknown peer '{peer}'"),
        }
    }

    /// Returns why candle's fused layer cannot run, `None` if it can.
    pub fn fused_lacks(&self) -> Option<&'static str> {
        if !cfg!(feature = "cuda") {
            Some("built without the feature 'cuda'")
        } else if !self.device.is_cuda() {
            Some("it needs CUDA")
        } else if self.dtype == DType::F32 {
            Some("it supports f16 and bf16 alone")
        } else {
            None
        }
    }

    pub fn note(&self) -> Option<&'static str> {
        let other = self.dtype != self.input.x.dtype();
        other.then_some("candle has no bf16 product on the CPU: f32 is used, as in its examples")
    }

    /// The copies of the weights that calls use in turn, so that no call finds them in a cache.
    fn copies(&self) -> usize {
        if self.device.is_cuda() { COLD_BYTES.div_ceil(self.input.active_bytes()) } else { 1 }
    }

    pub fn call(&self, peer: &str, boundary: &str) -> Result<Call> {
        if !self.boundaries(peer)?.contains(&boundary) {
            bail!("{peer} has no boundary '{boundary}'");
        }
        let load = |tensor: &Tensor| tensor.to_dtype(self.dtype)?.to_device(&self.device);
        let x = load(&self.input.x)?;
        #[cfg(feature = "cuda")]
        if peer == "candle-fused" {
            let layer = |_| crate::fused::load(&self.input, &self.device, self.dtype);
            let layers = (0..self.copies()).map(layer).collect::<candle_core::Result<Vec<_>>>()?;
            return Ok(Box::new(move |n| crate::fused::from_x(&layers[n % layers.len()], &x)));
        }
        let block = |_| Block::new(&self.input, &self.device, self.dtype);
        let blocks = (0..self.copies()).map(block).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(match boundary {
            GEMM => {
                let group = |expert| match self.tokens_of(expert) {
                    tokens if tokens.is_empty() => Ok(None),
                    tokens => Tensor::new(tokens, &self.device).map(Some),
                };
                let groups = (0..self.input.shape.experts as u32).map(group);
                let groups = groups.collect::<candle_core::Result<Vec<_>>>()?;
                Box::new(move |n| blocks[n % blocks.len()].products(&x, &groups))
            }
            FROM_LOGITS => {
                let logits = load(&self.input.logits)?;
                Box::new(move |n| blocks[n % blocks.len()].with_logits(&x, &logits))
            }
            _ => Box::new(move |n| blocks[n % blocks.len()].forward(&x)),
        })
    }

    /// Computes the truth of some rows of a call's result.
    pub fn truth(&self, boundary: &str) -> Result<Rows> {
        match boundary {
            GEMM => {
                let rows = |expert| {
                    let tokens = self.tokens_of(expert).into_iter();
                    tokens.map(move |token| (token as usize, expert as usize))
                };
                let experts = 0..self.input.shape.experts as u32;
                truth::product_rows(&self.input, &experts.flat_map(rows).collect::<Vec<_>>())
            }
            FROM_LOGITS => {
                let logits = self.input.logits.to_dtype(DType::F64)?.to_vec2()?;
                truth::layer_rows(&self.input, &logits)
            }
            _ => truth::layer_rows(&self.input, &truth::logits_from_x(&self.input)?),
        }
    }

    fn tokens_of(&self, expert: u32) -> Vec<u32> {
        let ids = self.input.expert_ids.iter().zip(0..);
        ids.filter(|(ids, _)| ids.contains(&expert)).map(|(_, token)| token).collect()
    }
}
