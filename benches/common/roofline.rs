//! The roofline: a lower bound on the time of an operation.
//!
//! An operation reads each of its inputs once, writes each of its outputs once, and does its
//! arithmetic. Memory traffic takes `bytes / bandwidth`, arithmetic `flops / rate`. The two can
//! overlap, so that the roofline is the longer of them. `ceiling.rs` measures bandwidth and rate in
//! the same process as the times that are compared with them.
//!
//! Intermediate results between two products count no bytes, because an ideal layer keeps them on
//! the chip. Weights of experts without a row count none either.

use moe_kernels::MoeConfig;

use crate::common::model::Model;
use crate::common::op::Op;
use crate::common::routing::Draw;

/// The least work of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Bytes of device memory, read and written.
    pub bytes: f64,
    /// Floating-point operations: a multiplication and an addition are two.
    pub flops: f64,
}

/// The resource that limits an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Bytes.
    Memory,
    /// Floating-point operations.
    Compute,
}

impl Bound {
    /// The name in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Compute => "compute",
        }
    }
}

/// The least time of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Seconds of one call.
    pub seconds: f64,
    /// The resource that takes that long.
    pub bound: Bound,
}

/// The least work of `op` on `tokens` tokens, with elements of `size` bytes.
///
/// `distinct` is the number of experts with a row, under uniform routing [`expected_distinct`].
/// Logits and the router gate have the element type, except for the f32 logits of `router_gemm`.
/// Ids, maps, routing weights and the selection bias have 4 bytes.
pub fn work(op: Op, config: &MoeConfig, tokens: usize, size: usize, distinct: f64) -> Work {
    let [t, h, i, e, k] =
        [tokens, config.hidden, config.intermediate, config.num_experts, config.top_k]
            .map(|dimension| dimension as f64);
    let size = size as f64;
    let rows = t * k;
    // A list of T*K ids, weights or rows.
    let list = 4.0 * rows;
    let (x, y) = (t * h * size, t * h * size);
    let act = rows * i * size;
    let yp = rows * h * size;
    let matrix = distinct * h * i * size;
    let product = 2.0 * rows * h * i;
    let bias = if config.router.selection_bias { 4.0 * e } else { 0.0 };
    let (bytes, flops) = match op {
        Op::RouterGemm => (x + e * h * size + 4.0 * t * e, 2.0 * t * h * e),
        Op::Route => (t * e * size + bias + 2.0 * list, 0.0),
        Op::Noise => (4.0 * t * e, 0.0),
        Op::Jitter => (x + 4.0 * t * h + x, 0.0),
        // The plan's slots, weights and ids.
        Op::Capacity => (3.0 * list + 4.0 * (e + 1.0) + 8.0 * e, 0.0),
        Op::ExpertChoice => (t * e * size + 8.0 * t * e, 0.0),
        Op::Plan => (list + 2.0 * list + 4.0 * (e + 1.0), 0.0),
        Op::Permute => (x + list + yp, 0.0),
        Op::GateUp => (x + 2.0 * matrix + act, 2.0 * product),
        Op::Down => (act + matrix + yp, product),
        Op::Experts => (x + 3.0 * matrix + yp, 3.0 * product),
        Op::RmsNorm => (2.0 * yp, 0.0),
        Op::Combine => (yp + 2.0 * list + y, 2.0 * rows * h),
        Op::Layer => (x + t * e * size + bias + 3.0 * matrix + y, 3.0 * product),
        Op::LayerFromX => {
            (x + e * h * size + bias + 3.0 * matrix + y, 3.0 * product + 2.0 * t * h * e)
        }
    };
    Work { bytes, flops }
}

impl Work {
    /// Returns the roofline at a bandwidth in bytes per second and a rate in operations per second.
    /// `None` if a ceiling that it depends on was not measured.
    pub fn roofline(&self, bandwidth: Option<f64>, rate: Option<f64>) -> Option<Roofline> {
        let memory = Roofline { seconds: self.bytes / bandwidth?, bound: Bound::Memory };
        // The few operations of a copy do not run at the rate of a matrix product.
        if self.flops < self.bytes {
            return Some(memory);
        }
        let compute = Roofline { seconds: self.flops / rate?, bound: Bound::Compute };
        Some(if compute.seconds > memory.seconds { compute } else { memory })
    }
}

/// The least work of an operation on the tokens of a draw.
pub fn least_work<D>(op: Op, model: &Model, draw: &Draw) -> Work {
    let num_tokens = draw.shape.num_tokens;
    let distinct = match op {
        // The routing follows from random tokens and a random router gate, not from the draw.
        Op::LayerFromX => expected_distinct(&model.config, num_tokens),
        _ => draw.distinct as f64,
    };
    work(op, &model.config, num_tokens, size_of::<D>(), distinct)
}

