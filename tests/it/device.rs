//! The device: images, launches, and errors that no single operation causes.

use cudarc::driver::{CudaContext, DevicePtr, DevicePtrMut};
use moe_kernels::ops::combine::CombineInputs;
use moe_kernels::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_fwd};
use moe_kernels::ops::permute::{self, PermuteBuffers};
use moe_kernels::ops::rms_norm::RmsNormInputs;
use moe_kernels::ops::router_gemm::RouterGemmInputs;
use moe_kernels::ops::{
    capacity, combine, expert_choice, jitter, plan, rms_norm, route, router_gemm,
};
use moe_kernels::{
    CapacityConfig, CapacityLimit, DType, Device, Error, Priority, RmsNorm, RouterConfig,
    RoutingShape, Workspace, kernel_files, kernel_symbols,
};

use crate::common::gpu;

#[test]
fn warm_up_loads_every_kernel() {
    let gpu = gpu();
    for dtype in DType::ALL {
        gpu.device.warm_up(dtype).unwrap();
    }
}

/// Two blocks of a product fit on a multiprocessor only with the largest shared memory carveout.
#[test]
fn products_prefer_shared_memory() {
    let gpu = gpu();
    gpu.device.warm_up(DType::BF16).unwrap();
    if !gpu.emulated {
        return; // A GPU's driver does not report the preference.
    }
    for (symbol, preferred) in [
        (c"moe_grouped_gemm_fwd_bf16", Some(100)),
        (c"moe_grouped_gemm_fwd_in_out_bf16", Some(100)),
        (c"moe_grouped_gemm_fwd_gate_up_bf16", Some(100)),
        (c"moe_grouped_gemm_fwd_gate_up_in_out_bf16", Some(100)),
        (c"moe_combine_fwd_bf16", None),
    ] {
        assert_eq!(moe_emulator::preferred_carveout(symbol), preferred, "{symbol:?}");
    }
}

#[test]
fn every_kernel_file_is_in_the_binary() {
    let names: Vec<_> = kernel_files().map(|file| file.name).collect();
    assert_eq!(
        names,
        [
            "capacity",
            "combine",
            "expert_choice",
            "grouped_gemm",
            "jitter",
            "noise",
            "permute",
            "plan",
            "rms_norm",
            "route",
            "router_gemm",
        ]
    );
}

/// The kernels of the software device are those of the kernel table. On a GPU all of them load.
#[test]
fn kernel_table_is_complete() {
    if !gpu().emulated {
        return warm_up_loads_every_kernel();
    }
    let mut listed: Vec<String> = kernel_symbols().collect();
    listed.sort();
    let exported = moe_emulator::kernels().into_iter().map(|kernel| kernel.symbol);
    let mut exported: Vec<String> = exported.filter(|symbol| symbol.starts_with("moe_")).collect();
    exported.sort();
    assert_eq!(listed, exported);
}

/// A launch from a thread in which the context has not been current.
#[test]
fn any_thread_may_launch() {
    let gpu = gpu();
    let shape = RoutingShape::new(2, 2, 1).unwrap();
    let ids = gpu.upload(&[1u32, 0]);
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let x = gpu.upload(&[1f32, 2.0]);
    let mut xp = gpu.poisoned::<f32>(2);
    let buffers = PermuteBuffers {
        xp: xp.view_mut().device_ptr_mut(&gpu.stream).0,
        x: x.view().device_ptr(&gpu.stream).0,
        row_of_slot: plan.row_of_slot().device_ptr(&gpu.stream).0,
        expert_offsets: plan.expert_offsets().device_ptr(&gpu.stream).0,
    };
    std::thread::scope(|scope| {
        let launch = || {
            // SAFETY: the buffers have the shape's sizes and outlive the kernel, which the download
            // below waits for.
            unsafe {
                let stream = gpu.stream.cu_stream();
                permute::permute_fwd_raw(&gpu.device, stream, DType::F32, shape, 1, buffers)
            }
        };
        scope.spawn(launch).join().unwrap().unwrap();
    });
    assert_eq!(gpu.download(&xp.view()), [2.0, 1.0]);
}

/// cudarc orders work within one CudaContext only, so buffers of two must not be mixed.
#[test]
fn foreign_stream_and_foreign_plan_are_errors() {
    let gpu = gpu();
    let other = CudaContext::new(0).unwrap();
    let (device, stream) = (Device::new(&other).unwrap(), other.new_stream().unwrap());
    let shape = RoutingShape::new(2, 2, 1).unwrap();
    let ids = gpu.upload(&[1u32, 0]);
    let foreign_stream = plan::plan_fwd(&device, &gpu.stream, shape, &ids.view());
    assert!(matches!(foreign_stream, Err(Error::Context { op: "plan_fwd", argument: "stream" })));

    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let x = stream.clone_htod(&[1f32, 2.0]).unwrap();
    let foreign_plan = permute::permute_fwd(&device, &stream, &plan, 1, &x.as_view());
    assert!(matches!(foreign_plan, Err(Error::Context { op: "permute_fwd", argument: "plan" })));
}

