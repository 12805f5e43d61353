//! Kernels that break the rules: the codes, the reports, and the objects that stay usable.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaSlice};

use crate::common::{
    Event, ONE_THREAD, Shape, Stream, address, append, entries, function, launch, new_log,
    own_context, pointer_to,
};

fn write_at(stream: &Stream, to: u64, index: i64) -> CUresult {
    let mut parameters = [pointer_to(&to), pointer_to(&index), pointer_to(&1i32)];
    launch(function("emu_bug_write_at"), stream.0, ONE_THREAD, &mut parameters)
}

/// A stream with a queued write out of bounds, and another stream. The members are dropped in this
/// order.
struct FailingStream {
    stream: Stream,
    other: Stream,
    at: u64,
    log: CudaSlice<i32>,
    context: Arc<CudaContext>,
}

impl FailingStream {
    fn new() -> Self {
        let context = own_context();
        let log = new_log(&context);
        let at = address(&log, &context.default_stream());
        let (stream, other) = (Stream::non_blocking(), Stream::non_blocking());
        assert_eq!(write_at(&stream, at, 1 << 40), CUresult::CUDA_SUCCESS);
        Self { stream, other, at, log, context }
    }

    /// The entries of the log after the failure has been cleared.
    fn entries(&self) -> Vec<i32> {
        moe_emulator::clear_errors();
        entries(&self.context, &self.log)
    }
}

#[test]
fn write_far_out_of_bounds_is_an_illegal_address() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(1024).expect("memory");
    context.synchronize().expect("nothing failed");
    let stream = Stream::non_blocking();
    let at = address(&memory, &context.default_stream());
    assert_eq!(write_at(&stream, at, 1023), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(moe_emulator::last_error(), None);
    assert_eq!(write_at(&stream, at, 1024), CUresult::CUDA_SUCCESS, "the launch itself succeeds");
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let report = moe_emulator::last_error().expect("a report");
    assert!(report.contains("emu_bug_write_at"), "{report}");
}

