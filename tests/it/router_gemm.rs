//! router_gemm: all bodies match the stated order bit for bit, and the reference in f64 within its
//! bound.

use cudarc::driver::{DevicePtr, DevicePtrMut};
use half::{bf16, f16};
use moe_kernels::ops::router_gemm::{
    self, RouterGemmBody, RouterGemmBuffers, RouterGemmInputs, RouterGemmShape, RouterGemmTypes,
};
use moe_kernels::{DType, Dtype, Error, reference};
use proptest::prelude::*;

use crate::common::{Gpu, assert_within, config, gpu, values};

const BODIES: [RouterGemmBody; 3] =
    [RouterGemmBody::One, RouterGemmBody::Few, RouterGemmBody::Tile];

/// The bits of values, with every NaN as the same NaN.
fn bits<L: Dtype>(values: &[L]) -> Vec<u32> {
    let bits = |value: &L| value.to_f32();
    values.iter().map(bits).map(|v| if v.is_nan() { f32::NAN } else { v }.to_bits()).collect()
}

struct Case<D, G> {
    num_experts: usize,
    hidden: usize,
    x: Vec<D>,
    gate: Vec<G>,
    bias: Option<Vec<G>>,
}

impl<D: Dtype, G: Dtype> Case<D, G> {
    fn new(num_tokens: usize, num_experts: usize, hidden: usize, seed: u64) -> Self {
        Self {
            num_experts,
            hidden,
            x: values::<D>(num_tokens * hidden, 2.0, seed),
            gate: values::<G>(num_experts * hidden, 1.0, seed ^ 1),
            bias: seed.is_multiple_of(2).then(|| values::<G>(num_experts, 1.0, seed ^ 2)),
        }
    }

    fn num_tokens(&self) -> usize {
        self.x.len() / self.hidden
    }

    /// Runs the body that the operation chooses.
    fn run<L: Dtype>(&self, gpu: &Gpu) -> Vec<L> {
        let (x, gate) = (gpu.upload(&self.x), gpu.upload(&self.gate));
        let bias = gpu.upload(self.bias.as_deref().unwrap_or_default());
        let (x, gate, bias) = (x.view(), gate.view(), bias.view());
        let inputs = RouterGemmInputs {
            x: &x,
            router_gate: &gate,
            bias: self.bias.is_some().then_some(&bias),
        };
        let mut logits = gpu.poisoned::<L>(self.num_tokens() * self.num_experts);
        router_gemm::router_gemm_fwd_into(
            &gpu.device,
            &gpu.stream,
            self.num_experts,
            self.hidden,
            &inputs,
            &mut logits.view_mut(),
        )
        .unwrap();
        gpu.download(&logits.view())
    }

    /// Runs the given body; `x` and `gate` start at these offsets in their buffers.
    fn run_with<L: Dtype>(&self, gpu: &Gpu, body: RouterGemmBody, offsets: [usize; 2]) -> Vec<L> {
        let mut x = vec![D::from_f32(f32::NAN); offsets[0]];
        let mut gate = vec![G::from_f32(f32::NAN); offsets[1]];
        x.extend(&self.x);
        gate.extend(&self.gate);
        let (x, gate) = (gpu.upload(&x), gpu.upload(&gate));
        let bias = self.bias.as_ref().map(|bias| gpu.upload(bias));
        let mut logits = gpu.poisoned::<L>(self.num_tokens() * self.num_experts);
        {
            let stream = &gpu.stream;
            let (x, gate) = (x.view(), gate.view());
            let (x, gate) = (x.slice(offsets[0]..), gate.slice(offsets[1]..));
            let bias = bias.as_ref().map(|bias| bias.view());
            let bias = bias.as_ref().map(|bias| bias.device_ptr(stream));
            let mut view = logits.view_mut();
            let (logits, _logits) = view.device_ptr_mut(stream);
            let (x, _x) = x.device_ptr(stream);
            let (gate, _gate) = gate.device_ptr(stream);
            let buffers = RouterGemmBuffers {
                logits,
                x,
                router_gate: gate,
                bias: bias.as_ref().map_or(0, |(at, _)| *at),
            };
            let types = RouterGemmTypes { x: D::DTYPE, router_gate: G::DTYPE, logits: L::DTYPE };
            let shape = RouterGemmShape {
                num_tokens: self.num_tokens(),
                num_experts: self.num_experts,
                hidden: self.hidden,
            };
            // SAFETY: the buffers have the shape's lengths and live on.
            unsafe {
                let (device, stream) = (&gpu.device, stream.cu_stream());
                router_gemm::router_gemm_fwd_with(device, stream, body, types, shape, buffers)
                    .unwrap();
            }
        }
        gpu.download(&logits.view())
    }

