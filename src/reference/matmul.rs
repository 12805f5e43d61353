//! The dense product of the CPU path, with the `gemm` crates of f32 and f64; the crate that
//! combines all types compiles complex products too.

use std::any::TypeId;

use bytemuck::{cast_slice, cast_slice_mut};
use gemm_common::Parallelism;

use super::accum::Accum;
use crate::error::{Result, check_len, product};

/// `y` `[rows, out]` = `x` `[rows, in]` times the transpose of `w` `[out, in]`, all in row-major
/// order, on the calling thread. `y` is not read. The order of summation depends only on the shape
/// and on the processor's vector instructions.
///
/// # Errors
/// A length that is not the shape's.
pub(crate) fn matmul_transposed<A: Accum>(
    [rows, out_features, in_features]: [usize; 3],
    x: &[A],
    w: &[A],
    y: &mut [A],
) -> Result<()> {
    const OP: &str = "matmul_transposed";
    let shape = [rows, out_features, in_features];
    check_len(OP, "x", x.len(), product(OP, "rows * in_features", rows, in_features)?)?;
    check_len(
        OP,
        "w",
        w.len(),
        product(OP, "out_features * in_features", out_features, in_features)?,
    )?;
    check_len(OP, "y", y.len(), product(OP, "rows * out_features", rows, out_features)?)?;
    if TypeId::of::<A>() == TypeId::of::<f32>() {
        let (x, w, y) = (cast_slice(x), cast_slice(w), cast_slice_mut(y));
        multiply(gemm_f32::gemm::f32::get_gemm_fn(), shape, x, w, y);
    } else {
        // `Accum` is sealed: it is f32 or f64.
        let (x, w, y) = (cast_slice(x), cast_slice(w), cast_slice_mut(y));
        multiply(gemm_f64::gemm::f64::get_gemm_fn(), shape, x, w, y);
    }
    Ok(())
}

/// The function that `gemm-f32` and `gemm-f64` export. Parameters: the three dimensions; the
/// destination, its column and row strides, and whether it is read; both operands with their
/// strides; the factors of destination and product; conjugations; parallelism.
type Gemm<A> = unsafe fn(
    usize,
    usize,
    usize,
    *mut A,
    isize,
    isize,
    bool,
    *const A,
    isize,
    isize,
    *const A,
    isize,
    isize,
    A,
    A,
    bool,
    bool,
    bool,
    Parallelism,
);

/// [`matmul_transposed`] for one element type; the caller has checked the lengths.
fn multiply<A: Accum>(
    gemm: Gemm<A>,
    [rows, out_features, in_features]: [usize; 3],
    x: &[A],
    w: &[A],
    y: &mut [A],
) {
    // A slice has at most isize::MAX bytes, so these casts are exact.
    let (y_pitch, pitch) = (out_features as isize, in_features as isize);
    // The crate stores columns. The rows of `y` are the columns of its transpose, which is `w`
    // times the transpose of `x`.
    let ([y_columns, y_rows], [m, n], a, b) = if out_features > 1 {
        ([y_pitch, 1], [out_features, rows], w, x)
    } else {
        ([1, y_pitch], [rows, out_features], x, w)
    };
    // SAFETY: `gemm` reads the elements of both operands and writes those of `y` that these strides
    // reach, which are the three slices; `y` is borrowed mutably, so nothing overlaps it.
    unsafe {
        gemm(
            m,
            n,
            in_features,
            y.as_mut_ptr(),
            y_columns,
            y_rows,
            false,
            a.as_ptr(),
            1,
            pitch,
            b.as_ptr(),
            pitch,
            1,
            A::ZERO,
            A::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