#[test]
fn write_just_past_an_allocation_is_reported_after_the_launch() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(10).expect("memory");
    context.synchronize().expect("nothing failed");
    let stream = Stream::non_blocking();
    let at = address(&memory, &context.default_stream());
    assert_eq!(write_at(&stream, at, 9), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(write_at(&stream, at, 10), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let report = moe_emulator::last_error().expect("a report");
    let expected = "kernel 'emu_bug_write_at' wrote byte 0 past the end of an allocation of 40 \
        bytes, which its parameter 0 at byte 0 points into";
    assert!(report.starts_with(expected), "{report}");
    moe_emulator::clear_errors();
}

#[test]
fn finds_a_write_just_past_an_allocation_whose_address_is_in_a_struct() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(10).expect("memory");
    context.synchronize().expect("nothing failed");
    let stream = Stream::non_blocking();
    let at = address(&memory, &context.default_stream());
    let write_at = |index: u64| {
        let params = [index, at, 1];
        let mut parameters = [pointer_to(&params)];
        launch(function("emu_bug_write_at_of_struct"), stream.0, ONE_THREAD, &mut parameters)
    };
    assert_eq!(write_at(9), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(write_at(10), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let report = moe_emulator::last_error().expect("a report");
    let expected = "kernel 'emu_bug_write_at_of_struct' wrote byte 0 past the end of an \
        allocation of 40 bytes, which its parameter 0 at byte 8 points into";
    assert!(report.starts_with(expected), "{report}");
    moe_emulator::clear_errors();
}

#[test]
fn unsupported_instruction_is_illegal() {
    crate::process::run_alone("failure::child_without_clusters", &[("MOE_EMULATOR_CC", "8.0")]);
}

#[test]
#[ignore = "run by unsupported_instruction_is_illegal"]
fn child_without_clusters() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(64).expect("memory");
    context.synchronize().expect("nothing failed");
    let stream = Stream::non_blocking();
    let at = address(&memory, &context.default_stream());
    let shape = Shape([1, 1, 1], [32, 1, 1], 1024);
    let kernel = function("emu_bug_mbar_lost_bytes");
    let launched = launch(kernel, stream.0, shape, &mut [pointer_to(&at)]);
    assert_eq!(launched, CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION);
}

#[test]
fn misaligned_access_has_its_own_error() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(64).expect("memory");
    context.synchronize().expect("nothing failed");
    let stream = Stream::non_blocking();
    let at = address(&memory, &context.default_stream());
    let shape = Shape([1, 1, 1], [32, 1, 1], 1024);
    let kernel = function("emu_bug_misaligned_ldmatrix");
    let launched = launch(kernel, stream.0, shape, &mut [pointer_to(&at)]);
    assert_eq!(launched, CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
}

#[test]
fn divergent_barrier_fails_the_launch() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(64).expect("memory");
    context.synchronize().expect("nothing failed");
    let stream = Stream::non_blocking();
    let at = address(&memory, &context.default_stream());
    let shape = Shape([1, 1, 1], [64, 1, 1], 0);
    let divergent = function("emu_bug_divergent_barrier");
    let launched = launch(divergent, stream.0, shape, &mut [pointer_to(&at)]);
    assert_eq!(launched, CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    let report = moe_emulator::last_error().expect("a report");
    assert!(
        report.contains("emu_bug_divergent_barrier") && report.contains("divergent barrier:"),
        "{report}"
    );
    assert!(report.contains("bugs.cu:"), "{report}");
}

/// The driver's description of an error, as messages print it.
fn description(error: CUresult) -> String {
    cudarc::driver::DriverError(error).error_string().expect("a code").to_string_lossy().into()
}

#[test]
fn the_description_of_a_failure_ends_with_its_report() {
    let context = own_context();
    let memory = context.default_stream().alloc_zeros::<i32>(64).expect("memory");
    context.synchronize().expect("nothing failed");
    let at = address(&memory, &context.default_stream());
    let error = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
    let plain = "an illegal memory access was encountered";
    assert_eq!(description(error), plain);
    let stream = Stream::non_blocking();
    assert_eq!(write_at(&stream, at, 1 << 40), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), error);
    let report = moe_emulator::last_error().expect("a report");
    assert!(report.contains("emu_bug_write_at"), "{report}");
    assert_eq!(description(error), format!("{plain}: {report}"));
    let printed = format!("{:?}", cudarc::driver::DriverError(error));
    assert!(printed.contains("emu_bug_write_at"), "{printed}");
    assert_eq!(description(CUresult::CUDA_ERROR_MISALIGNED_ADDRESS), "misaligned address");
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(description(error), plain, "another thread has not failed"));
    });
    moe_emulator::clear_errors();
    assert_eq!(description(error), plain);
}

#[test]
fn failure_sticks_to_its_stream() {
    let failing = FailingStream::new();
    let FailingStream { stream, other, at, context, .. } = &failing;
    let error = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
    assert_eq!(append(stream.0, *at, 1), CUresult::CUDA_SUCCESS, "the failure is not known yet");
    let event = Event::recorded(stream);
    assert_eq!(stream.synchronize(), error);
    assert_eq!(stream.synchronize(), error, "the failure is sticky");
    assert_eq!(stream.query(), error);
    assert_eq!(event.query(), error);
    assert_eq!(event.synchronize(), error);
    assert_eq!(append(stream.0, *at, 2), error);
    assert_eq!(context.synchronize().expect_err("the context reports it").0, error);
    assert_eq!(append(other.0, *at, 3), CUresult::CUDA_SUCCESS);
    assert_eq!(other.synchronize(), CUresult::CUDA_SUCCESS, "another stream is usable");
    let other_thread = std::thread::scope(|scope| {
        scope.spawn(|| context.synchronize().is_ok()).join().expect("no panic")
    });
    assert!(other_thread, "another thread gets no error");
    moe_emulator::clear_errors();
    assert_eq!(moe_emulator::last_error(), None);
    assert_eq!(append(stream.0, *at, 4), CUresult::CUDA_SUCCESS);
    assert_eq!(failing.entries(), [3, 4], "work after the failure did not run");
}

