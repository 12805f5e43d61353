//! The number formats of quantised checkpoints.
//!
//! Every code is exactly an f32. Its product with a scale is rounded once, and is exact if the
//! scale is a power of two within the range of f32.

use crate::error::{Error, Result};

/// The side of the square blocks that share a scale in FP8 checkpoints (DeepSeek-V3, Kimi).
pub const FP8_BLOCK: usize = 128;

/// The number of elements that share a scale in MXFP4.
pub const MXFP4_BLOCK: usize = 32;

/// The value of an FP8 code E4M3FN: a sign, 4 bits of exponent with bias 7, 3 bits of fraction.
/// There are no infinities. The code of each sign with all other bits set is NaN; 448 is the
/// largest value.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * power_of_two(-9),
        _ => (8.0 + fraction) * power_of_two(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The value of an FP4 code E2M1, the low 4 bits of `code`: a sign, 2 bits of exponent with bias 1,
/// 1 bit of fraction.
pub fn e2m1_to_f32(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The value of an E8M0 scale: `2^(code - 127)`, and NaN for 255.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        // The exponent of f32 has the same bias; 2^-127 is a subnormal number.
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}

fn power_of_two(exponent: i32) -> f32 {
    // The exponents are those of normal numbers.
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Dequantises a matrix `[rows, columns]` of E4M3 codes with a scale for each block of 128 x 128.
/// `scales` is `[rows.div_ceil(128), columns.div_ceil(128)]`; each is a factor of its block.
///
/// # Errors
/// [`Error::Length`] for slices of other lengths.
pub fn dequantize_fp8_blocks(
    codes: &[u8],
    scales: &[f32],
    shape: [usize; 2],
    out: &mut [f32],
) -> Result<()> {
    let op = "dequantize_fp8_blocks";
    scaled(op, codes, scales, shape, [FP8_BLOCK, FP8_BLOCK], 1, out, scale_e4m3)
}

/// Dequantises a matrix `[rows, columns]` of E4M3 codes with a scale for each block of `block[0]`
/// rows and `block[1]` columns; the last blocks may be smaller. `scales` is
/// `[rows.div_ceil(block[0]), columns.div_ceil(block[1])]`; each is a factor of its block. A block
/// `[rows, columns]` is one scale for the matrix, `[1, columns]` one for each row.
///
/// # Errors
/// [`Error::Length`] for slices of other lengths, [`Error::Unsupported`] for a block without rows
/// or columns.
pub fn dequantize_fp8(
    codes: &[u8],
    scales: &[f32],
    shape: [usize; 2],
    block: [usize; 2],
    out: &mut [f32],
) -> Result<()> {
    scaled("dequantize_fp8", codes, scales, shape, block, 1, out, scale_e4m3)
}

/// Dequantises a matrix `[rows, columns]` of E2M1 codes, two per byte and the low one first, so
/// that `codes` is `[rows, columns / 2]`. Scales are those of [`dequantize_fp8`].
///
/// # Errors
/// [`Error::Length`] for slices of other lengths, [`Error::Unsupported`] for an odd number of
/// columns, and for a block without rows or with an odd number of columns.
pub fn dequantize_fp4(
    codes: &[u8],
    scales: &[f32],
    shape: [usize; 2],
    block: [usize; 2],
    out: &mut [f32],
) -> Result<()> {
    scaled("dequantize_fp4", codes, scales, shape, block, 2, out, |bytes, scale, out| {
        for (&byte, out) in bytes.iter().zip(out.chunks_exact_mut(2)) {
            out.copy_from_slice(&[e2m1_to_f32(byte) * scale, e2m1_to_f32(byte >> 4) * scale]);
        }
    })
}

fn scale_e4m3(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = e4m3_to_f32(code) * scale;
    }
}

/// Widens a matrix, a part of a row with one scale at a time; a byte has `per_byte` codes.
#[allow(clippy::too_many_arguments)]
fn scaled(
    op: &'static str,
    codes: &[u8],
    scales: &[f32],
    [rows, columns]: [usize; 2],
    [height, width]: [usize; 2],
    per_byte: usize,
    out: &mut [f32],
    widen: impl Fn(&[u8], f32, &mut [f32]),
) -> Result<()> {
    for (argument, size) in [("columns", columns), ("block", width)] {
        if !size.is_multiple_of(per_byte) {
            let wanted = format!("a multiple of {per_byte}");
            return Err(Error::Unsupported { op, argument, wanted, got: size.to_string() });
        }
    }
    let elements = product(op, "codes", rows, columns)?;
    let scales_per_row = blocks(op, columns, width)?;
    check_len(op, "codes", codes.len(), elements / per_byte)?;
    let wanted = scales_of(op, [rows, columns], [height, width])?;
    check_len(op, "scales", scales.len(), wanted)?;
    check_len(op, "out", out.len(), elements)?;
    if elements == 0 {
        return Ok(());
    }
    let matrix = codes.chunks_exact(columns / per_byte).zip(out.chunks_exact_mut(columns));
    for (row, (codes, out)) in matrix.enumerate() {
        let scales = &scales[row / height * scales_per_row..][..scales_per_row];
        let parts = codes.chunks(width / per_byte).zip(out.chunks_mut(width));
        for (&scale, (codes, out)) in scales.iter().zip(parts) {
            widen(codes, scale, out);
        }
    }
    Ok(())
}

/// The number of blocks of a dimension.
fn blocks(op: &'static str, size: usize, block: usize) -> Result<usize> {
    if block == 0 {
        let (wanted, got) = ("at least one row and one column".into(), block.to_string());
        return Err(Error::Unsupported { op, argument: "block", wanted, got });
    }
    Ok(size.div_ceil(block))
}

fn scales_of(op: &'static str, [rows, columns]: [usize; 2], block: [usize; 2]) -> Result<usize> {
    product(op, "scales", blocks(op, rows, block[0])?, blocks(op, columns, block[1])?)
}

fn check_len(op: &'static str, argument: &'static str, got: usize, wanted: usize) -> Result<()> {
    if got == wanted { Ok(()) } else { Err(Error::Length { op, argument, got, wanted }) }
}

fn product(op: &'static str, argument: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| {
        let wanted = format!("at most {} elements", usize::MAX);
        Error::Unsupported { op, argument, wanted, got: format!("{a} * {b}") }
    })
}