#[test]
fn every_operation_checks_the_contexts_of_device_stream_and_plan() {
    let gpu = gpu();
    let other = CudaContext::new(0).unwrap();
    let (device, stream) = (&Device::new(&other).unwrap(), other.new_stream().unwrap());
    let shape = RoutingShape::new(2, 2, 1).unwrap();
    let ids = gpu.upload(&[0u32, 1]);
    let values = gpu.upload(&[1f32; 8]);
    let (four, eight) = (values.view().slice(..4), values.view());
    let (weights, rows) = (four.slice(..2), Rows::Grouped);
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let router = RouterConfig::top_k_softmax();
    let limit = CapacityLimit::Rows { rows: 1 };
    let one_row = CapacityConfig::new(limit, Priority::Token);
    let norm = RmsNorm { epsilon: 0.0, offset: 0.0, scale_first: false };
    let with_plan = RmsNormInputs { plan: Some(&plan), ..RmsNormInputs::default() };
    let projected = RouterGemmInputs { x: &four, router_gate: &four, bias: None };
    let mut errors = vec![
        route::route_fwd(device, &gpu.stream, shape, &router, &route::RouteInputs::new(&four))
            .err(),
        plan::plan_fwd(device, &gpu.stream, shape, &ids.view()).err(),
        jitter::jitter_fwd(device, &gpu.stream, 0.1, &four, &four).err(),
        expert_choice::expert_choice_fwd(device, &gpu.stream, 2, 2, 1, &four).err(),
        router_gemm::router_gemm_fwd::<f32, f32, f32>(device, &gpu.stream, 2, 2, &projected).err(),
    ];
    // First the device is foreign, then the plan.
    for stream in [&gpu.stream, &stream] {
        errors.extend([
            permute::permute_fwd(device, stream, &plan, 2, &four).err(),
            grouped_gemm_fwd(device, stream, &plan, 2, 2, rows, &four, LinearWeights::new(&eight))
                .err(),
            combine::combine_fwd(device, stream, &plan, 2, &CombineInputs::new(&four, &weights))
                .err(),
            capacity::capacity_fwd(device, stream, &plan, shape, &one_row, None, &weights).err(),
            rms_norm::rms_norm_fwd(device, stream, &norm, 2, &four, &with_plan).err(),
        ]);
    }
    for error in errors {
        assert!(matches!(error, Some(Error::Context { .. })), "{error:?}");
    }
}

/// After a kernel with an invalid access, the error of the next call has the software device's
/// report.
#[test]
fn error_after_an_invalid_access_has_the_report() {
    let gpu = gpu();
    if !gpu.emulated {
        return; // On a GPU the context would be unusable afterwards.
    }
    // A separate context: cudarc returns a failure to the next call in the same context.
    let context = CudaContext::new(0).unwrap();
    let (device, stream) = (&Device::new(&context).unwrap(), &context.new_stream().unwrap());
    let shape = RoutingShape::new(2, 2, 1).unwrap();
    let ids = stream.clone_htod(&[1u32, 0]).unwrap();
    let plan = plan::plan_fwd(device, stream, shape, &ids.as_view()).unwrap();
    let mut xp = stream.alloc_zeros::<f32>(2).unwrap();
    let buffers = PermuteBuffers {
        xp: xp.device_ptr_mut(stream).0,
        x: 4096,
        row_of_slot: plan.row_of_slot().device_ptr(stream).0,
        expert_offsets: plan.expert_offsets().device_ptr(stream).0,
    };
    // SAFETY: none; `x` is an invalid address, which the software device must report.
    unsafe { permute::permute_fwd_raw(device, stream.cu_stream(), DType::F32, shape, 1, buffers) }
        .unwrap();
    let from_cudarc = stream.synchronize().unwrap_err();
    let from_library = plan::plan_fwd(device, stream, shape, &ids.as_view()).err().unwrap();
    for message in [format!("{from_cudarc:?}"), from_library.to_string()] {
        assert!(message.contains("moe_permute_fwd_f32"), "{message}");
        assert!(message.contains("invalid access at 0x1000"), "{message}");
    }
    moe_emulator::clear_errors();
}

/// An error of the driver has the driver's name for it.
#[test]
fn driver_errors_have_the_name_of_the_code() {
    let gpu = gpu();
    let error = Workspace::alloc(&gpu.stream, 1 << 50).err().unwrap();
    let Error::Driver { name, .. } = &error else { panic!("{error}") };
    assert_eq!(name, "CUDA_ERROR_OUT_OF_MEMORY");
}
