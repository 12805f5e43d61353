//! Measures the seconds of a call.

use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor};

/// The time in which a GPU reaches its clock. On a CPU one call suffices.
const WARM_UP: Duration = Duration::from_millis(200);

/// The least time of a sample, long against the clock's resolution.
const SAMPLE_SECONDS: f64 = 0.01;

/// Times `run(n)`, the n-th call, `samples` times, after a warm-up.
pub fn seconds_per_call(
    device: &Device,
    samples: usize,
    mut run: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Vec<f64>> {
    let mut number = 0;
    let mut timed = |calls: usize| -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            run(number)?;
            number += 1;
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    };
    let start = Instant::now();
    timed(1)?;
    while device.is_cuda() && start.elapsed() < WARM_UP {
        timed(1)?;
    }
    let calls = (SAMPLE_SECONDS / timed(1)?).ceil().clamp(1.0, 100.0) as usize;
    (0..samples).map(|_| timed(calls)).collect()
}
