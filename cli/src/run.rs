//! `run`: one layer of a checkpoint, forward.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use moe_kernels::DType;
use moe_kernels::reference::bound::relative_error;

use crate::backend::{Backend, Element, FORWARD, Output, dispatch};
use crate::bundled::{self, FIXTURES, Fixture, RECORDED};
use crate::checkpoint::{Checkpoint, Folder};
use crate::device::{Choice, Place, available};
use crate::error::{Error, Result, io};
use crate::load;
use crate::progress::Steps;
use crate::tensor_file::{self, TensorFile};
use crate::text::{Table, say, time};

/// Runs one MoE layer of a checkpoint forward
///
/// Without --checkpoint it runs the checkpoints that are part of this binary, on every device that
/// there is, and says how far each is from the output that transformers recorded in float64.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder with config.json and safetensors, as the Hub has it
    #[arg(long, value_name = "DIR", requires_all = ["layer", "input", "output"])]
    checkpoint: Option<PathBuf>,

    /// Number of the layer, from 0
    #[arg(long, value_name = "N", requires = "checkpoint")]
    layer: Option<usize>,

    /// Safetensors file with the tensor `x` [T, H]
    #[arg(long, value_name = "FILE", requires = "checkpoint")]
    input: Option<PathBuf>,

    /// Safetensors file to write the tensor `y` [T, H] to
    #[arg(long, value_name = "FILE", requires = "checkpoint")]
    output: Option<PathBuf>,

    /// Where to run [default: auto; without a checkpoint: everywhere]
    #[arg(long)]
    device: Option<Choice>,

    /// f32, bf16 or f16: the type of weights, input and output [default: f32; without a checkpoint: f32 and bf16]
    #[arg(long)]
    dtype: Option<DType>,

    /// Leaves out the heading of the table: the caller has printed it.
    #[arg(long, hide = true)]
    no_heading: bool,
}

/// `Ok(false)` if a device is further from the recording than it may be.
pub fn run(arguments: &Arguments) -> Result<bool> {
    if let Arguments {
        checkpoint: Some(checkpoint),
        layer: Some(layer),
        input: Some(input),
        output: Some(output),
        ..
    } = arguments
    {
        let place = arguments.device.unwrap_or(Choice::Auto).place();
        let dtype = arguments.dtype.unwrap_or(DType::F32);
        run_checkpoint(checkpoint, *layer, input, output, place, dtype)?;
        return Ok(true);
    }
    let dtypes = arguments.dtype.map_or_else(|| vec![DType::F32, DType::BF16], |dtype| vec![dtype]);
    if !arguments.no_heading {
        say(
            "The checkpoints in this binary, against what transformers' own block made of them in float64\n\n",
        );
        say(heading());
    }
    match arguments.device {
        Some(choice) => compare_here(choice.place(), &dtypes),
        None => compare_everywhere(arguments.dtype),
    }
}