/// Dequantises MXFP4 blocks of 32 elements: 16 bytes of two E2M1 codes each, the low one first, and
/// an E8M0 scale as their factor. Block `i` is `blocks[16 * i..]` and `scales[i]`.
///
/// # Errors
/// [`Error::Length`] for slices of other lengths.
pub fn dequantize_mxfp4(blocks: &[u8], scales: &[u8], out: &mut [f32]) -> Result<()> {
    const OP: &str = "dequantize_mxfp4";
    const BYTES: usize = MXFP4_BLOCK / 2;
    check_len(OP, "blocks", blocks.len(), product(OP, "scales", scales.len(), BYTES)?)?;
    check_len(OP, "out", out.len(), product(OP, "scales", scales.len(), MXFP4_BLOCK)?)?;
    let blocks = blocks.chunks_exact(BYTES).zip(out.chunks_exact_mut(MXFP4_BLOCK));
    for (&scale, (bytes, out)) in scales.iter().zip(blocks) {
        let scale = e8m0_to_f32(scale);
        for (&byte, out) in bytes.iter().zip(out.chunks_exact_mut(2)) {
            out.copy_from_slice(&[e2m1_to_f32(byte) * scale, e2m1_to_f32(byte >> 4) * scale]);
        }
    }
    Ok(())
}

