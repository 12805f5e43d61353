//! Ceilings of the machine: memory bandwidth, the rate of a large dense product, and dense products
//! of an operation's shape. They are measured in the process whose times are compared with them.

use std::time::{Duration, Instant};

use cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
use cudarc::cublas::{CudaBlas, Gemm, GemmConfig, StridedBatchedConfig};
use cudarc::driver::{DevicePtr, DevicePtrMut};
use half::{bf16, f16};
use moe_kernels::DType;
use rayon::prelude::*;

use crate::common::error::{Result, cublas, driver};
use crate::common::model::Model;
use crate::common::op::Op;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu, Target};
use crate::common::timing::{Samples, between_events};
use crate::common::values::normal;
use crate::common::workload::Workload;

/// The bytes of one tensor of a bandwidth measurement, more than the size of any cache.
const GPU_BYTES: usize = 1 << 30;
const CPU_BYTES: usize = 1 << 28;

/// The side of the square matrices of the dense product.
const GPU_SIDE: usize = 8192;
const CPU_SIDE: usize = 1536;

/// The most repetitions of a measurement.
const ROUNDS: usize = 9;

/// The ceilings of a target. Those that could not be measured are `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Ceilings {
    /// Bytes per second of a copy, reads and writes counted.
    pub copy: Option<f64>,
    /// Bytes per second of reads without writes.
    pub read: Option<f64>,
    /// Operations per second of a large dense product in the element type, on the CPU in f32.
    pub dense: Option<f64>,
}

impl Ceilings {
    /// Measures the ceilings. On a GPU, reads and products run in cuBLAS; if it cannot be loaded,
    /// only the copy is measured.
    ///
    /// # Errors
    /// Errors of the driver or of cuBLAS.
    pub fn measure(target: &Target<'_>, dtype: DType) -> Result<Self> {
        match target {
            Target::Cpu => Ok(Self::of_cpu()),
            Target::Gpu(gpu) => match dtype {
                DType::F32 => Self::of_gpu::<f32>(gpu),
                DType::F16 => Self::of_gpu::<f16>(gpu),
                DType::BF16 => Self::of_gpu::<bf16>(gpu),
            },
        }
    }

    /// The bandwidth of rooflines: the higher one of copying and reading.
    pub fn bandwidth(&self) -> Option<f64> {
        [self.copy, self.read].into_iter().flatten().reduce(f64::max)
    }

    fn of_cpu() -> Self {
        let source = vec![1u64; CPU_BYTES / 8];
        let mut target = vec![0u64; CPU_BYTES / 8];
        let part = source.len().div_ceil(8 * rayon::current_num_threads()).max(1);
        let copy = best(|| {
            let pairs = target.par_chunks_mut(part).zip(source.par_chunks(part));
            pairs.for_each(|(target, source)| target.copy_from_slice(source));
            std::hint::black_box(&target);
        });
        let read = best(|| {
            let sums = source.par_chunks(part).map(|part| part.iter().fold(0, |sum, v| sum ^ v));
            std::hint::black_box(sums.reduce(|| 0, |a, b| a ^ b));
        });
        let side = CPU_SIDE;
        let (a, b) = (normal::<f32>(side * side, 1.0, 1), normal::<f32>(side * side, 1.0, 2));
        let mut c = vec![0f32; side * side];
        let dense = best(|| {
            let stride = side as isize;
            // SAFETY: all three are square matrices of this side, and c is borrowed mutably.
            unsafe {
                gemm_f32::gemm::f32::get_gemm_fn()(
                    side,
                    side,
                    side,
                    c.as_mut_ptr(),
                    stride,
                    1,
                    false,
                    a.as_ptr(),
                    stride,
                    1,
                    b.as_ptr(),
                    stride,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm_common::Parallelism::Rayon(0),
                );
            }
            std::hint::black_box(&c);
        });
        Self {
            copy: Some(2.0 * CPU_BYTES as f64 / copy),
            read: Some(CPU_BYTES as f64 / read),
            dense: Some(2.0 * (side as f64).powi(3) / dense),
        }
    }

    fn of_gpu<D: Element>(gpu: &Gpu) -> Result<Self>
    where
        CudaBlas: Gemm<D>,
    {
        let mut bytes = GPU_BYTES;
        let (free, _) = gpu.context().mem_get_info().map_err(driver("query the free memory"))?;
        while bytes > free / 4 {
            bytes /= 2;
        }
        let a = gpu.normal::<f32>(bytes / 4, 1.0, 1)?;
        let mut b = gpu.normal::<f32>(bytes / 4, 1.0, 2)?;
        let seconds = median_on(gpu, || {
            gpu.stream.memcpy_dtod(&a, &mut b).map_err(driver("copy on the device"))
        })?;
        let copy = Some(2.0 * bytes as f64 / seconds);
        let Some(dense) = Dense::new(gpu)? else { return Ok(Self { copy, ..Self::default() }) };
        let read = Some(dense.read_bandwidth(&a, &b)?);
        drop((a, b));
        let side = GPU_SIDE;
        let mut product = dense.product::<D>(1, side, side, side)?;
        let seconds = median_on(gpu, || product.call(0))?;
        Ok(Self { copy, read, dense: Some(2.0 * (side as f64).powi(3) / seconds) })
    }
}

/// Returns the seconds of the fastest of several calls.
fn best(mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut rounds = 0;
    while rounds < ROUNDS && (rounds < 3 || start.elapsed() < Duration::from_secs(2)) {
        let start = Instant::now();
        call();
        best = best.min(start.elapsed().as_secs_f64());
        rounds += 1;
    }
    best
}

