//! The file `bench.json`: device, ceilings and measurements.

use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::bench::traffic::Traffic;
use crate::error::Result;
use crate::write::replace;

/// Incremented when the meaning of a field changes.
const FORMAT: u32 = 1;

/// The content of the file.
#[derive(Serialize)]
pub struct Record {
    format: u32,
    version: &'static str,
    /// The commit of the sources, see [`commit`].
    commit: Option<String>,
    /// The time of the start, in UTC.
    pub date: String,
    /// True if everything was measured that was requested.
    pub complete: bool,
    pub device: Device,
    pub ceilings: Ceilings,
    pub rows: Vec<Row>,
}

#[derive(Serialize)]
pub struct Device {
    /// `cuda`, `emulator` or `cpu`
    pub kind: &'static str,
    pub name: String,
    pub capability: Option<String>,
    /// The CUDA version of the driver.
    pub driver: Option<String>,
    /// Threads of the CPU reference.
    pub threads: Option<usize>,
}

#[derive(Serialize, Clone, Copy, Default)]
pub struct Ceilings {
    pub copy_bytes_per_second: Option<f64>,
    pub read_bytes_per_second: Option<f64>,
    pub dense_flops_per_second: Option<f64>,
}

/// One operation or peer at one shape.
#[derive(Serialize, Clone)]
pub struct Row {
    pub op: &'static str,
    pub pass: &'static str,
    /// The part of the layer that is timed.
    pub boundary: &'static str,
    pub model: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub tokens: usize,
    pub dtype: &'static str,
    pub routing: &'static str,
    pub router: String,
    /// `moe-kernels`, or the name of a peer.
    pub by: String,
    pub version: Option<String>,
    pub seconds: Option<Seconds>,
    /// Our time directly before and after a peer, in seconds.
    pub ours_around: Option<[f64; 2]>,
    /// How calls are launched: `graph`, `stream`, `eager`, `call`.
    pub launch: Option<String>,
    /// `cold`: data is read from memory; `warm`: data may be in a cache.
    pub cache: Option<String>,
    /// The least bytes that the operation has to move.
    pub bytes: u64,
    /// The least operations that it has to compute.
    pub flops: u64,
    pub roofline_seconds: Option<f64>,
    pub bound: Option<&'static str>,
    /// `100 * roofline_seconds / seconds.median`
    pub percent_of_roofline: Option<f64>,
    /// The time of a dense library for the same products, with rows divided equally among experts.
    pub dense: Option<Dense>,
    /// The counts of the software device for each kernel.
    pub traffic: Option<Vec<Traffic>>,
    pub relative_error: Option<f64>,
    pub note: Option<String>,
}

#[derive(Serialize, Clone, Copy)]
pub struct Seconds {
    pub median: f64,
    pub p10: f64,
    pub p90: f64,
    pub samples: usize,
}

#[derive(Serialize, Clone)]
pub struct Dense {
    pub by: &'static str,
    pub seconds: f64,
    /// `100 * seconds / ours`
    pub percent: f64,
}

impl Record {
    pub fn new(device: Device) -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            date: now(),
            complete: false,
            device,
            ceilings: Ceilings::default(),
            rows: Vec::new(),
        }
    }

    /// Writes the file. It is replaced as a whole, so that a reader never finds a partial file.
    pub fn write(&self, folder: &Path) -> Result<()> {
        replace(&folder.join("bench.json"), |_, file| {
            let text = serde_json::to_string_pretty(self)?;
            writeln!(file, "{text}")
        })
    }
}

/// Reads the commit from the environment variable `MOE_KERNELS_COMMIT`, from the file `commit` in
/// the program's folder, or from git in the current folder, in this order.
fn commit() -> Option<String> {
    let from_file = || {
        let file = std::env::current_exe().ok()?.with_file_name("commit");
        std::fs::read_to_string(file).ok()
    };
    let from_git = || {
        let output = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let text = std::env::var("MOE_KERNELS_COMMIT").ok().or_else(from_file).or_else(from_git)?;
    Some(text.trim().to_string()).filter(|text| !text.is_empty())
}

/// The current time, as in `2026-11-22T14:08:32Z`.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    utc(since.as_secs())
}

/// Formats seconds since 1970-01-01T00:00:00Z in the Gregorian calendar.
fn utc(seconds: u64) -> String {
    const DAY: u64 = 86_400;
    let is_leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let (mut days, second) = (seconds / DAY, seconds % DAY);
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}Z", days + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_matches_gnu_date() {
        // The output of GNU date: `date -u -d @951782400 +%FT%TZ`.
        for (seconds, wanted) in [
            (0, "1970-01-01T00:00:00Z"),
            (94_694_399, "1972-12-31T23:59:59Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_795_356_512, "2026-11-22T14:08:32Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), wanted);
        }
    }
}
