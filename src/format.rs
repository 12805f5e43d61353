//! Numbers as quantised checkpoints store them, and their exact values.
//!
//! Every code is an f32 without rounding; a product with a scale rounds once, where it is not a power of two.

use crate::error::{Result, check_len};

/// The side of the square blocks that share a scale in FP8 checkpoints (DeepSeek-V3, Kimi).
pub const FP8_BLOCK: usize = 128;

/// The numbers that share a scale in MXFP4.
pub const MXFP4_BLOCK: usize = 32;

/// The value of an FP8 code of kind E4M3 "fn": a sign, 4 bits of exponent with bias 7, 3 bits of fraction. There are no
/// infinities; the one code of each sign with all bits set is NaN, and 448 is the largest value.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * power_of_two(-9),
        _ => (8.0 + fraction) * power_of_two(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The value of an FP4 code of kind E2M1, the low 4 bits of `code`: a sign, 2 bits of exponent with bias 1, 1 bit of
/// fraction.
pub fn e2m1_to_f32(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The value of a scale of kind E8M0: `2^(code - 127)`, and NaN for 255.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        // The exponent of f32 has the same bias, and the smallest power is below its normal numbers.
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}

fn power_of_two(exponent: i32) -> f32 {
    // Only exponents of normal numbers come here.
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// A matrix `[n, k]` of E4M3 codes with a scale for each block of 128 x 128: `scales` is
/// `[n.div_ceil(128), k.div_ceil(128)]`, and multiplies.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for slices that do not fit.
pub fn dequantize_fp8_blocks(
    codes: &[u8],
    scales: &[f32],
    n: usize,
    k: usize,
    out: &mut [f32],
) -> Result<()> {
    const OP: &str = "dequantize_fp8_blocks";
    let elements = crate::error::product(OP, "codes", n, k)?;
    let blocks_per_row = k.div_ceil(FP8_BLOCK);
    check_len(OP, "codes", codes.len(), elements)?;
    check_len(OP, "scales", scales.len(), n.div_ceil(FP8_BLOCK) * blocks_per_row)?;
    check_len(OP, "out", out.len(), elements)?;
    if elements == 0 {
        return Ok(());
    }
    let rows = codes.chunks_exact(k).zip(out.chunks_exact_mut(k));
    for (row, (codes, out)) in rows.enumerate() {
        let scales = &scales[row / FP8_BLOCK * blocks_per_row..][..blocks_per_row];
        let blocks = codes.chunks(FP8_BLOCK).zip(out.chunks_mut(FP8_BLOCK));
        for (&scale, (codes, out)) in scales.iter().zip(blocks) {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = e4m3_to_f32(code) * scale;
            }
        }
    }
    Ok(())
}

/// Blocks of 32 numbers as MXFP4 has them: 16 bytes of two E2M1 codes each, the low one first, and an E8M0 scale that
/// multiplies. Block `i` is `blocks[16 * i..]` and `scales[i]`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for slices that do not fit.
pub fn dequantize_mxfp4(blocks: &[u8], scales: &[u8], out: &mut [f32]) -> Result<()> {
    const OP: &str = "dequantize_mxfp4";
    const BYTES: usize = MXFP4_BLOCK / 2;
    check_len(
        OP,
        "blocks",
        blocks.len(),
        crate::error::product(OP, "scales", scales.len(), BYTES)?,
    )?;
    check_len(
        OP,
        "out",
        out.len(),
        crate::error::product(OP, "scales", scales.len(), MXFP4_BLOCK)?,
    )?;
    let blocks = blocks.chunks_exact(BYTES).zip(out.chunks_exact_mut(MXFP4_BLOCK));
    for (&scale, (bytes, out)) in scales.iter().zip(blocks) {
        let scale = e8m0_to_f32(scale);
        for (&byte, out) in bytes.iter().zip(out.chunks_exact_mut(2)) {
            out.copy_from_slice(&[e2m1_to_f32(byte) * scale, e2m1_to_f32(byte >> 4) * scale]);
        }
    }
    Ok(())
}

/// The number of scales that a matrix `[n, k]` of FP8 codes has.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) where that is more than there can be.
pub fn fp8_scales(n: usize, k: usize) -> Result<usize> {
    crate::error::product("fp8_scales", "n * k", n.div_ceil(FP8_BLOCK), k.div_ceil(FP8_BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sign, exponent and fraction as the definition has them, in f64.
    fn defined(sign: u8, exponent: i32, bias: i32, fraction: u8, bits: i32) -> f64 {
        let fraction = f64::from(fraction) / 2f64.powi(bits);
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(1 - bias),
            _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
        };
        if sign == 0 { magnitude } else { -magnitude }
    }

    fn same(got: f32, wanted: f64) {
        assert_eq!(f64::from(got).to_bits(), wanted.to_bits(), "{got} is not {wanted}");
    }

    #[test]
    fn every_code_of_e4m3() {
        for code in 0..=255u8 {
            if code & 0x7f == 0x7f {
                assert!(e4m3_to_f32(code).is_nan(), "{code:#x}");
                continue;
            }
            same(e4m3_to_f32(code), defined(code >> 7, i32::from(code >> 3 & 15), 7, code & 7, 3));
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert_eq!(e4m3_to_f32(0x01), 2f32.powi(-9));
        assert_eq!(e4m3_to_f32(0x80).to_bits(), (-0f32).to_bits());
    }

    #[test]
    fn every_code_of_e2m1() {
        for code in 0..16u8 {
            same(e2m1_to_f32(code), defined(code >> 3, i32::from(code >> 1 & 3), 1, code & 1, 1));
            assert_eq!(e2m1_to_f32(code).to_bits(), e2m1_to_f32(code | 0xf0).to_bits());
        }
    }

    #[test]
    fn every_code_of_e8m0() {
        for code in 0..=254u8 {
            same(e8m0_to_f32(code), 2f64.powi(i32::from(code) - 127));
        }
        assert!(e8m0_to_f32(255).is_nan());
    }

    /// Each element has the scale of its own block, in tails as well.
    #[test]
    fn blocks_of_fp8() {
        for (n, k) in
            [(1usize, 1usize), (128, 128), (129, 257), (256, 100), (3, 300), (0, 5), (5, 0)]
        {
            let codes: Vec<u8> = (0..n * k).map(|i| (i * 37 % 251) as u8).collect();
            let columns = k.div_ceil(128);
            let scales: Vec<f32> =
                (0..fp8_scales(n, k).unwrap()).map(|i| 0.37 + i as f32 * 1.7).collect();
            let mut out = vec![f32::NAN; n * k];
            dequantize_fp8_blocks(&codes, &scales, n, k, &mut out).unwrap();
            for (i, got) in out.iter().enumerate() {
                let (row, column) = (i / k, i % k);
                let wanted = e4m3_to_f32(codes[i]) * scales[row / 128 * columns + column / 128];
                assert_eq!(got.to_bits(), wanted.to_bits(), "[{row}, {column}] of [{n}, {k}]");
            }
        }
        let fails = |codes: &[u8], scales: &[f32], n, k, out: &mut [f32]| {
            dequantize_fp8_blocks(codes, scales, n, k, out).unwrap_err().to_string()
        };
        assert!(fails(&[0; 3], &[1.0], 2, 2, &mut [0.0; 4]).contains("`codes`"));
        assert!(fails(&[0; 4], &[1.0; 2], 2, 2, &mut [0.0; 4]).contains("`scales`"));
        assert!(fails(&[0; 4], &[1.0], 2, 2, &mut [0.0; 5]).contains("`out`"));
        assert!(fails(&[], &[], usize::MAX, 2, &mut []).contains("`codes`"));
    }

    /// All bytes under all scales; the low half of a byte comes first.
    #[test]
    fn blocks_of_mxfp4() {
        let blocks: Vec<u8> = (0..=255).collect();
        for first in 0..=255u8 {
            let scales: Vec<u8> = (0..16).map(|i| first.wrapping_add(i)).collect();
            let mut out = vec![f32::INFINITY; 512];
            dequantize_mxfp4(&blocks, &scales, &mut out).unwrap();
            for (i, got) in out.iter().enumerate() {
                let code = if i % 2 == 0 { blocks[i / 2] & 15 } else { blocks[i / 2] >> 4 };
                let (sign, exponent) = (code >> 3, i32::from(code >> 1 & 3));
                let scale = scales[i / 32];
                if scale == 255 {
                    assert!(got.is_nan());
                    continue;
                }
                // The largest products are beyond f32; as in any product, that is infinity.
                let wanted =
                    defined(sign, exponent, 1, code & 1, 1) * 2f64.powi(i32::from(scale) - 127);
                assert_eq!(got.to_bits(), (wanted as f32).to_bits(), "{code} * 2^({scale} - 127)");
            }
        }
        assert!(dequantize_mxfp4(&[0; 17], &[0], &mut [0.0; 32]).is_err());
        assert!(dequantize_mxfp4(&[0; 16], &[0], &mut [0.0; 31]).is_err());
        dequantize_mxfp4(&[], &[], &mut []).unwrap();
    }
}
