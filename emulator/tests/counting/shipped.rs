//! The shipped kernels of moe-kernels: their traffic against the traffic that their shapes need. A
//! kernel that starts to read twice, to scatter or to have bank conflicts fails here, whatever its
//! results.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};
use half::bf16;
use moe_emulator::Traffic;
use moe_kernels::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd, grouped_gemm_gate_up_fwd,
};
use moe_kernels::ops::{capacity, combine, expert_choice, jitter, noise, permute, plan, route};
use moe_kernels::{
    CapacityConfig, CapacityLimit, Device, Dtype, ExpertConfig, GateUpLayout, NoiseDistribution,
    Priority, RouterConfig, RoutingPlan, RoutingShape, WeightOrder,
};

use crate::measure::{Counting, Schedule};

/// The device, the stream, and a plan for the operations.
struct Case {
    device: Device,
    stream: Arc<CudaStream>,
    shape: RoutingShape,
    ids: CudaSlice<u32>,
    plan: RoutingPlan<'static>,
    counting: Counting,
}

impl Case {
    fn new(num_tokens: usize, num_experts: usize, top_k: usize) -> Self {
        let counting = Counting::new();
        let stream = counting.stream.clone();
        let device = Device::new(stream.context()).expect("a device");
        let shape = RoutingShape::new(num_tokens, num_experts, top_k).expect("a shape");
        // The experts of a token are distinct, since no number of experts here is a multiple of 3,
        // and all experts have the same number of rows.
        let ids: Vec<u32> = (0..num_tokens)
            .flat_map(|token| (0..top_k).map(move |k| ((5 * token + 3 * k) % num_experts) as u32))
            .collect();
        let ids = stream.clone_htod(&ids).expect("memory");
        let plan = plan::plan_fwd(&device, &stream, shape, &ids.as_view()).expect("a plan");
        Self { device, stream, shape, ids, plan, counting }
    }

    fn zeros<D: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> CudaSlice<D> {
        self.stream.alloc_zeros(len).expect("memory")
    }

    fn permute(&self, hidden: usize) -> Traffic {
        let x = self.zeros::<bf16>(self.shape.num_tokens * hidden);
        self.counting.traffic_of_one(|| {
            permute::permute_fwd(&self.device, &self.stream, &self.plan, hidden, &x.as_view())
                .expect("permute runs");
        })
    }

    fn combine(&self, hidden: usize) -> Traffic {
        let yp = self.zeros::<bf16>(self.shape.slots() * hidden);
        let weights = self.zeros::<f32>(self.shape.slots());
        self.counting.traffic_of_one(|| {
            let (yp, weights) = (yp.as_view(), weights.as_view());
            let inputs = combine::CombineInputs::new(&yp, &weights);
            combine::combine_fwd(&self.device, &self.stream, &self.plan, hidden, &inputs)
                .expect("combine runs");
        })
    }

    fn route<D: Dtype + ValidAsZeroBits>(&self) -> Traffic {
        let logits = self.zeros::<D>(self.shape.logits());
        let router = RouterConfig::softmax_top_k(true);
        self.counting.traffic_of_one(|| {
            let logits = logits.as_view();
            let inputs = route::RouteInputs::new(&logits);
            route::route_fwd(&self.device, &self.stream, self.shape, &router, &inputs)
                .expect("route runs");
        })
    }

    fn route_biased<D: Dtype + ValidAsZeroBits>(&self, router: &RouterConfig) -> Traffic {
        let logits = self.zeros::<D>(self.shape.logits());
        let bias = self.zeros::<f32>(self.shape.num_experts);
        self.counting.traffic_of_one(|| {
            let (logits, bias) = (logits.as_view(), bias.as_view());
            let selection_bias = Some(&bias);
            let inputs = route::RouteInputs { selection_bias, ..route::RouteInputs::new(&logits) };
            route::route_fwd(&self.device, &self.stream, self.shape, router, &inputs)
                .expect("route runs");
        })
    }

