//! The distributions of random numbers.

/// A distribution of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum NoiseDistribution {
    /// Uniform in `[0, 1)`, in multiples of 2^-24.
    Uniform,
    /// Standard normal, of magnitude at most 6.8.
    Normal,
    /// Standard Gumbel, `-ln(-ln(u))`. The index of the largest logit plus such noise is a sample
    /// of the softmax of the logits.
    Gumbel,
}

impl NoiseDistribution {
    /// All distributions.
    pub const ALL: [Self; 3] = [Self::Uniform, Self::Normal, Self::Gumbel];
}
