//! Stream capture: the streams that take part, the calls that a capture forbids, and its end.

use std::ptr;

use cudarc::driver::sys::{
    self, CUresult, CUstreamCaptureMode as Mode, CUstreamCaptureStatus as Status,
};

use crate::common::{Event, Stream, address, append, load_module, new_log, own_context};

const INVALIDATED: Result<sys::CUgraph, CUresult> =
    Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
const UNSUPPORTED: CUresult = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;

fn capturing() -> Stream {
    let stream = Stream::non_blocking();
    assert_eq!(stream.begin_capture(), CUresult::CUDA_SUCCESS);
    stream
}

#[test]
fn capture_does_not_execute_work() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = capturing();
    assert_eq!(stream.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    // SAFETY: the log is large enough.
    let captured = unsafe { sys::cuMemsetD32Async(at, 1, 1, stream.0) };
    assert_eq!(captured, CUresult::CUDA_SUCCESS);
    assert!(stream.end_capture().is_ok());
    assert_eq!(stream.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_NONE);
    assert_eq!(stream.query(), CUresult::CUDA_SUCCESS);
    assert_eq!(crate::common::entries(&context, &log), []);
}

#[test]
fn waiting_during_a_capture_invalidates_it() {
    type Forbidden = fn(&Stream) -> CUresult;
    let forbidden: [(&str, Forbidden); 10] = [
        ("cuStreamSynchronize", |stream| stream.synchronize()),
        ("cuStreamQuery", |stream| stream.query()),
        // SAFETY: the functions have no preconditions; they allocate nothing.
        ("cuCtxSynchronize", |_| unsafe { sys::cuCtxSynchronize() }),
        // SAFETY: as above.
        ("cuMemAlloc", |_| unsafe { sys::cuMemAlloc_v2(&mut 0, 4) }),
        // SAFETY: as above.
        ("cuMemAllocAsync", |stream| unsafe { sys::cuMemAllocAsync(&mut 0, 4, stream.0) }),
        // SAFETY: as above.
        ("cuMemFree", |_| unsafe { sys::cuMemFree_v2(256) }),
        // SAFETY: as above.
        ("cuMemFreeAsync", |stream| unsafe { sys::cuMemFreeAsync(256, stream.0) }),
        // SAFETY: as above.
        ("cuMemHostAlloc", |_| unsafe { sys::cuMemHostAlloc(&mut ptr::null_mut(), 4, 0) }),
        // SAFETY: as above.
        ("cuMemcpyDtoD", |_| unsafe { sys::cuMemcpyDtoD_v2(256, 256, 4) }),
        // SAFETY: as above; a null image is not read.
        ("cuModuleLoadData", |_| unsafe {
            sys::cuModuleLoadData(&mut ptr::null_mut(), ptr::null())
        }),
    ];
    let context = own_context();
    for (name, call) in forbidden {
        let stream = capturing();
        assert_eq!(call(&stream), UNSUPPORTED, "{name}");
        assert_eq!(stream.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_INVALIDATED, "{name}");
        assert_eq!(stream.end_capture(), INVALIDATED, "{name}");
        assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS, "{name}: the stream is usable");
    }
    context.synchronize().expect("nothing failed");
}

/// The first look-up of a kernel may load it. A known kernel may be looked up at any time.
#[test]
fn first_function_look_up_is_refused_while_capturing() {
    let context = own_context();
    let module = load_module();
    let find = |name: &std::ffi::CStr| {
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded and the name is a C string.
        unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) }
    };
    assert_eq!(find(c"emu_ok_scale"), CUresult::CUDA_SUCCESS);
    let stream = capturing();
    assert_eq!(find(c"emu_ok_scale"), CUresult::CUDA_SUCCESS, "known");
    assert_eq!(stream.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    assert_eq!(find(c"emu_ok_append"), UNSUPPORTED);
    assert_eq!(stream.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    assert_eq!(stream.end_capture(), INVALIDATED);
    assert_eq!(find(c"emu_ok_append"), CUresult::CUDA_SUCCESS, "no capture in progress");
    let stream = capturing();
    std::thread::scope(|scope| {
        let (context, module) = (&context, module as usize);
        scope.spawn(move || {
            context.bind_to_thread().expect("the context is valid");
            let (mut function, name) = (ptr::null_mut(), c"emu_bug_write_at");
            // SAFETY: the module is loaded and the name is a C string.
            let found = unsafe {
                sys::cuModuleGetFunction(&mut function, module as sys::CUmodule, name.as_ptr())
            };
            assert_eq!(found, CUresult::CUDA_SUCCESS, "another thread's capture does not matter");
        });
    });
    assert!(stream.end_capture().is_ok());
}

#[test]
fn invalid_capture_refuses_further_work() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = capturing();
    assert_eq!(stream.synchronize(), UNSUPPORTED);
    let invalidated = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    assert_eq!(fill(&stream, at), invalidated);
    assert_eq!(Event::new().record(stream.0), invalidated);
    assert_eq!(stream.end_capture(), INVALIDATED);
}

/// Captures a fill, which needs no function look-up (a capture forbids those).
fn fill(stream: &Stream, at: u64) -> CUresult {
    // SAFETY: the log is large enough.
    unsafe { sys::cuMemsetD8Async(at, 0, 4, stream.0) }
}

