//! Test controls of launches: a log, a planted fault, and omitted blocks.

use cudarc::driver::sys::CUresult;

use crate::common::{
    Shape, Stream, address, append, entries, function, launch, new_log, own_context, pointer_to,
    scale,
};
use crate::process::run_alone;

const FAILED: CUresult = CUresult::CUDA_ERROR_LAUNCH_FAILED;

/// Only the last blocks of a grid run, under every schedule; a launch without remaining blocks
/// fails.
#[test]
fn blocks_can_be_left_out() {
    let context = own_context();
    let stream = context.new_stream().expect("a stream");
    let x = stream.clone_htod(&vec![1f32; 64 * 10]).expect("a copy");
    let (left_out, ran) = (64 * 7, 64 * 3);
    for (seed, threads) in [(0, 1), (1, 1), (2, 3)] {
        moe_emulator::set_seed(seed);
        moe_emulator::set_os_threads(threads);
        let y = stream.alloc_zeros::<f32>(64 * 10).expect("memory");
        let (to, from) = (address(&y, &stream), address(&x, &stream));
        moe_emulator::leave_out_blocks(7);
        assert_eq!(scale(stream.cu_stream(), to, from, 2.0, 640), CUresult::CUDA_SUCCESS);
        moe_emulator::leave_out_blocks(0);
        let wanted = [vec![0f32; left_out], vec![2.0; ran]].concat();
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), wanted, "seed {seed}");
        assert_eq!(scale(stream.cu_stream(), to, from, 3.0, 640), CUresult::CUDA_SUCCESS);
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), [3.0; 640], "all run again");
    }
    moe_emulator::set_seed(0);
    moe_emulator::set_os_threads(1);
    let failing = Stream::non_blocking();
    moe_emulator::leave_out_blocks(10);
    let (to, from) = (address(&x, &stream), address(&x, &stream));
    assert_eq!(scale(failing.0, to, from, 2.0, 640), CUresult::CUDA_SUCCESS);
    moe_emulator::leave_out_blocks(0);
    assert_eq!(failing.synchronize(), FAILED);
    let report = moe_emulator::last_error().expect("a report");
    assert!(report.contains("all of its 10 blocks are left out"), "{report}");
    moe_emulator::clear_errors();
}

/// Each executed kernel is logged once; a kernel that failed, or was captured and never launched,
/// is not.
#[test]
fn executed_kernels_are_logged_once() {
    let file = std::env::temp_dir().join(format!("moe-launches-{}", std::process::id()));
    std::fs::write(&file, "before\n").expect("a file");
    let path = file.to_str().expect("a name");
    run_alone("observe::child_with_a_log", &[("MOE_EMULATOR_LAUNCHES", path)]);
    let log = std::fs::read_to_string(&file).expect("a log");
    let _ = std::fs::remove_file(&file);
    let mut lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.remove(0), "before", "a log is appended to");
    lines.sort_unstable();
    assert_eq!(lines, ["emu_ok_append", "emu_ok_scale"]);
    let invalid_path = [("MOE_EMULATOR_LAUNCHES", "/no/such/folder/log")];
    run_alone("observe::child_whose_launches_fail", &invalid_path);
}

#[test]
#[ignore = "run by executed_kernels_are_logged_once"]
fn child_with_a_log() {
    let context = own_context();
    let log = new_log(&context);
    let stream = Stream::non_blocking();
    let at = address(&log, &context.default_stream());
    for value in 0..3 {
        assert_eq!(append(stream.0, at, value), CUresult::CUDA_SUCCESS);
    }
    assert_eq!(scale(stream.0, at, at, 1.0, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
    let nothing = function("emu_ok_nothing");
    assert_eq!(stream.begin_capture(), CUresult::CUDA_SUCCESS);
    let one = Shape([1, 1, 1], [1, 1, 1], 0);
    assert_eq!(launch(nothing, stream.0, one, &mut []), CUresult::CUDA_SUCCESS);
    stream.end_capture().expect("a graph");
    let write_at = function("emu_bug_write_at");
    let mut parameters = [pointer_to(&at), pointer_to(&(1i64 << 40)), pointer_to(&1i32)];
    assert_eq!(launch(write_at, stream.0, one, &mut parameters), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn planted_faults_change_results_or_fail_launches() {
    run_alone("observe::child_with_a_flip", &[("MOE_EMULATOR_FAULT", "flip:emu_ok_scale")]);
    for fault in ["fail:emu_ok_scale", "flip:no_such_kernel", "flip", "flap:emu_ok_scale"] {
        run_alone("observe::child_whose_launches_fail", &[("MOE_EMULATOR_FAULT", fault)]);
    }
}

#[test]
#[ignore = "run by planted_faults_change_results_or_fail_launches"]
fn child_with_a_flip() {
    let context = own_context();
    let log = new_log(&context);
    let stream = context.new_stream().expect("a stream");
    let x = stream.clone_htod(&[1f32, 2.0]).expect("a copy");
    let y = stream.alloc_zeros::<f32>(2).expect("memory");
    let (to, from) = (address(&y, &stream), address(&x, &stream));
    assert_eq!(scale(stream.cu_stream(), to, from, 2.0, 2), CUresult::CUDA_SUCCESS);
    let got = stream.clone_dtoh(&y).expect("a copy");
    assert_eq!(got, [f32::from_bits(2f32.to_bits() ^ 1 << 14), 4.0]);
    let at = address(&log, &context.default_stream());
    assert_eq!(append(stream.cu_stream(), at, 7), CUresult::CUDA_SUCCESS);
    assert_eq!(entries(&context, &log), [7], "other kernels are right");
}

#[test]
#[ignore = "run by the tests above"]
fn child_whose_launches_fail() {
    let context = own_context();
    let log = new_log(&context);
    let stream = Stream::non_blocking();
    let at = address(&log, &context.default_stream());
    assert_eq!(scale(stream.0, at, at, 1.0, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), FAILED);
    let report = moe_emulator::last_error().expect("a report");
    assert!(report.contains("MOE_EMULATOR_"), "{report}");
}
