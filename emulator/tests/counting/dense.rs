//! Operations on rows and tokens, not on experts: combine's look-ups, the norm and the router's
//! product.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use half::bf16;
use moe_emulator::Traffic;
use moe_kernels::ops::combine::{CombineInputs, combine_fwd};
use moe_kernels::ops::plan::plan_fwd;
use moe_kernels::ops::rms_norm::{RmsNormInputs, rms_norm_fwd};
use moe_kernels::ops::router_gemm::{
    RouterGemmBody, RouterGemmBuffers, RouterGemmShape, RouterGemmTypes, router_gemm_fwd_with,
};
use moe_kernels::{Device, Dtype, RmsNorm, RoutingShape};

use crate::measure::Counting;

struct Case {
    counting: Counting,
    stream: Arc<CudaStream>,
    device: Device,
}

impl Case {
    fn new() -> Self {
        let counting = Counting::new();
        let stream = counting.stream.clone();
        let device = Device::new(stream.context()).expect("a device");
        Self { counting, stream, device }
    }

    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> CudaSlice<T> {
        self.stream.alloc_zeros(len).expect("memory")
    }

    fn router_gemm<D, G>(&self, body: RouterGemmBody, shape: RouterGemmShape) -> Traffic
    where
        D: Dtype + ValidAsZeroBits,
        G: Dtype + ValidAsZeroBits,
    {
        let RouterGemmShape { num_tokens, num_experts, hidden } = shape;
        let x = self.zeros::<D>(num_tokens * hidden);
        let gate = self.zeros::<G>(num_experts * hidden);
        let mut logits = self.zeros::<f32>(num_tokens * num_experts);
        let types = RouterGemmTypes { x: D::DTYPE, router_gate: G::DTYPE, logits: f32::DTYPE };
        self.counting.traffic_of_one(|| {
            let (x, _x) = x.device_ptr(&self.stream);
            let (gate, _gate) = gate.device_ptr(&self.stream);
            let (logits, _logits) = logits.device_ptr_mut(&self.stream);
            let buffers = RouterGemmBuffers { logits, x, router_gate: gate, bias: 0 };
            let stream = self.stream.cu_stream();
            // SAFETY: the buffers have the shape's lengths, and the caller waits for the kernel.
            unsafe { router_gemm_fwd_with(&self.device, stream, body, types, shape, buffers) }
                .expect("router_gemm runs");
        })
    }
}

/// Checks that the bytes from memory are at least `ideal`, and at most `times` as many.
#[track_caller]
fn assert_near(traffic: &Traffic, got: u64, ideal: usize, times: f64) {
    let ratio = got as f64 / ideal as f64;
    assert!((1.0..=times).contains(&ratio), "{}: {got} of {ideal}, {ratio:.4}", traffic.symbol);
}

/// A warp looks up all slots of its token at once: two loads in addition to the rows.
#[test]
fn combine_looks_slots_up_once() {
    let case = Case::new();
    let (num_tokens, hidden) = (8, 2048);
    for top_k in [1, 2, 8, 32] {
        let shape = RoutingShape::new(num_tokens, 32, top_k).expect("a shape");
        let ids: Vec<u32> =
            (0..num_tokens).flat_map(|t| (0..top_k).map(move |k| ((t + k) % 32) as u32)).collect();
        let ids = case.stream.clone_htod(&ids).expect("memory");
        let plan = plan_fwd(&case.device, &case.stream, shape, &ids.as_view()).expect("a plan");
        let yp = case.zeros::<bf16>(shape.slots() * hidden);
        let weights = case.zeros::<f32>(shape.slots());
        let traffic = case.counting.traffic_of_one(|| {
            let (yp, weights) = (yp.as_view(), weights.as_view());
            let inputs = CombineInputs::new(&yp, &weights);
            combine_fwd(&case.device, &case.stream, &plan, hidden, &inputs).expect("combine runs");
        });
        assert_eq!(traffic.global_read.requests, traffic.warps * (top_k as u64 + 2));
    }
}