    /// The arithmetic of the kernel, in the order that its header states.
    fn exact(&self) -> Vec<f32> {
        let logit = |index: usize| {
            let (token, expert) = (index / self.num_experts, index % self.num_experts);
            let x = &self.x[token * self.hidden..][..self.hidden];
            let gate = &self.gate[expert * self.hidden..][..self.hidden];
            let segments = x.chunks(512).zip(gate.chunks(512));
            let sum = segments.fold(0.0f32, |sum, (x, gate)| {
                let mut p = [0.0f32; 8];
                for (h, (x, gate)) in x.iter().zip(gate).enumerate() {
                    let p = &mut p[h / 8 % 8];
                    *p = x.to_f32().mul_add(gate.to_f32(), *p);
                }
                let half = |i: usize| (p[i] + p[i + 4]) + (p[i + 2] + p[i + 6]);
                sum + (half(0) + half(1))
            });
            self.bias.as_ref().map_or(sum, |bias| sum + bias[expert].to_f32())
        };
        (0..self.num_tokens() * self.num_experts).map(logit).collect()
    }

    fn check<L: Dtype>(&self, gpu: &Gpu, offsets: [usize; 2]) {
        let what = format!(
            "T{} E{} H{} {} {} -> {} {offsets:?}",
            self.num_tokens(),
            self.num_experts,
            self.hidden,
            D::DTYPE,
            G::DTYPE,
            L::DTYPE
        );
        let inputs = reference::RouterGemmInputs {
            x: &self.x[..],
            router_gate: &self.gate[..],
            bias: self.bias.as_deref(),
        };
        let want = reference::bound::router_gemm(self.num_experts, self.hidden, &inputs, L::DTYPE)
            .unwrap();
        let exact: Vec<L> = self.exact().into_iter().map(L::from_f32).collect();
        let chosen = self.run::<L>(gpu);
        assert_within(&chosen, &want, &what);
        assert_eq!(bits(&chosen), bits(&exact), "{what}: the order of summation");
        for body in BODIES {
            let got = self.run_with::<L>(gpu, body, offsets);
            assert_eq!(bits(&got), bits(&exact), "{what}: {body:?}");
        }
    }
}

/// Checks all pairs of types; `seed` chooses the type of the logits.
fn check(gpu: &Gpu, [num_tokens, num_experts, hidden]: [usize; 3], seed: u64) {
    let offsets = [(seed % 3) as usize, (seed / 3 % 3) as usize];
    macro_rules! pair {
        ($d:ty, $g:ty) => {
            let case = Case::<$d, $g>::new(num_tokens, num_experts, hidden, seed);
            if seed % 5 < 2 {
                case.check::<$d>(gpu, offsets);
            } else {
                case.check::<f32>(gpu, offsets);
            }
        };
    }
    pair!(f32, f32);
    pair!(f16, f16);
    pair!(bf16, bf16);
    pair!(f16, f32);
    pair!(bf16, f32);
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn matches_reference(
        num_tokens in 0usize..90, num_experts in 1usize..70, hidden in 1usize..700,
        seed in any::<u64>(),
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        check(&gpu, [num_tokens, num_experts, hidden], seed);
    }
}

