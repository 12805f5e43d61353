//! The counts of the software device while an operation runs: memory traffic and instructions,
//! which are exact, and no times.

use moe_bench::{Target, Workload};
use serde::Serialize;

use crate::error::Result;

/// The counts of one kernel in one call.
#[derive(Serialize, Clone)]
pub struct Traffic {
    pub kernel: String,
    pub launches: u64,
    /// Bytes of the distinct 32-byte sectors that are read and written: the least traffic of
    /// memory.
    pub dram_bytes: u64,
    /// Bytes that lanes load and store.
    pub requested_bytes: u64,
    pub read_requests: u64,
    /// 32-byte sectors of all read requests; a request of 16 bytes per lane has 16.
    pub read_sectors: u64,
    pub write_requests: u64,
    pub write_sectors: u64,
    pub shared_requests: u64,
    /// Passes through the banks of shared memory.
    pub shared_wavefronts: u64,
    /// Passes that are due to conflicts.
    pub bank_conflicts: u64,
    /// Shuffles, votes, reductions and matches.
    pub warp_operations: u64,
    pub matrix_multiplications: u64,
    pub block_barriers: u64,
    pub atomics: u64,
}

/// Counts the traffic of one call of a workload.
#[cfg(feature = "emulator")]
pub fn of(target: &Target<'_>, mut workload: Workload<'_>) -> Result<Vec<Traffic>> {
    let Target::Gpu(gpu) = target else { return Ok(Vec::new()) };
    gpu.wait()?;
    moe_emulator::reset_traffic();
    workload.call(0)?;
    gpu.wait()?;
    let kernels = moe_emulator::traffic().into_iter().map(|kernel| {
        let moe_emulator::WarpOperations {
            shuffles,
            votes,
            reductions,
            matches,
            matrix_multiplications,
            block_barriers,
            global_atomics,
            shared_atomics,
            ..
        } = kernel.operations;
        Traffic {
            launches: kernel.launches,
            dram_bytes: kernel.dram_bytes(),
            requested_bytes: kernel.requested_bytes(),
            read_requests: kernel.global_read.requests,
            read_sectors: kernel.global_read.sectors,
            write_requests: kernel.global_write.requests,
            write_sectors: kernel.global_write.sectors,
            shared_requests: kernel.shared_read.requests + kernel.shared_write.requests,
            shared_wavefronts: kernel.shared_read.wavefronts + kernel.shared_write.wavefronts,
            bank_conflicts: kernel.bank_conflicts(),
            warp_operations: shuffles + votes + reductions + matches,
            matrix_multiplications,
            block_barriers,
            atomics: global_atomics + shared_atomics,
            kernel: kernel.symbol,
        }
    });
    Ok(kernels.collect())
}

#[cfg(not(feature = "emulator"))]
pub fn of(_: &Target<'_>, _: Workload<'_>) -> Result<Vec<Traffic>> {
    Ok(Vec::new())
}
