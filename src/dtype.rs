//! Element types of activations and weights.

use bytemuck::Pod;
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

/// An element type, known at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum DType {
    /// IEEE 754 binary32. Products are true f32, never TF32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
}

impl DType {
    /// All element types, in the order of the kernel table.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// The size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name, `f32`, `f16` or `bf16`: the suffix of kernel symbols, and the word on a command
    /// line.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }

    /// The unit roundoff, half the distance between 1 and the next larger number: the largest
    /// relative error of rounding to nearest.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            DType::F32 => 1.0 / (1u64 << 24) as f64,
            DType::F16 => 1.0 / (1u64 << 11) as f64,
            DType::BF16 => 1.0 / (1u64 << 8) as f64,
        }
    }

    /// The smallest positive normal number. Below it the error of rounding is absolute.
    pub const fn min_positive(self) -> f64 {
        match self {
            DType::F32 | DType::BF16 => f32::MIN_POSITIVE as f64,
            DType::F16 => 1.0 / (1u64 << 14) as f64,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
            crate::Error::Unsupported {
                op: "DType",
                argument: "name",
                wanted: "f32, f16 or bf16".into(),
                got: format!("'{name}'"),
            }
        })
    }
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element of any tensor of a layer: activations, weights, ids or flags.
pub(crate) trait Plain: Pod + DeviceRepr {}

impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}
impl Plain for u32 {}
impl Plain for u8 {}

/// An element type, known at compile time: `f32`, [`half::f16`] or [`half::bf16`].
///
/// It implies cudarc's `DeviceRepr` and `ValidAsZeroBits`, so generic code can upload slices and
/// allocate zeroed memory of any such type without further bounds.
pub trait Dtype:
    Pod + DeviceRepr + ValidAsZeroBits + Send + Sync + PartialOrd + std::fmt::Debug + private::Sealed
{
    /// The same type as a run-time value.
    const DTYPE: DType;

    /// Converts to f32 exactly.
    fn to_f32(self) -> f32;

    /// Rounds an f32 to nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Converts to f64 exactly.
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }

    /// Rounds an f64 to nearest, ties to even, in one step.
    fn from_f64(value: f64) -> Self;
}

impl Dtype for f32 {
    const DTYPE: DType = DType::F32;

    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }

    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Dtype for f16 {
    const DTYPE: DType = DType::F16;

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    fn from_f64(value: f64) -> Self {
        f16::from_f32(round_to_odd(value))
    }
}

impl Dtype for bf16 {
    const DTYPE: DType = DType::BF16;

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    fn from_f64(value: f64) -> Self {
        bf16::from_f32(round_to_odd(value))
    }
}

/// Rounds an f64 to odd: if it is not exactly an f32, the result is the neighbour whose last bit is
/// set. Rounding the result to a narrower type then gives the same number as rounding the f64
/// directly.
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !nearest.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    let towards_larger = f64::from(nearest).abs() < value.abs();
    let bits = nearest.to_bits();
    f32::from_bits(if towards_larger { bits + 1 } else { bits - 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f64_rounds_once() {
        // 1 + 2^-11 is halfway between two f16. 2^-40 more must round up, though f32 does not hold
        // it.
        let above = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        let (to_f16, to_bf16) = (<f16 as Dtype>::from_f64, <bf16 as Dtype>::from_f64);
        assert_eq!(to_f16(above).to_f64(), 1.0 + 2f64.powi(-10));
        assert_eq!(to_f16(1.0 + 2f64.powi(-11)).to_f64(), 1.0);
        let above = 2f64.powi(-8) + 2f64.powi(-50);
        assert_eq!(to_bf16(-(1.0 + above)).to_f64(), -(1.0 + 2f64.powi(-7)));
        assert_eq!(to_bf16(f64::INFINITY), bf16::INFINITY);
        assert!(to_f16(f64::NAN).is_nan());
        assert_eq!(to_f16(0.0).to_bits(), 0);
        assert_eq!(to_f16(1e-60).to_bits(), 0);
    }

    #[test]
    fn names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse::<DType>().unwrap(), dtype);
        }
        assert!("f64".parse::<DType>().is_err());
    }
}
