//! TMA, wgmma and stmatrix, with the kernels of hopper_sm90.cu and golden_sm90.cu.

use cudarc::driver::sys::{
    self, CUresult, CUtensorMapDataType as DataType, CUtensorMapSwizzle as Swizzle,
};

use crate::common::{Shape, address, function, launch, pointer_to};
use crate::exact::{global, shared};
use crate::measure::Counting;

/// The device, if it has these instructions.
fn hopper() -> Option<Counting> {
    let counting = Counting::new();
    let capability = counting.stream.context().compute_capability().expect("attributes");
    (capability.0 == 9).then_some(counting)
}

/// Boxes of a row-major matrix; `dim` and `tile` are columns and rows.
fn tensor_map(
    base: u64,
    (data_type, element_bytes): (DataType, u64),
    dim: [u64; 2],
    tile: [u32; 2],
    swizzle: Swizzle,
) -> sys::CUtensorMap {
    // SAFETY: a tensor map is plain words, and the arrays have the two dimensions of the rank.
    unsafe {
        let mut map: sys::CUtensorMap = std::mem::zeroed();
        let encoded = sys::cuTensorMapEncodeTiled(
            &mut map,
            data_type,
            2,
            std::ptr::without_provenance_mut(base as usize),
            dim.as_ptr(),
            [dim[0] * element_bytes].as_ptr(),
            tile.as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        );
        assert_eq!(encoded, CUresult::CUDA_SUCCESS);
        map
    }
}

/// One tile of the GEMM of kernels/hopper_sm90.cu.
#[test]
fn bulk_copies_and_operands_are_counted() {
    const M: usize = 128;
    const N: usize = 64;
    const K: usize = 128;
    let Some(counting) = hopper() else { return };
    let a = counting.stream.alloc_zeros::<u16>(M * K).expect("memory");
    let b = counting.stream.alloc_zeros::<u16>(N * K).expect("memory");
    let c = counting.stream.alloc_zeros::<f32>(M * N).expect("memory");
    let map = |base, rows: usize| {
        let (dim, tile) = ([K as u64, rows as u64], [64, rows as u32]);
        let bf16 = (DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2);
        tensor_map(base, bf16, dim, tile, Swizzle::CU_TENSOR_MAP_SWIZZLE_128B)
    };
    let (a_map, b_map) =
        (map(address(&a, &counting.stream), M), map(address(&b, &counting.stream), N));
    let (m, n, k, c_at) = (M as i32, N as i32, K as i32, address(&c, &counting.stream));
    let gemm = function("emu_ok_gemm_sm90");
    let bytes = 3 * (M + N) as i32 * 128 + 48; // Three stages, then the mbarriers.
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function is loaded.
    assert_eq!(unsafe { sys::cuFuncSetAttribute(gemm, attribute, bytes) }, CUresult::CUDA_SUCCESS);
    for seed in 0..8 {
        moe_emulator::set_seed(seed);
        let traffic = counting.traffic_of(|| {
            let mut arguments = [
                pointer_to(&c_at),
                pointer_to(&a_map),
                pointer_to(&b_map),
                pointer_to(&m),
                pointer_to(&n),
                pointer_to(&k),
            ];
            let shape = Shape([1, 1, 1], [384, 1, 1], bytes.cast_unsigned());
            let launched = launch(gemm, counting.stream.cu_stream(), shape, &mut arguments);
            assert_eq!(launched, CUresult::CUDA_SUCCESS);
        });
        let traffic = &traffic[0];
        // Two steps along K, each a box of a and one of b.
        let bytes = ((M + N) * K * 2) as u64;
        assert_eq!(traffic.global_read, global(bytes, 4, bytes / 32, bytes / 32), "seed {seed}");
        // Two warp groups, two steps, four products each. Their operands are 64 rows of two chunks.
        let products = 2 * 2 * 4;
        assert_eq!(traffic.operations.matrix_multiplications, products * 4);
        assert_eq!(traffic.shared_read, shared(2 * products, 32 * products, 32 * products));
        // c is written in 32 stores by each of 8 warps: eight rows of four pairs' halves.
        let bytes = (M * N * 4) as u64;
        assert_eq!(traffic.global_write, global(bytes, 32 * 8, 32 * 8 * 8, bytes / 32));
    }
}

/// Boxes of 8 rows of 32 words, the last of which has 4 rows inside the matrix.
#[test]
fn bulk_copies_count_bytes_inside_the_tensor() {
    const ROWS: u64 = 20;
    let Some(counting) = hopper() else { return };
    let memory = counting.stream.alloc_zeros::<u32>(2 * 32 * ROWS as usize).expect("memory");
    let [to, from] = [32 * ROWS * 4, 0].map(|offset| {
        let base = address(&memory, &counting.stream) + offset;
        let u32s = (DataType::CU_TENSOR_MAP_DATA_TYPE_UINT32, 4);
        tensor_map(base, u32s, [32, ROWS], [32, 8], Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE)
    });
    let traffic = counting.traffic_of(|| {
        let tiles = 3i32;
        let mut arguments = [pointer_to(&to), pointer_to(&from), pointer_to(&tiles)];
        let shape = Shape([1, 1, 1], [32, 1, 1], 2048);
        let add_one = function("emu_ok_add_one_sm90");
        let launched = launch(add_one, counting.stream.cu_stream(), shape, &mut arguments);
        assert_eq!(launched, CUresult::CUDA_SUCCESS);
    });
    let expected = global(ROWS * 128, 3, ROWS * 4, ROWS * 4);
    assert_eq!((traffic[0].global_read, traffic[0].global_write), (expected, expected));
    // The threads' own accesses between the copies: 8 requests for the 256 words of a tile.
    let expected = shared(3 * 8, 3 * 8, 3 * 8);
    assert_eq!((traffic[0].shared_read, traffic[0].shared_write), (expected, expected));
}

#[test]
fn stmatrix_writes_rows() {
    let Some(counting) = hopper() else { return };
    let memory = counting.stream.alloc_zeros::<u32>(1 << 10).expect("memory");
    let at = address(&memory, &counting.stream);
    let warp = Shape([1, 1, 1], [32, 1, 1], 0);
    let traffic = counting.count("emu_golden_stmatrix_x4", warp, &[at, at + 2048]);
    // All lanes give the address of one row.
    assert_eq!((traffic.operations.matrix_stores, traffic.shared_write), (1, shared(1, 4, 4)));
}
