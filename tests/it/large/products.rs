//! The grouped products, with and without an activation, with weights, rows and features beyond
//! element 2^31.

use cudarc::driver::{CudaSlice, DevicePtr};
use half::f16;
use moe_kernels::ops::grouped_gemm::{
    GateUpBuffers, GroupedGemmBuffers, Rows, grouped_gemm_fwd_raw, grouped_gemm_gate_up_fwd_raw,
};
use moe_kernels::reference::{self, bound};
use moe_kernels::{DType, ExpertConfig, GateUpLayout, RoutingShape, WeightOrder};

use super::{LIMIT, alone, end_of, ending_in, without_blocks};
use crate::common::{Gpu, assert_within, bits, values};

/// Rows and features of a tile, and tiles of a group in the grid.
const TILE: usize = 128;
const GROUP: usize = 8;

/// A product, by the layout of its weights.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Product {
    Linear(WeightOrder),
    GateUp(GateUpLayout, WeightOrder),
}

use GateUpLayout::{Concatenated, Interleaved, Separate};
use Product::Linear;
use WeightOrder::{InOut, OutIn};

impl Product {
    /// Outputs of a tile.
    fn columns(self) -> usize {
        if matches!(self, Linear(_)) { TILE } else { TILE / 2 }
    }

    /// Features of one tensor of weights that make `n` outputs.
    fn features(self, n: usize) -> usize {
        match self {
            Linear(_) | Self::GateUp(Separate, _) => n,
            Self::GateUp(..) => 2 * n,
        }
    }

    fn order(self) -> WeightOrder {
        let (Linear(order) | Self::GateUp(_, order)) = self;
        order
    }
}

/// A launch without its first `left_out` blocks; outputs that are not written are NaN.
struct Call<'a> {
    product: Product,
    shape: RoutingShape,
    n: usize,
    k: usize,
    x: &'a CudaSlice<f16>,
    /// One tensor, or gate and up.
    w: &'a [CudaSlice<f16>],
    /// Expert, first row, number of rows.
    tiles: &'a [[usize; 3]],
    left_out: usize,
}

impl Call<'_> {
    fn run(&self, gpu: &Gpu) -> CudaSlice<f16> {
        let Self { product, shape, n, k, .. } = *self;
        let stream = &gpu.stream;
        let int = |number: usize| i32::try_from(number).unwrap();
        let tiles: Vec<i32> = self
            .tiles
            .iter()
            .flat_map(|&[e, row, rows]| [int(e), int(row), int(rows), 0])
            .collect();
        let rows_in_use = self.tiles.iter().map(|tile| tile[1] + tile[2]).max().unwrap();
        let mut offsets = vec![0; shape.num_experts + 1];
        offsets[shape.num_experts] = int(rows_in_use);
        let len = shape.slots() * n;
        let y = ending_in(gpu, len, &vec![f16::NAN; len.min(1 << 14)]);
        let tiles = stream.clone_htod(&tiles).unwrap();
        let offsets = stream.clone_htod(&offsets).unwrap();
        let num_tiles = stream.clone_htod(&[int(self.tiles.len())]).unwrap();
        let (y_at, x) = (y.device_ptr(stream).0, self.x.device_ptr(stream).0);
        let w: Vec<_> = self.w.iter().map(|w| w.device_ptr(stream).0).collect();
        let expert_offsets = offsets.device_ptr(stream).0;
        let (tiles, num_tiles) = (tiles.device_ptr(stream).0, num_tiles.device_ptr(stream).0);
        let (device, on, dtype) = (&gpu.device, stream.cu_stream(), DType::F16);
        without_blocks(gpu, self.left_out, || match product {
            Linear(order) => {
                let buffers = GroupedGemmBuffers {
                    y: y_at,
                    x,
                    w: w[0],
                    bias: 0,
                    token_of_row: 0,
                    expert_offsets,
                    tiles,
                    num_tiles,
                };
                // SAFETY: the buffers have the lengths of the shape, and live until the kernel has
                // run.
                unsafe { grouped_gemm_fwd_raw(device, on, dtype, shape, n, k, order, buffers) }
            }
            Product::GateUp(gate_up, gate_up_order) => {
                let experts = ExpertConfig { gate_up, gate_up_order, ..ExpertConfig::default() };
                let buffers = GateUpBuffers {
                    act: y_at,
                    x,
                    gate_up: w[0],
                    up: w.get(1).copied().unwrap_or(0),
                    bias: 0,
                    routing_weights: 0,
                    row_of_slot: 0,
                    token_of_row: 0,
                    expert_offsets,
                    tiles,
                    num_tiles,
                };
                let rows = Rows::Grouped;
                // SAFETY: as above.
                unsafe {
                    grouped_gemm_gate_up_fwd_raw(
                        device, on, dtype, shape, &experts, n, k, rows, buffers,
                    )
                }
            }
        })
        .unwrap();
        stream.synchronize().unwrap();
        y
    }
}