/// The number of scales of a matrix `[rows, columns]` with one for each block of `block[0]` rows
/// and `block[1]` columns.
///
/// # Errors
/// [`Error::Unsupported`] for more than `usize::MAX`, and for a block without rows or columns.
pub fn num_scales(shape: [usize; 2], block: [usize; 2]) -> Result<usize> {
    scales_of("num_scales", shape, block)
}

/// The number of scales of a matrix `[rows, columns]` of FP8 codes with blocks of 128 x 128.
///
/// # Errors
/// [`Error::Unsupported`] for more than `usize::MAX`.
pub fn fp8_scales(shape: [usize; 2]) -> Result<usize> {
    scales_of("fp8_scales", shape, [FP8_BLOCK, FP8_BLOCK])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code by the definition of the format, in f64.
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

    /// Each element is multiplied by the scale of its own block, the last blocks included.
    #[test]
    fn blocks_of_fp8() {
        for (rows, columns) in
            [(1usize, 1usize), (128, 128), (129, 257), (256, 100), (3, 300), (0, 5), (5, 0)]
        {
            let codes: Vec<u8> = (0..rows * columns).map(|i| (i * 37 % 251) as u8).collect();
            let scales_per_row = columns.div_ceil(128);
            let scales: Vec<f32> =
                (0..fp8_scales([rows, columns]).unwrap()).map(|i| 0.37 + i as f32 * 1.7).collect();
            let mut out = vec![f32::NAN; rows * columns];
            dequantize_fp8_blocks(&codes, &scales, [rows, columns], &mut out).unwrap();
            for (i, got) in out.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let wanted =
                    e4m3_to_f32(codes[i]) * scales[row / 128 * scales_per_row + column / 128];
                assert_eq!(
                    got.to_bits(),
                    wanted.to_bits(),
                    "[{row}, {column}] of [{rows}, {columns}]"
                );
            }
        }
        let fails = |codes: &[u8], scales: &[f32], rows, columns, out: &mut [f32]| {
            dequantize_fp8_blocks(codes, scales, [rows, columns], out).unwrap_err().to_string()
        };
        assert!(fails(&[0; 3], &[1.0], 2, 2, &mut [0.0; 4]).contains("`codes`"));
        assert!(fails(&[0; 4], &[1.0; 2], 2, 2, &mut [0.0; 4]).contains("`scales`"));
        assert!(fails(&[0; 4], &[1.0], 2, 2, &mut [0.0; 5]).contains("`out`"));
        assert!(fails(&[], &[], usize::MAX, 2, &mut []).contains("`codes`"));
    }

    /// Every code with every E8M0 scale and with other scales: the product of the exact values,
    /// rounded once.
    #[test]
    fn every_code_of_fp8_under_every_scale() {
        let codes: Vec<u8> = (0..=255).collect();
        let mut scales: Vec<f32> = (0..=255).map(e8m0_to_f32).collect();
        scales.extend([0.37, -1.7e-3, 3.1e38, 1e-45, 0.0, f32::INFINITY]);
        for scale in scales {
            // One scale for the matrix, for each row, and for each block of a row.
            for (rows, columns, block) in
                [(1, 256, [1, 256]), (4, 64, [4, 64]), (16, 16, [1, 16]), (2, 128, [1, 32])]
            {
                let count = num_scales([rows, columns], block).unwrap();
                let mut out = vec![0.25; 256];
                dequantize_fp8(&codes, &vec![scale; count], [rows, columns], block, &mut out)
                    .unwrap();
                for (&code, got) in codes.iter().zip(out) {
                    same_or_nan(got, f64::from(e4m3_to_f32(code)) * f64::from(scale));
                }
            }
        }
    }

    /// Every byte with every E8M0 scale; the low half is the first element.
    #[test]
    fn every_byte_of_fp4_under_every_scale() {
        let bytes: Vec<u8> = (0..=255).collect();
        for scale in 0..=255u8 {
            for (rows, columns, block) in [(1, 512, [1, 32]), (16, 32, [1, 32]), (8, 64, [4, 64])] {
                let count = num_scales([rows, columns], block).unwrap();
                let scales = vec![e8m0_to_f32(scale); count];
                let mut out = vec![0.25; 512];
                dequantize_fp4(&bytes, &scales, [rows, columns], block, &mut out).unwrap();
                for (i, got) in out.into_iter().enumerate() {
                    let code = if i % 2 == 0 { bytes[i / 2] & 15 } else { bytes[i / 2] >> 4 };
                    let value = defined(code >> 3, i32::from(code >> 1 & 3), 1, code & 1, 1);
                    let scale =
                        if scale == 255 { f64::NAN } else { 2f64.powi(i32::from(scale) - 127) };
                    same_or_nan(got, value * scale);
                }
            }
        }
    }

    /// The product rounded to f32. The product in f64 is exact: the factors have 24 and 4 bits at
    /// most.
    fn same_or_nan(got: f32, wanted: f64) {
        if wanted.is_nan() {
            assert!(got.is_nan(), "{got} is not NaN");
        } else {
            assert_eq!(got.to_bits(), (wanted as f32).to_bits(), "{got} is not {wanted}");
        }
    }

    /// Each element is multiplied by the scale of its own block, the last blocks included.
    #[test]
    fn blocks_of_any_size() {
        for (rows, columns, block) in [
            (1, 2, [1, 2]),
            (5, 14, [2, 4]),
            (5, 14, [5, 14]),
            (5, 14, [1, 14]),
            (129, 258, [128, 128]),
            (3, 4, [100, 100]),
            (0, 6, [1, 2]),
        ] {
            let codes: Vec<u8> = (0..rows * columns).map(|i| (i * 37 % 251) as u8).collect();
            let count = num_scales([rows, columns], block).unwrap();
            let scales: Vec<f32> = (0..count).map(|i| 0.37 + i as f32 * 1.7).collect();
            let scale = |i: usize| {
                scales[i / columns / block[0] * columns.div_ceil(block[1]) + i % columns / block[1]]
            };
            let mut out = vec![f32::NAN; rows * columns];
            dequantize_fp8(&codes, &scales, [rows, columns], block, &mut out).unwrap();
            for (i, got) in out.iter().enumerate() {
                let wanted = e4m3_to_f32(codes[i]) * scale(i);
                assert_eq!(
                    got.to_bits(),
                    wanted.to_bits(),
                    "{i} of [{rows}, {columns}] by {block:?}"
                );
            }
            dequantize_fp4(&codes[..rows * columns / 2], &scales, [rows, columns], block, &mut out)
                .unwrap();
            for (i, got) in out.iter().enumerate() {
                let wanted = e2m1_to_f32(codes[i / 2] >> (4 * (i % 2))) * scale(i);
                assert_eq!(
                    got.to_bits(),
                    wanted.to_bits(),
                    "{i} of [{rows}, {columns}] by {block:?} in FP4"
                );
            }
        }
        let fails = |rows, columns, block| {
            let mut out = vec![0.0; rows * columns];
            let error = dequantize_fp4(
                &vec![0; rows * columns / 2],
                &[1.0],
                [rows, columns],
                block,
                &mut out,
            );
            error.unwrap_err().to_string()
        };
        assert!(fails(1, 3, [1, 2]).contains("`columns` is 3, wanted a multiple of 2"));
        assert!(fails(1, 4, [1, 3]).contains("`block` is 3"));
        assert!(fails(1, 4, [0, 2]).contains("`block` is 0"));
        assert!(fails(1, 4, [1, 0]).contains("`block` is 0"));
        assert!(fails(1, 4, [1, 2]).contains("`scales` has 1 elements, wanted 2"));
        assert!(fails(2, 4, [2, 2]).contains("`scales` has 1 elements, wanted 2"));
    }

    /// Every byte with every scale; the low half is the first element.
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
                // The largest products overflow to infinity.
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