/// Returns the median seconds of several calls on a device's stream. The times that are compared
/// with it are medians too.
fn median_on(gpu: &Gpu, mut enqueue: impl FnMut() -> Result<()>) -> Result<f64> {
    enqueue()?;
    let taken = (0..ROUNDS).map(|_| between_events(gpu, &mut enqueue));
    Ok(Samples::new(taken.collect::<Result<_>>()?).median())
}

/// Dense products through cuBLAS.
pub struct Dense<'g> {
    gpu: &'g Gpu,
    blas: CudaBlas,
}

impl<'g> Dense<'g> {
    /// Loads cuBLAS. `None` if it cannot be loaded.
    ///
    /// # Errors
    /// Errors of cuBLAS.
    pub fn new(gpu: &'g Gpu) -> Result<Option<Self>> {
        // SAFETY: loading cuBLAS runs its initialisers, as every program that links it does.
        if !unsafe { cudarc::cublas::sys::is_culib_present() } {
            return Ok(None);
        }
        let blas = CudaBlas::new(gpu.stream.clone()).map_err(cublas("start"))?;
        Ok(Some(Self { gpu, blas }))
    }

    /// Prepares batched products with the arithmetic of `op`: groups of equal size, one for each
    /// expert that has a row, without the gather and SwiGLU. `None` if `op` is not a product.
    ///
    /// # Errors
    /// Errors of the driver, such as too little memory.
    pub fn matching<D: Element>(
        &self,
        op: Op,
        model: &Model,
        draw: &Draw,
    ) -> Result<Option<Workload<'_>>>
    where
        CudaBlas: Gemm<D>,
    {
        let (h, i) = (model.config.hidden, model.config.intermediate);
        let groups = draw.distinct;
        let rows = draw.shape.slots().div_ceil(groups.max(1));
        if groups == 0 {
            return Ok(None);
        }
        Ok(match op {
            Op::GateUp => Some(self.product::<D>(groups, rows, 2 * i, h)?),
            Op::Down => Some(self.product::<D>(groups, rows, h, i)?),
            Op::Experts => {
                let mut gate_up = self.product::<D>(groups, rows, 2 * i, h)?;
                let mut down = self.product::<D>(groups, rows, h, i)?;
                Some(Workload::new(move |set| {
                    gate_up.call(set)?;
                    down.call(set)
                }))
            }
            _ => None,
        })
    }

    /// Prepares `groups` products y [rows, out] = x [rows, in] * w [out, in] transposed.
    fn product<D: Element>(
        &self,
        groups: usize,
        rows: usize,
        out_features: usize,
        in_features: usize,
    ) -> Result<Workload<'_>>
    where
        CudaBlas: Gemm<D>,
    {
        let matrix = out_features * in_features;
        let x = self.gpu.normal::<D>(groups * rows * in_features, 1.0, 1)?;
        let w = self.gpu.normal::<D>(groups * matrix, (in_features as f64).sqrt().recip(), 2)?;
        let mut y = self.gpu.zeros::<D>(groups * rows * out_features)?;
        // cuBLAS is column-major: its y is [out, rows], and w is transposed.
        let config = StridedBatchedConfig {
            gemm: GemmConfig {
                transa: CUBLAS_OP_T,
                transb: CUBLAS_OP_N,
                m: out_features as i32,
                n: rows as i32,
                k: in_features as i32,
                alpha: D::from_f32(1.0),
                lda: in_features as i32,
                ldb: in_features as i32,
                beta: D::from_f32(0.0),
                ldc: out_features as i32,
            },
            batch_size: groups as i32,
            stride_a: matrix as i64,
            stride_b: (rows * in_features) as i64,
            stride_c: (rows * out_features) as i64,
        };
        let blas = &self.blas;
        Ok(Workload::new(move |_| {
            // SAFETY: the tensors have the lengths that groups, sides and strides require.
            unsafe { blas.gemm_strided_batched(config, &w, &x, &mut y) }.map_err(cublas("multiply"))
        }))
    }

    /// Measures the bytes per second of a dot product of two long vectors, which only reads.
    fn read_bandwidth(
        &self,
        a: &cudarc::driver::CudaSlice<f32>,
        b: &cudarc::driver::CudaSlice<f32>,
    ) -> Result<f64> {
        use cudarc::cublas::sys::{cublasPointerMode_t, cublasSdot_v2};
        let mode = |mode| self.blas.set_pointer_mode(mode).map_err(cublas("set a mode"));
        let mut result = self.gpu.zeros::<f32>(1)?;
        let stream = &self.gpu.stream;
        let (a_address, _a) = a.device_ptr(stream);
        let (b_address, _b) = b.device_ptr(stream);
        let (result, _result) = result.device_ptr_mut(stream);
        // The result stays on the device, since a copy to the host would be timed.
        mode(cublasPointerMode_t::CUBLAS_POINTER_MODE_DEVICE)?;
        let seconds = median_on(self.gpu, || {
            // SAFETY: both vectors have this many elements and the result has one.
            unsafe {
                cublasSdot_v2(
                    *self.blas.handle(),
                    a.len() as i32,
                    a_address as *const f32,
                    1,
                    b_address as *const f32,
                    1,
                    result as *mut f32,
                )
            }
            .result()
            .map_err(cublas("read"))
        });
        mode(cublasPointerMode_t::CUBLAS_POINTER_MODE_HOST)?;
        Ok(8.0 * a.len() as f64 / seconds?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_of_the_cpu_are_plausible() {
        let ceilings = Ceilings::measure(&Target::Cpu, DType::BF16).unwrap();
        for ceiling in [ceilings.copy, ceilings.read, ceilings.dense] {
            // Bounds that hold for any machine.
            assert!((1e7..1e15).contains(&ceiling.unwrap()), "{ceilings:?}");
        }
        assert_eq!(ceilings.bandwidth(), Some(ceilings.copy.unwrap().max(ceilings.read.unwrap())));
    }
}
