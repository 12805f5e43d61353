//! rms_norm: matches its stated order bit for bit, and the reference in f64 within its bound.

use half::{bf16, f16};
use moe_kernels::ops::plan;
use moe_kernels::ops::rms_norm::{self, RmsNormBuffers, RmsNormInputs, RmsNormShape};
use moe_kernels::{DType, Dtype, Error, RmsNorm, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, values};

const PLAIN: RmsNorm = RmsNorm { epsilon: 1e-6, offset: 0.0, scale_first: false };

struct Case<D> {
    norm: RmsNorm,
    hidden: usize,
    x: Vec<D>,
    weight: Option<Vec<D>>,
    /// The routing of the rows, and its plan.
    routing: Option<(RoutingShape, Vec<u32>, reference::Plan)>,
}

impl<D: Dtype> Case<D> {
    fn new(norm: RmsNorm, rows: usize, hidden: usize, seed: u64) -> Self {
        let x = values::<D>(rows * hidden, 3.0, seed);
        let weight = Some(values::<D>(hidden, 1.0, seed ^ 1));
        Self { norm, hidden, x, weight, routing: None }
    }

    /// Rows of a plan; unused rows are NaN.
    fn planned(norm: RmsNorm, shape: RoutingShape, hidden: usize, seed: u64) -> Self {
        let mut case = Self::new(norm, shape.slots(), hidden, seed);
        let ids = routing_ids(shape, Skew::Inactive, seed);
        let plan = reference::plan_fwd(&shape, &ids).unwrap();
        case.x[plan.rows_in_use() * hidden..].fill(D::from_f32(f32::NAN));
        case.routing = Some((shape, ids, plan));
        case
    }

    /// `x`, `weight` and `y` start at these offsets in their buffers; in place, `y` is `x`.
    fn run(&self, gpu: &Gpu, offsets: [usize; 3], in_place: bool) -> Vec<D> {
        let nan = |offset: usize| vec![D::from_f32(f32::NAN); offset];
        let mut x = gpu.upload(&[&nan(offsets[0]), &self.x[..]].concat());
        let weight = self.weight.as_deref().unwrap_or_default();
        let weight = gpu.upload(&[&nan(offsets[1]), weight].concat());
        let (device, stream) = (&gpu.device, &gpu.stream);
        let plan = self.routing.as_ref().map(|(shape, ids, _)| {
            plan::plan_fwd(device, stream, *shape, &gpu.upload(ids).view()).unwrap()
        });
        let weight = weight.view();
        let weight = weight.slice(offsets[1]..);
        let inputs =
            RmsNormInputs { weight: self.weight.is_some().then_some(&weight), plan: plan.as_ref() };
        let (norm, hidden) = (&self.norm, self.hidden);
        if in_place {
            let mut view = x.view_mut();
            let x = &mut view.slice_mut(offsets[0]..);
            rms_norm::rms_norm_fwd_in_place(device, stream, norm, hidden, x, &inputs).unwrap();
            return gpu.download(&x.as_view());
        }
        let mut y = gpu.poisoned::<D>(offsets[2] + self.x.len());
        let mut view = y.view_mut();
        let to = &mut view.slice_mut(offsets[2]..);
        let x = x.view();
        let x = &x.slice(offsets[0]..);
        rms_norm::rms_norm_fwd_into(device, stream, norm, hidden, x, &inputs, to).unwrap();
        let mut got = gpu.download(&y.view());
        assert!(got[..offsets[2]].iter().all(|y| y.to_f32().is_nan()), "writes before the view");
        got.split_off(offsets[2])
    }

    /// The arithmetic of the kernel, in the order that its header states.
    fn exact(&self) -> Vec<D> {
        let used = self.routing.as_ref().map_or(usize::MAX, |(_, _, plan)| plan.rows_in_use());
        let rows = self.x.chunks_exact(self.hidden).enumerate();
        rows.flat_map(|(r, x)| if r < used { self.row(x) } else { vec![D::from_f32(0.0); x.len()] })
            .collect()
    }

