//! The one dense product of the CPU path, over the `gemm` crate.

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
    // A slice has at most isize::MAX bytes, so these casts lose nothing.
    let (y_pitch, pitch) = (n as isize, k as isize);
    // SAFETY: `gemm` reads the M*K, N*K and writes the M*N elements that these strides reach, which
    // is what the three slices hold (checked above); `y` is borrowed mutably, so nothing overlaps
    // it. The type of the elements is f32 or f64, for `Accum` is sealed, and `gemm` knows both.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            y_pitch,
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
            gemm::Parallelism::None,
        );
    }
    Ok(())
}