/// `rows` rows of one expert, on small tensors, for comparison with the large ones.
fn small_product(
    gpu: &Gpu,
    product: Product,
    n: usize,
    x: &[f16],
    w: &[Vec<f16>],
    rows: usize,
) -> Vec<f16> {
    let k = x.len() / rows;
    let w_device: Vec<_> = w.iter().map(|w| gpu.stream.clone_htod(w).unwrap()).collect();
    let call = Call {
        product,
        shape: RoutingShape::new(rows, 1, 1).unwrap(),
        n,
        k,
        x: &gpu.stream.clone_htod(x).unwrap(),
        w: &w_device,
        tiles: &[[0, 0, rows]],
        left_out: 0,
    };
    let y = gpu.download(&call.run(gpu).as_view());
    assert!(y.iter().all(|y| y.is_finite()) && y.iter().any(|y| y.to_f32() != 0.0));
    if product == Linear(OutIn) {
        let one = RoutingShape::new(rows, 1, 1).unwrap();
        let plan = reference::plan_fwd(&one, &vec![0; rows]).unwrap();
        let weights = reference::LinearWeights::new(&w[0]);
        let wanted = bound::grouped_gemm(&plan, n, k, x, weights, false, DType::F16).unwrap();
        assert_within(&y, &wanted, "the small product");
    }
    y
}

/// Random weights of one expert: one tensor, or gate and up.
fn weights_of(product: Product, len: usize) -> Vec<Vec<f16>> {
    let tensors = if matches!(product, Product::GateUp(Separate, _)) { 2 } else { 1 };
    (0..tensors).map(|seed| values::<f16>(len, 0.2, 7 + seed)).collect()
}

/// 4096 experts; only the last one has rows and initialized weights.
#[test]
fn weights_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let (experts, rows, k) = (4096, 3, 728);
    for (product, n) in [
        (Linear(OutIn), 728),
        (Linear(InOut), 728),
        (Product::GateUp(Concatenated, OutIn), 368),
        (Product::GateUp(Concatenated, InOut), 368),
        (Product::GateUp(Interleaved, OutIn), 368),
        (Product::GateUp(Interleaved, InOut), 368),
        (Product::GateUp(Separate, OutIn), 728),
        (Product::GateUp(Separate, InOut), 728),
    ] {
        let len = product.features(n) * k;
        assert!((experts - 1) * len > LIMIT);
        let (x, w) = (values::<f16>(rows * k, 1.0, 1), weights_of(product, len));
        let far: Vec<_> = w.iter().map(|w| ending_in(&gpu, experts * len, w)).collect();
        let call = Call {
            product,
            shape: RoutingShape::new(rows, experts, 1).unwrap(),
            n,
            k,
            x: &gpu.stream.clone_htod(&x).unwrap(),
            w: &far,
            tiles: &[[experts - 1, 0, rows]],
            left_out: 0,
        };
        let y = gpu.download(&call.run(&gpu).as_view());
        let small = small_product(&gpu, product, n, &x, &w, rows);
        assert_eq!(bits(&y), bits(&small), "{product:?}");
    }
}

