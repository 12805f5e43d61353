//! Reads the input file: one layer, whose tensors are all checked here.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

/// The tensors of one layer on the CPU, in the dtype of the file.
pub struct Input {
    pub x: Tensor,
    pub router_gate: Tensor,
    pub logits: Tensor,
    pub gate_up: Tensor,
    pub down: Tensor,
    /// The experts of each token, by which "GEMM alone" groups.
    pub expert_ids: Vec<Vec<u32>>,
    /// Whether the routing weights of a token are divided by their sum.
    pub renormalize: bool,
    pub shape: Shape,
}

/// Sizes of the layer.
#[derive(Clone, Copy)]
pub struct Shape {
    pub tokens: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
}

impl Input {
    /// Reads `path` and checks names, shapes and dtypes.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        let renormalize = renormalize(&bytes)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        drop(bytes);
        let (tokens, hidden) = find(&tensors, "x")?.dims2()?;
        let (experts, two_widths, _) = find(&tensors, "gate_up")?.dims3()?;
        let (_, top_k) = find(&tensors, "expert_ids")?.dims2()?;
        let intermediate = two_widths / 2;
        let shape = Shape { tokens, hidden, intermediate, experts, top_k };
        let dtype = find(&tensors, "x")?.dtype();
        let take = |name, dims: &[usize], dtype| {
            let tensor = find(&tensors, name)?;
            let got = tensor.dims();
            ensure!(got == dims, "tensor '{name}' is {got:?}, not {dims:?}");
            let got = tensor.dtype();
            ensure!(got == dtype, "tensor '{name}' is {got:?}, not {dtype:?}");
            Ok(tensor.clone())
        };
        ensure!(two_widths % 2 == 0, "tensor 'gate_up' has an odd number of rows");
        ensure!((1..=experts).contains(&top_k), "{top_k} experts per token of {experts}");
        let ids = take("expert_ids", &[tokens, top_k], DType::I32)?;
        let ids = ids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let expert = |id: i64| match u32::try_from(id) {
            Ok(id) if (id as usize) < experts => Ok(id),
            _ => Err(anyhow!("tensor 'expert_ids' has {id}, but there are {experts} experts")),
        };
        let ids = ids.into_iter().map(|row| row.into_iter().map(expert).collect());
        Ok(Self {
            x: take("x", &[tokens, hidden], dtype)?,
            router_gate: take("router_gate", &[experts, hidden], dtype)?,
            logits: take("logits", &[tokens, experts], dtype)?,
            gate_up: take("gate_up", &[experts, two_widths, hidden], dtype)?,
            down: take("down", &[experts, hidden, intermediate], dtype)?,
            expert_ids: ids.collect::<Result<_>>()?,
            renormalize,
            shape,
        })
    }

    /// The bytes of weights that one call reads: those of experts with a row.
    pub fn active_bytes(&self) -> usize {
        let mut active: Vec<u32> = self.expert_ids.iter().flatten().copied().collect();
        active.sort_unstable();
        active.dedup();
        let each = 3 * self.shape.hidden * self.shape.intermediate;
        active.len() * each * self.x.dtype().size_in_bytes()
    }
}

fn find<'a>(tensors: &'a HashMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    tensors.get(name).ok_or_else(|| anyhow!("tensor '{name}' is missing"))
}

fn renormalize(bytes: &[u8]) -> Result<bool> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let said = header.metadata().as_ref().and_then(|metadata| metadata.get("renormalize"));
    match said.map(String::as_str) {
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        other => bail!("metadata 'renormalize' is {other:?}, not true or false"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The truth and the layer read the same field: checks of a result do not detect a misreading.
    #[test]
    fn renormalize_is_read_from_the_metadata() {
        let file = |said: &str| {
            let metadata = HashMap::from([("renormalize".to_owned(), said.to_owned())]);
            let tensors: [(&str, safetensors::tensor::TensorView<'_>); 0] = [];
            safetensors::serialize(tensors, Some(metadata)).unwrap()
        };
        assert!(renormalize(&file("true")).unwrap());
        assert!(!renormalize(&file("false")).unwrap());
        assert!(renormalize(&file("no")).is_err());
    }
}
