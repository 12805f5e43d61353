//! The one dense product of the CPU path, over the `gemm` crates: those of f32 and f64 alone, because
//! the crate that combines them compiles complex products too.

use std::any::TypeId;

use bytemuck::{cast_slice, cast_slice_mut};
use gemm_common::Parallelism;

use crate::error::{Result, check_len, product};
use crate::reference::Accum;

/// `y` `[M, N]` = `a` `[M, K]` times the transpose of `b` `[N, K]`, all in row-major order, on the
/// calling thread. What was in `y` is not read. The order of summation depends on the shape and on
/// the processor's vector instructions, and on nothing else.
///
/// # Errors
/// A length that is not the shape's.
pub(crate) fn matmul_transposed<A: Accum>(
    [m, n, k]: [usize; 3],
    a: &[A],
    b: &[A],
    y: &mut [A],
) -> Result<()> {
    const OP: &str = "matmul_transposed";
    check_len(OP, "a", a.len(), product(OP, "M * K", m, k)?)?;
    check_len(OP, "b", b.len(), product(OP, "N * K", n, k)?)?;
    check_len(OP, "y", y.len(), product(OP, "M * N", m, n)?)?;
    if TypeId::of::<A>() == TypeId::of::<f32>() {
        let (a, b, y) = (cast_slice(a), cast_slice(b), cast_slice_mut(y));
        multiply(gemm_f32::gemm::f32::get_gemm_fn(), [m, n, k], a, b, y);
    } else {
        // `Accum` is sealed: it is f32 or f64.
        let (a, b, y) = (cast_slice(a), cast_slice(b), cast_slice_mut(y));
        multiply(gemm_f64::gemm::f64::get_gemm_fn(), [m, n, k], a, b, y);
    }
    Ok(())
}

/// A product for one element type, as `gemm-f32` and `gemm-f64` export it. Its parameters: the three
/// dimensions, then the destination with its strides of columns and rows and whether it is read, both
/// operands with theirs, the factors of destination and product, and conjugations.
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
fn multiply<A: Accum>(gemm: Gemm<A>, [m, n, k]: [usize; 3], a: &[A], b: &[A], y: &mut [A]) {
    // A slice has at most isize::MAX bytes, so these casts lose nothing.
    let (y_pitch, pitch) = (n as isize, k as isize);
    // The kernels store columns. The rows of `y` are the columns of its transpose, which is `b`
    // times the transpose of `a`.
    let ([y_columns, y_rows], [m, n], a, b) =
        if n > 1 { ([y_pitch, 1], [n, m], b, a) } else { ([1, y_pitch], [m, n], a, b) };
    // SAFETY: `gemm` reads the M*K, N*K and writes the M*N elements that these strides reach, which
    // is what the three slices hold; `y` is borrowed mutably, so nothing overlaps it.
    unsafe {
        gemm(
            m,
            n,
            k,
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