#[test]
fn host_cannot_wait_for_captured_events() {
    let _context = own_context();
    let stream = capturing();
    let event = Event::recorded(&stream);
    assert_eq!(event.query(), CUresult::CUDA_ERROR_CAPTURED_EVENT);
    assert_eq!(stream.end_capture(), INVALIDATED);
    let stream = capturing();
    let event = Event::recorded(&stream);
    assert_eq!(event.synchronize(), CUresult::CUDA_ERROR_CAPTURED_EVENT);
    assert_eq!(stream.end_capture(), INVALIDATED);
    assert_eq!(stream.wait(&event), CUresult::CUDA_ERROR_CAPTURED_EVENT, "the capture has ended");
}

#[test]
fn waiting_for_an_uncaptured_event_is_refused() {
    let _context = own_context();
    let other = Stream::non_blocking();
    let event = Event::recorded(&other);
    let stream = capturing();
    assert_eq!(stream.wait(&Event::new()), CUresult::CUDA_SUCCESS, "never recorded");
    assert_eq!(stream.wait(&event), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(stream.end_capture(), INVALIDATED);
}

#[test]
fn unjoined_fork_is_an_error() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let fork = Stream::non_blocking();
    let stream = capturing();
    assert_eq!(fork.wait(&Event::recorded(&stream)), CUresult::CUDA_SUCCESS);
    assert_eq!(fork.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    assert_eq!(fill(&fork, at), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.end_capture(), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
    assert_eq!(fork.capture_status(), Status::CU_STREAM_CAPTURE_STATUS_NONE);
}

#[test]
fn captures_cannot_be_merged() {
    let _context = own_context();
    let (a, b) = (capturing(), capturing());
    let event = Event::recorded(&a);
    assert_eq!(b.wait(&event), CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE);
    assert_eq!(a.end_capture(), INVALIDATED);
    assert_eq!(b.end_capture(), INVALIDATED);
}

#[test]
fn capture_must_end_on_its_own_stream() {
    let _context = own_context();
    let fork = Stream::non_blocking();
    assert_eq!(fork.end_capture(), Err(CUresult::CUDA_ERROR_ILLEGAL_STATE), "not capturing");
    let stream = capturing();
    assert_eq!(stream.begin_capture(), CUresult::CUDA_ERROR_ILLEGAL_STATE, "twice");
    assert_eq!(fork.wait(&Event::recorded(&stream)), CUresult::CUDA_SUCCESS);
    assert_eq!(fork.end_capture(), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED));
    assert_eq!(stream.end_capture(), INVALIDATED);
}

#[test]
fn capture_must_end_on_its_thread_unless_relaxed() {
    let context = own_context();
    for (mode, expected) in [
        (Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, false),
        (Mode::CU_STREAM_CAPTURE_MODE_RELAXED, true),
    ] {
        let stream = Stream::non_blocking();
        assert_eq!(stream.begin_capture_in(mode), CUresult::CUDA_SUCCESS);
        std::thread::scope(|scope| {
            let raw = stream.0 as usize;
            let context = &context;
            scope.spawn(move || {
                context.bind_to_thread().expect("the context is valid");
                let stream = std::mem::ManuallyDrop::new(Stream(raw as sys::CUstream));
                let ended = stream.end_capture();
                assert_eq!(ended.is_ok(), expected, "{mode:?}");
                if let Err(error) = ended {
                    assert_eq!(error, CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
                }
            });
        });
        if !expected {
            assert!(stream.end_capture().is_ok());
        }
    }
}

#[test]
fn relaxed_capture_forbids_fewer_calls() {
    let context = own_context();
    let stream = Stream::non_blocking();
    let relaxed = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
    assert_eq!(stream.begin_capture_in(relaxed), CUresult::CUDA_SUCCESS);
    let module = load_module();
    // SAFETY: the module is loaded.
    assert_eq!(unsafe { sys::cuModuleUnload(module) }, CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), UNSUPPORTED, "the capturing stream cannot be waited for");
    assert_eq!(stream.end_capture(), INVALIDATED);
    let mut mode = relaxed;
    let stream = capturing();
    // SAFETY: the pointer is valid for the calls.
    unsafe {
        assert_eq!(sys::cuThreadExchangeStreamCaptureMode(&mut mode), CUresult::CUDA_SUCCESS);
        assert_eq!(mode, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
        load_module();
        assert_eq!(sys::cuThreadExchangeStreamCaptureMode(&mut mode), CUresult::CUDA_SUCCESS);
        assert_eq!(mode, relaxed);
    }
    assert!(stream.end_capture().is_ok());
    context.synchronize().expect("nothing failed");
}

#[test]
fn legacy_stream_conflicts_with_captures() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let legacy = std::mem::ManuallyDrop::new(Stream(ptr::null_mut()));
    assert_eq!(legacy.begin_capture(), UNSUPPORTED);
    let blocking = Stream::blocking();
    assert_eq!(blocking.begin_capture(), CUresult::CUDA_SUCCESS);
    let implicit = CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    assert_eq!(fill(&legacy, at), implicit);
    assert_eq!(blocking.end_capture(), INVALIDATED);
    let stream = capturing();
    assert_eq!(fill(&legacy, at), CUresult::CUDA_SUCCESS, "a non-blocking stream is independent");
    assert!(stream.end_capture().is_ok());
    assert_eq!(append(ptr::null_mut(), at, 1), CUresult::CUDA_SUCCESS);
}