    fn expert_choice<D: Dtype>(&self, capacity: usize) -> Traffic {
        let RoutingShape { num_tokens, num_experts, .. } = self.shape;
        // Distinct within an expert, in no order: 7 and the number of tokens are coprime.
        let scores: Vec<D> = (0..self.shape.logits())
            .map(|i| D::from_f64((i / num_experts * 7 % num_tokens) as f64 - 100.0))
            .collect();
        let scores = self.stream.clone_htod(&scores).expect("memory");
        self.counting.traffic_of_one(|| {
            let (device, stream) = (&self.device, &self.stream);
            let scores = scores.as_view();
            expert_choice::expert_choice_fwd(
                device,
                stream,
                num_tokens,
                num_experts,
                capacity,
                &scores,
            )
            .expect("experts choose");
        })
    }

    fn jitter(&self, hidden: usize) -> Traffic {
        let x = self.zeros::<bf16>(self.shape.num_tokens * hidden);
        let u = self.zeros::<f32>(self.shape.num_tokens * hidden);
        self.counting.traffic_of_one(|| {
            let (x, u) = (x.as_view(), u.as_view());
            jitter::jitter_fwd(&self.device, &self.stream, 0.1, &x, &u).expect("jitter runs");
        })
    }

    fn noise(&self) -> Traffic {
        self.counting.traffic_of_one(|| {
            let (kind, len) = (NoiseDistribution::Normal, self.shape.logits());
            noise::noise_fwd(&self.device, &self.stream, kind, 1, 0, len).expect("noise runs");
        })
    }

    /// By token, with capacity for all slots or for half.
    fn capacity(&self, factor: f64, priority: Priority) -> Traffic {
        let by_slot = self.shape.by_slot();
        let (device, stream) = (&self.device, &self.stream);
        let plan = plan::plan_fwd(device, stream, by_slot, &self.ids.as_view()).expect("a plan");
        let weights = self.zeros::<f32>(self.shape.slots());
        let limit = CapacityLimit::Factor { factor };
        let config = CapacityConfig::new(limit, priority);
        self.counting.traffic_of_one(|| {
            let weights = weights.as_view();
            capacity::capacity_fwd(device, stream, &plan, self.shape, &config, None, &weights)
                .expect("capacity runs");
        })
    }

    fn plan(&self) -> Vec<Traffic> {
        self.counting.traffic_of(|| {
            plan::plan_fwd(&self.device, &self.stream, self.shape, &self.ids.as_view())
                .expect("plan runs");
        })
    }

    fn gate_up<D: Dtype + ValidAsZeroBits>(
        &self,
        experts: ExpertConfig,
        n: usize,
        k: usize,
    ) -> Traffic {
        let x = self.zeros::<D>(self.shape.num_tokens * k);
        let w = self.zeros::<D>(self.shape.num_experts * 2 * n * k);
        self.counting.traffic_of_one(|| {
            let (x, w, rows) = (x.as_view(), w.as_view(), Rows::Gathered);
            let (device, stream, w) = (&self.device, &self.stream, GateUpWeights::fused(&w));
            grouped_gemm_gate_up_fwd(device, stream, &self.plan, &experts, n, k, rows, &x, w, None)
                .expect("gate_up runs");
        })
    }

    fn down<D: Dtype + ValidAsZeroBits>(&self, order: WeightOrder, n: usize, k: usize) -> Traffic {
        let x = self.zeros::<D>(self.shape.slots() * k);
        let w = self.zeros::<D>(self.shape.num_experts * n * k);
        self.counting.traffic_of_one(|| {
            let (x, w) = (x.as_view(), w.as_view());
            let (device, stream) = (&self.device, &self.stream);
            let w = LinearWeights { order, ..LinearWeights::new(&w) };
            grouped_gemm_fwd(device, stream, &self.plan, n, k, Rows::Grouped, &x, w)
                .expect("down runs");
        })
    }
}

