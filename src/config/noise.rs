//! What random numbers are drawn from.

/// A distribution of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum NoiseDistribution {
    /// Uniform in `[0, 1)`, multiples of 2^-24.
    Uniform,
    /// Standard normal, up to 6.8 to either side.
    Normal,
    /// Standard Gumbel, `-ln(-ln(u))`: the largest of logits plus such noise is a draw from their softmax.
    Gumbel,
}

impl NoiseDistribution {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Uniform, Self::Normal, Self::Gumbel];
}
