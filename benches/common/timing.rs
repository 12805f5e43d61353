//! Timing: CUDA events on a device's stream, the clock on the CPU.

use std::time::{Duration, Instant};

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};

use crate::common::error::{Result, driver};
use crate::common::target::{Gpu, Target};
use crate::common::workload::Workload;

/// The most tokens of a call that is captured and replayed. Such a call takes so little time that
/// the launches from the host would dominate it.
const MOST_GRAPH_TOKENS: usize = 512;

/// Calls in one graph.
const GRAPH_CALLS: usize = 24;

/// The time of calls before the first sample, in which clocks rise and caches and page tables fill.
const WARM_UP: Duration = Duration::from_millis(200);

/// The least time of a sample on a device. Shorter calls are repeated.
const SAMPLE: Duration = Duration::from_millis(2);

/// Repeats a workload and measures its time.
pub struct Repeater<'a> {
    workload: Workload<'a>,
    launch: Launch<'a>,
}

/// How calls are launched.
enum Launch<'a> {
    Call,
    Stream(&'a Gpu),
    /// Each launch has `GRAPH_CALLS` calls.
    Graph(&'a Gpu, CudaGraph),
}

impl<'a> Repeater<'a> {
    /// Prepares a workload on `num_tokens` tokens.
    ///
    /// # Errors
    /// Errors of the first call.
    pub fn new(target: &Target<'a>, mut workload: Workload<'a>, num_tokens: usize) -> Result<Self> {
        let launch = match target {
            Target::Cpu => Launch::Call,
            Target::Gpu(gpu) => {
                workload.call(0)?;
                gpu.wait()?;
                if num_tokens <= MOST_GRAPH_TOKENS {
                    Launch::Graph(gpu, capture(gpu, &mut workload)?)
                } else {
                    Launch::Stream(gpu)
                }
            }
        };
        Ok(Self { workload, launch })
    }

    /// How calls are launched: `graph`, `stream`, or `call` on the CPU.
    pub fn launch(&self) -> &'static str {
        match self.launch {
            Launch::Call => "call",
            Launch::Stream(_) => "stream",
            Launch::Graph(..) => "graph",
        }
    }

    /// `cold` if the inputs are read from memory, `warm` if from a cache.
    pub fn cache(&self) -> &'static str {
        if self.workload.cold { "cold" } else { "warm" }
    }

    /// Measures the seconds of `calls` calls. Whole graphs are launched; the result is the share of
    /// `calls` in their time.
    ///
    /// # Errors
    /// Errors of the library or the device.
    pub fn seconds(&mut self, calls: usize) -> Result<f64> {
        let workload = &mut self.workload;
        match &self.launch {
            Launch::Call => {
                let start = Instant::now();
                (0..calls).try_for_each(|set| workload.call(set))?;
                Ok(start.elapsed().as_secs_f64())
            }
            Launch::Stream(gpu) => {
                between_events(gpu, || (0..calls).try_for_each(|set| workload.call(set)))
            }
            Launch::Graph(gpu, graph) => {
                let launches = calls.div_ceil(GRAPH_CALLS);
                let launch = |_| graph.launch().map_err(driver("launch a graph"));
                let seconds = between_events(gpu, || (0..launches).try_for_each(launch))?;
                Ok(seconds * calls as f64 / (launches * GRAPH_CALLS) as f64)
            }
        }
    }

    /// Warms up, then takes `samples` samples of the time of one call. If they take longer than
    /// `patience`, sampling stops after at least five.
    ///
    /// # Errors
    /// Errors of the library or the device.
    pub fn samples(&mut self, samples: usize, patience: Duration) -> Result<Samples> {
        let on_device = !matches!(self.launch, Launch::Call);
        let start = Instant::now();
        let mut one = self.seconds(1)?;
        while on_device && start.elapsed() < WARM_UP {
            one = one.min(self.seconds(1)?);
        }
        let calls = if on_device {
            (SAMPLE.as_secs_f64() / one.max(1e-9)).ceil().clamp(1.0, 4096.0) as usize
        } else {
            1
        };
        let start = Instant::now();
        let mut taken = Vec::with_capacity(samples);
        while taken.len() < samples && (taken.len() < 5 || start.elapsed() < patience) {
            taken.push(self.seconds(calls)? / calls as f64);
        }
        Ok(Samples::new(taken))
    }
}

/// Measures the seconds between an event before and an event after the work of `enqueue`.
pub(crate) fn between_events(gpu: &Gpu, enqueue: impl FnOnce() -> Result<()>) -> Result<f64> {
    const DOING: &str = "time with events";
    let event = || gpu.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event().map_err(driver(DOING))?, event().map_err(driver(DOING))?);
    start.record(&gpu.stream).map_err(driver(DOING))?;
    enqueue()?;
    end.record(&gpu.stream).map_err(driver(DOING))?;
    let milliseconds = start.elapsed_ms(&end).map_err(driver(DOING))?;
    Ok(f64::from(milliseconds) / 1e3)
}

fn capture(gpu: &Gpu, workload: &mut Workload<'_>) -> Result<CudaGraph> {
    const DOING: &str = "capture a graph";
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    gpu.stream.begin_capture(mode).map_err(driver(DOING))?;
    let calls = (0..GRAPH_CALLS).try_for_each(|set| workload.call(set));
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    // The capture must end even if a call has failed.
    let graph = gpu.stream.end_capture(flags);
    calls?;
    let graph = graph.map_err(driver(DOING))?;
    graph
        .ok_or(cudarc::driver::DriverError(
            cudarc::driver::sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        ))
        .map_err(driver(DOING))
}

/// Times of one call, in seconds, in ascending order.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Sorts the times, which may be in any order.
    pub fn new(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    /// The number of samples.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The `q`-quantile, interpolated between samples. NaN without samples.
    pub fn quantile(&self, q: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return f64::NAN };
        let position = q.clamp(0.0, 1.0) * last as f64;
        let below = position.floor() as usize;
        let above = (below + 1).min(last);
        let share = position - below as f64;
        self.0[below] * (1.0 - share) + self.0[above] * share
    }

    /// The 0.5-quantile.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(samples.median(), 2.5);
        assert_eq!((samples.quantile(0.0), samples.quantile(1.0)), (1.0, 4.0));
        assert!((samples.quantile(0.1) - 1.3).abs() < 1e-12);
        assert_eq!(Samples::new(vec![7.0]).median(), 7.0);
        assert!(Samples::new(vec![]).median().is_nan());
    }

    #[test]
    fn a_slow_workload_is_sampled_five_times() {
        let mut calls = 0;
        let workload = Workload::new(|_| {
            calls += 1;
            std::thread::sleep(Duration::from_millis(2));
            Ok(())
        });
        let mut repeater = Repeater::new(&Target::Cpu, workload, 1).unwrap();
        let samples = repeater.samples(100, Duration::ZERO).unwrap();
        assert_eq!((samples.count(), repeater.launch()), (5, "call"));
        assert!(samples.quantile(0.0) >= 0.002);
        drop(repeater);
        assert_eq!(calls, 6, "one call to warm up");
    }
}
