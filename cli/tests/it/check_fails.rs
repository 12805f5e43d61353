//! `check` with a wrong result: the verdict, exit status 1, and the command that reproduces it. The
//! software device injects the fault.

use crate::common::{Done, program_in};

const FAULT: &str = "MOE_EMULATOR_FAULT";
const CASE: [&str; 8] =
    ["--shapes", "T5H33I7E7K3", "--dtypes", "f32", "--skews", "zipf", "--seeds", "7"];

fn check(fault: Option<&str>, ops: &str, case: &[&str]) -> Done {
    let arguments = [&["check", "--device", "emulator", "--ops", ops], case].concat();
    let environment: Vec<(&str, &str)> = fault.map(|fault| (FAULT, fault)).into_iter().collect();
    program_in(&environment, &arguments)
}

/// The verdict of an operation in f32.
fn verdict<'a>(done: &'a Done, op: &str) -> &'a str {
    let row = done.stdout.lines().find(|line| line.split_whitespace().take(2).eq([op, "f32"]));
    row.and_then(|row| row.split_whitespace().last()).unwrap_or("no row")
}

/// The arguments of the printed commands that reproduce failures.
fn reproductions(done: &Done) -> Vec<Vec<&str>> {
    let lines = done.stdout.lines().filter_map(|line| line.split_once("moe-kernels check "));
    lines.map(|(_, arguments)| arguments.split_whitespace().collect()).collect()
}

#[test]
fn flipped_bit_fails_each_operation() {
    for (op, kernel) in [
        ("router_gemm", "moe_router_gemm_fwd_few_f32"),
        ("route", "moe_route_fwd_plain_narrow_f32"),
        ("noise", "moe_noise_fwd"),
        ("jitter", "moe_jitter_fwd_f32"),
        ("capacity", "moe_capacity_fwd_select"),
        ("expert_choice", "moe_expert_choice_fwd_f32"),
        ("plan", "moe_plan_fwd_single"),
        ("permute", "moe_permute_fwd_f32"),
        ("grouped_gemm", "moe_grouped_gemm_fwd_f32"),
        ("gate_up", "moe_grouped_gemm_fwd_gate_up_f32"),
        ("rms_norm", "moe_rms_norm_fwd_f32"),
        ("combine", "moe_combine_fwd_f32"),
        ("layer", "moe_combine_fwd_f32"),
    ] {
        let done = check(Some(&format!("flip:{kernel}")), op, &CASE);
        assert_eq!(done.status, Some(1), "{op}: {done:?}");
        assert_eq!(verdict(&done, op), "FAILED", "{op}: {}", done.stdout);
        let again = reproductions(&done);
        let wanted = [&["--device", "emulator", "--ops", op], &CASE[..]].concat();
        assert_eq!(again, [wanted], "{op}: {}", done.stdout);
    }
}

/// The command fails with the same message while the fault is injected, and passes without it.
/// Other operations pass.
#[test]
fn printed_command_reproduces_failure() {
    let kernel = "flip:moe_combine_fwd_f32";
    let done = check(Some(kernel), "permute,combine", &CASE);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert_eq!((verdict(&done, "permute"), verdict(&done, "combine")), ("ok", "FAILED"));
    let sentence = done.stdout.lines().find(|line| line.starts_with("combine: y[0] is ")).unwrap();
    assert!(sentence.contains(", wanted ") && sentence.contains(" within "), "{sentence}");

    let lines = reproductions(&done);
    assert_eq!(lines.len(), 1, "{}", done.stdout);
    let arguments = [&["check"], &lines[0][..]].concat();
    let again = program_in(&[(FAULT, kernel)], &arguments);
    assert_eq!(again.status, Some(1), "{again:?}");
    assert!(again.stdout.lines().any(|line| line == sentence), "{}", again.stdout);
    let without = program_in(&[], &arguments);
    assert_eq!((without.status, verdict(&without, "combine")), (Some(0), "ok"), "{without:?}");
    assert!(reproductions(&without).is_empty(), "{}", without.stdout);
}

#[test]
fn prints_ten_failures_and_counts_the_rest() {
    let many = ["--shapes", "T5H33I7E7K3", "--dtypes", "f32", "--seeds", "0,1,2"];
    let done = check(Some("flip:moe_permute_fwd_f32"), "permute", &many);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert_eq!(reproductions(&done).len(), 10);
    assert!(done.stdout.contains("and 5 more failures"), "{}", done.stdout);
}

/// After a failed launch the device cannot be used, so that nothing else is checked.
#[test]
fn failed_launch_ends_the_check() {
    let many = ["--shapes", "T5H33I7E7K3", "--dtypes", "f32", "--seeds", "0,1,2"];
    let done = check(Some("fail:moe_combine_fwd_f32"), "permute,combine", &many);
    assert_eq!(done.status, Some(1), "{done:?}");
    let lines = reproductions(&done);
    assert_eq!(lines.len(), 1, "{}", done.stdout);
    assert!(lines[0].starts_with(&["--device", "emulator", "--ops", "combine"]), "{lines:?}");
    for words in ["combine: ", "CUDA_ERROR_LAUNCH_FAILED", "moe_combine_fwd_f32"] {
        assert!(done.stdout.contains(words), "no '{words}' in {}", done.stdout);
    }
}
