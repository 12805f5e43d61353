//! The types that the reference computes in, and the conversion of elements to them.

use std::any::TypeId;
use std::fmt::{Debug, Display};
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::route::exact::Number;
use crate::dtype::{DType, Dtype};

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The type that the reference computes in: `f64`, which tests compare with, or `f32`, which is
/// faster.
pub trait Accum:
    Pod
    + Send
    + Sync
    + PartialOrd
    + Debug
    + Display
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + Sum
    + Element<Self>
    + Number
    + private::Sealed
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;

    /// Converts an element exactly.
    fn from_dtype<D: Dtype>(value: D) -> Self;

    /// Rounds an f64 to nearest, ties to even.
    fn nearest(value: f64) -> Self;

    /// Rounds to an element, to nearest, ties to even.
    fn round<D: Dtype>(self) -> D;

    /// Converts to f64 exactly.
    fn to_f64(self) -> f64;

    /// `e` to the power of this number.
    fn exp(self) -> Self;

    /// The hyperbolic tangent.
    fn tanh(self) -> Self;

    /// The complementary error function, `1 - erf`.
    fn erfc(self) -> Self;

    /// The square root.
    fn sqrt(self) -> Self;

    /// The absolute value.
    fn abs(self) -> Self;

    /// Converts a slice with [`from_dtype`](Self::from_dtype); both slices have the same length.
    #[doc(hidden)]
    fn from_dtypes<D: Dtype>(values: &[D], wide: &mut [Self]);
}

impl Accum for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;

    fn from_dtype<D: Dtype>(value: D) -> f32 {
        value.to_f32()
    }

    fn nearest(value: f64) -> f32 {
        value as f32
    }

    fn round<D: Dtype>(self) -> D {
        D::from_f32(self)
    }

    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    fn exp(self) -> f32 {
        f32::exp(self)
    }

    fn tanh(self) -> f32 {
        f32::tanh(self)
    }

    fn erfc(self) -> f32 {
        libm::erfcf(self)
    }

    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    fn abs(self) -> f32 {
        f32::abs(self)
    }

    fn from_dtypes<D: Dtype>(values: &[D], wide: &mut [f32]) {
        // The conversion of a slice uses vector instructions; that of single elements does not.
        match D::DTYPE {
            DType::F32 => wide.copy_from_slice(bytemuck::cast_slice(values)),
            DType::F16 => bytemuck::cast_slice::<D, f16>(values).convert_to_f32_slice(wide),
            DType::BF16 => {
                let values = bytemuck::cast_slice::<D, bf16>(values);
                for (wide, value) in wide.iter_mut().zip(values) {
                    *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
        }
    }
}

impl Accum for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;

    fn from_dtype<D: Dtype>(value: D) -> f64 {
        value.to_f64()
    }

    fn nearest(value: f64) -> f64 {
        value
    }

    fn round<D: Dtype>(self) -> D {
        D::from_f64(self)
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn exp(self) -> f64 {
        f64::exp(self)
    }

    fn tanh(self) -> f64 {
        f64::tanh(self)
    }

    fn erfc(self) -> f64 {
        libm::erfc(self)
    }

    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }

    fn abs(self) -> f64 {
        f64::abs(self)
    }

    fn from_dtypes<D: Dtype>(values: &[D], wide: &mut [f64]) {
        const CHUNK: usize = 256;
        let mut buffer = [0.0f32; CHUNK];
        for (values, wide) in values.chunks(CHUNK).zip(wide.chunks_mut(CHUNK)) {
            let buffer = &mut buffer[..values.len()];
            f32::from_dtypes(values, buffer);
            for (wide, value) in wide.iter_mut().zip(buffer) {
                *wide = f64::from(*value);
            }
        }
    }
}

/// A type that converts to `A` without rounding: every [`Dtype`], and `A` itself.
///
/// With it an operation reads rounded tensors and unrounded results of other operations alike.
pub trait Element<A: Accum>: Pod + Send + Sync {
    /// Converts to `A` exactly.
    fn widen(self) -> A;

    /// Converts a slice with [`widen`](Self::widen); both slices have the same length.
    #[doc(hidden)]
    fn widen_slice(values: &[Self], wide: &mut [A]);
}

impl<A: Accum, D: Dtype> Element<A> for D {
    fn widen(self) -> A {
        A::from_dtype(self)
    }

    fn widen_slice(values: &[Self], wide: &mut [A]) {
        A::from_dtypes(values, wide);
    }
}

impl Element<f64> for f64 {
    fn widen(self) -> f64 {
        self
    }

    fn widen_slice(values: &[f64], wide: &mut [f64]) {
        wide.copy_from_slice(values);
    }
}

/// Converts elements to `A`: returns the slice itself if its elements are `A`, else a copy in
/// `buffer`.
pub(super) fn widened<'a, A: Accum, X: Element<A>>(
    values: &'a [X],
    buffer: &'a mut Vec<A>,
) -> &'a [A] {
    if TypeId::of::<X>() == TypeId::of::<A>() {
        return bytemuck::cast_slice(values);
    }
    if buffer.len() < values.len() {
        buffer.resize(values.len(), A::ZERO);
    }
    let wide = &mut buffer[..values.len()];
    X::widen_slice(values, wide);
    wide
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Widens every finite f16 and bf16, as a slice and one at a time.
    #[test]
    fn slices_and_elements_widen_alike() {
        let halves: Vec<f16> =
            (0..=u16::MAX).map(f16::from_bits).filter(|v| v.is_finite()).collect();
        let brains: Vec<bf16> =
            (0..=u16::MAX).map(bf16::from_bits).filter(|v| v.is_finite()).collect();
        check(&halves);
        check(&brains);
        check(&[0.0f32, -0.0, 1.5, f32::MIN_POSITIVE, f32::MAX, 1e-45]);
    }

    fn check<D: Dtype>(values: &[D]) {
        let (mut single, mut double) = (Vec::new(), Vec::new());
        let single = widened::<f32, D>(values, &mut single);
        let double = widened::<f64, D>(values, &mut double);
        for (i, value) in values.iter().enumerate() {
            assert_eq!(single[i].to_bits(), value.to_f32().to_bits());
            assert_eq!(double[i].to_bits(), value.to_f64().to_bits());
        }
    }

    #[test]
    fn slice_of_the_same_type_is_not_copied() {
        let values = [1.0f64, 2.0];
        let mut buffer = Vec::new();
        assert_eq!(widened::<f64, f64>(&values, &mut buffer).as_ptr(), values.as_ptr());
    }
}
