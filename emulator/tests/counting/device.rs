//! The choice between the two variants of the device, and the table of counts.

use moe_emulator::{Choice, ChooseError, Driver, InstallError};

use crate::common::{Shape, address};
use crate::measure::Counting;

#[test]
fn second_variant_is_refused() {
    let _counting = Counting::new();
    assert_eq!(moe_emulator::install_counting(), Ok(()));
    assert!(moe_emulator::is_installed());
    let refused = moe_emulator::install().expect_err("the counting variant is installed");
    assert!(matches!(refused, InstallError::DriverAlreadyLoaded(_)), "{refused}");
    assert!(
        refused.to_string().ends_with("the counting software device is already loaded"),
        "{refused}"
    );
    assert_eq!("counting".parse(), Ok(Choice::Counting));
    assert_eq!(moe_emulator::choose(Choice::Counting), Ok(Driver::Emulator));
    assert_eq!(moe_emulator::choose(Choice::Emulator), Ok(Driver::Emulator));
    let other = ChooseError::AlreadyChosen(Driver::Emulator);
    assert_eq!(moe_emulator::choose(Choice::Cuda), Err(other));
}

#[test]
fn counts_are_reset_and_sorted() {
    let counting = Counting::new();
    let memory = counting.zeros(1 << 10);
    let at = address(&memory, &counting.stream);
    let shape = Shape([1, 1, 1], [32, 1, 1], 0);
    assert_eq!(counting.count("emu_count_words", shape, &[at, at, 0, 1]).launches, 1);
    assert_eq!(counting.traffic_of(|| ()), []);
    let traffic = counting.traffic_of(|| {
        for name in ["emu_count_vectors_f32", "emu_count_int4", "emu_count_vectors_f32"] {
            counting.launch(name, shape, &[at, at + 2048]);
        }
    });
    let launches: Vec<_> =
        traffic.iter().map(|kernel| (kernel.symbol.as_str(), kernel.launches)).collect();
    assert_eq!(launches, [("emu_count_int4", 1), ("emu_count_vectors_f32", 2)]);
    assert_eq!(traffic[1].global_read.unique_sectors, 2 * 16, "launches share no sectors");
}

#[test]
fn failed_launches_do_not_count() {
    let counting = Counting::new();
    let memory = counting.zeros(1 << 10);
    let at = address(&memory, &counting.stream);
    let start = |first: u64| {
        counting.launch("emu_count_words", Shape([1, 1, 1], [32, 1, 1], 0), &[at, at, first, 1]);
    };
    let traffic = counting.traffic_of(|| {
        // Lane 31 reads just past the end, after the other lanes have read and written.
        start(1024 - 31);
        assert!(counting.stream.synchronize().is_err());
        moe_emulator::clear_errors();
        start(0);
    });
    assert_eq!((traffic.len(), traffic[0].launches, traffic[0].warps), (1, 1, 1));
    assert_eq!((traffic[0].global_read.requests, traffic[0].global_read.bytes), (1, 128));
}
