//! Launches: refused configurations, copied arguments, and execution.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUresult};

use crate::common::{
    ONE_THREAD, Shape, Stream, address, function, launch, own_context, pointer_to, scale,
};

const REFUSED: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;

#[test]
fn kernel_computes_its_result() {
    let context = own_context();
    let stream = context.new_stream().expect("a stream");
    let x = stream.clone_htod(&[1f32, 2.0, 3.0]).expect("a copy");
    let y = stream.alloc_zeros::<f32>(3).expect("memory");
    let (to, from) = (address(&y, &stream), address(&x, &stream));
    assert_eq!(scale(stream.cu_stream(), to, from, 2.0, 3), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.clone_dtoh(&y).expect("a copy"), [2.0, 4.0, 6.0]);
}

#[test]
fn grids_are_checked() {
    let _context = own_context();
    let nothing = function("emu_ok_nothing");
    let on = |grid| launch(nothing, ptr::null_mut(), Shape(grid, [1, 1, 1], 0), &mut []);
    for grid in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
        assert_eq!(on(grid), REFUSED, "empty: {grid:?}");
    }
    for grid in [[1, 65536, 1], [1, 1, 65536], [1 << 31, 1, 1]] {
        assert_eq!(on(grid), REFUSED, "too large: {grid:?}");
    }
    assert_eq!(on([3, 2, 2]), CUresult::CUDA_SUCCESS);
}

#[test]
fn blocks_are_checked() {
    let context = own_context();
    let on = |name, block| {
        // More parameters than any of these kernels has; refused launches do not read them.
        let mut parameters = [pointer_to(&0u64); 4];
        launch(function(name), ptr::null_mut(), Shape([1, 1, 1], block, 0), &mut parameters)
    };
    for block in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
        assert_eq!(on("emu_ok_nothing", block), REFUSED, "empty: {block:?}");
    }
    for block in [[1025, 1, 1], [32, 33, 1], [1, 1, 65], [16, 1, 65]] {
        assert_eq!(on("emu_ok_nothing", block), REFUSED, "too large: {block:?}");
    }
    assert_eq!(on("emu_ok_nothing", [1024, 1, 1]), CUresult::CUDA_SUCCESS);
    assert_eq!(on("emu_ok_nothing", [4, 4, 64]), CUresult::CUDA_SUCCESS);
    assert_eq!(on("emu_ok_scale", [257, 1, 1]), REFUSED, "beyond the launch bound");
    context.synchronize().expect("nothing failed");
}

#[test]
fn dynamic_shared_memory_beyond_48_kib_needs_opt_in() {
    let context = own_context();
    let stream = context.default_stream();
    let out = stream.alloc_zeros::<i32>(1).expect("memory");
    let to = address(&out, &stream);
    let shared = function("emu_ok_shared");
    let on = |bytes: i32| {
        let shape = Shape([1, 1, 1], [1, 1, 1], bytes.cast_unsigned());
        launch(shared, ptr::null_mut(), shape, &mut [pointer_to(&to), pointer_to(&bytes)])
    };
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function is valid.
    let set = |bytes| unsafe { sys::cuFuncSetAttribute(shared, attribute, bytes) };
    let most = context
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        .expect("a known attribute");
    assert_eq!(on(48 << 10), CUresult::CUDA_SUCCESS);
    assert_eq!(on((48 << 10) + 1), REFUSED);
    assert_eq!(set(most + 1), REFUSED);
    assert_eq!(set(-1), REFUSED);
    assert_eq!(set(most), CUresult::CUDA_SUCCESS);
    assert_eq!(on(most), CUresult::CUDA_SUCCESS);
    assert_eq!(on(most + 1), REFUSED);
    assert_eq!(stream.clone_dtoh(&out).expect("a copy"), [42]);
}

#[test]
fn arguments_are_copied_at_the_launch() {
    let context = own_context();
    let stream = Stream::non_blocking();
    let log = crate::common::new_log(&context);
    let to = address(&log, &context.default_stream());
    let append = function("emu_ok_append");
    let mut value = 1;
    for i in 1..=3 {
        value = i;
        let mut parameters = [pointer_to(&to), pointer_to(&value)];
        assert_eq!(launch(append, stream.0, ONE_THREAD, &mut parameters), CUresult::CUDA_SUCCESS);
    }
    value += 100;
    std::hint::black_box(&value);
    assert_eq!(crate::common::entries(&context, &log), [1, 2, 3]);
}

