//! Allocations, copies and fills, and when the host may access memory.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use crate::common::{Stream, address, own_context, shared_context};

#[test]
fn copies_round_trip() {
    let context = shared_context();
    let stream = context.new_stream().expect("a stream");
    let values: Vec<f32> = (0..1000u16).map(f32::from).collect();
    let x = stream.clone_htod(&values).expect("a copy");
    let mut y = stream.alloc_zeros::<f32>(1000).expect("memory");
    stream.memcpy_dtod(&x, &mut y).expect("a copy");
    assert_eq!(stream.clone_dtoh(&y).expect("a copy"), values);
    let part = stream.clone_dtoh(&x.slice(10..12)).expect("a copy");
    assert_eq!(part, [10.0, 11.0]);
}

#[test]
fn fresh_memory_is_poisoned() {
    let stream = own_context().new_stream().expect("a stream");
    // SAFETY: every bit pattern is a valid byte.
    let memory = unsafe { stream.alloc::<u8>(333) }.expect("memory");
    assert!(stream.clone_dtoh(&memory).expect("a copy").iter().all(|byte| *byte == 0xff));
}

#[test]
fn fills_have_three_widths() {
    let context = own_context();
    let stream = context.default_stream();
    let memory = stream.alloc_zeros::<u8>(16).expect("memory");
    let at = address(&memory, &stream);
    // SAFETY: the addresses lie in the allocation, or the driver refuses them.
    unsafe {
        assert_eq!(sys::cuMemsetD8_v2(at, 1, 3), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemsetD16_v2(at + 4, 0x0302, 2), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemsetD32_v2(at + 8, 0x0706_0504, 2), CUresult::CUDA_SUCCESS);
        let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
        assert_eq!(sys::cuMemsetD16_v2(at + 1, 0, 1), refused, "misaligned");
        assert_eq!(sys::cuMemsetD32_v2(at + 2, 0, 1), refused, "misaligned");
        assert_eq!(sys::cuMemsetD8_v2(at + 1, 0, 16), refused, "beyond the end");
        assert_eq!(sys::cuMemsetD32_v2(at, 0, usize::MAX), refused, "overflow");
    }
    let bytes = stream.clone_dtoh(&memory).expect("a copy");
    assert_eq!(bytes, [1, 1, 1, 0, 2, 3, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]);
}

#[test]
fn copies_outside_of_allocations_are_refused() {
    let context = own_context();
    let stream = context.default_stream();
    let memory = stream.alloc_zeros::<u8>(100).expect("memory");
    let at = address(&memory, &stream);
    let mut host = [0u8; 200];
    let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
    // SAFETY: the host's side is large enough, and the driver refuses the device's.
    unsafe {
        let from = host.as_ptr().cast::<c_void>();
        assert_eq!(sys::cuMemcpyHtoD_v2(at, from, 101), refused);
        assert_eq!(sys::cuMemcpyHtoD_v2(at + 1, from, 100), refused);
        assert_eq!(sys::cuMemcpyHtoDAsync_v2(at - 1, from, 2, ptr::null_mut()), refused);
        assert_eq!(sys::cuMemcpyHtoD_v2(0, from, 1), refused);
        let to = host.as_mut_ptr().cast::<c_void>();
        assert_eq!(sys::cuMemcpyDtoH_v2(to, at + 100, 1), refused);
        assert_eq!(sys::cuMemcpyDtoD_v2(at, at + 60, 41), refused);
        assert_eq!(sys::cuMemcpyDtoD_v2(at, at + 60, 40), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemcpyHtoD_v2(at, from, 0), CUresult::CUDA_SUCCESS);
    }
}

