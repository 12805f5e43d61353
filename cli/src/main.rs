//! `moe-kernels`: runs a Mixture-of-Experts layer of a checkpoint, checks devices against the
//! reference, measures both, and lists the kernels in the binary.
//!
//! Exit status: 0 for success, 1 if the error of a result exceeds its limit, 2 for any other error.

mod backend;
mod bench;
mod bundled;
mod check;
mod device;
mod error;
mod finite;
mod gpu;
mod histogram;
mod info;
mod load;
mod progress;
mod recording;
mod run;
mod text;
mod tokens;
mod tune;
mod write;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mixture-of-Experts layers on a GPU, on the software CUDA device, and on the CPU.
#[derive(Parser)]
#[command(name = "moe-kernels", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Arguments),
    Check(check::Arguments),
    Bench(bench::Arguments),
    Info(info::Arguments),
    Tune(tune::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Check(arguments) => check::check(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Info(arguments) => info::info(&arguments),
        Command::Tune(arguments) => tune::tune(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