#[test]
fn failure_propagates_through_an_event() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let failure = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
    for seed in 0..10 {
        // The plain schedule executes nothing early, so the event is recorded before the kernel
        // fails. The rest executes in the order of the seed.
        moe_emulator::set_seed(0);
        let (stream, other) = (Stream::non_blocking(), Stream::non_blocking());
        assert_eq!(write_at(&stream, at, 1 << 40), CUresult::CUDA_SUCCESS);
        moe_emulator::set_seed(seed);
        let event = Event::recorded(&stream);
        assert_eq!(other.wait(&event), CUresult::CUDA_SUCCESS, "seed {seed}");
        // The failure may already be known.
        let appended = append(other.0, at, 1);
        assert!([CUresult::CUDA_SUCCESS, failure].contains(&appended), "seed {seed}: {appended:?}");
        assert_eq!(stream.synchronize(), failure, "seed {seed}");
        assert_eq!(other.synchronize(), failure, "seed {seed}");
    }
    moe_emulator::set_seed(0);
    moe_emulator::clear_errors();
    assert_eq!(entries(&context, &log), []);
}

/// After a failure no event can be recorded, and waiting for such an event has no effect.
#[test]
fn failed_stream_records_no_events() {
    let failing = FailingStream::new();
    let failure = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
    assert_eq!(failing.stream.synchronize(), failure);
    let event = Event::new();
    assert_eq!(event.record(failing.stream.0), failure);
    assert_eq!(event.query(), CUresult::CUDA_SUCCESS, "an unrecorded event is ready");
    assert_eq!(failing.other.wait(&event), CUresult::CUDA_SUCCESS);
    assert_eq!(append(failing.other.0, failing.at, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(failing.other.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(failing.entries(), [1]);
}

/// An event also propagates a failure that is already known.
#[test]
fn failure_propagates_through_a_completed_event() {
    let failing = FailingStream::new();
    let failure = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
    let event = Event::recorded(&failing.stream);
    assert_eq!(failing.stream.synchronize(), failure);
    assert_eq!(event.query(), failure, "the event has completed");
    assert_eq!(failing.other.wait(&event), CUresult::CUDA_SUCCESS);
    assert_eq!(append(failing.other.0, failing.at, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(failing.other.synchronize(), failure);
    assert_eq!(failing.entries(), []);
}

#[test]
fn default_stream_fails_for_one_thread() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let legacy = std::mem::ManuallyDrop::new(Stream(ptr::null_mut()));
    assert_eq!(write_at(&legacy, at, 1 << 40), CUresult::CUDA_SUCCESS);
    assert_eq!(legacy.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            context.bind_to_thread().expect("the context is valid");
            assert_eq!(append(ptr::null_mut(), at, 1), CUresult::CUDA_SUCCESS);
            assert_eq!(entries(&context, &log), [1]);
            assert_eq!(moe_emulator::last_error(), None, "the report is the other thread's");
        });
    });
    moe_emulator::clear_errors();
    assert_eq!(legacy.synchronize(), CUresult::CUDA_SUCCESS);
}

#[test]
fn copy_of_freed_memory_fails() {
    let context = own_context();
    let (a, b) = (Stream::non_blocking(), Stream::non_blocking());
    let mut pointer = 0;
    // SAFETY: the copy is wrong on purpose; the driver detects it when it runs.
    unsafe {
        use cudarc::driver::sys;
        assert_eq!(sys::cuMemAllocAsync(&mut pointer, 64, a.0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemsetD8Async(pointer, 0, 64, b.0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemFreeAsync(pointer, a.0), CUresult::CUDA_SUCCESS);
    }
    assert_eq!(a.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(b.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert!(moe_emulator::last_error().expect("a report").contains("has been freed"));
    moe_emulator::clear_errors();
    context.synchronize().expect("nothing else failed");
}
