//! Kernels of kernels/counting.cu, whose counts follow from their source.

use moe_emulator::{GlobalTraffic, SharedTraffic, Traffic, WarpOperations};

use crate::common::{Shape, address};
use crate::measure::{Counting, Schedule};

const WARP: Shape = Shape([1, 1, 1], [32, 1, 1], 0);

/// Calls `work` with two zeroed buffers, for outputs and inputs.
fn with_buffers<R>(work: impl FnOnce(&Counting, u64, u64) -> R) -> R {
    let counting = Counting::new();
    let (y, x) = (counting.zeros(1 << 14), counting.zeros(1 << 14));
    work(&counting, address(&y, &counting.stream), address(&x, &counting.stream))
}

pub fn global(bytes: u64, requests: u64, sectors: u64, unique_sectors: u64) -> GlobalTraffic {
    GlobalTraffic { bytes, requests, sectors, unique_sectors }
}

pub fn shared(requests: u64, wavefronts: u64, ideal_wavefronts: u64) -> SharedTraffic {
    SharedTraffic { requests, wavefronts, ideal_wavefronts }
}

#[test]
fn word_accesses_count_their_sectors() {
    with_buffers(|counting, y, x| {
        // First word, stride, and the number of sectors of a warp's 32 words.
        for (first, stride, sectors) in [
            (0, 1, 4),
            (1, 1, 5),
            (8, 1, 4),
            (0, 0, 1),
            (0, 2, 8),
            (0, 7, 28),
            (0, 8, 32),
            (4, 64, 32),
        ] {
            let traffic = counting.count("emu_count_words", WARP, &[y, x, first, stride]);
            let read = global(128, 1, sectors, sectors);
            assert_eq!(traffic.global_read, read, "from {first} on, every {stride}th");
            assert_eq!(traffic.global_write, global(128, 1, 4, 4));
            assert_eq!(traffic.global_read.sectors_per_request(), sectors as f64);
            assert_eq!(traffic.dram_bytes(), (sectors + 4) * 32);
            assert_eq!(traffic.requested_bytes(), 256);
            assert_eq!((traffic.blocks, traffic.warps), (1, 1));
            assert_eq!(traffic.operations, WarpOperations::default());
        }
    });
}

#[test]
fn warps_add_up_and_share_sectors() {
    with_buffers(|counting, y, x| {
        // Three blocks of two warps; the second warp has 16 lanes. All read one word.
        let shape = Shape([3, 1, 1], [48, 1, 1], 0);
        let traffic = counting.count("emu_count_words", shape, &[y, x, 0, 0]);
        assert_eq!((traffic.blocks, traffic.warps), (3, 6));
        assert_eq!(traffic.global_read, global(144 * 4, 6, 6, 1));
        assert_eq!(traffic.global_write, global(144 * 4, 6, 3 * 4 + 3 * 2, 18));
    });
}

#[test]
fn sixteen_bytes_are_one_access() {
    with_buffers(|counting, y, x| {
        for elem in ["f32", "f16", "bf16"] {
            let traffic = counting.count(&format!("emu_count_vectors_{elem}"), WARP, &[y, x]);
            assert_eq!(traffic.global_read, global(512, 1, 16, 16), "{elem}");
            assert_eq!(traffic.global_write, global(512, 1, 16, 16), "{elem}");
        }
        let traffic = counting.count("emu_count_int4", WARP, &[y, x]);
        assert_eq!(traffic.global_read, global(512 + 256, 2, 24, 24));
        assert_eq!(traffic.global_write, global(512, 1, 16, 16));
    });
}

#[test]
fn struct_moves_in_pieces_of_its_alignment() {
    with_buffers(|counting, y, x| {
        let traffic = counting.count("emu_count_quads", WARP, &[y, x]);
        assert_eq!(traffic.global_read, global(512, 4, 4 * 16, 16));
        assert_eq!(traffic.global_write, global(512, 4, 4 * 16, 16));
    });
}

#[test]
fn lanes_may_take_different_numbers_of_iterations() {
    with_buffers(|counting, y, x| {
        let traffic = counting.count("emu_count_uneven", WARP, &[y, x]);
        // 24, 16 and 8 lanes in the loop's iterations, then all of them.
        assert_eq!(traffic.global_read, global((24 + 16 + 8 + 32) * 4, 4, 16, 12));
        assert_eq!(traffic.global_write, global(128, 1, 4, 4));
        assert_eq!(traffic.operations.warp_barriers, 1);
    });
}

/// Divergent loops, as documented in the README.
#[test]
fn rendezvous_of_the_warp_separates_requests() {
    with_buffers(|counting, y, x| {
        let separate = counting.count("emu_count_iterations", WARP, &[y, x, 1]);
        assert_eq!(separate.global_read, global(128, 2, 8, 4));
        assert_eq!(separate.global_write, global(128, 2, 8, 4));
        let joint = counting.count("emu_count_iterations", WARP, &[y, x, 0]);
        assert_eq!(joint.global_read, global(128, 1, 4, 4));
    });
}