/// Dimensions around chunks, steps and segments, and around each body's block.
#[test]
fn edge_shapes_match_reference() {
    let gpu = gpu();
    for hidden in [1, 4, 7, 8, 9, 63, 64, 65, 128, 504, 512, 513, 520, 1024, 2048, 2056, 17000] {
        check(&gpu, [2, 3, hidden], 18 * hidden as u64);
    }
    for (num_tokens, num_experts) in
        [(1, 1), (1, 256), (5, 4), (8, 5), (9, 31), (63, 32), (64, 33), (65, 1), (0, 8)]
    {
        check(&gpu, [num_tokens, num_experts, 72], 90 * num_experts as u64);
    }
    check(&gpu, [1, 4096, 8], 0);
}

/// The bits of a token's logits depend neither on the number of tokens, for which the operation
/// chooses different bodies, nor on its index.
#[test]
fn logits_do_not_depend_on_other_tokens() {
    let gpu = gpu();
    let (num_experts, hidden) = (40, 1100);
    let all = Case::<bf16, f32>::new(3200, num_experts, hidden, 8);
    let logits = all.run::<f32>(&gpu);
    for range in [0..1, 7..9, 100..103, 511..520, 1000..1100, 3199..3200] {
        let some = Case {
            x: all.x[range.start * hidden..range.end * hidden].to_vec(),
            gate: all.gate.clone(),
            bias: all.bias.clone(),
            ..all
        };
        let want = &logits[range.start * num_experts..range.end * num_experts];
        assert_eq!(bits(&some.run::<f32>(&gpu)), bits(want), "tokens {range:?}");
    }
}