/// Checks that `got` is at least `ideal`, and at most `times` as much.
#[track_caller]
fn assert_near(what: &str, got: u64, ideal: usize, times: f64) {
    let ratio = got as f64 / ideal as f64;
    assert!((1.0..=times).contains(&ratio), "{what}: {got} of {ideal}, {ratio:.4} times the ideal");
}

#[test]
fn permute_and_combine_move_the_ideal_bytes() {
    let hidden = 2048;
    for top_k in [2, 8] {
        let case = Case::new(32, 8, top_k);
        let (tokens, slots) = (32 * hidden * 2, 32 * top_k);
        let rows = slots * hidden * 2;

        let permute = case.permute(hidden);
        let ideal = tokens + 4 * slots + rows;
        assert_near("permute, DRAM", permute.dram_bytes(), ideal, 1.05);
        // Each warp of a block reads the block's part of the map itself.
        assert_near("permute, L2", permute.sector_bytes(), ideal, 1.07);
        assert_eq!(permute.global_write.sectors_per_request(), 16.0);

        let combine = case.combine(hidden);
        let ideal = rows + 8 * slots + tokens;
        assert_near("combine, DRAM", combine.dram_bytes(), ideal, 1.05);
        // As above, and the weights too.
        assert_near("combine, L2", combine.sector_bytes(), ideal, 1.12);
        assert_eq!(combine.global_write.sectors_per_request(), 16.0);
    }
}

#[test]
fn route_reads_the_logits_once_in_wide_requests() {
    let case = Case::new(64, 128, 8);
    for (traffic, size, sectors_per_request) in
        [(case.route::<f32>(), 4, 16.0), (case.route::<bf16>(), 2, 8.0)]
    {
        let sectors = (case.shape.logits() * size / 32) as u64;
        assert_eq!(traffic.global_read.sectors, sectors);
        assert_eq!(traffic.global_read.unique_sectors, sectors);
        assert_eq!(traffic.global_read.sectors_per_request(), sectors_per_request);
        // Ids and weights, one token at a time.
        assert_eq!(traffic.global_write.bytes, 8 * case.shape.slots() as u64);
        assert_eq!(traffic.global_write.requests, 2 * 64);
        // Two maxima of the warp for each choice and one before them; a sum in two parts.
        assert_eq!(traffic.operations.reductions, 64 * (2 * 8 + 1 + 2));
        assert_eq!(traffic.operations.shuffles, 0);
    }
}

/// DeepSeek-V3's router: eight choices of the four best of eight groups, by sigmoids with a bias.
#[test]
fn route_with_options_reads_the_logits_once_without_bank_conflicts() {
    let case = Case::new(64, 256, 8);
    let router = RouterConfig::deepseek_v3(8, 4, 2.5);
    for (traffic, size, sectors_per_request) in [
        (case.route_biased::<f32>(&router), 4, 16.0),
        (case.route_biased::<bf16>(&router), 2, 16.0),
    ] {
        let logits = (case.shape.logits() * size / 32) as u64;
        let bias = 256 * 4 / 32;
        // Each warp reads the bias from the cache, in words.
        assert_eq!(traffic.global_read.unique_sectors, logits + bias);
        assert_eq!(traffic.global_read.sectors, logits + 64 * bias);
        let requests = logits as f64 / sectors_per_request + 64.0 * 8.0;
        assert_eq!(traffic.global_read.requests as f64, requests);
        assert_eq!(traffic.global_write.bytes, 8 * case.shape.slots() as u64);
        assert_eq!(traffic.bank_conflicts(), 0);
        // Two maxima for each choice; per group two steps with two keys each, and the keys of
        // eight; a sum.
        assert_eq!(traffic.operations.reductions, 64 * 2 * 8);
        assert_eq!(traffic.operations.shuffles, 64 * (2 * 2 + 8 + 5));
        assert_eq!(traffic.operations.votes, 64);
    }
}