    fn row(&self, x: &[D]) -> Vec<D> {
        let norm = &self.norm;
        let factor = |h: usize| self.weight.as_ref().map(|weight| norm.offset + weight[h].to_f32());
        let first = |h: usize| factor(h).filter(|_| norm.scale_first).unwrap_or(1.0);
        let last = |h: usize| factor(h).filter(|_| !norm.scale_first).unwrap_or(1.0);
        let x: Vec<f32> = x.iter().enumerate().map(|(h, x)| x.to_f32() * first(h)).collect();

        let len = 16 / size_of::<D>();
        let threads = x.len().div_ceil(len).next_multiple_of(32).min(256);
        let mut parts = vec![0.0f32; threads];
        for (vector, columns) in x.chunks(len).enumerate() {
            let part = &mut parts[vector % threads];
            *part = columns.iter().fold(*part, |part, x| x.mul_add(*x, part));
        }
        let warp_sum = |lanes: &[f32]| {
            let mut lanes = lanes.to_vec();
            for offset in [16, 8, 4, 2, 1] {
                lanes = (0..32).map(|lane| lanes[lane] + lanes[lane ^ offset]).collect();
            }
            lanes[0]
        };
        let sum = parts.chunks(32).map(warp_sum).fold(0.0, |sum, warp| sum + warp);
        let inverse = 1.0 / (sum / x.len() as f32 + norm.epsilon).sqrt();
        x.iter().enumerate().map(|(h, x)| D::from_f32(x * inverse * last(h))).collect()
    }

    fn check(&self, gpu: &Gpu, offsets: [usize; 3], in_place: bool) {
        let got = self.run(gpu, offsets, in_place);
        let what = format!(
            "{} rows of H{} {} {:?} weight {} {offsets:?} in place {in_place}",
            self.x.len() / self.hidden,
            self.hidden,
            D::DTYPE,
            self.norm,
            self.weight.is_some()
        );
        let inputs = reference::RmsNormInputs {
            x: &self.x[..],
            weight: self.weight.as_deref(),
            plan: self.routing.as_ref().map(|(_, _, plan)| plan),
        };
        let want = reference::bound::rms_norm(&self.norm, self.hidden, &inputs, D::DTYPE).unwrap();
        assert_within(&got, &want, &what);
        assert_eq!(bits(&got), bits(&self.exact()), "{what}: the order of summation");
    }
}

/// Checks one case; each bit of `options` is an option.
fn check<D: Dtype>(gpu: &Gpu, rows: usize, hidden: usize, options: u64, seed: u64) {
    let bit = |bit: u32| options >> bit & 1 == 1;
    let norm = RmsNorm {
        epsilon: if bit(0) { 1e-5 } else { 0.125 },
        offset: if bit(1) { 1.0 } else { 0.0 },
        scale_first: bit(2),
    };
    let mut case = if bit(3) {
        let top_k = rows.clamp(1, 3);
        let shape = RoutingShape::new(rows / top_k, 5, top_k).unwrap();
        Case::<D>::planned(norm, shape, hidden, seed)
    } else {
        Case::<D>::new(norm, rows, hidden, seed)
    };
    if bit(4) {
        case.weight = None;
    }
    let offset = (seed % 3) as usize;
    case.check(gpu, [offset; 3], bit(5));
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn matches_reference(
        rows in 0usize..12, hidden in 1usize..3000, options in 0u64..64, seed in any::<u64>(),
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        check::<f32>(&gpu, rows, hidden, options, seed);
        check::<f16>(&gpu, rows, hidden, options, seed);
        check::<bf16>(&gpu, rows, hidden, options, seed);
    }
}

/// Widths around those of a thread, a warp and a block, with and without tails.
#[test]
fn edge_widths_match_reference() {
    let gpu = gpu();
    for hidden in [1, 3, 4, 7, 8, 9, 128, 248, 256, 264, 1024, 1025, 2048, 2056, 4104, 7168] {
        for options in [0b00_0010, 0b00_0111, 0b01_0000, 0b10_1010] {
            check::<f32>(&gpu, 3, hidden, options, 3 * hidden as u64);
            check::<bf16>(&gpu, 3, hidden, options, 3 * hidden as u64);
            check::<f16>(&gpu, 3, hidden, options, 3 * hidden as u64 + 1);
        }
    }
    check::<f16>(&gpu, 0, 16, 0, 0);
    check::<f16>(&gpu, 0, 16, 0b1000, 0);
}

#[test]
fn accepts_views_at_any_offset() {
    let gpu = gpu();
    let case = Case::<bf16>::new(PLAIN, 5, 64, 4);
    for offsets in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
        case.check(&gpu, offsets, false);
    }
}

