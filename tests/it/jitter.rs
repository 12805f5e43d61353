//! jitter: one product, so device and reference agree bit for bit.

use half::{bf16, f16};
use moe_kernels::ops::jitter::{self, JitterBuffers};
use moe_kernels::{DType, Dtype, Error, NoiseDistribution, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Rng, config, gpu, values};

/// The number of elements by which each buffer starts past an aligned address.
type Places = [usize; 3];

fn check<D: Dtype>(gpu: &Gpu, x: &[D], epsilon: f32, seed: u64, places: Places) {
    let len = x.len();
    let u = reference::noise_fwd(NoiseDistribution::Uniform, seed, 0, len);
    let want = reference::jitter_fwd(epsilon, x, &u).unwrap();
    let padded = |place: usize| vec![D::from_f32(9.0); place];
    let x_device = gpu.upload(&[padded(places[0]), x.to_vec()].concat());
    let u_device = gpu.upload(&[vec![9.0; places[1]], u].concat());
    let mut jittered = gpu.poisoned::<D>(places[2] + len + 3);
    {
        let mut whole = jittered.view_mut();
        jitter::jitter_fwd_into(
            &gpu.device,
            &gpu.stream,
            epsilon,
            &x_device.view().slice(places[0]..),
            &u_device.view().slice(places[1]..),
            &mut whole.slice_mut(places[2]..places[2] + len),
        )
        .unwrap();
    }
    let got = gpu.download(&jittered.view());
    let what = format!("{len} of {} at {places:?}", D::DTYPE);
    for (i, (got, want)) in got[places[2]..].iter().zip(&want).enumerate() {
        let (got, want) = (got.to_f32(), want.to_f32());
        // The bits of a NaN depend on the processor.
        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(same, "{what}: element {i} is {got}, wanted {want}");
    }
    let outside = got[..places[2]].iter().chain(&got[places[2] + len..]);
    assert!(outside.into_iter().all(|value| value.to_f32().is_nan()), "{what}: outside");
}

fn check_all<D: Dtype>(gpu: &Gpu, len: usize, epsilon: f32, seed: u64) {
    let mut x = values::<D>(len, 4.0, seed);
    let mut rng = Rng::new(seed);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, 6e4] {
        if len > 0 {
            x[rng.below(len)] = D::from_f32(value);
        }
    }
    for places in [[0, 0, 0], [8, 4, 8], [1, 0, 0], [0, 1, 0], [0, 0, 3]] {
        check(gpu, &x, epsilon, seed, places);
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn matches_reference(len in 0usize..5000, epsilon in -1.5f32..1.5, seed in any::<u64>()) {
        let gpu = gpu();
        gpu.reschedule(seed);
        check_all::<f32>(&gpu, len, epsilon, seed);
        check_all::<f16>(&gpu, len, epsilon, seed);
        check_all::<bf16>(&gpu, len, epsilon, seed);
    }
}

#[test]
fn matches_reference_at_limits() {
    let gpu = gpu();
    for len in [0, 1, 3, 4, 7, 8, 9, 1023, 1024, 1025, 2048, 2049] {
        check_all::<f32>(&gpu, len, 0.01, 1);
        check_all::<bf16>(&gpu, len, 0.0, 2);
    }
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let (x, u) = (gpu.upload(&[1f32; 8]), gpu.upload(&[0.5f32; 8]));
    let call = |epsilon, len: usize| {
        let u = u.view().slice(..len);
        jitter::jitter_fwd(&gpu.device, &gpu.stream, epsilon, &x.view(), &u).map(|_| ())
    };
    assert_eq!(call(0.1, 8), Ok(()));
    let short = Error::Length { op: "jitter_fwd", argument: "u", wanted: 8, got: 7 };
    assert_eq!(call(0.1, 7), Err(short));
    for epsilon in [f32::NAN, f32::INFINITY] {
        let result = call(epsilon, 8);
        assert!(matches!(result, Err(Error::Unsupported { argument: "epsilon", .. })));
    }
    let buffers = JitterBuffers { jittered: 257, x: 256, u: 256 };
    // SAFETY: the call fails before it launches anything.
    let result = unsafe {
        let stream = gpu.stream.cu_stream();
        jitter::jitter_fwd_raw(&gpu.device, stream, DType::F16, 0.1, 8, buffers)
    };
    assert!(matches!(result, Err(Error::Alignment { argument: "jittered", .. })), "{result:?}");
}
