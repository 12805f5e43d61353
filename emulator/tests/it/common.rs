//! Shared by the tests: own contexts, functions by name, and launches that return the driver's
//! code.

use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};

/// A module image that the driver accepts and that has no code.
pub const EMPTY_PTX: &std::ffi::CStr = c".version 8.0\n.target sm_80\n.address_size 64\n";

/// Installs the device. Every test starts with the plain schedule, for any environment.
pub fn install() {
    moe_emulator::install().expect("the software device installs");
    moe_emulator::set_seed(0);
}

/// The primary context, which the tests of a process share.
pub fn shared_context() -> Arc<CudaContext> {
    install();
    CudaContext::new(0).expect("the software device has a context")
}

/// A context in which no other test synchronises or captures.
pub fn own_context() -> Arc<CudaContext> {
    install();
    let mut context = ptr::null_mut();
    // SAFETY: the pointer is valid for the call, and the new context has one owner.
    unsafe {
        assert_eq!(sys::cuInit(0), CUresult::CUDA_SUCCESS);
        let created = sys::cuCtxCreate_v4(&mut context, ptr::null_mut(), 0, 0);
        assert_eq!(created, CUresult::CUDA_SUCCESS);
        CudaContext::from_raw_context(0, 0, context).expect("the new context is usable")
    }
}

pub fn load_module() -> sys::CUmodule {
    let mut module = ptr::null_mut();
    // SAFETY: the image is a C string.
    let loaded = unsafe { sys::cuModuleLoadData(&mut module, EMPTY_PTX.as_ptr().cast()) };
    assert_eq!(loaded, CUresult::CUDA_SUCCESS);
    module
}

/// A function of a fresh module in the thread's current context.
pub fn function(name: &str) -> sys::CUfunction {
    let name = CString::new(name).expect("no NUL in a name");
    let mut function = ptr::null_mut();
    // SAFETY: the module is loaded and the name is a C string.
    let found = unsafe { sys::cuModuleGetFunction(&mut function, load_module(), name.as_ptr()) };
    assert_eq!(found, CUresult::CUDA_SUCCESS, "{name:?}");
    function
}

/// Grid, block, and bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub struct Shape(pub [u32; 3], pub [u32; 3], pub u32);

pub const ONE_THREAD: Shape = Shape([1, 1, 1], [1, 1, 1], 0);

