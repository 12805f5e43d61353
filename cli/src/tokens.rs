//! Reads a layer's inputs from a file, and runs the layer on them.

use moe_kernels::{Dtype, MoeInputs, Owned, Selection, Typed};
use moe_kernels_hf::{Block, LogitsFrom, Tensor, TensorFile};

use crate::backend::{Output, rows_per_expert};
use crate::error::Result;
use crate::progress::Steps;

/// The output of a layer for all tokens of a file.
pub struct Outputs<D> {
    pub num_tokens: usize,
    /// `H`
    pub hidden: usize,
    /// `K`
    pub top_k: usize,
    /// The columns of `logits`. A block may use fewer; the rest are 0.
    pub experts: usize,
    /// `y` `[T, H]`, ids and weights `[T, K]`. The id of a slot without an expert is `u32::MAX`.
    pub output: Output<D>,
    /// For each token, whether all inputs are finite before they are rounded to `D`.
    pub finite: Vec<bool>,
    /// The experts of all blocks, block after block.
    pub rows_per_expert: Vec<usize>,
}

const ROUTER_INPUT: &str = "router_input";
const LOGITS: &str = "logits";

/// The most logits of a pass, 1 GiB in f32. Without a limit a small file of narrow tokens could
/// need any amount of memory. As K <= E, it limits the slots as well.
const MOST_LOGITS: usize = 1 << 28;

/// Calls `run` for each block, with the tokens of the block.
pub fn forward<D: Dtype>(
    layers: &[Block],
    file: &TensorFile,
    steps: &mut Steps,
    mut run: impl FnMut(&Block, MoeInputs<Owned, D>, &mut Steps) -> Result<Output<D>>,
) -> Result<Outputs<D>> {
    let blocks = blocks(layers, file)?;
    let hidden = blocks.first().map_or(0, |(layer, _)| layer.config().hidden);
    let top_k = blocks.iter().map(|(layer, _)| layer.config().top_k).max().unwrap_or(0);
    let num_tokens = blocks.iter().map(|(_, tokens)| tokens.len()).sum();
    let experts =
        blocks.iter().map(|(layer, _)| layer.config().router_experts()).max().unwrap_or(0);
    let most = MOST_LOGITS / experts.max(1);
    if num_tokens > most {
        let wanted = format!("at most {most} tokens, for {experts} logits each");
        return Err(file.tensor("x")?.error(format!("of {num_tokens} tokens"), wanted).into());
    }
    let mut all = Outputs {
        num_tokens,
        hidden,
        top_k,
        experts,
        output: Output {
            logits: vec![0.0; num_tokens * experts],
            y: vec![D::from_f32(0.0); num_tokens * hidden],
            expert_ids: vec![u32::MAX; num_tokens * top_k],
            weights: vec![0.0; num_tokens * top_k],
        },
        finite: finite_tokens(layers, file, num_tokens)?,
        rows_per_expert: Vec::new(),
    };
    for (layer, tokens) in blocks {
        let inputs = steps.time("read the input", || read_inputs::<D>(layer, file, &tokens))?;
        let part = run(layer, inputs, steps)?;
        let config = layer.config();
        all.rows_per_expert.extend(rows_per_expert(&part.expert_ids, config.num_experts));
        let block_experts = config.router_experts();
        for (row, token) in tokens.into_iter().enumerate() {
            let output = &mut all.output;
            put(&mut output.logits, token * experts, &part.logits, row, block_experts);
            put(&mut output.y, token * hidden, &part.y, row, hidden);
            put(&mut output.expert_ids, token * top_k, &part.expert_ids, row, config.top_k);
            put(&mut output.weights, token * top_k, &part.weights, row, config.top_k);
        }
    }
    Ok(all)
}

/// The name of the tensor that the router reads in place of `x`.
fn router_input(layer: &Block) -> Option<&'static str> {
    match layer.info().logits {
        LogitsFrom::ProjectionOfResidual => Some(ROUTER_INPUT),
        LogitsFrom::Caller => Some(LOGITS),
        _ => None,
    }
}

