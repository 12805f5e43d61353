//! `info`: the devices of this machine, their drivers, and the kernels in this binary.

use std::process::{Command, Stdio};

use moe_kernels::{DType, kernel_files, kernel_symbols, kernel_toolkit};

use crate::device::{Choice, Gpu, Place, probe};
use crate::error::{Error, Result, io};
use crate::text::{Table, print};

/// Lists the devices, and the kernels in this binary with their architectures and element types
#[derive(clap::Args)]
pub struct Arguments {
    /// Prints this device only [default: kernels and all devices]
    #[arg(long)]
    device: Option<Choice>,
}

pub fn info(arguments: &Arguments) -> Result<bool> {
    if let Some(choice) = arguments.device {
        print(describe(choice.place())?);
        return Ok(true);
    }
    print(binary());
    print("\n");
    print(describe(Place::Cpu)?);
    // A process has one driver: a process of this program describes each device.
    let program = std::env::current_exe().map_err(io("find", "this program"))?;
    for place in [Place::Emulator, Place::Cuda] {
        let missing = match place {
            Place::Cuda => probe().err(),
            _ if cfg!(feature = "emulator") => None,
            _ => Some("this binary was built without the feature `emulator`".into()),
        };
        if let Some(why) = missing {
            print(row(place, &format!("none: {why}")));
            continue;
        }
        let arguments = ["info", "--device", place.name()];
        let status = Command::new(&program).args(arguments).stdin(Stdio::null()).status();
        let status = status.map_err(io("start", &program))?;
        if !status.success() {
            let why = format!("`info` on this device failed: {status}");
            return Err(Error::Device { device: place.name(), why });
        }
    }
    Ok(true)
}

/// The kernel files, the compiler and the kernels.
fn binary() -> String {
    let mut table = Table::new(&["kernel file", "architectures", "KiB"]);
    for file in kernel_files() {
        let architectures = match file.architectures {
            "" => "none (built without nvcc)",
            architectures => architectures,
        };
        table.row(vec![
            file.name.into(),
            architectures.into(),
            (file.bytes.div_ceil(1024)).to_string(),
        ]);
    }
    let toolkit = kernel_toolkit().map_or_else(String::new, |(major, minor)| {
        format!("\ncompiled by nvcc {major}.{minor}, for drivers of CUDA {major}.0 and newer\n")
    });
    let version = env!("CARGO_PKG_VERSION");
    format!("moe-kernels {version}\n\n{table}{toolkit}\n{}", kernels(kernel_symbols()))
}

/// A table of kernels, grouped by operation, with the element types of each.
fn kernels(symbols: impl Iterator<Item = String>) -> String {
    // A symbol is moe_{op}_{fwd|bwd}[_{part}][_{dtype}].
    let mut kernels: Vec<(String, Vec<&str>)> = Vec::new();
    for symbol in symbols {
        let split = DType::ALL.into_iter().find_map(|dtype| {
            Some((symbol.strip_suffix(dtype.name())?.strip_suffix('_')?, dtype.name()))
        });
        let (name, dtype) = split.map_or((&symbol[..], None), |(name, dtype)| (name, Some(dtype)));
        match kernels.iter_mut().find(|(known, _)| known == name) {
            Some((_, dtypes)) => dtypes.extend(dtype),
            None => kernels.push((name.into(), dtype.into_iter().collect())),
        }
    }
    let mut table = Table::new(&["operation", "kernel", "element types"]);
    let mut previous = String::new();
    for (name, dtypes) in kernels {
        let operation = ["_fwd", "_bwd"].iter().find_map(|pass| Some(name.split_once(pass)?.0));
        let operation = operation.unwrap_or(&name).trim_start_matches("moe_").to_string();
        let dtypes = if dtypes.is_empty() { "any".into() } else { dtypes.join(" ") };
        let first = if operation == previous { String::new() } else { operation.clone() };
        table.row(vec![first, name, dtypes]);
        previous = operation;
    }
    table.to_string()
}

fn row(place: Place, text: &str) -> String {
    format!("{:<9} {text}\n", place.name())
}

fn describe(place: Place) -> Result<String> {
    if place == Place::Cpu {
        return Ok(row(
            place,
            &format!("the reference in f32, {} threads", rayon::current_num_threads()),
        ));
    }
    let gpu = Gpu::open(place)?;
    let (major, minor) = gpu.device.capability();
    let context = gpu.device.context();
    let name = context.name().map_err(gpu.failed("read the device's name"))?;
    let memory = context.total_mem().map_err(gpu.failed("read the memory size"))?;
    let text = format!(
        "{name}, compute capability {major}.{minor}, {:.1} GiB, driver for CUDA {}",
        memory as f64 / (1u64 << 30) as f64,
        gpu.driver_version()?
    );
    Ok(row(place, &text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_grouped_by_operation() {
        let symbols = ["moe_plan_fwd_scan", "moe_permute_fwd_f32", "moe_permute_fwd_bf16"];
        let more = ["moe_permute_bwd_f16", "moe_noise_fwd"];
        let table = kernels(symbols.into_iter().chain(more).map(String::from));
        let rows: Vec<Vec<&str>> =
            table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            rows,
            [
                vec!["plan", "moe_plan_fwd_scan", "any"],
                vec!["permute", "moe_permute_fwd", "f32", "bf16"],
                vec!["moe_permute_bwd", "f16"],
                vec!["noise", "moe_noise_fwd", "any"],
            ]
        );
    }
}