/// A tile of one row, the last but one of x and of y; the last row of y is unused.
#[test]
fn rows_of_products_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let tokens = 1 << 20;
    let products = [Linear(OutIn), Product::GateUp(Concatenated, OutIn)];
    for product in products {
        for (n, k) in [(8, 2056), (2056, 8), (2057, 8)] {
            assert!((tokens - 2) * n.max(k) > LIMIT);
            let (x, w) = (values::<f16>(k, 1.0, 4), weights_of(product, product.features(n) * k));
            let end = [&x[..], &vec![f16::NAN; k]].concat();
            let w_device: Vec<_> = w.iter().map(|w| gpu.stream.clone_htod(w).unwrap()).collect();
            // The most tiles that a list can have: the last one begins a group, whose other blocks
            // zero the last row.
            let before = tokens / TILE;
            let mut tiles: Vec<_> = (0..before).map(|row| [0, row, 1]).collect();
            tiles.push([0, tokens - 2, 1]);
            let call = Call {
                product,
                shape: RoutingShape::new(tokens, 1, 1).unwrap(),
                n,
                k,
                x: &ending_in(&gpu, tokens * k, &end),
                w: &w_device,
                tiles: &tiles,
                left_out: before * n.div_ceil(product.columns()),
            };
            let end = end_of(&gpu, &call.run(&gpu), 2 * n);
            let small = small_product(&gpu, product, n, &x, &w, 1);
            assert_eq!(bits(&end[..n]), bits(&small), "{product:?} {n} x {k}");
            assert_eq!(bits(&end[n..]), vec![0; n], "{product:?} {n} x {k}");
        }
    }
}

/// One expert whose last tile of features is beyond element 2^31.
#[test]
fn features_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let (features, k) = (1 << 20, 2056);
    assert!((features - TILE) * k > LIMIT);
    for product in [
        Linear(OutIn),
        Linear(InOut),
        Product::GateUp(Concatenated, OutIn),
        Product::GateUp(Concatenated, InOut),
        Product::GateUp(Interleaved, OutIn),
        Product::GateUp(Interleaved, InOut),
    ] {
        let (columns, n) = (product.columns(), features / product.features(1));
        let (x, w) = (values::<f16>(k, 1.0, 5), weights_of(product, TILE * k));
        // Features of the small tensor and their place in the large one: from, to, count.
        let pieces = match product {
            Product::GateUp(Concatenated, _) => {
                vec![(0, n - columns, columns), (columns, features - columns, columns)]
            }
            _ => vec![(0, features - TILE, TILE)],
        };
        let mut far = ending_in::<f16>(&gpu, features * k, &[]);
        for (from, to, len) in pieces {
            match product.order() {
                OutIn => {
                    let part = &w[0][from * k..(from + len) * k];
                    gpu.stream
                        .memcpy_htod(part, &mut far.slice_mut(to * k..(to + len) * k))
                        .unwrap();
                }
                InOut => (0..k).for_each(|input| {
                    let part = &w[0][input * TILE + from..][..len];
                    let at = input * features + to;
                    gpu.stream.memcpy_htod(part, &mut far.slice_mut(at..at + len)).unwrap();
                }),
            }
        }
        let call = Call {
            product,
            shape: RoutingShape::new(1, 1, 1).unwrap(),
            n,
            k,
            x: &gpu.stream.clone_htod(&x).unwrap(),
            w: &[far],
            tiles: &[[0, 0, 1]],
            left_out: GROUP * (n / columns - 1),
        };
        let end = end_of(&gpu, &call.run(&gpu), columns);
        let small = small_product(&gpu, product, columns, &x, &w, 1);
        assert_eq!(bits(&end), bits(&small), "{product:?}");
    }
}