/// A sector contains all of a block's columns of a row, so no half sectors are read or written.
#[test]
fn expert_choice_reads_whole_sectors() {
    let case = Case::new(512, 64, 8);
    for (traffic, size) in
        [(case.expert_choice::<f32>(100), 4), (case.expert_choice::<bf16>(100), 2)]
    {
        let read = (case.shape.logits() * size / 32) as u64;
        assert_eq!(traffic.global_read.unique_sectors, read);
        // The last pass, and one for each digit examined: of a score and, with ties, of a token.
        let passes = traffic.global_read.sectors / read;
        assert_eq!(traffic.global_read.sectors, passes * read);
        assert!((3..=5).contains(&passes), "{passes} passes");
        let written = (8 * case.shape.logits() / 32) as u64;
        assert_eq!(traffic.global_write.sectors, written);
    }
}

#[test]
fn noise_and_jitter_move_the_ideal_bytes() {
    let case = Case::new(64, 128, 8);
    let noise = case.noise();
    assert_eq!((noise.global_read.bytes, noise.global_write.sectors_per_request()), (0, 16.0));
    assert_eq!(noise.global_write.bytes, 4 * case.shape.logits() as u64);
    let hidden = 2048;
    let jitter = case.jitter(hidden);
    assert_near("jitter, DRAM", jitter.dram_bytes(), 64 * hidden * 8, 1.0);
    assert_eq!(jitter.global_write.sectors_per_request(), 16.0);
}

/// With capacity for all slots, or by token, a slot's row is read once and its id written once.
#[test]
fn capacity_reads_slots_once_if_their_order_is_known() {
    let case = Case::new(600, 32, 8);
    let (slots, cells) = (case.shape.slots(), 32);
    for (factor, priority) in [(1.0, Priority::Weight), (0.5, Priority::Token)] {
        let traffic = case.capacity(factor, priority);
        let written = 4 * slots + 8 * cells;
        assert_eq!(traffic.global_write.bytes, written as u64);
        // Rows, the map of slots, and a binary search by every thread of a block.
        let weights = if priority == Priority::Weight { 4 * slots } else { 0 };
        let least = 8 * slots + weights;
        let unique = 32 * traffic.global_read.unique_sectors as usize;
        assert!((least..least + least / 4).contains(&unique), "{unique} of {least}");
    }
}

#[test]
fn plan_counts_and_places_without_conflicts() {
    let case = Case::new(600, 32, 8);
    let traffic = case.plan();
    let symbols: Vec<_> = traffic.iter().map(|kernel| kernel.symbol.as_str()).collect();
    assert_eq!(symbols, ["moe_plan_fwd_count", "moe_plan_fwd_place", "moe_plan_fwd_scan"]);
    let ids = 4 * case.shape.slots();
    assert_near("count", traffic[0].global_read.bytes, ids, 1.0);
    // The ids twice and an offset for each slot; the ends of the lists for each thread.
    assert_near("place", traffic[1].global_read.bytes, 3 * ids, 1.25);
    assert_near("place", traffic[1].global_write.unique_bytes(), 2 * ids, 1.05);
    assert_eq!(traffic.iter().map(Traffic::bank_conflicts).sum::<u64>(), 0);
    // One match, one shuffle and one barrier for 32 slots.
    let steps = case.shape.slots() as u64 / 32;
    let operations = traffic[1].operations;
    let counted = [operations.matches, operations.shuffles, operations.warp_barriers];
    assert_eq!(counted, [steps; 3]);
}

/// Rows of `in_features` elements and weights of a grouped product; a tile's rows are read once for
/// each column of blocks, and its expert's weights once.
struct Product {
    rows_in: usize,
    weight_rows: usize,
    out_features: usize,
    in_features: usize,
    columns: usize,
    tile_rows: usize,
}

