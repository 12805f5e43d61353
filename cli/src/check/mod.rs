//! `check`: compares every operation and the layer on a device with the reference in f64.

mod case;
mod ops;
mod routing;
mod weighted;
mod worst;

use std::fmt::Write;

use moe_kernels::{DType, Dtype};

use crate::backend::dispatch;
use crate::device::{Choice, Gpu, Place};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::text::{Table, print};

use case::{Case, Shape, Skew};
use ops::Op;
use worst::Worst;

/// Checks each operation and the layer on a device against the reference in f64
///
/// Runs every combination of the lists below. Integers and copies have to agree bit for bit. Other
/// outputs have a bound for each element, derived from the element type and the length of the sums.
#[derive(clap::Args)]
pub struct Arguments {
    /// The device that runs the kernels
    #[arg(long, default_value = "auto")]
    device: Choice,

    /// Operations
    #[arg(long, value_delimiter = ',', default_values = Op::NAMES)]
    ops: Vec<Op>,

    /// Tokens, hidden, intermediate, experts and experts per token
    #[arg(long, value_delimiter = ',', value_name = "T#H#I#E#K#", default_values = Shape::DEFAULTS)]
    shapes: Vec<Shape>,

    /// Element types: f32, f16, bf16
    #[arg(long, value_delimiter = ',', default_values = ["f32", "f16", "bf16"])]
    dtypes: Vec<DType>,

    /// Distributions of tokens over experts
    #[arg(long, value_delimiter = ',', default_values = Skew::NAMES)]
    skews: Vec<Skew>,

    /// Seeds of the inputs and of the emulator's schedule
    #[arg(long, value_delimiter = ',', default_values = ["0", "1"])]
    seeds: Vec<u64>,
}

/// The result of all cases of one operation and element type.
struct Row {
    op: Op,
    dtype: DType,
    cases: usize,
    worst: Worst,
}

/// Returns `Ok(false)` if an error exceeds its bound.
pub fn check(arguments: &Arguments) -> Result<bool> {
    let place = arguments.device.place();
    if place == Place::Cpu {
        let why = "cpu is the reference, wanted cuda, emulator or auto".into();
        return Err(Error::Option { option: "--device", why });
    }
    let gpu = Gpu::open(place)?;
    // Read before the first launch: the calls fail on a device with a failed kernel.
    let device = gpu.describe();
    // The capability that the emulator has is part of the command that reproduces a failure.
    let emulated = std::env::var("MOE_EMULATOR_CC")
        .map_or_else(|_| String::new(), |capability| format!("MOE_EMULATOR_CC={capability} "));
    let Arguments { ops, shapes, dtypes, skews, seeds, .. } = arguments;
    let cases = shapes.len() * dtypes.len() * skews.len() * seeds.len();
    let progress = Progress::parts("check", cases);
    let mut rows: Vec<Row> = Vec::new();
    let mut failures = Vec::new();
    'cases: for &dtype in dtypes {
        for &shape in shapes {
            for (&skew, &seed) in
                skews.iter().flat_map(|skew| seeds.iter().map(move |seed| (skew, seed)))
            {
                progress.set_message(format!("{dtype} {shape} {skew} seed {seed}"));
                let result =
                    dispatch!(dtype, D => check_case::<D>(&gpu, shape, skew, seed, ops, &mut rows));
                let reproduce = |op: Op| {
                    format!(
                        "{emulated}moe-kernels check --device {} --ops {op} --shapes {shape} \
                         --dtypes {dtype} --skews {skew} --seeds {seed}",
                        place.name()
                    )
                };
                match result {
                    Ok(failed) => failures.extend(
                        failed
                            .into_iter()
                            .map(|(op, worst)| format!("{op}: {worst}\n  {}\n", reproduce(op))),
                    ),
                    // Nothing was launched: no kernels for this GPU, or a shape out of range.
                    Err((_, Error::Library(error)))
                        if !matches!(error, moe_kernels::Error::Driver { .. }) =>
                    {
                        return Err(error.into());
                    }
                    // After a failed launch the device cannot be used.
                    Err((op, error)) => {
                        failures.push(format!("{op}: {error}\n  {}\n", reproduce(op)));
                        break 'cases;
                    }
                }
                progress.advance();
            }
        }
    }
    drop(progress);
    print(report(&device, &rows, &failures));
    Ok(failures.is_empty())
}

/// Runs all operations on one case. Returns those with an error above its bound.
fn check_case<D: Dtype>(
    gpu: &Gpu,
    shape: Shape,
    skew: Skew,
    seed: u64,
    ops: &[Op],
    rows: &mut Vec<Row>,
) -> std::result::Result<Vec<(Op, Worst)>, (Op, Error)> {
    let first = ops.first().copied().unwrap_or(Op::Layer);
    let case = Case::<D>::new(shape, skew, seed).map_err(|error| (first, error))?;
    let mut failed = Vec::new();
    for &op in ops {
        gpu.reschedule(seed);
        let worst = op.run(gpu, &case).map_err(|error| (op, error))?;
        if !worst.is_good() {
            failed.push((op, worst.clone()));
        }
        match rows.iter_mut().find(|row| row.op == op && row.dtype == D::DTYPE) {
            Some(row) => {
                row.cases += 1;
                row.worst.merge(worst);
            }
            None => rows.push(Row { op, dtype: D::DTYPE, cases: 1, worst }),
        }
    }
    Ok(failed)
}

fn report(device: &str, rows: &[Row], failures: &[String]) -> String {
    /// More would scroll the table off the screen.
    const MOST_FAILURES: usize = 10;
    let mut table =
        Table::new(&["op", "dtype", "cases", "worst error", "bound", "error/bound", "verdict"]);
    for Row { op, dtype, cases, worst } in rows {
        let verdict = if worst.is_good() { "ok" } else { "FAILED" };
        table.row(vec![
            op.to_string(),
            dtype.to_string(),
            cases.to_string(),
            format!("{:.1e}", worst.error),
            if worst.exact { "exact".into() } else { format!("{:.1e}", worst.bound) },
            if worst.is_good() {
                format!("{:.2}", worst.ratio)
            } else {
                format!("{:.1e}", worst.ratio)
            },
            verdict.into(),
        ]);
    }
    let mut text = format!("{device}, checked against the reference in f64\n\n{table}");
    for failure in failures.iter().take(MOST_FAILURES) {
        // Writing to a string does not fail.
        let _ = write!(text, "\n{failure}");
    }
    if failures.len() > MOST_FAILURES {
        let _ = write!(text, "\nand {} more failures\n", failures.len() - MOST_FAILURES);
    }
    text
}