/// Products that underflow, infinities and NaN.
#[test]
fn handles_operands_of_any_bits() {
    let gpu = gpu();
    let mut case = Case::<f32, f32>::new(9, 9, 130, 4);
    for (i, x) in case.x.iter_mut().enumerate() {
        *x = match (i / 130, i % 130) {
            (0, _) => -1e-30,
            (1, _) => 1e30 * *x,
            (2, 5) => f32::NAN,
            (3, 129) => f32::INFINITY,
            (4, _) => -0.0,
            _ => *x,
        };
    }
    for (i, gate) in case.gate.iter_mut().enumerate() {
        *gate = match i / 130 {
            0 => 1e-30,
            1 => 1e30 * *gate,
            2 => 0.0,
            _ => *gate,
        };
    }
    let exact = bits(&case.exact());
    for body in BODIES {
        for offsets in [[0, 0], [0, 1]] {
            assert_eq!(bits(&case.run_with::<f32>(&gpu, body, offsets)), exact, "{body:?}");
        }
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let case = Case::<f16, f32>::new(70, 33, 600, 6);
    for body in BODIES {
        let runs: Vec<_> = (0..8)
            .map(|seed| {
                gpu.reschedule(seed);
                bits(&case.run_with::<f32>(&gpu, body, [seed as usize % 2, 0]))
            })
            .collect();
        assert!(runs.windows(2).all(|pair| pair[0] == pair[1]), "{body:?}");
    }
}

#[test]
fn allocating_form_matches() {
    let gpu = gpu();
    let case = Case::<bf16, f32>::new(6, 5, 48, 3);
    let (x, gate) = (gpu.upload(&case.x), gpu.upload(&case.gate));
    let (x, gate) = (x.view(), gate.view());
    let inputs = RouterGemmInputs { x: &x, router_gate: &gate, bias: None };
    let logits =
        router_gemm::router_gemm_fwd::<_, _, bf16>(&gpu.device, &gpu.stream, 5, 48, &inputs)
            .unwrap();
    assert_eq!(bits(&gpu.download(&logits.as_view())), bits(&case.run::<bf16>(&gpu)));
}

#[test]
fn rejects_invalid_arguments_before_the_launch() {
    let gpu = gpu();
    let values = gpu.upload(&values::<f32>(64, 1.0, 0));
    let mut logits = gpu.poisoned::<f32>(64);
    let mut call = |num_experts: usize, hidden: usize, lens: [usize; 4]| {
        let values = values.view();
        let [x, gate, bias] = [0, 1, 2].map(|at| values.slice(..lens[at]));
        let inputs = RouterGemmInputs { x: &x, router_gate: &gate, bias: Some(&bias) };
        let view = &mut logits.view_mut();
        let logits = &mut view.slice_mut(..lens[3]);
        router_gemm::router_gemm_fwd_into(
            &gpu.device,
            &gpu.stream,
            num_experts,
            hidden,
            &inputs,
            logits,
        )
    };
    let length =
        |argument, wanted, got| Err(Error::Length { op: "router_gemm_fwd", argument, wanted, got });
    assert_eq!(call(3, 8, [31, 24, 3, 12]), length("x", 24, 31));
    assert_eq!(call(3, 8, [32, 23, 3, 12]), length("router_gate", 24, 23));
    assert_eq!(call(3, 8, [32, 24, 2, 12]), length("bias", 3, 2));
    assert_eq!(call(3, 8, [32, 24, 3, 11]), length("logits", 12, 11));
    assert!(call(3, 8, [32, 24, 3, 12]).is_ok());
    let unsupported = |result: Result<(), Error>, wanted| {
        assert!(matches!(result, Err(Error::Unsupported { argument, .. }) if argument == wanted));
    };
    unsupported(call(0, 8, [32, 0, 0, 0]), "num_experts");
    unsupported(call(3, 0, [0, 0, 3, 0]), "hidden");
    unsupported(call(3, usize::MAX, [32, 24, 3, 12]), "hidden");
    unsupported(call(usize::MAX, 8, [32, 24, 3, 12]), "num_experts * hidden");

    // Combinations of types without a kernel.
    let tokens = gpu.upload(&[f16::ONE; 8]);
    let gate = gpu.upload(&[bf16::ONE; 8]);
    let (tokens, gate) = (tokens.view(), gate.view());
    let (device, stream) = (&gpu.device, &gpu.stream);
    let inputs = RouterGemmInputs { x: &tokens, router_gate: &gate, bias: None };
    let mixed = router_gemm::router_gemm_fwd::<_, _, f32>(device, stream, 1, 8, &inputs);
    assert!(matches!(mixed, Err(Error::Unsupported { argument: "router_gate", .. })), "{mixed:?}");
    let inputs = RouterGemmInputs { x: &tokens, router_gate: &tokens, bias: None };
    let mixed = router_gemm::router_gemm_fwd::<_, _, bf16>(device, stream, 1, 8, &inputs);
    assert!(matches!(mixed, Err(Error::Unsupported { argument: "logits", .. })), "{mixed:?}");
}

#[test]
fn rejects_invalid_raw_arguments() {
    let gpu = gpu();
    let good = RouterGemmBuffers { logits: 256, x: 256, router_gate: 256, bias: 256 };
    let call = |num_tokens: usize, buffers: RouterGemmBuffers| {
        let types = RouterGemmTypes { x: DType::F16, router_gate: DType::F32, logits: DType::F32 };
        let shape = RouterGemmShape { num_tokens, num_experts: 4, hidden: 8 };
        let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
        // SAFETY: every call here fails before it launches anything.
        unsafe { router_gemm::router_gemm_fwd_raw(device, stream, types, shape, buffers) }
    };
    for (argument, buffers) in [
        ("logits", RouterGemmBuffers { logits: 258, ..good }),
        ("x", RouterGemmBuffers { x: 257, ..good }),
        ("router_gate", RouterGemmBuffers { router_gate: 258, ..good }),
        ("bias", RouterGemmBuffers { bias: 258, ..good }),
    ] {
        let result = call(4, buffers);
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
    let many = call(1 << 31, good);
    assert!(matches!(many, Err(Error::Unsupported { argument: "num_tokens", .. })));
}
