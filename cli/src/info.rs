//! `info`: the devices of this machine, their drivers, and what is in this binary.

use std::process::{Command, Stdio};

use moe_kernels::{kernel_files, kernel_symbols, kernel_toolkit};

use crate::device::{Choice, Gpu, Place, probe};
use crate::error::{Error, Result, io};
use crate::text::{Table, print};

/// Says which devices there are, and which kernels are in this binary for which architectures
#[derive(clap::Args)]
pub struct Arguments {
    /// One device and nothing else [default: everything]
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
    // A process has one driver: this program starts itself for each.
    let program = std::env::current_exe().map_err(io("find", "the program itself"))?;
    for place in [Place::Emulator, Place::Cuda] {
        let missing = match place {
            Place::Cuda => probe().err(),
            _ if cfg!(feature = "emulator") => None,
            _ => Some("not in this binary".into()),
        };
        if let Some(why) = missing {
            print(row(place, &format!("none: {why}")));
            continue;
        }
        let arguments = ["info", "--device", place.name()];
        let status = Command::new(&program).args(arguments).stdin(Stdio::null()).status();
        let status = status.map_err(io("start", &program))?;
        if !status.success() {
            let why = format!("the process that asked it ended with {status}");
            return Err(Error::Device { device: place.name(), why });
        }
    }
    Ok(true)
}

/// What was compiled in.
fn binary() -> String {
    let mut table = Table::new(&["kernel file", "architectures", "KiB"]);
    for file in kernel_files() {
        let architectures = match file.architectures {
            "" => "none: built without nvcc",
            architectures => architectures,
        };
        table.row(vec![
            file.name.into(),
            architectures.into(),
            (file.bytes.div_ceil(1024)).to_string(),
        ]);
    }
    let symbols: Vec<String> = kernel_symbols().collect();
    let toolkit = kernel_toolkit().map_or_else(String::new, |(major, minor)| {
        format!("\ncompiled by nvcc {major}.{minor}, for drivers of CUDA {major}.0 and newer\n")
    });
    format!(
        "moe-kernels {}\n\n{table}{toolkit}\n{} kernels: {}\n",
        env!("CARGO_PKG_VERSION"),
        symbols.len(),
        symbols.join(" ")
    )
}

fn row(place: Place, text: &str) -> String {
    format!("{:<9} {text}\n", place.name())
}

fn describe(place: Place) -> Result<String> {
    if place == Place::Cpu {
        return Ok(row(place, &format!("the reference, {} threads", rayon::current_num_threads())));
    }
    let gpu = Gpu::open(place)?;
    let (major, minor) = gpu.device.capability();
    let context = gpu.device.context();
    let name = context.name().map_err(gpu.failed("ask for the name"))?;
    let memory = context.total_mem().map_err(gpu.failed("ask for the memory"))?;
    let text = format!(
        "{name}, compute capability {major}.{minor}, {:.1} GiB, driver for CUDA {}",
        memory as f64 / (1u64 << 30) as f64,
        gpu.driver_version()?
    );
    Ok(row(place, &text))
}