/// The expected number of experts with a row under uniform, independent choices:
/// `E * (1 - (1 - K/E)^T)`.
pub fn expected_distinct(config: &MoeConfig, tokens: usize) -> f64 {
    let (e, k) = (config.num_experts as f64, config.top_k as f64);
    e * (1.0 - (1.0 - k / e).powf(tokens as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::model::TOKENS;

    /// Copy bandwidth and dense bf16 rate measured on an H200. The tables below are computed from
    /// them.
    const BANDWIDTH: f64 = 4.3e12;
    const RATE: f64 = 790e12;

    fn layer(name: &str, tokens: usize) -> Work {
        let config = Model::find(name).unwrap().config;
        work(Op::LayerFromX, &config, tokens, 2, expected_distinct(&config, tokens))
    }

    /// Rooflines of whole layers in bf16, in microseconds; M is bound by memory, C by arithmetic.
    const ROOFLINES: [(&str, [&str; 6]); 12] = [
        ("mixtral-8x7b", ["164 M", "590 M", "656 M", "657 M", "3654 C", "14615 C"]),
        ("mixtral-8x22b", ["281 M", "1011 M", "1124 M", "1127 M", "6264 C", "25054 C"]),
        ("qwen3-30b-a3b", ["17.7 M", "113 M", "277 M", "282 M", "394 C", "1577 C"]),
        ("qwen3-235b-a22b", ["70.5 M", "453 M", "1106 M", "1126 M", "1571 C", "6285 C"]),
        ("deepseek-v3", ["165 M", "1177 M", "4558 M", "5248 M", "5272 M", "14690 C"]),
        ("deepseek-v2-lite", ["24.2 M", "140 M", "257 M", "259 M", "540 C", "2158 C"]),
        ("gpt-oss-20b", ["46.3 M", "243 M", "370 M", "372 M", "1033 C", "4132 C"]),
        ("gpt-oss-120b", ["46.5 M", "332 M", "1288 M", "1483 M", "1493 M", "4144 C"]),
        ("olmoe-1b-7b", ["23.5 M", "123 M", "187 M", "188 M", "523 C", "2093 C"]),
        ("llama-4-scout", ["58.6 M", "378 M", "922 M", "939 M", "1306 C", "5223 C"]),
        ("kimi-k2", ["165 M", "1221 M", "5823 M", "7870 M", "7894 M", "14728 C"]),
        ("glm-4.5-air", ["64.6 M", "416 M", "1014 M", "1032 M", "1441 C", "5763 C"]),
    ];

    #[test]
    fn rooflines_of_whole_layers() {
        for (name, cells) in ROOFLINES {
            for (tokens, cell) in TOKENS.into_iter().zip(cells) {
                let roofline = layer(name, tokens).roofline(Some(BANDWIDTH), Some(RATE)).unwrap();
                let micros = roofline.seconds * 1e6;
                let bound = if roofline.bound == Bound::Memory { "M" } else { "C" };
                let got = if micros < 100.0 {
                    format!("{micros:.1} {bound}")
                } else {
                    format!("{micros:.0} {bound}")
                };
                assert_eq!(got, cell, "{name}, T={tokens}");
            }
        }
    }

    /// Distinct experts, GFLOP and megabytes of three layers.
    #[test]
    fn work_of_whole_layers() {
        let table = [
            ("mixtral-8x7b", 8, 7.2, 5.6, 2537.0),
            ("qwen3-30b-a3b", 64, 125.9, 4.9, 1190.0),
            ("deepseek-v3", 64, 222.4, 45.0, 19600.0),
            ("kimi-k2", 16384, 384.0, 11600.0, 34300.0),
        ];
        for (name, tokens, distinct, gflop, megabytes) in table {
            let config = Model::find(name).unwrap().config;
            let close = |got: f64, want: f64| (got / want - 1.0).abs() < 0.01;
            assert!(close(expected_distinct(&config, tokens), distinct), "{name}");
            let work = layer(name, tokens);
            assert!(close(work.flops / 1e9, gflop), "{name}: {} GFLOP", work.flops / 1e9);
            assert!(close(work.bytes / 1e6, megabytes), "{name}: {} MB", work.bytes / 1e6);
        }
    }

    #[test]
    fn bytes_match_the_kernels_headers() {
        let config = Model::find("deepseek-v3").unwrap().config;
        // The figures of the kernels' header comments, at T4096 H7168 K8 bf16.
        let permute = work(Op::Permute, &config, 4096, 2, 256.0);
        assert_eq!((permute.bytes / 1e6).round(), 59.0 + 470.0);
        let combine = work(Op::Combine, &config, 4096, 2, 256.0);
        assert_eq!((combine.bytes / 1e6).round(), 529.0);
        // Gate, up and down are 6 operations for each weight of a row.
        let experts = work(Op::Experts, &config, 4096, 2, 256.0);
        let parts = [Op::GateUp, Op::Down].map(|op| work(op, &config, 4096, 2, 256.0).flops);
        assert_eq!(experts.flops, parts.iter().sum::<f64>());
        assert_eq!(experts.flops, 6.0 * 4096.0 * 8.0 * 7168.0 * 2048.0);
    }

    #[test]
    fn a_roofline_needs_measured_ceilings() {
        let work = Work { bytes: 100.0, flops: 1000.0 };
        assert_eq!(work.roofline(None, Some(1.0)), None);
        assert_eq!(work.roofline(Some(1.0), None), None);
        let roofline = work.roofline(Some(1.0), Some(100.0)).unwrap();
        assert_eq!((roofline.seconds, roofline.bound), (100.0, Bound::Memory));
        let roofline = work.roofline(Some(100.0), Some(1.0)).unwrap();
        assert_eq!((roofline.seconds, roofline.bound), (1000.0, Bound::Compute));
        // Without arithmetic the rate is unused.
        assert!(Work { bytes: 100.0, flops: 0.0 }.roofline(Some(1.0), None).is_some());
    }
}