impl Product {
    #[track_caller]
    fn check(&self, case: &Case, traffic: &Traffic, size: usize) {
        let weights = case.shape.num_experts * self.weight_rows * self.in_features * size;
        let rows = self.rows_in * self.in_features * size;
        let outputs = case.shape.slots() * self.out_features * size;
        let symbol = &traffic.symbol;
        assert_near(symbol, traffic.dram_bytes(), weights + rows + outputs, 1.02);
        let gathered =
            case.shape.slots() * self.in_features * size * self.out_features.div_ceil(self.columns);
        assert_near(symbol, traffic.sector_bytes(), weights + gathered + outputs, 1.02);
        assert_eq!(traffic.global_write.sector_use(), 1.0, "{symbol}");
        assert_eq!(traffic.bank_conflicts(), 0, "{symbol}");
        if size == 2 {
            // m16n8k16 on the tiles' rows, which are padded to 32, 64 or 128.
            let mmas = case.shape.num_experts * self.tile_rows / 16;
            let mmas = mmas * (self.weight_rows / 8) * (self.in_features / 16);
            assert_eq!(traffic.operations.matrix_multiplications, mmas as u64, "{symbol}");
        }
    }
}

/// SwiGLU with each order of one tensor.
fn orders() -> [ExpertConfig; 4] {
    use GateUpLayout::{Concatenated, Interleaved};
    use WeightOrder::{InOut, OutIn};
    [(Concatenated, OutIn), (Interleaved, OutIn), (Concatenated, InOut), (Interleaved, InOut)].map(
        |(gate_up, gate_up_order)| ExpertConfig { gate_up, gate_up_order, ..Default::default() },
    )
}

#[test]
fn products_read_weights_once_without_bank_conflicts() {
    let (hidden, intermediate) = (512, 256);
    // Rows of each expert, and the padded number.
    for (num_tokens, tile_rows) in [(32, 32), (160, 64), (480, 128)] {
        let case = Case::new(num_tokens, 8, 2);
        let gate_up = Product {
            rows_in: num_tokens,
            weight_rows: 2 * intermediate,
            out_features: intermediate,
            in_features: hidden,
            columns: 64,
            tile_rows,
        };
        for experts in orders() {
            gate_up.check(&case, &case.gate_up::<bf16>(experts, intermediate, hidden), 2);
            if num_tokens == 32 {
                gate_up.check(&case, &case.gate_up::<f32>(experts, intermediate, hidden), 4);
            }
        }
        let down = Product {
            rows_in: case.shape.slots(),
            weight_rows: hidden,
            out_features: hidden,
            in_features: intermediate,
            columns: 128,
            tile_rows,
        };
        for order in [WeightOrder::OutIn, WeightOrder::InOut] {
            down.check(&case, &case.down::<bf16>(order, hidden, intermediate), 2);
            if num_tokens == 32 {
                down.check(&case, &case.down::<f32>(order, hidden, intermediate), 4);
            }
        }
    }
}

#[test]
fn schedules_do_not_change_counts() {
    let case = Case::new(150, 8, 8);
    let all = |schedule: Schedule| {
        schedule.set();
        let mut traffic = vec![case.permute(264), case.combine(264), case.route::<f32>()];
        traffic.extend(case.plan());
        let [plain, .., interleaved] = orders();
        traffic.extend([
            case.gate_up::<bf16>(plain, 72, 72),
            case.gate_up::<bf16>(interleaved, 72, 72),
            case.down::<f32>(WeightOrder::OutIn, 64, 72),
        ]);
        traffic
    };
    let plain = all(Schedule(0, 1));
    for schedule in [Schedule(1, 1), Schedule(2, 2), Schedule(3, 3), Schedule(0, 2), Schedule(4, 1)]
    {
        assert_eq!(all(schedule), plain, "{schedule:?}");
    }
}
