//! Loads a block's weights, with a progress bar, and warns of infinities and NaN.

use moe_kernels::{Dtype, MoeWeights, Owned};
use moe_kernels_hf::Block;

use crate::error::Result;
use crate::progress::Progress;
use crate::text::warn;

/// The weights of a block as `D`.
pub fn load_weights<D: Dtype>(block: &Block) -> Result<MoeWeights<Owned, D>> {
    let progress = Progress::parts("read the weights", block.num_parts());
    let loaded = block.load_with::<D>(|_, _| progress.advance())?;
    drop(progress); // The bar is cleared before the warning.
    if let Some(text) = loaded.warning() {
        warn(&text);
    }
    Ok(loaded.weights)
}
