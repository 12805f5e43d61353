//! `check` and `info`.

use crate::common::program;

#[cfg(feature = "emulator")]
#[test]
fn emulator_passes_every_operation() {
    let lists =
        ["--shapes", "T5H33I7E7K3,T1H1I1E1K1", "--dtypes", "f32,bf16", "--skews", "zipf,inactive"];
    let done = program(&[&["check", "--device", "emulator", "--seeds", "7"], &lists[..]].concat());
    assert_eq!(done.status, Some(0), "{done:?}");
    for op in [
        "router_gemm",
        "route",
        "noise",
        "jitter",
        "capacity",
        "expert_choice",
        "plan",
        "permute",
        "grouped_gemm",
        "gate_up",
        "rms_norm",
        "combine",
        "layer",
    ] {
        for dtype in ["f32", "bf16"] {
            let row =
                done.stdout.lines().find(|line| line.split_whitespace().take(2).eq([op, dtype]));
            // Two shapes and two skews.
            let cells: Vec<&str> = row.unwrap_or_default().split_whitespace().collect();
            assert_eq!(
                (cells.get(2), cells.last()),
                (Some(&"4"), Some(&"ok")),
                "{op} in {}",
                done.stdout
            );
        }
    }
    assert!(done.stdout.starts_with("emulator: "), "{}", done.stdout);
}

#[test]
fn invalid_lists_are_errors() {
    for (arguments, words) in [
        (["--shapes", "T1H1"], "'T1H1' is not a shape like T37H72I56E5K2"),
        (["--shapes", "T1H1I1E2K3"], "top_k"),
        (["--dtypes", "f64"], "wanted f32, f16 or bf16"),
        (["--skews", "left"], "possible values"),
        (["--ops", "sort"], "possible values"),
        (["--device", "cpu"], "cpu is the reference, wanted cuda, emulator or auto"),
    ] {
        let done = program(&[&["check"], &arguments[..]].concat());
        assert_eq!(done.status, Some(2), "{done:?}");
        assert!(done.stderr.contains(words), "no '{words}' in: {}", done.stderr);
    }
}

#[test]
fn info_lists_devices_and_kernels_by_operation() {
    let done = program(&["info"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    let line = |start: &str| done.stdout.lines().find(|line| line.starts_with(start));
    assert!(line("cpu ").is_some_and(|line| line.contains("the reference")), "{}", done.stdout);
    assert!(line("cuda ").is_some(), "{}", done.stdout);
    if cfg!(feature = "emulator") {
        assert!(
            line("emulator ").is_some_and(|line| line.contains("compute capability")),
            "{}",
            done.stdout
        );
    }
    for word in ["permute", "grouped_gemm", "moe_combine_fwd", env!("CARGO_PKG_VERSION")] {
        assert!(done.stdout.contains(word), "no '{word}' in {}", done.stdout);
    }
    // The operation is printed in the first row of its kernels.
    let rows: Vec<Vec<&str>> =
        done.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(rows.contains(&vec!["permute", "moe_permute_fwd", "f32", "f16", "bf16"]), "{rows:?}");
    assert!(rows.contains(&vec!["noise", "moe_noise_fwd", "any"]), "{rows:?}");
    for symbol in moe_kernels::kernel_symbols() {
        let name = ["_f32", "_f16", "_bf16"].iter().find_map(|end| symbol.strip_suffix(end));
        let name = name.unwrap_or(&symbol);
        assert_eq!(rows.iter().filter(|row| row.contains(&name)).count(), 1, "{name}");
    }
}
