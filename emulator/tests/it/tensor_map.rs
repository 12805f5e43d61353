//! cuTensorMapEncodeTiled and the maps that it refuses.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use crate::common::{address, own_context};

/// The arguments of a valid map of a [64, 256] bf16 matrix in tiles of [64, 64].
#[derive(Clone)]
struct Map {
    rank: u32,
    base: u64,
    dim: [u64; 5],
    stride: [u64; 4],
    tile: [u32; 5],
    element_stride: [u32; 5],
    interleave: sys::CUtensorMapInterleave,
    swizzle: sys::CUtensorMapSwizzle,
}

fn valid(base: u64) -> Map {
    Map {
        rank: 2,
        base,
        dim: [256, 64, 1, 1, 1],
        stride: [512, 512 * 64, 512 * 64, 512 * 64],
        tile: [64, 64, 1, 1, 1],
        element_stride: [1; 5],
        interleave: sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    }
}

fn encode(map: &Map) -> CUresult {
    // SAFETY: a tensor map is plain words; the arrays have room for five dimensions.
    unsafe {
        let mut out: sys::CUtensorMap = std::mem::zeroed();
        sys::cuTensorMapEncodeTiled(
            &mut out,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            map.rank,
            ptr::without_provenance_mut::<c_void>(map.base as usize),
            map.dim.as_ptr(),
            map.stride.as_ptr(),
            map.tile.as_ptr(),
            map.element_stride.as_ptr(),
            map.interleave,
            map.swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
}

#[test]
fn invalid_tensor_maps_are_refused() {
    let context = own_context();
    let stream = context.default_stream();
    let memory = stream.alloc_zeros::<u16>(64 * 256).expect("memory");
    let base = address(&memory, &stream);
    if context.compute_capability().expect("attributes").0 < 9 {
        assert_eq!(encode(&valid(base)), CUresult::CUDA_ERROR_NOT_SUPPORTED);
        return;
    }
    assert_eq!(encode(&valid(base)), CUresult::CUDA_SUCCESS);
    type Change = fn(&mut Map);
    let wrong: [(&str, Change); 13] = [
        ("null base", |map| map.base = 0),
        ("misaligned base", |map| map.base += 8),
        ("rank 0", |map| map.rank = 0),
        ("rank 6", |map| map.rank = 6),
        ("empty dimension", |map| map.dim[1] = 0),
        ("dimension over 2^32", |map| map.dim[0] = (1 << 32) + 1),
        ("stride no multiple of 16", |map| map.stride[0] = 520),
        ("stride over 2^40", |map| map.stride[0] = 1 << 40),
        ("empty tile", |map| map.tile[1] = 0),
        ("tile over 256", |map| map.tile[1] = 257),
        ("row of a tile over the swizzle's span", |map| map.tile[0] = 128),
        ("row of a tile no multiple of 16 bytes", |map| map.tile[0] = 4),
        ("element stride 0", |map| map.element_stride[1] = 0),
    ];
    for (name, change) in wrong {
        let mut map = valid(base);
        change(&mut map);
        assert_eq!(encode(&map), CUresult::CUDA_ERROR_INVALID_VALUE, "{name}");
    }
}
