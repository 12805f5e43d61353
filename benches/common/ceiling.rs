//! What the machine can do, measured in the run that it is compared with: bandwidth, the rate of a
//! large dense product, and the dense products that match an operation's shape.

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

/// The bytes of one tensor of a bandwidth measurement: more than any cache holds.
const GPU_BYTES: usize = 1 << 30;
const CPU_BYTES: usize = 1 << 28;

/// The side of the dense product.
const GPU_SIDE: usize = 8192;
const CPU_SIDE: usize = 1536;

/// Best of so many.
const ROUNDS: usize = 9;

/// The ceilings of a target; what could not be measured is not there.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Ceilings {
    /// Bytes per second of a copy, reads and writes counted.
    pub copy: Option<f64>,
    /// Bytes per second of reading alone.
    pub read: Option<f64>,
    /// Operations per second of a large dense product in the element type; of f32 on the CPU.
    pub dense: Option<f64>,
}

impl Ceilings {
    /// Measures them. cuBLAS reads and multiplies on a GPU; where it cannot be loaded, only the copy
    /// remains.
    ///
    /// # Errors
    /// What the driver or cuBLAS says.
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

    /// The bandwidth that rooflines are made with: whichever way of moving bytes was faster.
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
        let (free, _) = gpu.context().mem_get_info().map_err(driver("ask for free memory"))?;
        while bytes > free / 4 {
            bytes /= 2;
        }
        let a = gpu.normal::<f32>(bytes / 4, 1.0, 1)?;
        let mut b = gpu.normal::<f32>(bytes / 4, 1.0, 2)?;
        let seconds = best_on(gpu, || {
            gpu.stream.memcpy_dtod(&a, &mut b).map_err(driver("copy on the device"))
        })?;
        let copy = Some(2.0 * bytes as f64 / seconds);
        let Some(dense) = Dense::new(gpu)? else { return Ok(Self { copy, ..Self::default() }) };
        let read = Some(dense.read_bandwidth(&a, &b)?);
        drop((a, b));
        let side = GPU_SIDE;
        let mut product = dense.product::<D>(1, side, side, side)?;
        let seconds = best_on(gpu, || product.call(0))?;
        Ok(Self { copy, read, dense: Some(2.0 * (side as f64).powi(3) / seconds) })
    }
}

/// Seconds of the fastest of several runs.
fn best(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut rounds = 0;
    while rounds < ROUNDS && (rounds < 3 || start.elapsed() < Duration::from_secs(2)) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        rounds += 1;
    }
    best
}

/// The same on a device's stream. The median, as for what is compared with it.
fn best_on(gpu: &Gpu, mut enqueue: impl FnMut() -> Result<()>) -> Result<f64> {
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
    /// `None` where cuBLAS cannot be loaded.
    ///
    /// # Errors
    /// What cuBLAS says.
    pub fn new(gpu: &'g Gpu) -> Result<Option<Self>> {
        // SAFETY: loading cuBLAS runs its initialisers, as every program that links it does.
        if !unsafe { cudarc::cublas::sys::is_culib_present() } {
            return Ok(None);
        }
        let blas = CudaBlas::new(gpu.stream.clone()).map_err(cublas("start"))?;
        Ok(Some(Self { gpu, blas }))
    }

    /// The products of `op` with as many rows for every expert that has any: what a library makes of
    /// the same arithmetic without groups of unequal size, without the gather and SwiGLU. `None` for
    /// what is no product.
    ///
    /// # Errors
    /// What the driver says, above all that there is not enough memory.
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

    /// `groups` products y [rows, n] = x [rows, k] * w [n, k] transposed.
    fn product<D: Element>(
        &self,
        groups: usize,
        rows: usize,
        n: usize,
        k: usize,
    ) -> Result<Workload<'_>>
    where
        CudaBlas: Gemm<D>,
    {
        let x = self.gpu.normal::<D>(groups * rows * k, 1.0, 1)?;
        let w = self.gpu.normal::<D>(groups * n * k, (k as f64).sqrt().recip(), 2)?;
        let mut y = self.gpu.zeros::<D>(groups * rows * n)?;
        // cuBLAS counts columns first: its y is n by rows, and w is transposed.
        let config = StridedBatchedConfig {
            gemm: GemmConfig {
                transa: CUBLAS_OP_T,
                transb: CUBLAS_OP_N,
                m: n as i32,
                n: rows as i32,
                k: k as i32,
                alpha: D::from_f32(1.0),
                lda: k as i32,
                ldb: k as i32,
                beta: D::from_f32(0.0),
                ldc: n as i32,
            },
            batch_size: groups as i32,
            stride_a: (n * k) as i64,
            stride_b: (rows * k) as i64,
            stride_c: (rows * n) as i64,
        };
        let blas = &self.blas;
        Ok(Workload::new(move |_| {
            // SAFETY: the tensors are as long as groups, sides and strides say.
            unsafe { blas.gemm_strided_batched(config, &w, &x, &mut y) }.map_err(cublas("multiply"))
        }))
    }

    /// Bytes per second of a dot product of two long vectors, which reads and does nothing else.
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
        // The result stays on the device: fetching it would be part of the time.
        mode(cublasPointerMode_t::CUBLAS_POINTER_MODE_DEVICE)?;
        let seconds = best_on(self.gpu, || {
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
    fn the_cpu_has_ceilings() {
        let ceilings = Ceilings::measure(&Target::Cpu, DType::BF16).unwrap();
        for ceiling in [ceilings.copy, ceilings.read, ceilings.dense] {
            // Any machine since 1990, and none yet.
            assert!((1e7..1e15).contains(&ceiling.unwrap()), "{ceilings:?}");
        }
        assert_eq!(ceilings.bandwidth(), Some(ceilings.copy.unwrap().max(ceilings.read.unwrap())));
    }
}
