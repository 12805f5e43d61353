//! Execution order: late, in stream order, and otherwise as the seed draws.

use std::collections::HashSet;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use cudarc::driver::sys::{self, CUresult};

use crate::common::{Event, Stream, address, append, entries, new_log, own_context};

#[test]
fn work_runs_only_when_a_thread_waits() {
    let context = own_context();
    let log = new_log(&context);
    let stream = Stream::non_blocking();
    let at = address(&log, &context.default_stream());
    assert_eq!(append(stream.0, at, 5), CUresult::CUDA_SUCCESS);
    assert_eq!(moe_emulator::counters().unfinished, 1);
    assert_eq!(stream.query(), CUresult::CUDA_ERROR_NOT_READY);
    assert_eq!(stream.query(), CUresult::CUDA_SUCCESS, "a query executes work");
    assert_eq!(moe_emulator::counters().unfinished, 0);
    assert_eq!(entries(&context, &log), [5]);
}

/// The order of the work of two independent streams.
fn interleaving(seed: u64) -> Vec<i32> {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    moe_emulator::set_seed(seed);
    let (a, b) = (Stream::non_blocking(), Stream::non_blocking());
    for i in 0..4 {
        assert_eq!(append(a.0, at, i), CUresult::CUDA_SUCCESS);
        assert_eq!(append(b.0, at, 10 + i), CUresult::CUDA_SUCCESS);
    }
    assert_eq!(a.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(b.synchronize(), CUresult::CUDA_SUCCESS);
    moe_emulator::set_seed(0);
    entries(&context, &log)
}

#[test]
fn seed_interleaves_streams() {
    assert_eq!(interleaving(0), [0, 1, 2, 3, 10, 11, 12, 13], "as late as possible");
    let mut seen = HashSet::new();
    for seed in 1..=40 {
        let order = interleaving(seed);
        assert_eq!(order, interleaving(seed), "seed {seed} repeats its order");
        for stream in [0, 10] {
            let own: Vec<i32> = order.iter().copied().filter(|v| v / 10 * 10 == stream).collect();
            assert_eq!(own, [stream, stream + 1, stream + 2, stream + 3], "seed {seed}");
        }
        seen.insert(order);
    }
    assert!(seen.len() > 10, "only {} interleavings", seen.len());
}

#[test]
fn nonzero_seed_runs_some_work_early() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = Stream::non_blocking();
    moe_emulator::set_seed(3);
    for value in 0..40 {
        assert_eq!(append(stream.0, at, value), CUresult::CUDA_SUCCESS);
    }
    let waiting = moe_emulator::counters().unfinished;
    moe_emulator::set_seed(0);
    assert!(waiting > 0 && waiting < 40, "{waiting} of 40 are waiting");
    assert_eq!(entries(&context, &log), (0..40).collect::<Vec<_>>());
}

#[test]
fn queue_is_bounded() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = Stream::non_blocking();
    for _ in 0..3000 {
        // SAFETY: the log is large enough.
        let set = unsafe { sys::cuMemsetD8Async(at, 0, 4, stream.0) };
        assert_eq!(set, CUresult::CUDA_SUCCESS);
    }
    assert!(moe_emulator::counters().unfinished <= 1024);
    context.synchronize().expect("nothing failed");
}

#[test]
fn legacy_and_blocking_streams_wait_for_each_other() {
    let context = own_context();
    for seed in 0..40 {
        moe_emulator::set_seed(seed);
        let log = new_log(&context);
        let at = address(&log, &context.default_stream());
        let (a, b) = (Stream::blocking(), Stream::blocking());
        let legacy = ptr::without_provenance_mut(1);
        let per_thread = ptr::without_provenance_mut(2);
        assert_eq!(append(a.0, at, 1), CUresult::CUDA_SUCCESS);
        assert_eq!(append(ptr::null_mut(), at, 2), CUresult::CUDA_SUCCESS);
        assert_eq!(append(b.0, at, 3), CUresult::CUDA_SUCCESS);
        assert_eq!(append(legacy, at, 4), CUresult::CUDA_SUCCESS);
        assert_eq!(append(per_thread, at, 5), CUresult::CUDA_SUCCESS);
        assert_eq!(append(ptr::null_mut(), at, 6), CUresult::CUDA_SUCCESS);
        assert_eq!(entries(&context, &log), [1, 2, 3, 4, 5, 6], "seed {seed}");
    }
}

#[test]
fn legacy_stream_waits_for_destroyed_blocking_streams() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = Stream::blocking();
    assert_eq!(append(stream.0, at, 1), CUresult::CUDA_SUCCESS);
    drop(stream);
    assert_eq!(append(ptr::null_mut(), at, 2), CUresult::CUDA_SUCCESS);
    // SAFETY: the legacy stream is always valid.
    assert_eq!(unsafe { sys::cuStreamSynchronize(ptr::null_mut()) }, CUresult::CUDA_SUCCESS);
    assert_eq!(entries(&context, &log), [1, 2]);
}

#[test]
fn non_blocking_streams_ignore_the_legacy_stream() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = Stream::non_blocking();
    assert_eq!(append(ptr::null_mut(), at, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(append(stream.0, at, 2), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(entries(&context, &log), [2, 1]);
}

#[test]
fn stream_properties_are_reported() {
    let context = own_context();
    let (mut least, mut greatest) = (0, 0);
    let (mut raw, mut priority, mut flags) = (ptr::null_mut(), 0, 0);
    let mut owner = ptr::null_mut();
    // SAFETY: the pointers are valid for the calls.
    unsafe {
        let range = sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest);
        assert_eq!(range, CUresult::CUDA_SUCCESS);
        let created = sys::cuStreamCreateWithPriority(&mut raw, 1, greatest - 10);
        assert_eq!(created, CUresult::CUDA_SUCCESS);
        let stream = Stream(raw);
        assert_eq!(sys::cuStreamGetPriority(stream.0, &mut priority), CUresult::CUDA_SUCCESS);
        assert_eq!(priority, greatest, "clamped");
        assert_eq!(sys::cuStreamGetFlags(stream.0, &mut flags), CUresult::CUDA_SUCCESS);
        assert_eq!(flags, 1);
        assert_eq!(sys::cuStreamGetCtx(stream.0, &mut owner), CUresult::CUDA_SUCCESS);
        assert_eq!(owner, context.cu_ctx());
        assert_eq!(sys::cuStreamCreate(&mut raw, 8), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

static CALLS: AtomicI32 = AtomicI32::new(0);

unsafe extern "C" fn count_call(result: *mut c_void) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the test passes a place for a code, and calling the driver here is refused.
    unsafe {
        let mut pointer = 0;
        *result.cast::<CUresult>() = sys::cuMemAlloc_v2(&mut pointer, 4);
    }
}

#[test]
fn host_functions_run_in_stream_order_and_may_not_call_the_driver() {
    let _context = own_context();
    let stream = Stream::non_blocking();
    let mut result = CUresult::CUDA_SUCCESS;
    let to = ptr::from_mut(&mut result);
    // SAFETY: the place outlives the stream's work.
    let launched = unsafe { sys::cuLaunchHostFunc(stream.0, Some(count_call), to.cast()) };
    assert_eq!(launched, CUresult::CUDA_SUCCESS);
    assert_eq!(CALLS.load(Ordering::Relaxed), 0);
    let event = Event::recorded(&stream);
    assert_eq!(event.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(CALLS.load(Ordering::Relaxed), 1);
    // SAFETY: the work is done.
    assert_eq!(unsafe { to.read_volatile() }, CUresult::CUDA_ERROR_NOT_PERMITTED);
}