/// Rows of zeros, rows whose squares overflow or underflow, and rows with NaN or infinity.
#[test]
fn rows_do_not_affect_each_other() {
    let gpu = gpu();
    let mut case = Case::<f32>::new(PLAIN, 6, 40, 9);
    case.weight = None;
    let rows: Vec<&mut [f32]> = case.x.chunks_exact_mut(40).collect();
    for (row, x) in rows.into_iter().enumerate() {
        match row {
            0 => x.fill(0.0),
            1 => x.fill(1e30),
            2 => x[7] = f32::NAN,
            3 => x[7] = f32::INFINITY,
            4 => x.fill(1e-30),
            _ => {}
        }
    }
    let y = case.run(&gpu, [0; 3], false);
    let rows: Vec<&[f32]> = y.chunks_exact(40).collect();
    assert_eq!(rows[0], [0.0; 40]);
    assert_eq!(rows[1], [0.0; 40]);
    assert!(rows[2].iter().all(|y| y.is_nan()));
    assert!(rows[3].iter().enumerate().all(|(h, y)| if h == 7 { y.is_nan() } else { *y == 0.0 }));
    assert!(rows[4].iter().all(|y| *y > 0.0 && *y < 1e-26));
    assert_eq!(bits(rows[5]), bits(&case.exact()[5 * 40..]));
    // Without an epsilon a row of zeros is 0 / 0.
    case.norm.epsilon = 0.0;
    assert!(case.run(&gpu, [0; 3], false)[..40].iter().all(|y| y.is_nan()));
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let shape = RoutingShape::new(20, 5, 2).unwrap();
    let case = Case::<f16>::planned(PLAIN, shape, 1000, 5);
    let runs: Vec<_> = (0..12)
        .map(|seed| {
            gpu.reschedule(seed);
            bits(&case.run(&gpu, [seed as usize % 2, 0, 0], seed % 3 == 0))
        })
        .collect();
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn allocating_form_matches() {
    let gpu = gpu();
    let case = Case::<f16>::new(PLAIN, 6, 48, 3);
    let (x, weight) = (gpu.upload(&case.x), gpu.upload(case.weight.as_deref().unwrap()));
    let (x, weight) = (x.view(), weight.view());
    let inputs = RmsNormInputs { weight: Some(&weight), plan: None };
    let y = rms_norm::rms_norm_fwd(&gpu.device, &gpu.stream, &PLAIN, 48, &x, &inputs).unwrap();
    assert_eq!(bits(&gpu.download(&y.as_view())), bits(&case.exact()));
}

#[test]
fn rejects_invalid_arguments_before_the_launch() {
    let gpu = gpu();
    let shape = RoutingShape::new(2, 4, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let values = gpu.upload(&values::<f32>(64, 1.0, 0));
    let mut y = gpu.poisoned::<f32>(64);
    let mut call = |norm: RmsNorm, hidden: usize, [x, weight, to]: [usize; 3], planned: bool| {
        let values = values.view();
        let (x, weight) = (values.slice(..x), values.slice(..weight));
        let inputs = RmsNormInputs { weight: Some(&weight), plan: planned.then_some(&plan) };
        let y = &mut y.view_mut();
        let y = &mut y.slice_mut(..to);
        rms_norm::rms_norm_fwd_into(&gpu.device, &gpu.stream, &norm, hidden, &x, &inputs, y)
    };
    let length =
        |argument, wanted, got| Err(Error::Length { op: "rms_norm_fwd", argument, wanted, got });
    assert_eq!(call(PLAIN, 8, [31, 8, 31], false), length("x", 24, 31));
    assert_eq!(call(PLAIN, 8, [32, 7, 32], false), length("weight", 8, 7));
    assert_eq!(call(PLAIN, 8, [32, 8, 24], false), length("y", 32, 24));
    assert_eq!(call(PLAIN, 8, [24, 8, 24], true), length("x", 32, 24));
    assert!(call(PLAIN, 8, [32, 8, 32], true).is_ok());
    let unsupported = |result: Result<(), Error>, wanted| {
        assert!(matches!(result, Err(Error::Unsupported { argument, .. }) if argument == wanted));
    };
    unsupported(call(PLAIN, 0, [0, 0, 0], false), "hidden");
    unsupported(call(PLAIN, usize::MAX, [32, 8, 32], false), "hidden");
    for epsilon in [-1.0, f32::NAN, f32::INFINITY] {
        unsupported(call(RmsNorm { epsilon, ..PLAIN }, 8, [32, 8, 32], false), "norm");
    }
}

#[test]
fn rejects_invalid_raw_arguments() {
    let gpu = gpu();
    let good = RmsNormBuffers { y: 256, x: 256, ..RmsNormBuffers::default() };
    let call = |rows: usize, buffers: RmsNormBuffers| {
        let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
        let shape = RmsNormShape { rows, hidden: 8, num_experts: 4 };
        // SAFETY: every call here fails before it launches anything.
        unsafe { rms_norm::rms_norm_fwd_raw(device, stream, DType::F16, &PLAIN, shape, buffers) }
    };
    for (argument, buffers) in [
        ("y", RmsNormBuffers { y: 257, ..good }),
        ("x", RmsNormBuffers { x: 257, ..good }),
        ("weight", RmsNormBuffers { weight: 257, ..good }),
        ("expert_offsets", RmsNormBuffers { expert_offsets: 258, ..good }),
    ] {
        let result = call(4, buffers);
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
    assert!(matches!(call(1 << 31, good), Err(Error::Unsupported { argument: "rows", .. })));
}
