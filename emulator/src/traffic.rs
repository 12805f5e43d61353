//! Exact counts of the memory traffic and warp operations of kernels, from the counting variant of
//! the software device.

use std::ffi::CString;

use crate::{InstallError, Variant, control, install_variant, kernels};

/// Bytes of a sector, the unit of transfer of L2 and DRAM.
const SECTOR_BYTES: u64 = 32;

/// The memory traffic and warp operations of one kernel's launches since [`reset_traffic`].
///
/// The unit is the *request*: one instruction that a warp executes, for all its lanes at once. The
/// counts depend only on the kernel, its arguments and its data, not on the seed or on the number
/// of OS threads. `emulator/README.md` describes how requests are found, and the limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// The kernel's exported name.
    pub symbol: String,
    /// Successful launches; a failed one adds to no count.
    pub launches: u64,
    /// Blocks of these launches.
    pub blocks: u64,
    /// Warps of these blocks.
    pub warps: u64,
    /// Reads of device memory: loads, cp.async and TMA loads, but not atomics.
    pub global_read: GlobalTraffic,
    /// Writes of device memory: stores and TMA stores, but not atomics.
    pub global_write: GlobalTraffic,
    /// Reads of shared memory: loads, ldmatrix and the operands of wgmma, but not atomics.
    pub shared_read: SharedTraffic,
    /// Writes of shared memory: stores, stmatrix and the arrival of cp.async, but not that of TMA.
    pub shared_write: SharedTraffic,
    /// Warp operations other than memory accesses.
    pub operations: WarpOperations,
}

impl Traffic {
    /// The least bytes that DRAM must move, with a cache as large as memory: every sector that a
    /// launch reads is loaded once, and every sector that it writes is stored once.
    pub fn dram_bytes(&self) -> u64 {
        self.global_read.unique_bytes() + self.global_write.unique_bytes()
    }

    /// The bytes that move between L1 and L2 in both directions if L1 keeps nothing between
    /// requests. A kernel that reads data twice shows here.
    pub fn sector_bytes(&self) -> u64 {
        (self.global_read.sectors + self.global_write.sectors) * SECTOR_BYTES
    }

    /// The bytes that lanes requested, in both directions.
    pub fn requested_bytes(&self) -> u64 {
        self.global_read.bytes + self.global_write.bytes
    }

    /// Additional wavefronts of shared memory because of bank conflicts, in both directions.
    pub fn bank_conflicts(&self) -> u64 {
        self.shared_read.conflicts() + self.shared_write.conflicts()
    }
}

/// Reads or writes of device memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GlobalTraffic {
    /// Bytes that lanes requested: a byte that two lanes request counts twice.
    pub bytes: u64,
    /// Requests by warps.
    pub requests: u64,
    /// Different sectors of 32 bytes in a request, summed over requests: the transfers from L2 if
    /// L1 keeps nothing.
    pub sectors: u64,
    /// Different sectors of 32 bytes in a launch, summed over launches. Sectors of atomics count as
    /// both read and written.
    pub unique_sectors: u64,
}

impl GlobalTraffic {
    /// Sectors of an average request; 0 without requests. A warp whose lanes access adjacent
    /// addresses has 4 with 4 bytes a lane and 16 with 16; a warp whose lanes share no sectors has
    /// 32.
    pub fn sectors_per_request(&self) -> f64 {
        ratio(self.sectors, self.requests)
    }

    /// Requested bytes per moved byte. 1 is ideal; below 1 unneeded bytes are moved, and above 1
    /// lanes share bytes.
    pub fn sector_use(&self) -> f64 {
        ratio(self.bytes, self.sectors * SECTOR_BYTES)
    }

    /// Bytes of the different sectors.
    pub fn unique_bytes(&self) -> u64 {
        self.unique_sectors * SECTOR_BYTES
    }
}

/// Reads or writes of shared memory, which has 32 banks of 4 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    /// Requests by warps.
    pub requests: u64,
    /// Passes through the banks that the requests take, in wavefronts. A pass serves 32 lanes with
    /// 4 bytes each, 16 with 8 or 8 with 16, and takes as many wavefronts as the busiest bank has
    /// different words.
    pub wavefronts: u64,
    /// Wavefronts without conflicts: one for each pass in which a lane takes part.
    pub ideal_wavefronts: u64,
}

impl SharedTraffic {
    /// Additional wavefronts because of bank conflicts.
    pub fn conflicts(&self) -> u64 {
        self.wavefronts - self.ideal_wavefronts
    }

    /// Wavefronts of an average request; 0 without requests.
    pub fn wavefronts_per_request(&self) -> f64 {
        ratio(self.wavefronts, self.requests)
    }
}

/// Instructions that a warp executes as a whole; each counts once, for any mask.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WarpOperations {
    /// `__shfl_*_sync`
    pub shuffles: u64,
    /// `__ballot_sync`, `__any_sync`, `__all_sync`
    pub votes: u64,
    /// `__reduce_*_sync`
    pub reductions: u64,
    /// `__match_any_sync`
    pub matches: u64,
    /// `mma.sync`, and `wgmma.mma_async` once for each of its four warps.
    pub matrix_multiplications: u64,
    /// `ldmatrix`
    pub matrix_loads: u64,
    /// `stmatrix`
    pub matrix_stores: u64,
    /// `__syncwarp`
    pub warp_barriers: u64,
    /// Barriers of a block, named or not, once for each warp that arrives.
    pub block_barriers: u64,
    /// Atomics on device memory; lanes with the same address count once.
    pub global_atomics: u64,
    /// Atomics on shared memory; lanes with the same address count once.
    pub shared_atomics: u64,
}

/// The struct `Traffic` of emulator/simt/runtime.h.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Counts {
    launches: u64,
    blocks: u64,
    warps: u64,
    global_read: GlobalTraffic,
    global_write: GlobalTraffic,
    shared_read: SharedTraffic,
    shared_write: SharedTraffic,
    operations: WarpOperations,
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Like [`install`](crate::install), for the variant that counts the traffic of kernels:
/// [`traffic`]. It runs them more slowly and is otherwise identical. A process has one of the two
/// variants.
///
/// # Errors
/// Fails if a CUDA driver is already loaded, including the plain software device, if the library
/// cannot be loaded, or in a build without the feature `counting`.
pub fn install_counting() -> Result<(), InstallError> {
    install_variant(Variant::Counting)
}

/// The traffic of each kernel that was launched since [`reset_traffic`], sorted by symbol. Empty if
/// the device does not count. A launch counts when it has run: synchronise first.
///
/// # Panics
/// Panics if the software device is not installed.
pub fn traffic() -> Vec<Traffic> {
    kernels().into_iter().filter_map(|kernel| traffic_of(kernel.symbol)).collect()
}

fn traffic_of(symbol: String) -> Option<Traffic> {
    let name = CString::new(symbol.as_str()).ok()?;
    let mut counts = Counts::default();
    // SAFETY: the name is a C string, and the struct is the one that the function fills.
    let launched = unsafe { (control().traffic)(name.as_ptr(), &mut counts) };
    let Counts {
        launches,
        blocks,
        warps,
        global_read,
        global_write,
        shared_read,
        shared_write,
        operations,
    } = counts;
    launched.then_some(Traffic {
        symbol,
        launches,
        blocks,
        warps,
        global_read,
        global_write,
        shared_read,
        shared_write,
        operations,
    })
}

/// Sets the counts of all kernels to zero, for all threads of the process.
///
/// # Panics
/// Panics if the software device is not installed.
pub fn reset_traffic() {
    // SAFETY: the function has no preconditions.
    unsafe { (control().reset_traffic)() }
}