pub fn launch(
    function: sys::CUfunction,
    stream: sys::CUstream,
    shape: Shape,
    parameters: &mut [*mut c_void],
) -> CUresult {
    let Shape(grid, block, shared) = shape;
    // SAFETY: the callers pass the kernel's parameters; the driver copies them here.
    unsafe {
        sys::cuLaunchKernel(
            function,
            grid[0],
            grid[1],
            grid[2],
            block[0],
            block[1],
            block[2],
            shared,
            stream,
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    }
}

pub fn pointer_to<T>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

/// The address of a slice, for launches that bypass cudarc.
pub fn address<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> sys::CUdeviceptr {
    slice.device_ptr(stream).0
}

/// Launches `emu_ok_append(log, value)`.
pub fn append(stream: sys::CUstream, log: sys::CUdeviceptr, value: i32) -> CUresult {
    launch(
        function("emu_ok_append"),
        stream,
        ONE_THREAD,
        &mut [pointer_to(&log), pointer_to(&value)],
    )
}

/// Launches `emu_ok_scale(y, x, factor, n)`.
pub fn scale(stream: sys::CUstream, y: u64, x: u64, factor: f32, n: i32) -> CUresult {
    launch(
        function("emu_ok_scale"),
        stream,
        Shape([n.cast_unsigned().div_ceil(64), 1, 1], [64, 1, 1], 0),
        &mut [pointer_to(&y), pointer_to(&x), pointer_to(&factor), pointer_to(&n)],
    )
}

/// An empty log for [`append`], with event tracking off, so that only the test orders streams.
pub fn new_log(context: &Arc<CudaContext>) -> CudaSlice<i32> {
    // SAFETY: the tests order their own accesses.
    unsafe { context.disable_event_tracking() };
    let stream = context.default_stream();
    let log = stream.alloc_zeros::<i32>(256).expect("a small allocation");
    stream.synchronize().expect("an idle device");
    log
}

/// The entries of a log, read through the default stream after all work has finished.
pub fn entries(context: &Arc<CudaContext>, log: &CudaSlice<i32>) -> Vec<i32> {
    context.synchronize().expect("nothing failed");
    let all = context.default_stream().clone_dtoh(log).expect("a copy");
    all[1..=all[0] as usize].to_vec()
}

/// A created stream that is destroyed with the test.
pub struct Stream(pub sys::CUstream);

impl Stream {
    pub fn new(flags: sys::CUstream_flags) -> Self {
        let mut stream = ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        let created = unsafe { sys::cuStreamCreate(&mut stream, flags as u32) };
        assert_eq!(created, CUresult::CUDA_SUCCESS);
        Self(stream)
    }

    pub fn non_blocking() -> Self {
        Self::new(sys::CUstream_flags::CU_STREAM_NON_BLOCKING)
    }

    pub fn blocking() -> Self {
        Self::new(sys::CUstream_flags::CU_STREAM_DEFAULT)
    }

    pub fn synchronize(&self) -> CUresult {
        // SAFETY: the stream is valid.
        unsafe { sys::cuStreamSynchronize(self.0) }
    }

    pub fn query(&self) -> CUresult {
        // SAFETY: the stream is valid.
        unsafe { sys::cuStreamQuery(self.0) }
    }

    pub fn wait(&self, event: &Event) -> CUresult {
        // SAFETY: both are valid.
        unsafe { sys::cuStreamWaitEvent(self.0, event.0, 0) }
    }

    pub fn begin_capture(&self) -> CUresult {
        self.begin_capture_in(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    }

    pub fn begin_capture_in(&self, mode: sys::CUstreamCaptureMode) -> CUresult {
        // SAFETY: the stream is valid.
        unsafe { sys::cuStreamBeginCapture_v2(self.0, mode) }
    }

    pub fn end_capture(&self) -> Result<sys::CUgraph, CUresult> {
        let mut graph = ptr::null_mut();
        // SAFETY: the stream is valid.
        match unsafe { sys::cuStreamEndCapture(self.0, &mut graph) } {
            CUresult::CUDA_SUCCESS => Ok(graph),
            error => {
                assert!(graph.is_null());
                Err(error)
            }
        }
    }

    pub fn capture_status(&self) -> sys::CUstreamCaptureStatus {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is valid.
        let result = unsafe { sys::cuStreamIsCapturing(self.0, &mut status) };
        assert_eq!(result, CUresult::CUDA_SUCCESS);
        status
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: this owns the stream. A failure shows where the stream is used.
        unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// An event that is destroyed with the test.
pub struct Event(pub sys::CUevent);

impl Event {
    pub fn new() -> Self {
        let mut event = ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        assert_eq!(unsafe { sys::cuEventCreate(&mut event, 0) }, CUresult::CUDA_SUCCESS);
        Self(event)
    }

    pub fn recorded(stream: &Stream) -> Self {
        let event = Self::new();
        assert_eq!(event.record(stream.0), CUresult::CUDA_SUCCESS);
        event
    }

    pub fn record(&self, stream: sys::CUstream) -> CUresult {
        // SAFETY: both are valid.
        unsafe { sys::cuEventRecord(self.0, stream) }
    }

    pub fn query(&self) -> CUresult {
        // SAFETY: the event is valid.
        unsafe { sys::cuEventQuery(self.0) }
    }

    pub fn synchronize(&self) -> CUresult {
        // SAFETY: the event is valid.
        unsafe { sys::cuEventSynchronize(self.0) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: this owns the event.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
