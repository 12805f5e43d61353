//! Many OS threads at once, as in a test harness.

use std::sync::Barrier;

use cudarc::driver::sys::CUresult;

use crate::common::{
    Stream, address, append, entries, new_log, own_context, scale, shared_context,
};

#[test]
fn threads_with_own_streams_are_independent() {
    let context = shared_context();
    std::thread::scope(|scope| {
        for thread in 0..8u16 {
            let context = &context;
            scope.spawn(move || {
                moe_emulator::set_seed(u64::from(thread));
                for round in 0..20u16 {
                    let stream = context.new_stream().expect("a stream");
                    let value = f32::from(thread * 100 + round);
                    let x = stream.clone_htod(&[value; 64]).expect("a copy");
                    let y = stream.alloc_zeros::<f32>(64).expect("memory");
                    let (to, from) = (address(&y, &stream), address(&x, &stream));
                    let raw = stream.cu_stream();
                    assert_eq!(scale(raw, to, from, 2.0, 64), CUresult::CUDA_SUCCESS);
                    let back = stream.clone_dtoh(&y).expect("a copy");
                    assert_eq!(back, [2.0 * value; 64]);
                }
            });
        }
    });
}

#[test]
fn threads_share_a_default_stream() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let start = Barrier::new(6);
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (context, start) = (&context, &start);
            scope.spawn(move || {
                context.bind_to_thread().expect("the context is valid");
                moe_emulator::set_seed(thread);
                start.wait();
                for value in 0..20 {
                    let value = i32::try_from(thread).expect("small") * 100 + value;
                    assert_eq!(append(std::ptr::null_mut(), at, value), CUresult::CUDA_SUCCESS);
                    if value % 7 == 0 {
                        context.default_stream().synchronize().expect("nothing failed");
                    }
                }
            });
        }
    });
    let all = entries(&context, &log);
    assert_eq!(all.len(), 120);
    for thread in 0..6 {
        let own: Vec<i32> = all.iter().copied().filter(|value| value / 100 == thread).collect();
        let expected: Vec<i32> = (0..20).map(|value| thread * 100 + value).collect();
        assert_eq!(own, expected, "one thread's launches keep their order");
    }
}

#[test]
fn threads_wait_for_each_others_streams() {
    let context = own_context();
    for seed in 0..10 {
        let log = new_log(&context);
        let at = address(&log, &context.default_stream());
        let streams: Vec<Stream> = (0..4).map(|_| Stream::non_blocking()).collect();
        // Each stream waits for the one before it, so a thread that synchronises one stream
        // executes other threads' work.
        for (i, stream) in streams.iter().enumerate() {
            if i > 0 {
                let event = crate::common::Event::recorded(&streams[i - 1]);
                assert_eq!(stream.wait(&event), CUresult::CUDA_SUCCESS);
            }
            for j in 0..5 {
                let value = i32::try_from(i * 5 + j).expect("small");
                assert_eq!(append(stream.0, at, value), CUresult::CUDA_SUCCESS);
            }
        }
        std::thread::scope(|scope| {
            for stream in &streams {
                let (raw, context) = (stream.0 as usize, &context);
                scope.spawn(move || {
                    context.bind_to_thread().expect("the context is valid");
                    moe_emulator::set_seed(seed);
                    let stream = std::mem::ManuallyDrop::new(Stream(raw as _));
                    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
                });
            }
        });
        assert_eq!(entries(&context, &log), (0..20).collect::<Vec<_>>());
    }
}
