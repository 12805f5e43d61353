//! Random numbers that depend on (seed, index of the element) alone: the words of Philox4x32-10, a
//! counter-based generator (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3",
//! 2011), and distributions computed from them by correctly rounded operations in a stated order,
//! so that kernels have the same bits.

use super::route::exact::precise_log as ln;
use crate::config::NoiseDistribution;

/// Words of one counter.
const WORDS: usize = 4;

/// Elements `offset`, `offset + 1`, ... (modulo 2^64) of the sequence of `seed`, `len` of them.
///
/// Elements `4c` to `4c + 3` come from the words `w` of [`philox`] with counter `[c, 0]`: uniform
/// `floor(w / 2^8) * 2^-24`; Gumbel `-ln(-ln(u))` with `u = (floor(w / 2^9) + 1/2) * 2^-23`; normal
/// `r cos(a)` and `r sin(a)` of each pair of words, with `r = sqrt(-2 ln u)`,
/// `u = (w0 + 1/2) * 2^-32` rounded and `a = 2 pi * w1 * 2^-32`.
pub fn noise_fwd(distribution: NoiseDistribution, seed: u64, offset: u64, len: usize) -> Vec<f32> {
    let element = |i: usize| {
        let number = offset.wrapping_add(i as u64);
        let (counter, place) = (number / WORDS as u64, (number % WORDS as u64) as usize);
        let words = philox([counter as u32, (counter >> 32) as u32, 0, 0], split(seed));
        match distribution {
            NoiseDistribution::Uniform => uniform(words[place]),
            NoiseDistribution::Normal => {
                normal_pair(words[place & !1], words[place | 1])[place & 1]
            }
            NoiseDistribution::Gumbel => gumbel(words[place]),
        }
    };
    (0..len).map(element).collect()
}

