//! Launches on the counting device, and their traffic.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use moe_emulator::Traffic;

use crate::common::{Shape, function, launch, pointer_to};

/// A schedule: a seed, and how many OS threads run the blocks of a launch.
#[derive(Debug, Clone, Copy)]
pub struct Schedule(pub u64, pub u32);

impl Schedule {
    pub fn set(self) {
        moe_emulator::set_seed(self.0);
        moe_emulator::set_os_threads(self.1);
    }
}

/// A stream of the counting device. Counts are per process, and tests run in parallel: while a test
/// has one of these, no other test has one.
pub struct Counting {
    pub stream: Arc<CudaStream>,
    _alone: MutexGuard<'static, ()>,
}

impl Counting {
    pub fn new() -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        moe_emulator::install_counting().expect("the counting device installs");
        Schedule(0, 1).set();
        // For the whole process: a primary context ends with its last owner.
        static CONTEXT: OnceLock<Arc<CudaContext>> = OnceLock::new();
        let context = CONTEXT.get_or_init(|| CudaContext::new(0).expect("there is a device"));
        context.bind_to_thread().expect("the context is valid");
        Self { stream: context.new_stream().expect("a stream"), _alone: alone }
    }

    pub fn zeros(&self, words: usize) -> CudaSlice<u32> {
        self.stream.alloc_zeros(words).expect("memory")
    }

    /// Launches a kernel whose arguments are addresses and integers.
    pub fn launch(&self, kernel: &str, shape: Shape, arguments: &[u64]) {
        let mut pointers: Vec<_> = arguments.iter().map(pointer_to).collect();
        let launched = launch(function(kernel), self.stream.cu_stream(), shape, &mut pointers);
        assert_eq!(launched, CUresult::CUDA_SUCCESS, "{kernel}");
    }

    /// The traffic of the launches that `work` enqueues on the stream, by kernel.
    pub fn traffic_of(&self, work: impl FnOnce()) -> Vec<Traffic> {
        self.stream.synchronize().expect("nothing failed before");
        moe_emulator::reset_traffic();
        work();
        let done = self.stream.synchronize();
        assert!(done.is_ok(), "{done:?}: {:?}", moe_emulator::last_error());
        moe_emulator::traffic()
    }

    /// The traffic of the one launch that `work` enqueues.
    pub fn traffic_of_one(&self, work: impl FnOnce()) -> Traffic {
        let mut traffic = self.traffic_of(work);
        assert_eq!((traffic.len(), traffic[0].launches), (1, 1), "{traffic:?}");
        traffic.remove(0)
    }

    /// The traffic of one launch.
    pub fn count(&self, kernel: &str, shape: Shape, arguments: &[u64]) -> Traffic {
        let traffic = self.traffic_of_one(|| self.launch(kernel, shape, arguments));
        assert_eq!(traffic.symbol, kernel);
        traffic
    }
}
