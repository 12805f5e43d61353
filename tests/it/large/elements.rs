//! The element-wise operations noise and jitter.

use cudarc::driver::DevicePtr;
use half::f16;
use moe_kernels::ops::jitter::{JitterBuffers, jitter_fwd, jitter_fwd_raw};
use moe_kernels::ops::noise::{noise_fwd, noise_fwd_into};
use moe_kernels::{DType, NoiseDistribution};

use super::{LIMIT, alone, end_of, ending_in, without_blocks};
use crate::common::{bits, values};

/// The number of elements, not a multiple of those of a block.
const LEN: usize = LIMIT + 5003;

/// The number of compared elements, which belong to the last two blocks and start at an even index.
const END: usize = 1003;

#[test]
fn noise_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let (distribution, seed) = (NoiseDistribution::Normal, 11);
    let mut noise = ending_in::<f32>(&gpu, LEN, &[]);
    let blocks = LEN.div_ceil(4 * 256);
    without_blocks(&gpu, blocks - 2, || {
        let to = &mut noise.as_view_mut();
        noise_fwd_into(device, stream, distribution, seed, 3, to).unwrap();
    });
    let offset = 3 + (LEN - END) as u64;
    let near = noise_fwd(device, stream, distribution, seed, offset, END).unwrap();
    let near = gpu.download(&near.as_view());
    assert!(near.iter().all(|value| value.is_finite()));
    assert_eq!(bits(&end_of(&gpu, &noise, END)), bits(&near));
}

/// Tokens and random numbers share one allocation: three buffers exceed the memory of the software
/// device.
#[test]
fn jitter_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let (device, stream, epsilon) = (&gpu.device, &gpu.stream, 0.1);
    let (x, u) = (values::<f16>(END, 1.0, 1), values::<f32>(END, 1.0, 2));
    let mut read = ending_in(&gpu, LEN, &u);
    // Each f32 holds the bits of two f16 elements.
    let pair = |pair: &[f16]| {
        let high = pair.get(1).map_or(0, |x| x.to_bits());
        f32::from_bits(u32::from(pair[0].to_bits()) | u32::from(high) << 16)
    };
    let (pairs, begin) = (x.chunks(2).map(pair).collect::<Vec<f32>>(), (LEN - END) / 2);
    stream.memcpy_htod(&pairs, &mut read.slice_mut(begin..begin + pairs.len())).unwrap();
    let jittered = ending_in::<f16>(&gpu, LEN, &[]);
    let at = read.device_ptr(stream).0;
    let buffers = JitterBuffers { jittered: jittered.device_ptr(stream).0, x: at, u: at };
    let blocks = LEN.div_ceil(8 * 256);
    // SAFETY: the allocation is as long as the longer of both and outlives the kernel; any bits are
    // valid.
    without_blocks(&gpu, blocks - 2, || unsafe {
        jitter_fwd_raw(device, stream.cu_stream(), DType::F16, epsilon, LEN, buffers).unwrap();
    });
    let (x, u) = (gpu.upload(&x), gpu.upload(&u));
    let near = jitter_fwd(device, stream, epsilon, &x.view(), &u.view()).unwrap();
    let near = gpu.download(&near.as_view());
    assert!(near.iter().all(|value| value.is_finite()));
    assert_eq!(bits(&end_of(&gpu, &jittered, END)), bits(&near));
}