#[test]
fn allocations_are_checked() {
    let _context = own_context();
    let mut pointer = 0;
    // SAFETY: the pointer is valid for the calls; no memory is touched.
    unsafe {
        let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
        assert_eq!(sys::cuMemAlloc_v2(&mut pointer, 0), refused);
        assert_eq!(sys::cuMemAllocAsync(&mut pointer, 0, ptr::null_mut()), refused);
        let huge = 1 << 50;
        let none = CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        assert_eq!(sys::cuMemAlloc_v2(&mut pointer, huge), none);
        assert_eq!(sys::cuMemFree_v2(0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemFree_v2(12345), refused);
        assert_eq!(sys::cuMemAlloc_v2(&mut pointer, 64), CUresult::CUDA_SUCCESS);
        assert_eq!(pointer % 256, 0);
        assert_eq!(sys::cuMemFree_v2(pointer + 4), refused, "not the start");
        assert_eq!(sys::cuMemFreeAsync(pointer, ptr::null_mut()), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemFreeAsync(pointer, ptr::null_mut()), refused, "twice");
        assert_eq!(sys::cuMemFree_v2(pointer), refused, "twice");
        assert_eq!(sys::cuMemsetD8_v2(pointer, 0, 1), refused, "after the free");
    }
}

#[test]
fn stream_ordered_free_follows_earlier_work() {
    let context = own_context();
    let stream = Stream::non_blocking();
    let (mut pointer, mut byte) = (0, 0u8);
    // SAFETY: the memory is used in stream order only.
    unsafe {
        assert_eq!(sys::cuMemAllocAsync(&mut pointer, 64, stream.0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemsetD8Async(pointer, 7, 64, stream.0), CUresult::CUDA_SUCCESS);
        let to = ptr::from_mut(&mut byte).cast();
        assert_eq!(sys::cuMemcpyDtoHAsync_v2(to, pointer, 1, stream.0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemFreeAsync(pointer, stream.0), CUresult::CUDA_SUCCESS);
    }
    assert_eq!(byte, 7, "a copy to pageable memory is done when the call returns");
    context.synchronize().expect("nothing failed");
}

#[test]
fn pageable_source_is_read_before_the_call_returns() {
    let context = own_context();
    let stream = Stream::non_blocking();
    let memory = context.default_stream().alloc_zeros::<u8>(4).expect("memory");
    context.synchronize().expect("nothing failed");
    let at = address(&memory, &context.default_stream());
    let mut host = [1u8, 2, 3, 4];
    // SAFETY: both sides have four bytes.
    let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(at, host.as_ptr().cast(), 4, stream.0) };
    assert_eq!(copied, CUresult::CUDA_SUCCESS);
    host.fill(9);
    std::hint::black_box(&host);
    context.synchronize().expect("nothing failed");
    let copy = context.default_stream().clone_dtoh(&memory).expect("a copy");
    assert_eq!(copy, [1, 2, 3, 4]);
}

#[test]
fn pinned_memory_is_accessed_in_stream_order() {
    let context = own_context();
    let stream = Stream::non_blocking();
    let memory = context.default_stream().alloc_zeros::<u8>(4).expect("memory");
    context.synchronize().expect("nothing failed");
    let at = address(&memory, &context.default_stream());
    let mut host = ptr::null_mut();
    // SAFETY: both sides have four bytes, and the host waits before it looks.
    unsafe {
        assert_eq!(sys::cuMemHostAlloc(&mut host, 8, 0), CUresult::CUDA_SUCCESS);
        let bytes = host.cast::<u8>();
        bytes.write_bytes(1, 8);
        assert_eq!(sys::cuMemcpyHtoDAsync_v2(at, host, 4, stream.0), CUresult::CUDA_SUCCESS);
        bytes.write_bytes(2, 8);
        let back = bytes.add(4).cast();
        assert_eq!(sys::cuMemcpyDtoHAsync_v2(back, at, 4, stream.0), CUresult::CUDA_SUCCESS);
        bytes.add(4).write_bytes(3, 4);
        assert_eq!(bytes.add(4).read(), 3, "no work has run yet");
        assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
        assert_eq!(bytes.add(4).read(), 2, "the source's value when the stream ran");
        assert_eq!(sys::cuMemFreeHost(host), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemFreeHost(host), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn host_memory_is_registered_once() {
    let _context = own_context();
    let mut host = vec![0u8; 100];
    let start = host.as_mut_ptr().cast::<c_void>();
    // SAFETY: the memory outlives the registration.
    unsafe {
        assert_eq!(sys::cuMemHostRegister_v2(start, 100, 0), CUresult::CUDA_SUCCESS);
        let again = CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
        assert_eq!(sys::cuMemHostRegister_v2(start, 10, 0), again);
        assert_eq!(sys::cuMemHostUnregister(start), CUresult::CUDA_SUCCESS);
        let unknown = CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
        assert_eq!(sys::cuMemHostUnregister(start), unknown);
    }
}

#[test]
fn pointer_attributes_are_reported() {
    use sys::CUpointer_attribute as Attribute;
    let context = own_context();
    let stream = context.default_stream();
    let memory = stream.alloc_zeros::<u8>(100).expect("memory");
    let at = address(&memory, &stream);
    let ask = |attribute, pointer| {
        let mut value = 0u64;
        let to = ptr::from_mut(&mut value).cast();
        // SAFETY: every requested attribute fits in eight bytes.
        let result = unsafe { sys::cuPointerGetAttribute(to, attribute, pointer) };
        (result == CUresult::CUDA_SUCCESS).then_some(value)
    };
    assert_eq!(ask(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at + 7), Some(2));
    assert_eq!(ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, at + 7), Some(at));
    assert_eq!(ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, at + 7), Some(100));
    assert_eq!(ask(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at + 100), None);
    assert_eq!(ask(Attribute::CU_POINTER_ATTRIBUTE_HOST_POINTER, at), None);
}

#[test]
fn dropping_everything_frees_all_memory() {
    // Other tests allocate too, so this one counts in a process of its own.
    crate::process::run_alone("memory::child_drops_everything", &[]);
}

#[test]
#[ignore = "run by dropping_everything_frees_all_memory"]
fn child_drops_everything() {
    let context = shared_context();
    for seed in 0..20 {
        moe_emulator::set_seed(seed);
        let stream = context.new_stream().expect("a stream");
        let x = stream.alloc_zeros::<f32>(1000).expect("memory");
        let y = x.try_clone().expect("a copy");
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), [0.0; 1000]);
    }
    context.synchronize().expect("nothing failed");
    let counters = moe_emulator::counters();
    assert_eq!((counters.live_allocations, counters.live_bytes, counters.unfinished), (0, 0, 0));
}
