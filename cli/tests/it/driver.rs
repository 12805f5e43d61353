//! Messages for a driver that is older than the kernels' toolkit. The software device can report
//! one.

use std::process::Command;

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_moe-kernels"))
        .args(arguments)
        .env("MOE_EMULATOR_DRIVER", "12020")
        .output()
        .unwrap();
    let output =
        [done.stdout, done.stderr].map(|output| String::from_utf8_lossy(&output).into_owned());
    (done.status.code(), output.concat())
}

#[test]
fn older_driver_is_reported_and_refused() {
    let (status, output) = run(&["info", "--device", "emulator"]);
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("driver for CUDA 12.2"), "{output}");

    let (status, output) = run(&["check", "--device", "emulator", "--shapes", "T3H8I8E2K1"]);
    match moe_kernels::kernel_toolkit() {
        // The images are read by any driver.
        None => assert_eq!(status, Some(0), "{output}"),
        Some((12, _)) => assert_eq!(status, Some(0), "{output}"),
        Some((major, minor)) => {
            assert_eq!(status, Some(2), "{output}");
            let wanted = format!("for CUDA 12.2, and nvcc {major}.{minor} compiled the kernels");
            assert!(output.contains(&wanted), "{output}");
        }
    }
}