#[repr(C)]
struct MixedArgs {
    a: i32,
    b: f64,
    c: i8,
}

#[test]
fn parameters_of_all_sizes_are_passed() {
    let context = own_context();
    let stream = context.default_stream();
    let out = stream.alloc_zeros::<f64>(4).expect("memory");
    let to = address(&out, &stream);
    let args = MixedArgs { a: 1, b: 0.5, c: 3 };
    let mut parameters = [
        pointer_to(&to),
        pointer_to(&-7i8),
        pointer_to(&2.25f64),
        pointer_to(&300i16),
        pointer_to(&args),
    ];
    let launched = launch(function("emu_ok_mixed"), ptr::null_mut(), ONE_THREAD, &mut parameters);
    assert_eq!(launched, CUresult::CUDA_SUCCESS);
    assert_eq!(stream.clone_dtoh(&out).expect("a copy"), [-7.0, 2.25, 300.0, 4.5]);
}

#[test]
fn parameters_have_offsets_and_sizes() {
    let _context = own_context();
    let mixed = function("emu_ok_mixed");
    let info = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the pointers are valid for the call.
        match unsafe { sys::cuFuncGetParamInfo(mixed, index, &mut offset, &mut size) } {
            CUresult::CUDA_SUCCESS => Some((offset, size)),
            _ => None,
        }
    };
    let expected = [(0, 8), (8, 1), (16, 8), (24, 2), (32, 24)];
    for (index, parameter) in expected.into_iter().enumerate() {
        assert_eq!(info(index), Some(parameter), "parameter {index}");
    }
    assert_eq!(info(5), None);
    let kernels = moe_emulator::kernels();
    let listed = kernels.iter().find(|kernel| kernel.symbol == "emu_ok_mixed").expect("listed");
    let parameters: Vec<_> = listed.parameters.iter().map(|p| (p.offset, p.size)).collect();
    assert_eq!((listed.max_threads, parameters), (32, expected.to_vec()));
}

fn launch_packed(function: sys::CUfunction, buffer: &[u8], size: usize) -> CUresult {
    let end = ptr::null_mut();
    let mut extra = [
        ptr::without_provenance_mut(1),
        buffer.as_ptr().cast_mut().cast::<c_void>(),
        ptr::without_provenance_mut(2),
        pointer_to(&size),
        end,
    ];
    // SAFETY: the list is terminated, and the buffer is as long as the list says or the driver
    // refuses it.
    unsafe {
        sys::cuLaunchKernel(
            function,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            ptr::null_mut(),
            ptr::null_mut(),
            extra.as_mut_ptr(),
        )
    }
}

#[test]
fn arguments_can_be_packed() {
    let context = own_context();
    let stream = context.default_stream();
    let log = crate::common::new_log(&context);
    let append = function("emu_ok_append");
    let mut buffer = [0u8; 16];
    buffer[..8].copy_from_slice(&address(&log, &stream).to_ne_bytes());
    buffer[8..12].copy_from_slice(&77i32.to_ne_bytes());
    assert_eq!(launch_packed(append, &buffer, 12), CUresult::CUDA_SUCCESS);
    assert_eq!(launch_packed(append, &buffer, 16), REFUSED, "too long");
    assert_eq!(launch_packed(append, &buffer, 8), REFUSED, "too short");
    assert_eq!(crate::common::entries(&context, &log), [77]);
}

#[test]
fn missing_arguments_are_refused() {
    let _context = own_context();
    let append = function("emu_ok_append");
    let launch = |parameters: *mut *mut c_void, extra: *mut *mut c_void| {
        // SAFETY: the lists are null or long enough for the driver to refuse them.
        unsafe {
            sys::cuLaunchKernel(append, 1, 1, 1, 1, 1, 1, 0, ptr::null_mut(), parameters, extra)
        }
    };
    assert_eq!(launch(ptr::null_mut(), ptr::null_mut()), REFUSED);
    let mut nulls = [ptr::null_mut(); 3];
    assert_eq!(launch(nulls.as_mut_ptr(), ptr::null_mut()), REFUSED);
    let mut unknown = [ptr::without_provenance_mut(9), ptr::null_mut(), ptr::null_mut()];
    assert_eq!(launch(ptr::null_mut(), unknown.as_mut_ptr()), REFUSED);
    assert_eq!(launch(nulls.as_mut_ptr(), unknown.as_mut_ptr()), REFUSED, "both");
}

