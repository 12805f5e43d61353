//! Tests that need a process of their own: the environment, and calls before cuInit.

use std::process::Command;
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use crate::common::{install, shared_context};

/// Runs one ignored test of this binary in a new process with these variables.
pub fn run_alone(test: &str, environment: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().expect("this binary has a path"))
        .args(["--exact", test, "--ignored", "--test-threads=1"])
        .envs(environment.iter().copied())
        .output()
        .expect("this binary starts");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.contains("1 passed"), "{environment:?}\n{printed}");
}

#[test]
fn calls_before_initialisation_are_refused() {
    run_alone("process::child_before_initialisation", &[]);
}

#[test]
#[ignore = "run by calls_before_initialisation_are_refused"]
fn child_before_initialisation() {
    install();
    let (mut count, mut context, mut pointer) = (0, ptr::null_mut(), 0);
    let refused = CUresult::CUDA_ERROR_NOT_INITIALIZED;
    // SAFETY: the pointers are valid for the calls.
    unsafe {
        assert_eq!(sys::cuDeviceGetCount(&mut count), refused);
        assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut context, 0), refused);
        assert_eq!(sys::cuMemAlloc_v2(&mut pointer, 4), refused);
        assert_eq!(sys::cuInit(1), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuInit(0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuDeviceGetCount(&mut count), CUresult::CUDA_SUCCESS);
    }
}

#[test]
fn each_compute_capability_can_be_chosen() {
    for capability in ["8.0", "9.0", "12.0"] {
        let test = "process::child_of_a_capability";
        run_alone(test, &[("MOE_EMULATOR_CC", capability)]);
        let test = "context::device_follows_the_environment";
        let status = Command::new(std::env::current_exe().expect("this binary has a path"))
            .args(["--exact", test])
            .env("MOE_EMULATOR_CC", capability)
            .output()
            .expect("this binary starts")
            .status;
        assert!(status.success(), "{capability}");
    }
}

#[test]
#[ignore = "run by each_compute_capability_can_be_chosen"]
fn child_of_a_capability() {
    let context = shared_context();
    let has_tensor_maps = context
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED)
        .expect("a known attribute");
    let (major, _) = context.compute_capability().expect("attributes");
    assert_eq!(has_tensor_maps == 1, major >= 9);
}

#[test]
fn unknown_compute_capability_gives_no_device() {
    run_alone("process::child_without_device", &[("MOE_EMULATOR_CC", "7.5")]);
}

#[test]
#[ignore = "run by unknown_compute_capability_gives_no_device"]
fn child_without_device() {
    install();
    // SAFETY: the function has no preconditions.
    assert_eq!(unsafe { sys::cuInit(0) }, CUresult::CUDA_ERROR_NO_DEVICE);
}

#[test]
fn unknown_driver_version_gives_no_device() {
    for version in ["12.4", "10020", "13010", "new"] {
        run_alone("process::child_without_device", &[("MOE_EMULATOR_DRIVER", version)]);
    }
}

#[test]
fn older_driver_refuses_newer_images() {
    run_alone("process::child_of_an_older_driver", &[("MOE_EMULATOR_DRIVER", "12040")]);
}

/// A fat binary of one part: machine code (kind 2) or PTX (kind 1) of this version.
fn fat_binary(kind: u16, version: (u16, u16)) -> Vec<u8> {
    let mut image = 0xba55_ed50_u32.to_le_bytes().to_vec();
    image.extend([1, 0, 16, 0]);
    image.extend(80u64.to_le_bytes());
    image.extend(kind.to_le_bytes());
    image.extend([1, 1, 64, 0, 0, 0]);
    image.extend(16u64.to_le_bytes());
    image.extend([0; 8]);
    image.extend(version.1.to_le_bytes());
    image.extend(version.0.to_le_bytes());
    image.resize(96, 0);
    image
}

#[test]
#[ignore = "run by older_driver_refuses_newer_images"]
fn child_of_an_older_driver() {
    let _context = shared_context();
    let mut version = 0;
    // SAFETY: the pointer is valid for the call.
    assert_eq!(unsafe { sys::cuDriverGetVersion(&mut version) }, CUresult::CUDA_SUCCESS);
    assert_eq!(version, 12040);
    let load = |image: &[u8]| {
        let mut module = ptr::null_mut();
        // SAFETY: the images end with NUL, or have a length in their headers.
        unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) }
    };
    let refused = CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    for (image, expected) in [
        (&b".version 8.4\n.target sm_80\n\0"[..], CUresult::CUDA_SUCCESS),
        (b".version 8.5\n.target sm_80\n\0", refused),
        (b".version 9.0\n.target sm_80\n\0", refused),
        (&fat_binary(1, (8, 4)), CUresult::CUDA_SUCCESS),
        // Its machine code is of the driver's own major version.
        (&fat_binary(1, (8, 8)), CUresult::CUDA_SUCCESS),
        (&fat_binary(1, (9, 0)), refused),
        (&fat_binary(2, (8, 1)), CUresult::CUDA_SUCCESS),
    ] {
        assert_eq!(load(image), expected, "{image:?}");
    }
    let mut function = ptr::null_mut();
    // SAFETY: the name is a C string and the pointers are valid for the call.
    let found = unsafe {
        let name = c"cuFuncGetParamInfo".as_ptr();
        sys::cuGetProcAddress_v2(name, &mut function, 12040, 0, ptr::null_mut())
    };
    assert_eq!(found, CUresult::CUDA_SUCCESS, "since 12.4");
}

#[test]
fn last_release_destroys_the_primary_context() {
    run_alone("process::child_releases_the_primary_context", &[]);
}

#[test]
#[ignore = "run by last_release_destroys_the_primary_context"]
fn child_releases_the_primary_context() {
    let context = shared_context();
    let raw = context.cu_ctx();
    let leaked = context.default_stream().alloc_zeros::<u8>(10).expect("memory").leak();
    assert_ne!(leaked, 0);
    drop(context);
    assert_eq!(moe_emulator::counters().live_allocations, 0);
    let mut pointer = 0;
    // SAFETY: the handle is known, if inactive; the pointer is valid for the call.
    unsafe {
        let destroyed = CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED;
        assert_eq!(sys::cuMemAlloc_v2(&mut pointer, 4), destroyed);
        assert_eq!(sys::cuCtxSetCurrent(raw), destroyed);
    }
    assert_eq!(shared_context().cu_ctx(), raw);
}

#[test]
fn concurrent_release_and_retain_keep_the_context() {
    run_alone("process::child_with_short_lived_threads", &[]);
}

/// Threads release the context with work in flight, while others retain it again.
#[test]
#[ignore = "run by concurrent_release_and_retain_keep_the_context"]
fn child_with_short_lived_threads() {
    install();
    // SAFETY: the driver is initialised; each address is of a live variable or of memory that is
    // long enough.
    let retain_and_release = || unsafe {
        let (mut context, mut memory) = (ptr::null_mut(), 0);
        sys::cuDevicePrimaryCtxRetain(&mut context, 0).result().expect("a context");
        sys::cuCtxSetCurrent(context).result().expect("a valid context");
        sys::cuMemAlloc_v2(&mut memory, 1 << 20).result().expect("memory");
        sys::cuMemsetD8Async(memory, 0, 1 << 20, ptr::null_mut()).result().expect("a fill");
        sys::cuDevicePrimaryCtxRelease_v2(0).result().expect("a release");
    };
    // SAFETY: it is the first call to the driver.
    unsafe { sys::cuInit(0) }.result().expect("a driver");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..300).for_each(|_| retain_and_release()));
        }
    });
}
