//! Modules, functions, their attributes, and occupancy.

use std::ffi::CStr;
use std::ptr;

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUresult};

use crate::common::{function, load_module, own_context};

fn load(image: &[u8]) -> CUresult {
    let mut module = ptr::null_mut();
    // SAFETY: the images end with NUL, or begin with a number that identifies their format.
    unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) }
}

#[test]
fn invalid_images_are_refused() {
    let _context = own_context();
    assert_eq!(load(b"\x7fELF\x02\x01\0\0"), CUresult::CUDA_SUCCESS);
    assert_eq!(load(&0xba55_ed50_u32.to_le_bytes()), CUresult::CUDA_SUCCESS);
    assert_eq!(load(b"// code\n.version 8.0\n.target sm_80\n\0"), CUresult::CUDA_SUCCESS);
    assert_eq!(load(b".version 8.0\n\0"), CUresult::CUDA_ERROR_INVALID_PTX);
    assert_eq!(load(b"what is this?\0"), CUresult::CUDA_ERROR_INVALID_IMAGE);
    let mut module = ptr::null_mut();
    // SAFETY: a null image and a path that does not exist are refused.
    unsafe {
        let refused = sys::cuModuleLoadData(&mut module, ptr::null());
        assert_eq!(refused, CUresult::CUDA_ERROR_INVALID_VALUE);
        let missing = sys::cuModuleLoad(&mut module, c"/no/such/file".as_ptr());
        assert_eq!(missing, CUresult::CUDA_ERROR_FILE_NOT_FOUND);
    }
}

#[test]
fn functions_are_found_while_their_module_is_loaded() {
    let _context = own_context();
    let module = load_module();
    let find = |name: &CStr| {
        let mut function = ptr::null_mut();
        // SAFETY: the name is a C string; a stale module must be detected by the driver.
        match unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) } {
            CUresult::CUDA_SUCCESS => Ok(function),
            error => Err(error),
        }
    };
    let scale = find(c"emu_ok_scale").expect("the kernel is compiled in");
    assert_eq!(find(c"emu_ok_scale"), Ok(scale));
    assert_eq!(find(c"no_such_kernel"), Err(CUresult::CUDA_ERROR_NOT_FOUND));
    let mut name = ptr::null();
    let (mut pointer, mut size) = (0, 0);
    // SAFETY: the module is unloaded once, and the handles after that are stale on purpose.
    unsafe {
        assert_eq!(sys::cuFuncGetName(&mut name, scale), CUresult::CUDA_SUCCESS);
        assert_eq!(CStr::from_ptr(name), c"emu_ok_scale");
        let global = c"no_such_global".as_ptr();
        let found = sys::cuModuleGetGlobal_v2(&mut pointer, &mut size, module, global);
        assert_eq!(found, CUresult::CUDA_ERROR_NOT_FOUND);
        let stale = CUresult::CUDA_ERROR_INVALID_HANDLE;
        assert_eq!(sys::cuModuleUnload(module), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuModuleUnload(module), stale);
        assert_eq!(sys::cuFuncGetName(&mut name, scale), stale);
    }
    assert_eq!(find(c"emu_ok_scale"), Err(CUresult::CUDA_ERROR_INVALID_HANDLE));
}

#[test]
fn functions_have_attributes() {
    let context = own_context();
    let scale = function("emu_ok_scale");
    let get = |attribute| {
        let mut value = -99;
        // SAFETY: the function is valid and the pointer is valid for the call.
        let result = unsafe { sys::cuFuncGetAttribute(&mut value, attribute, scale) };
        assert_eq!(result, CUresult::CUDA_SUCCESS);
        value
    };
    let (major, minor) = context.compute_capability().expect("attributes");
    assert_eq!(get(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK), 256);
    assert_eq!(get(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES), 48 << 10);
    assert_eq!(get(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION), major * 10 + minor);
    assert_eq!(get(Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT), -1);
    // SAFETY: the function is valid.
    let set = |attribute, value| unsafe { sys::cuFuncSetAttribute(scale, attribute, value) };
    let carveout = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    assert_eq!(set(carveout, 50), CUresult::CUDA_SUCCESS);
    assert_eq!(get(carveout), 50);
    assert_eq!(set(carveout, 101), CUresult::CUDA_ERROR_INVALID_VALUE);
    let fixed = Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
    assert_eq!(set(fixed, 8), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn occupancy_counts_threads_and_shared_memory() {
    let context = own_context();
    let scale = function("emu_ok_scale");
    let blocks = |size, shared| {
        let mut blocks = -1;
        // SAFETY: the function is valid and the pointer is valid for the call.
        let result = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, scale, size, shared)
        };
        (result, blocks)
    };
    let threads = context
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)
        .expect("a known attribute");
    assert_eq!(blocks(256, 0), (CUresult::CUDA_SUCCESS, threads / 256));
    assert_eq!(blocks(257, 0), (CUresult::CUDA_SUCCESS, 0), "beyond the launch bound");
    let with_shared = blocks(256, 40 << 10).1;
    assert!(with_shared > 0 && with_shared < threads / 256);
    assert_eq!(blocks(0, 0).0, CUresult::CUDA_ERROR_INVALID_VALUE);
}