fn run_checkpoint(
    folder: &Path,
    layer_number: usize,
    input: &Path,
    output: &Path,
    place: Place,
    dtype: DType,
) -> Result<()> {
    // Found out now, and not after the work.
    let parent = std::path::absolute(output).map_err(io("find the folder of", output))?;
    if let Some(parent) = parent.parent()
        && !parent.is_dir()
    {
        let why = format!("{} is not a folder", parent.display());
        return Err(Error::Option { option: "--output", why });
    }
    if output.is_dir() {
        let why = format!("{} is a folder, wanted a file", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    let mut steps = Steps::default();
    let checkpoint =
        steps.time("open the checkpoint", || Checkpoint::open(Folder::Disk(folder.into())))?;
    let layer = checkpoint.layer(layer_number)?;
    let input_file = TensorFile::open(input)?;
    let x = input_file.tensor("x")?;
    let num_tokens = x.rows_of(layer.config.hidden)?;
    let backend = steps.time("open the device", || Backend::open(place))?;

    let rows_per_expert = dispatch!(dtype, D => {
        let x_values = steps.time("read the input", || x.read::<D>())?;
        let Output { y, rows_per_expert } = backend.forward::<D>(&layer, &x_values, num_tokens, &mut steps)?;
        steps.time("write the output", || {
            let y = tensor_file::view(&[num_tokens, layer.config.hidden], &y)?;
            tensor_file::write(output, vec![("y", y)], None)
        })?;
        rows_per_expert
    });

    let hidden = layer.config.hidden;
    let (x_type, w_type) = (x.dtype_name(), layer.dtype_on_disk());
    let model_type = layer.block.model_type;
    say(format_args!(
        "layer   {layer_number} of {}: {model_type}, {}\n",
        folder.display(),
        layer.config
    ));
    say(format_args!("device  {}, in {dtype} (weights on disk in {w_type})\n", backend.describe()));
    say(format_args!("input   {}: x [{num_tokens}, {hidden}] {x_type}\n", input.display()));
    say(format_args!("output  {}: y [{num_tokens}, {hidden}] {dtype}\n\n", output.display()));
    say(load::describe(&rows_per_expert));
    let mut table = Table::new(&["step", "time"]);
    for (step, duration) in &steps.0 {
        table.row(vec![step.clone(), time(*duration)]);
    }
    say(format_args!("\n{table}"));
    Ok(())
}

/// Column widths of the comparison, whose rows come from several processes.
fn comparison_row(cells: [&str; 8]) -> String {
    let [device, checkpoint, dtype, tokens, load, time, error, verdict] = cells;
    format!(
        "{device:<9} {checkpoint:<15} {dtype:<5} {tokens:>6}  {load:<16} {time:>8}  {error:>14}  {verdict}\n"
    )
}

fn heading() -> String {
    comparison_row([
        "device",
        "checkpoint",
        "dtype",
        "tokens",
        "rows per expert",
        "time",
        "relative error",
        "limit",
    ])
}

/// All bundled checkpoints on one device, in this process.
fn compare_here(place: Place, dtypes: &[DType]) -> Result<bool> {
    let backend = Backend::open(place)?;
    let mut good = true;
    for fixture in FIXTURES {
        for &dtype in dtypes {
            good &= dispatch!(dtype, D => compare::<D>(&backend, fixture))?;
        }
    }
    Ok(good)
}

fn compare<D: Element>(backend: &Backend, fixture: &Fixture) -> Result<bool> {
    let checkpoint = Checkpoint::open(fixture.folder())?;
    let recorded = fixture.folder().tensors(RECORDED)?;
    let layer_number =
        recorded.note("layer").and_then(|layer| layer.parse().ok()).ok_or_else(|| Error::File {
            file: fixture.name.into(),
            why: format!("{RECORDED} does not say which layer it is of"),
        })?;
    let layer = checkpoint.layer(layer_number)?;
    let x = recorded.tensor("x")?;
    let num_tokens = x.rows_of(layer.config.hidden)?;
    let wanted = recorded.tensor("y")?;
    wanted.check(&[num_tokens, layer.config.hidden])?;

    let mut steps = Steps::default();
    let Output { y, rows_per_expert } =
        backend.forward::<D>(&layer, &x.read::<D>()?, num_tokens, &mut steps)?;
    let y: Vec<f64> = y.into_iter().map(|value| value.to_f64()).collect();
    let distance = relative_error(&y, &wanted.read_f64()?);
    let limit = bundled::limit(backend.place(), D::DTYPE);
    // Not `distance > limit`: a distance that is not a number is not good.
    let good = distance <= limit;
    let least = rows_per_expert.iter().min().copied().unwrap_or(0);
    let most = rows_per_expert.iter().max().copied().unwrap_or(0);
    say(comparison_row([
        backend.place().name(),
        fixture.name,
        D::DTYPE.name(),
        &num_tokens.to_string(),
        &format!("{least} to {most}"),
        &time(steps.of(FORWARD)),
        &format!("{distance:.1e}"),
        &format!("{limit:.0e} {}", if good { "ok" } else { "EXCEEDED" }),
    ]));
    Ok(good)
}

/// A process for each device, since a process has one driver: this program starts itself.
fn compare_everywhere(dtype: Option<DType>) -> Result<bool> {
    let program = std::env::current_exe().map_err(io("find", "the program itself"))?;
    let mut good = true;
    for place in available() {
        let mut command = Command::new(&program);
        command.args(["run", "--no-heading", "--device", place.name()]);
        if let Some(dtype) = dtype {
            command.args(["--dtype", dtype.name()]);
        }
        let status = command.stdin(Stdio::null()).status().map_err(io("start", &program))?;
        match status.code() {
            Some(0) => {}
            Some(1) => good = false,
            _ => {
                let why = format!("the process that ran on it ended with {status}");
                return Err(Error::Device { device: place.name(), why });
            }
        }
    }
    if !good {
        eprintln!("error: a device is further from the recorded output than its limit");
    }
    Ok(good)
}