#[test]
fn handles_are_checked() {
    let _context = own_context();
    let nonsense = CUresult::CUDA_ERROR_INVALID_HANDLE;
    let stray = ptr::without_provenance_mut::<c_void>(0x123450);
    assert_eq!(launch(stray.cast(), ptr::null_mut(), ONE_THREAD, &mut []), nonsense);
    let nothing = function("emu_ok_nothing");
    assert_eq!(launch(nothing, stray.cast(), ONE_THREAD, &mut []), nonsense);
    let stale = Stream::non_blocking().0;
    assert_eq!(launch(nothing, stale, ONE_THREAD, &mut []), nonsense);
    let other = own_context();
    let launched = launch(nothing, other.default_stream().cu_stream(), ONE_THREAD, &mut []);
    assert_eq!(launched, CUresult::CUDA_ERROR_INVALID_CONTEXT, "a function of another context");
}

fn attribute(
    id: sys::CUlaunchAttributeID,
    set: impl FnOnce(&mut sys::CUlaunchAttributeValue),
) -> sys::CUlaunchAttribute {
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = id;
    set(&mut attribute.value);
    attribute
}

fn launch_ex(
    grid: [u32; 3],
    function: sys::CUfunction,
    attributes: &mut [sys::CUlaunchAttribute],
) -> CUresult {
    let config = sys::CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: 1,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: ptr::null_mut(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: u32::try_from(attributes.len()).expect("a few"),
    };
    // SAFETY: the kernel has no parameters.
    unsafe { sys::cuLaunchKernelEx(&config, function, ptr::null_mut(), ptr::null_mut()) }
}

fn cluster(x: u32, y: u32, z: u32) -> sys::CUlaunchAttribute {
    attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, |value| {
        value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
    })
}

#[test]
fn clusters_are_checked() {
    let context = own_context();
    let nothing = function("emu_ok_nothing");
    let (major, _) = context.compute_capability().expect("attributes");
    let on = |grid, x, y, z| launch_ex(grid, nothing, &mut [cluster(x, y, z)]);
    let refused = CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE;
    assert_eq!(on([4, 2, 1], 1, 1, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(on([4, 2, 1], 0, 1, 1), REFUSED);
    assert_eq!(on([4, 2, 1], 3, 1, 1), refused, "does not divide the grid");
    assert_eq!(on([32, 1, 1], 16, 1, 1), refused, "is not portable");
    if major < 9 {
        assert_eq!(on([4, 2, 1], 2, 2, 1), refused, "the device has none");
        return;
    }
    assert_eq!(on([4, 2, 1], 2, 2, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(on([32, 1, 1], 8, 1, 1), CUresult::CUDA_SUCCESS);
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
    // SAFETY: the function is valid.
    let allowed = unsafe { sys::cuFuncSetAttribute(nothing, attribute, 1) };
    assert_eq!(allowed, CUresult::CUDA_ERROR_NOT_SUPPORTED);
    context.synchronize().expect("nothing failed");
}

#[test]
fn unknown_launch_attributes_are_refused() {
    use sys::CUlaunchAttributeID as Id;
    let context = own_context();
    let nothing = function("emu_ok_nothing");
    let (major, _) = context.compute_capability().expect("attributes");
    let dependent = attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, |value| {
        value.programmaticStreamSerializationAllowed = 1;
    });
    let expected =
        if major < 9 { CUresult::CUDA_ERROR_NOT_SUPPORTED } else { CUresult::CUDA_SUCCESS };
    assert_eq!(launch_ex([1, 1, 1], nothing, &mut [dependent]), expected);
    let priority =
        |priority| attribute(Id::CU_LAUNCH_ATTRIBUTE_PRIORITY, |value| value.priority = priority);
    let ignored = attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE, |_| {});
    let both = &mut [ignored, priority(-1)];
    assert_eq!(launch_ex([1, 1, 1], nothing, both), CUresult::CUDA_SUCCESS);
    assert_eq!(launch_ex([1, 1, 1], nothing, &mut [priority(7)]), REFUSED);
    let cooperative = attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, |value| value.cooperative = 1);
    let refused = launch_ex([1, 1, 1], nothing, &mut [cooperative]);
    assert_eq!(refused, CUresult::CUDA_ERROR_NOT_SUPPORTED);
    context.synchronize().expect("nothing failed");
}