#[test]
fn rms_norm_reads_rows_twice_and_writes_them_once() {
    let case = Case::new();
    let (rows, hidden) = (32, 2048);
    let norm = RmsNorm { epsilon: 1e-6, offset: 1.0, scale_first: false };
    let x = case.zeros::<bf16>(rows * hidden);
    let weight = case.zeros::<bf16>(hidden);
    let traffic = case.counting.traffic_of_one(|| {
        let (x, weight) = (x.as_view(), weight.as_view());
        let inputs = RmsNormInputs { weight: Some(&weight), plan: None };
        rms_norm_fwd(&case.device, &case.stream, &norm, hidden, &x, &inputs).expect("it runs");
    });
    let bytes = 2 * rows * hidden;
    assert_near(&traffic, traffic.dram_bytes(), 2 * bytes + 2 * hidden, 1.01);
    // The second read, and the weights for each row, hit in L1.
    assert_eq!(traffic.global_read.sectors as usize * 32, 3 * bytes);
    assert_eq!(traffic.global_read.sectors_per_request(), 16.0);
    assert_eq!(traffic.global_write.sectors_per_request(), 16.0);
    assert_eq!(traffic.bank_conflicts(), 0);
}

/// The traffic of a product with `blocks` of `rows`, for elements of `sizes`, each for tokens and
/// experts.
struct Product {
    shape: RouterGemmShape,
    blocks: [usize; 2],
    rows: [usize; 2],
    sizes: [usize; 2],
}

impl Product {
    #[track_caller]
    fn check(&self, traffic: &Traffic) {
        let Self { shape: RouterGemmShape { num_tokens, num_experts, hidden }, .. } = *self;
        let [x_size, gate_size] = self.sizes;
        let logits = 4 * num_tokens * num_experts;
        let least = hidden * (num_tokens * x_size + num_experts * gate_size) + logits;
        assert_near(traffic, traffic.dram_bytes(), least, 1.01);
        let blocks = self.blocks[0] * self.blocks[1] * hidden;
        let read = |times: [usize; 2]| {
            let bytes = |i: usize| times[i] * self.rows[i] * self.sizes[i];
            blocks * (bytes(0) + bytes(1))
        };
        assert_near(traffic, traffic.global_read.bytes, read([1, 1]), 1.0);
        // A lane loads its consecutive f32 values in two loads; the sectors of the second are
        // already in L1. A tile is loaded in whole lines.
        let tile = traffic.symbol.contains("tile");
        let loads = self.sizes.map(|size| if size == 4 && !tile { 2 } else { 1 });
        assert_near(traffic, 32 * traffic.global_read.sectors, read(loads), 1.0);
    }
}

#[test]
fn router_gemm_moves_the_bytes_of_its_blocks() {
    let case = Case::new();
    let of = |num_tokens, num_experts| RouterGemmShape { num_tokens, num_experts, hidden: 1024 };
    let (one, few, tile) = (of(1, 24), of(16, 24), of(128, 64));
    let product = |shape, blocks, rows| move |sizes| Product { shape, blocks, rows, sizes };
    let product_one = product(one, [1, 24], [1, 1]);
    product_one([2, 2]).check(&case.router_gemm::<bf16, bf16>(RouterGemmBody::One, one));
    product_one([2, 4]).check(&case.router_gemm::<bf16, f32>(RouterGemmBody::One, one));
    let product_few = product(few, [2, 6], [8, 4]);
    product_few([2, 4]).check(&case.router_gemm::<bf16, f32>(RouterGemmBody::Few, few));
    for (traffic, sizes) in [
        (case.router_gemm::<f32, f32>(RouterGemmBody::Tile, tile), [4, 4]),
        (case.router_gemm::<bf16, bf16>(RouterGemmBody::Tile, tile), [2, 2]),
        (case.router_gemm::<bf16, f32>(RouterGemmBody::Tile, tile), [2, 4]),
    ] {
        product(tile, [2, 2], [64, 32])(sizes).check(&traffic);
        assert_eq!(traffic.bank_conflicts(), 0, "{}", traffic.symbol);
    }
}
