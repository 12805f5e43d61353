//! Devices and contexts.

use std::ptr;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use moe_emulator::{Choice, ChooseError, Driver, InstallError};

use crate::common::{address, append, entries, install, new_log, own_context, shared_context};

fn attribute(attribute: Attribute) -> i32 {
    shared_context().attribute(attribute).expect("a known attribute")
}

#[test]
fn device_follows_the_environment() {
    let context = shared_context();
    let wanted = std::env::var("MOE_EMULATOR_CC").unwrap_or_else(|_| "9.0".into());
    let (major, minor) = context.compute_capability().expect("attributes");
    assert_eq!(format!("{major}.{minor}"), wanted);
    assert_eq!(context.name().expect("a name"), format!("Software CUDA device {wanted}"));
    let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    let clusters = attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH);
    let expected = match wanted.as_str() {
        "8.0" => (163, 0),
        "9.0" => (227, 1),
        _ => (99, 1),
    };
    assert_eq!((shared / 1024, clusters), expected);
    assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE), 32);
    assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK), 1024);
    assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y), 65535);
    assert_eq!(CudaContext::device_count().expect("a count"), 1);
    assert!(context.total_mem().expect("a size") > 1 << 30);
}

#[test]
fn driver_version_is_13_0() {
    install();
    let mut version = 0;
    // SAFETY: the pointer is valid for the call.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    assert_eq!((result, version), (CUresult::CUDA_SUCCESS, 13000));
}

#[test]
fn only_one_device_exists() {
    install();
    let error = CudaContext::new(1).expect_err("a second device");
    assert_eq!(error.0, CUresult::CUDA_ERROR_INVALID_DEVICE);
}

#[test]
fn calls_without_a_current_context_are_refused() {
    let _context = shared_context();
    std::thread::spawn(|| {
        let (mut pointer, mut stream, mut event) = (0, ptr::null_mut(), ptr::null_mut());
        // SAFETY: the pointers are valid for the calls.
        unsafe {
            let refused = CUresult::CUDA_ERROR_INVALID_CONTEXT;
            assert_eq!(sys::cuMemAlloc_v2(&mut pointer, 4), refused);
            assert_eq!(sys::cuStreamCreate(&mut stream, 0), refused);
            assert_eq!(sys::cuEventCreate(&mut event, 0), refused);
            assert_eq!(sys::cuCtxSynchronize(), refused);
            assert_eq!(sys::cuStreamSynchronize(ptr::null_mut()), refused);
            let mut context = ptr::null_mut();
            assert_eq!(sys::cuCtxGetCurrent(&mut context), CUresult::CUDA_SUCCESS);
            assert!(context.is_null());
        }
    })
    .join()
    .expect("no panic");
}

#[test]
fn contexts_are_pushed_and_popped() {
    install();
    std::thread::spawn(|| {
        let (first, second) = (own_context(), own_context());
        let mut popped = ptr::null_mut();
        // SAFETY: the contexts are valid and the pointer is valid for the calls.
        unsafe {
            assert_eq!(sys::cuCtxPushCurrent_v2(first.cu_ctx()), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuCtxPopCurrent_v2(&mut popped), CUresult::CUDA_SUCCESS);
            assert_eq!(popped, first.cu_ctx());
            assert_eq!(sys::cuCtxGetCurrent(&mut popped), CUresult::CUDA_SUCCESS);
            assert_eq!(popped, second.cu_ctx());
            let nonsense = ptr::without_provenance_mut(0xdead0);
            assert_eq!(sys::cuCtxSetCurrent(nonsense), CUresult::CUDA_ERROR_INVALID_CONTEXT);
        }
    })
    .join()
    .expect("no panic");
}

#[test]
fn destroyed_context_is_unusable_and_frees_its_memory() {
    let context = own_context();
    let stream = context.default_stream();
    let slice = stream.alloc_zeros::<u8>(1000).expect("memory");
    let pointer = slice.leak();
    let raw = context.cu_ctx();
    drop(stream);
    drop(context);
    let mut size = 0;
    // SAFETY: the handle is stale on purpose; the driver must detect it.
    unsafe {
        assert_eq!(sys::cuCtxSetCurrent(raw), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    }
    let _other = own_context();
    // SAFETY: the pointers are valid for the call.
    let found = unsafe { sys::cuMemGetAddressRange_v2(ptr::null_mut(), &mut size, pointer) };
    assert_eq!(found, CUresult::CUDA_ERROR_NOT_FOUND);
}

#[test]
fn limits_are_stored() {
    let context = own_context();
    context.set_limit(sys::CUlimit::CU_LIMIT_STACK_SIZE, 4096).expect("a known limit");
    assert_eq!(context.get_limit(sys::CUlimit::CU_LIMIT_STACK_SIZE).expect("a known limit"), 4096);
    let error = context.get_limit(sys::CUlimit::CU_LIMIT_SHMEM_SIZE).expect_err("unknown");
    assert_eq!(error.0, CUresult::CUDA_ERROR_UNSUPPORTED_LIMIT);
}

#[test]
fn second_installation_has_no_effect() {
    install();
    assert_eq!(moe_emulator::install(), Ok(()));
    assert!(moe_emulator::is_installed());
}

#[test]
fn plain_device_counts_no_traffic() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    assert_eq!(append(ptr::null_mut(), at, 7), CUresult::CUDA_SUCCESS);
    assert_eq!(entries(&context, &log), [7]);
    assert_eq!(moe_emulator::traffic(), []);
    moe_emulator::reset_traffic();
    let refused = InstallError::DriverAlreadyLoaded("the plain software device");
    assert_eq!(moe_emulator::install_counting(), Err(refused.clone()));
    let refused = Err(ChooseError::Install(refused));
    assert_eq!(moe_emulator::choose(Choice::Counting), refused);
    assert_eq!(moe_emulator::choose(Choice::Emulator), Ok(Driver::Emulator));
}

#[test]
fn functions_are_found_by_name() {
    install();
    let mut function = ptr::null_mut();
    let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    // SAFETY: the name is a C string and the pointers are valid for the calls.
    unsafe {
        let name = c"cuMemAlloc".as_ptr();
        let found = sys::cuGetProcAddress_v2(name, &mut function, 13000, 0, &mut status);
        assert_eq!(found, CUresult::CUDA_SUCCESS);
        assert!(!function.is_null());
        let name = c"cuNoSuchFunction".as_ptr();
        let found = sys::cuGetProcAddress_v2(name, &mut function, 13000, 0, &mut status);
        assert_eq!(found, CUresult::CUDA_ERROR_NOT_FOUND);
        assert!(function.is_null());
    }
}

#[test]
fn errors_have_names() {
    install();
    let name = |code: CUresult| {
        let error = cudarc::driver::DriverError(code);
        error.error_name().expect("a known code").to_str().expect("ASCII").to_owned()
    };
    assert_eq!(name(CUresult::CUDA_ERROR_LAUNCH_FAILED), "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(name(CUresult::CUDA_ERROR_NOT_READY), "CUDA_ERROR_NOT_READY");
}