/// Returns for each token whether it is finite in every tensor that these layers read.
fn finite_tokens(layers: &[Block], file: &TensorFile, num_tokens: usize) -> Result<Vec<bool>> {
    let mut finite = vec![true; num_tokens];
    for name in ["x"].into_iter().chain(layers.iter().filter_map(router_input)) {
        let tensor = file.tensor(name)?;
        let values = tensor.read::<f32>()?;
        let width = values.len().checked_div(num_tokens).unwrap_or(0).max(1);
        for (finite, row) in finite.iter_mut().zip(values.chunks(width)) {
            *finite &= row.iter().all(|value| value.is_finite());
        }
    }
    Ok(finite)
}

/// Copies a row of `part` to `all`, from element `at` on.
fn put<T: Copy>(all: &mut [T], at: usize, part: &[T], row: usize, width: usize) {
    all[at..at + width].copy_from_slice(&part[row * width..(row + 1) * width]);
}

/// Returns the blocks that have tokens, and the tokens of each. A model with text and vision
/// experts has two blocks in a layer. If both have the width of `x`, the tensor `token_types` has
/// the block's number for each token.
fn blocks<'l>(layers: &'l [Block], file: &TensorFile) -> Result<Vec<(&'l Block, Vec<usize>)>> {
    let x = file.tensor("x")?;
    let fits: Vec<_> =
        layers.iter().filter(|layer| x.rows_of(layer.config().hidden).is_ok()).collect();
    let [first, _, ..] = fits[..] else {
        let only = fits.first().copied().or(layers.first());
        return only
            .map(|layer| Ok((layer, (0..x.rows_of(layer.config().hidden)?).collect())))
            .into_iter()
            .collect();
    };
    let num_tokens = x.rows_of(first.config().hidden)?;
    let tensor = file.tensor("token_types")?;
    tensor.check_ids(&[num_tokens])?;
    let types = tensor.read_ids(fits.len(), "numbers of the layer's blocks")?;
    let tokens_of = |block: usize| -> Vec<usize> {
        (0..num_tokens).filter(|token| types[*token] as usize == block).collect()
    };
    let blocks = fits.into_iter().enumerate().map(|(block, layer)| (layer, tokens_of(block)));
    Ok(blocks.filter(|(_, tokens)| !tokens.is_empty()).collect())
}

/// Reads the rows of these tokens from each tensor that the block needs.
fn read_inputs<D: Dtype>(
    layer: &Block,
    file: &TensorFile,
    tokens: &[usize],
) -> Result<MoeInputs<Owned, D>> {
    let (config, x) = (layer.config(), file.tensor("x")?);
    let num_tokens = x.rows_of(config.hidden)?;
    let mut inputs = MoeInputs::new(rows(&x, config.hidden, tokens)?);
    match layer.info().logits {
        LogitsFrom::ProjectionOfResidual => {
            let tensor = file.tensor(ROUTER_INPUT)?;
            tensor.check(&[num_tokens, config.hidden])?;
            inputs.router_x = Some(rows(&tensor, config.hidden, tokens)?);
        }
        LogitsFrom::Caller => {
            let (tensor, width) = (file.tensor(LOGITS)?, config.router_experts());
            tensor.check(&[num_tokens, width])?;
            inputs.logits = Some(match config.projection.f32_logits {
                true => Typed::F32(rows(&tensor, width, tokens)?),
                false => Typed::Element(rows(&tensor, width, tokens)?),
            });
        }
        _ => {}
    }
    if config.router.selection == Selection::Given {
        let tensor = file.tensor("token_ids")?;
        tensor.check_ids(&[num_tokens])?;
        let ids = tensor.read_ids(layer.info().vocabulary, "rows of the table of expert ids")?;
        inputs.token_ids = Some(tokens.iter().map(|&token| ids[token]).collect());
    }
    Ok(inputs)
}

fn rows<D: Dtype>(tensor: &Tensor, width: usize, tokens: &[usize]) -> Result<Vec<D>> {
    let all = tensor.read::<D>()?;
    Ok(tokens.iter().flat_map(|&token| &all[token * width..(token + 1) * width]).copied().collect())
}
