//! Events: their state, their time, and the order that they impose.

use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use crate::common::{Event, Stream, address, append, entries, new_log, own_context};

#[test]
fn event_is_ready_after_its_work() {
    let context = own_context();
    let log = new_log(&context);
    let stream = Stream::non_blocking();
    let at = address(&log, &context.default_stream());
    let event = Event::new();
    assert_eq!(event.query(), CUresult::CUDA_SUCCESS, "never recorded");
    assert_eq!(event.synchronize(), CUresult::CUDA_SUCCESS, "never recorded");
    assert_eq!(append(stream.0, at, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(event.record(stream.0), CUresult::CUDA_SUCCESS);
    assert_eq!(event.query(), CUresult::CUDA_ERROR_NOT_READY, "no thread has waited for it");
    assert_eq!(event.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(event.query(), CUresult::CUDA_SUCCESS);
    assert_eq!(entries(&context, &log), [1]);
}

#[test]
fn polling_an_event_terminates() {
    let context = own_context();
    let log = new_log(&context);
    let stream = Stream::non_blocking();
    let at = address(&log, &context.default_stream());
    for value in 0..5 {
        assert_eq!(append(stream.0, at, value), CUresult::CUDA_SUCCESS);
    }
    let event = Event::recorded(&stream);
    let polls = (0..100).take_while(|_| event.query() == CUresult::CUDA_ERROR_NOT_READY).count();
    assert_eq!(polls, 6, "five launches and the record");
    assert_eq!(stream.query(), CUresult::CUDA_SUCCESS);
}

#[test]
fn wait_uses_the_latest_earlier_record() {
    let context = own_context();
    for seed in 0..30 {
        moe_emulator::set_seed(seed);
        let log = new_log(&context);
        let at = address(&log, &context.default_stream());
        let (a, b) = (Stream::non_blocking(), Stream::non_blocking());
        assert_eq!(append(a.0, at, 1), CUresult::CUDA_SUCCESS);
        let event = Event::recorded(&a);
        assert_eq!(b.wait(&event), CUresult::CUDA_SUCCESS);
        assert_eq!(append(b.0, at, 2), CUresult::CUDA_SUCCESS);
        // A new record does not change the record that b waits for, which would be a deadlock here.
        assert_eq!(a.wait(&Event::recorded(&b)), CUresult::CUDA_SUCCESS);
        assert_eq!(event.record(a.0), CUresult::CUDA_SUCCESS);
        assert_eq!(append(a.0, at, 3), CUresult::CUDA_SUCCESS);
        assert_eq!(entries(&context, &log), [1, 2, 3], "seed {seed}");
    }
}

#[test]
fn waiting_for_an_unrecorded_event_has_no_effect() {
    let _context = own_context();
    let stream = Stream::non_blocking();
    assert_eq!(stream.wait(&Event::new()), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.query(), CUresult::CUDA_SUCCESS);
}

#[test]
fn events_measure_elapsed_time() {
    let context = own_context();
    let stream = context.new_stream().expect("a stream");
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(timed).expect("an event");
    let end = stream.record_event(timed).expect("an event");
    assert!(start.elapsed_ms(&end).expect("both are recorded") >= 0.0);
    let untimed = stream.record_event(None).expect("an event");
    let error = start.elapsed_ms(&untimed).expect_err("no time");
    assert_eq!(error.0, CUresult::CUDA_ERROR_INVALID_HANDLE);
    let (first, second) = (Event::new(), Event::new());
    let elapsed = || {
        let mut milliseconds = 0.0;
        // SAFETY: the events are valid and the pointer is valid for the call.
        unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, first.0, second.0) }
    };
    assert_eq!(elapsed(), CUresult::CUDA_ERROR_INVALID_HANDLE, "never recorded");
    assert_eq!(first.record(ptr::null_mut()), CUresult::CUDA_SUCCESS);
    assert_eq!(second.record(ptr::null_mut()), CUresult::CUDA_SUCCESS);
    assert_eq!(elapsed(), CUresult::CUDA_ERROR_NOT_READY);
    assert_eq!(second.synchronize(), CUresult::CUDA_SUCCESS);
    assert_eq!(elapsed(), CUresult::CUDA_SUCCESS);
}

#[test]
fn handles_are_checked() {
    let _context = own_context();
    let refused = CUresult::CUDA_ERROR_INVALID_HANDLE;
    let (stale_event, stale_stream) = (Event::new().0, Stream::non_blocking().0);
    let (event, stream) = (Event::new(), Stream::non_blocking());
    // SAFETY: the handles are stale on purpose; the driver must detect them.
    unsafe {
        assert_eq!(sys::cuEventRecord(stale_event, stream.0), refused);
        assert_eq!(sys::cuEventRecord(event.0, stale_stream), refused);
        assert_eq!(sys::cuEventQuery(stale_event), refused);
        assert_eq!(sys::cuEventSynchronize(stale_event), refused);
        assert_eq!(sys::cuEventDestroy_v2(stale_event), refused);
        assert_eq!(sys::cuStreamWaitEvent(stream.0, stale_event, 0), refused);
        assert_eq!(sys::cuStreamSynchronize(stale_stream), refused);
        assert_eq!(sys::cuStreamQuery(stale_stream), refused);
        assert_eq!(sys::cuStreamDestroy_v2(stale_stream), refused);
    }
    let _other = own_context();
    let foreign = Event::new();
    assert_eq!(foreign.record(stream.0), refused, "an event of another context");
}
