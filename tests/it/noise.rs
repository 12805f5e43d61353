//! noise: correctly rounded operations in a stated order, so device and reference agree bit for
//! bit.

use moe_kernels::ops::noise;
use moe_kernels::{Error, NoiseDistribution, reference};
use proptest::prelude::*;

use crate::common::{Gpu, bits, config, gpu};

fn check(gpu: &Gpu, seed: u64, offset: u64, len: usize, place: usize) {
    for distribution in NoiseDistribution::ALL {
        let want = reference::noise_fwd(distribution, seed, offset, len);
        let mut noise = gpu.poisoned::<f32>(place + len + 5);
        {
            let mut view = noise.view_mut();
            let mut view = view.slice_mut(place..place + len);
            noise::noise_fwd_into(&gpu.device, &gpu.stream, distribution, seed, offset, &mut view)
                .unwrap();
        }
        let got = gpu.download(&noise.view());
        let what = format!("{distribution:?} of {seed}, {len} from {offset}, at {place}");
        assert_eq!(bits(&got[place..place + len]), bits(&want), "{what}");
        assert!(got[..place].iter().all(|value| value.is_nan()), "{what}: before");
        assert!(got[place + len..].iter().all(|value| value.is_nan()), "{what}: behind");
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn matches_reference(
        seed in any::<u64>(), offset in any::<u64>(), len in 0usize..3000, place in 0usize..6,
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        check(&gpu, seed, offset, len, place);
        check(&gpu, seed, offset & !3, len, place & !3);
    }
}

#[test]
fn matches_reference_at_limits() {
    let gpu = gpu();
    for len in [0, 1, 2, 3, 4, 5, 1023, 1024, 1025] {
        for offset in [0, 1, 2, 3, 4, (1 << 34) - 2, u64::MAX, u64::MAX - 2, u64::MAX - 1023] {
            check(&gpu, u64::MAX, offset, len, 0);
        }
    }
}

/// Far more words than the random cases, for every branch of the functions.
#[test]
fn many_elements_match_reference() {
    check(&gpu(), 42, 0, 200_000, 0);
}

#[test]
fn rejects_another_context() {
    let gpu = gpu();
    let other = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = other.new_stream().unwrap();
    let result = noise::noise_fwd(&gpu.device, &stream, NoiseDistribution::Normal, 1, 0, 8);
    assert!(matches!(result, Err(Error::Context { op: "noise_fwd", argument: "stream" })));
    let noise = noise::noise_fwd(&gpu.device, &gpu.stream, NoiseDistribution::Normal, 1, 7, 0);
    assert_eq!(noise.unwrap().len(), 0);
}
