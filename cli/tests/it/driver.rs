//! Messages about a driver older than the kernels' toolkit; the software device can report such a driver.

use std::process::Command;

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_moe-kernels"))
        .args(arguments)
        .env("MOE_EMULATOR_DRIVER", "12020")
        .output()
        .unwrap();
    let said = [done.stdout, done.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    (done.status.code(), said.concat())
}

#[test]
fn an_older_driver() {
    let (status, said) = run(&["info", "--device", "emulator"]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("driver for CUDA 12.2"), "{said}");

    let (status, said) = run(&["check", "--device", "emulator", "--shapes", "T3H8I8E2K1"]);
    match moe_kernels::kernel_toolkit() {
        // The images are read by any driver.
        None => assert_eq!(status, Some(0), "{said}"),
        Some((12, _)) => assert_eq!(status, Some(0), "{said}"),
        Some((major, minor)) => {
            assert_eq!(status, Some(2), "{said}");
            let wanted = format!("for CUDA 12.2, and nvcc {major}.{minor} compiled the kernels");
            assert!(said.contains(&wanted), "{said}");
        }
    }
}
