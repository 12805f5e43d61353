//! The MoE block of a layer: its configuration, and where a checkpoint has its tensors.

use moe_kernels::MoeConfig;

use crate::names::Layout;
use crate::quantization::Quantization;

/// The MoE block of one layer of a model, as config.json describes it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BlockInfo {
    /// The family, as `model_type` in config.json names it.
    pub model_type: &'static str,
    /// The part of a model with several blocks in a layer ("text", "vision", "encoder" ...), else
    /// empty.
    pub part: &'static str,
    /// The number of the layer.
    pub layer: usize,
    /// The configuration, with weights in the order of the first of [`layouts`](Self::layouts).
    /// [`Layout::config`] has the order of another layout.
    pub config: MoeConfig,
    /// The source of its logits.
    pub logits: LogitsFrom,
    /// `V`, the rows of the table of expert ids by token id; 0 without such a table.
    pub vocabulary: usize,
    /// The number of the first expert in the names of tensors.
    pub first_expert: usize,
    /// The quantisation of the weights, if config.json has one.
    pub quantization: Option<Quantization>,
    pub(crate) prefixes: &'static [&'static str],
    pub(crate) layouts: &'static [Layout],
}

/// The source of a block's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LogitsFrom {
    /// The product of the experts' input and the router's weights.
    Projection,
    /// The product of another input and the router's weights: the layer's residual, if a norm is
    /// applied to the experts' input alone (Gemma 4).
    ProjectionOfResidual,
    /// The caller: the router is a network with a state that passes from layer to layer (Zaya).
    Caller,
}

impl BlockInfo {
    /// The possible prefixes of the names of this layer's tensors, the most frequent first.
    pub fn prefixes(&self) -> Vec<String> {
        let number = self.layer.to_string();
        self.prefixes.iter().map(|prefix| prefix.replace(LAYER, &number)).collect()
    }

    /// The kinds of checkpoints of this family, the most frequent first.
    pub fn layouts(&self) -> &'static [Layout] {
        self.layouts
    }

    /// The number of the layer in the name of a tensor with one of this block's prefixes.
    pub fn layer_of(&self, tensor: &str) -> Option<usize> {
        self.prefixes.iter().find_map(|prefix| {
            let (before, after) = prefix.split_once(LAYER)?;
            let rest = tensor.strip_prefix(before)?;
            let digits = rest.find(|c: char| !c.is_ascii_digit())?;
            let (number, rest) = rest.split_at(digits);
            rest.starts_with(after).then(|| number.parse().ok())?
        })
    }
}

const LAYER: &str = "{layer}";