fn split(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// Philox4x32-10: four random words from a counter and a key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let product = |a: u32, b: u32| split(u64::from(a) * u64::from(b));
    let (mut word, mut key) = (counter, key);
    for _ in 0..10 {
        let [low_0, high_0] = product(MULTIPLIERS[0], word[0]);
        let [low_1, high_1] = product(MULTIPLIERS[1], word[2]);
        word = [high_1 ^ word[1] ^ key[0], low_1, high_0 ^ word[3] ^ key[1], low_0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    word
}

/// 2^-24
const TWO_M24: f32 = 1.0 / (1u32 << 24) as f32;

fn uniform(word: u32) -> f32 {
    (word >> 8) as f32 * TWO_M24
}

fn gumbel(word: u32) -> f32 {
    let u = (word >> 9 << 1 | 1) as f32 * TWO_M24;
    -ln(-ln(u))
}

/// Box and Muller's two numbers.
fn normal_pair(radius: u32, angle: u32) -> [f32; 2] {
    const TWO_M32: f32 = TWO_M24 / 256.0;
    let u = (radius as f32).mul_add(TWO_M32, TWO_M32 / 2.0);
    let r = (-2.0 * ln(u)).sqrt();
    let (cosine, sine) = cos_sin(angle);
    [r * cosine, r * sine]
}

/// Cosine and sine of `2 pi * word * 2^-32`.
fn cos_sin(word: u32) -> (f32, f32) {
    // The nearest quarter turn, and the rest: at most an eighth of a turn either way.
    let quarter = word.wrapping_add(1 << 29) >> 30;
    let rest = word.wrapping_sub(quarter << 30) as i32;
    let a = rest as f32 * 1.462_918_1e-9;
    let z = a * a;
    let q = -1.958_789e-4_f32;
    let q = q.mul_add(z, 8.332_748e-3);
    let q = q.mul_add(z, -0.166_666_64);
    let s = (a * z).mul_add(q, a);
    let p = 2.454_794_2e-5_f32;
    let p = p.mul_add(z, -1.388_830_2e-3);
    let p = p.mul_add(z, 4.166_666_4e-2);
    let c = (z * z).mul_add(p, (-0.5f32).mul_add(z, 1.0));
    match quarter {
        0 => (c, s),
        1 => (-s, c),
        2 => (-c, -s),
        _ => (s, -c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 ships for Philox4x32-10.
    #[test]
    fn philox_gives_the_known_answers() {
        let ones = u32::MAX;
        for (counter, key, words) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            // Digits of pi.
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), words);
        }
    }

    /// The ends of every range, and random words.
    fn words() -> impl Iterator<Item = u32> {
        let ends = [0, 1, 255, 256, 511, 512, 1 << 29, 1 << 30, 3 << 29, 1 << 31, 3 << 30, 7 << 29];
        let near = ends
            .into_iter()
            .flat_map(|end: u32| [end.wrapping_sub(1), end, end.wrapping_add(1), !end]);
        near.chain((0..100_000).map(|i| philox([i, 0, 0, 0], [7, 7])[0]))
    }

    #[test]
    fn functions_are_within_their_bounds() {
        let unit = f64::from(TWO_M24);
        for word in words() {
            let u = uniform(word);
            assert!((0.0..1.0).contains(&u));
            let radius = (f64::from(word) + 0.5) * unit / 256.0;
            let x = radius as f32;
            let wanted = f64::from(x).ln();
            assert!((f64::from(ln(x)) - wanted).abs() <= 1.5 * unit * wanted.abs(), "ln {x:e}");
            let angle = std::f64::consts::TAU * f64::from(word) / 4_294_967_296.0;
            let (cosine, sine) = cos_sin(word);
            assert!((f64::from(cosine) - angle.cos()).abs() <= 2.0 * unit, "cos {word:#x}");
            assert!((f64::from(sine) - angle.sin()).abs() <= 2.0 * unit, "sin {word:#x}");
            let g = gumbel(word);
            assert!((-2.9..16.7).contains(&g), "gumbel {word:#x} is {g}");
            let wanted = (f64::from(word >> 9) + 0.5) * 2.0 * unit;
            let wanted = -(-wanted.ln()).ln();
            assert!((f64::from(g) - wanted).abs() <= 4.0 * unit * (1.0 + wanted.abs()), "{g}");
            let [a, b] = normal_pair(word, !word);
            let r = f64::from(a).hypot(f64::from(b));
            let wanted = (-2.0
                * f64::from((word as f32).mul_add(TWO_M24 / 256.0, TWO_M24 / 512.0)).ln())
            .sqrt();
            assert!((r - wanted).abs() <= 4.0 * unit * (1.0 + wanted), "{word:#x}: {r}, {wanted}");
        }
    }

    #[test]
    fn distributions_have_their_moments() {
        let n = 1 << 16;
        for (distribution, mean, variance) in [
            (NoiseDistribution::Uniform, 0.5, 1.0 / 12.0),
            (NoiseDistribution::Normal, 0.0, 1.0),
            (NoiseDistribution::Gumbel, 0.577_215_66, 1.644_934_07),
        ] {
            let noise = noise_fwd(distribution, 3, 0, n);
            let moment = |f: &dyn Fn(f64) -> f64| {
                noise.iter().map(|&x| f(f64::from(x))).sum::<f64>() / n as f64
            };
            let got = moment(&|x| x);
            assert!((got - mean).abs() < 5.0 * (variance / n as f64).sqrt(), "{distribution:?}");
            let got = moment(&|x| (x - mean).powi(2));
            assert!((got / variance - 1.0).abs() < 0.04, "{distribution:?}: {got}");
            let neighbours = noise.windows(2);
            let covariance: f64 = neighbours
                .map(|pair| (f64::from(pair[0]) - mean) * (f64::from(pair[1]) - mean))
                .sum();
            assert!((covariance / n as f64 / variance).abs() < 0.02, "{distribution:?}");
        }
    }

    #[test]
    fn an_element_depends_on_its_index_alone() {
        for distribution in NoiseDistribution::ALL {
            let whole = noise_fwd(distribution, 11, u64::MAX - 20, 40);
            for (start, len) in [(0, 3), (1, 9), (18, 8), (21, 5), (39, 1)] {
                let offset = (u64::MAX - 20).wrapping_add(start as u64);
                assert_eq!(noise_fwd(distribution, 11, offset, len), whole[start..start + len]);
            }
            assert_ne!(noise_fwd(distribution, 12, 0, 4), noise_fwd(distribution, 11, 0, 4));
        }
    }
}