#[test]
fn bank_conflicts_follow_the_stride() {
    with_buffers(|counting, y, _| {
        // Bytes of an element, its stride, wavefronts, and wavefronts without conflicts.
        for (bytes, stride, wavefronts, ideal) in [
            (2, 1, 1, 1),
            (2, 2, 1, 1),
            (2, 4, 2, 1),
            (4, 0, 1, 1),
            (4, 1, 1, 1),
            (4, 2, 2, 1),
            (4, 3, 1, 1),
            (4, 8, 8, 1),
            (4, 32, 32, 1),
            (4, 33, 1, 1),
            (8, 0, 2, 2),
            (8, 1, 2, 2),
            (8, 2, 4, 2),
            (8, 16, 32, 2),
            (16, 0, 4, 4),
            (16, 1, 4, 4),
            (16, 2, 8, 4),
            (16, 8, 32, 4),
            (16, 9, 4, 4),
        ] {
            let shape = Shape([1, 1, 1], [32, 1, 1], 16 << 10);
            let traffic = counting.count(&format!("emu_count_shared{bytes}"), shape, &[y, stride]);
            let expected = shared(1, wavefronts, ideal);
            assert_eq!(traffic.shared_write, expected, "{bytes} bytes, every {stride}th");
            assert_eq!(traffic.shared_read, expected, "{bytes} bytes, every {stride}th");
            assert_eq!(traffic.bank_conflicts(), 2 * (wavefronts - ideal));
            let sectors = bytes * 32 / 32;
            assert_eq!(traffic.global_write, global(32 * bytes, 1, sectors, sectors));
            assert_eq!(traffic.global_read, GlobalTraffic::default());
        }
    });
}

#[test]
fn async_copies_read_src_bytes() {
    with_buffers(|counting, y, x| {
        for (copied, requests) in [(0, 1), (5, 3), (32, 3)] {
            let traffic = counting.count("emu_count_cp_async", WARP, &[y, x, copied]);
            let bytes = (2 * copied + 32) * 16;
            // Two chunks are a sector.
            let sectors = 2 * copied.div_ceil(2) + 16;
            assert_eq!(traffic.global_read, global(bytes, requests, sectors, sectors), "{copied}");
            assert_eq!(traffic.shared_write, shared(3, 12, 12), "zeros are written too");
            assert_eq!(traffic.shared_read, shared(3, 12, 12));
        }
    });
}

#[test]
fn ldmatrix_conflicts_without_a_swizzle() {
    with_buffers(|counting, y, _| {
        for (swizzle, x4, x2) in [(0, 32, 16), (1, 4, 2)] {
            let traffic = counting.count("emu_count_matrices", WARP, &[y, swizzle]);
            assert_eq!(traffic.shared_read, shared(2, x4 + x2, 4 + 2), "swizzle {swizzle}");
            assert_eq!(traffic.shared_write, shared(8, 32, 32));
            let expected = WarpOperations {
                matrix_loads: 2,
                matrix_multiplications: 1,
                warp_barriers: 1,
                ..WarpOperations::default()
            };
            assert_eq!(traffic.operations, expected);
        }
    });
}

fn sum_over_blocks(schedule: Schedule) -> Traffic {
    with_buffers(|counting, y, x| {
        schedule.set();
        counting.count("emu_count_sum", Shape([5, 1, 1], [96, 1, 1], 0), &[y, x])
    })
}

#[test]
fn shuffles_barriers_and_atomics_are_counted() {
    let traffic = sum_over_blocks(Schedule(0, 1));
    let expected = WarpOperations {
        shuffles: 15 * 5,
        block_barriers: 15 * 2,
        shared_atomics: 15,
        global_atomics: 5,
        ..WarpOperations::default()
    };
    assert_eq!(traffic.operations, expected);
    // The atomics' sector is read and written back.
    assert_eq!(traffic.global_read, global(480 * 4, 15, 60, 60 + 1));
    assert_eq!(traffic.global_write, global(0, 0, 0, 1));
    assert_eq!((traffic.shared_write, traffic.shared_read), (shared(5, 5, 5), shared(5, 5, 5)));
}

#[test]
fn other_warp_operations_are_counted() {
    with_buffers(|counting, y, _| {
        let expected = WarpOperations {
            votes: 3,
            reductions: 1,
            matches: 1,
            warp_barriers: 1,
            shuffles: 2,
            ..WarpOperations::default()
        };
        assert_eq!(counting.count("emu_count_operations", WARP, &[y]).operations, expected);
    });
}

#[test]
fn schedules_do_not_change_counts() {
    let plain = sum_over_blocks(Schedule(0, 1));
    for seed in 1..20 {
        for threads in [1, 3] {
            let schedule = Schedule(seed, threads);
            assert_eq!(sum_over_blocks(schedule), plain, "{schedule:?}");
        }
    }
}
