//! `run`: runs a layer of a checkpoint forward.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use moe_kernels::{DType, Dtype};
use moe_kernels_hf::{Block, Checkpoint, TensorFile};

use crate::backend::{Backend, FORWARD, dispatch};
use crate::device::{Choice, Place, available};
use crate::error::{Error, Result, io};
use crate::finite::NotFinite;
use crate::histogram;
use crate::progress::Steps;
use crate::recording::{self, Distance, Recording};
use crate::text::{Table, print, time, warn};
use crate::tokens::{self, Outputs};
use crate::write::{view, view_ids, write};

/// Runs an MoE layer of a checkpoint forward
///
/// Without --checkpoint it runs the checkpoints in this binary on every available device, and
/// prints the relative error of each output against the output of transformers in float64.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder with config.json and safetensors files, as on the Hugging Face Hub
    #[arg(long, value_name = "DIR", requires_all = ["layer", "input", "output"])]
    checkpoint: Option<PathBuf>,

    /// Index of the layer, from 0
    #[arg(long, value_name = "N", requires = "checkpoint")]
    layer: Option<usize>,

    /// Safetensors file with the tensor `x` [T, H] and, if the layer's router reads it,
    /// `router_input` [T, H], `logits` [T, E], `token_ids` [T] or `token_types` [T]
    #[arg(long, value_name = "FILE", requires = "checkpoint")]
    input: Option<PathBuf>,

    /// Safetensors file to write: `y` [T, H], `expert_ids` and `weights` [T, K]
    #[arg(long, value_name = "FILE", requires = "checkpoint")]
    output: Option<PathBuf>,

    /// Folder of a checkpoint with recorded.safetensors, or a folder of such folders: compares the
    /// output of each with the recorded one
    #[arg(long, value_name = "DIR", conflicts_with = "checkpoint")]
    recorded: Option<PathBuf>,

    /// Device [default: auto; without a checkpoint: all]
    #[arg(long)]
    device: Option<Choice>,

    /// Type of weights, input and output: f32, bf16 or f16 [default: f32; without a checkpoint: f32
    /// and bf16]
    #[arg(long)]
    dtype: Option<DType>,

    /// Omits the heading of the table, which the parent process prints.
    #[arg(long, hide = true)]
    no_heading: bool,
}

/// Printed after the comparison of the embedded checkpoints.
const NEXT: &str = concat!(
    "\nTo run a layer of a checkpoint: ",
    "cargo moe run --checkpoint DIR --layer 3 --input x.safetensors --output y.safetensors\n",
);

/// Returns `Ok(false)` if the distance from a recording exceeds its limit.
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
        let which = arguments
            .recorded
            .as_ref()
            .map_or("in this binary".into(), |folder| format!("of {}", folder.display()));
        print(format_args!(
            "Checkpoints {which}, compared with the output of transformers in float64\n\n"
        ));
        print(heading());
    }
    let good = match arguments.device {
        Some(choice) => compare_here(arguments.recorded.as_deref(), choice.place(), &dtypes)?,
        None => compare_everywhere(arguments.recorded.as_deref(), arguments.dtype)?,
    };
    if good && arguments.recorded.is_none() && !arguments.no_heading {
        print(NEXT);
    }
    Ok(good)
}

fn run_checkpoint(
    folder: &Path,
    layer_number: usize,
    input: &Path,
    output: &Path,
    place: Place,
    dtype: DType,
) -> Result<()> {
    // Checked before the work.
    let parent = std::path::absolute(output).map_err(io("find the folder of", output))?;
    if let Some(parent) = parent.parent()
        && !parent.is_dir()
    {
        let why = format!("{} is not a folder", parent.display());
        return Err(Error::Option { option: "--output", why });
    }
    if let Ok(metadata) = output.metadata()
        && !metadata.is_file()
    {
        let kind = if metadata.is_dir() { "a folder" } else { "not a regular file" };
        let why = format!("{} is {kind}, wanted a file", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    if let (Ok(from), Ok(to)) = (input.canonicalize(), output.canonicalize())
        && from == to
    {
        let why = format!("{} is the input file, wanted another file", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    let mut steps = Steps::default();
    let checkpoint = steps.time("open the checkpoint", || Checkpoint::open(folder))?;
    let layers = checkpoint.blocks(layer_number)?;
    if let Some(ignored) = checkpoint.warning() {
        warn(&ignored);
    }
    let input_file = TensorFile::open(input)?;
    let x = input_file.tensor("x")?;
    let backend = steps.time("open the device", || Backend::open(place))?;

    let (num_tokens, hidden, rows_per_expert, not_finite) = dispatch!(dtype, D => {
        let run = |layer: &Block, inputs, steps: &mut Steps| backend.forward::<D>(layer, inputs, steps);
        let made = tokens::forward(&layers, &input_file, &mut steps, run)?;
        let Outputs { num_tokens, hidden, top_k, experts, output: made_of, finite, rows_per_expert } = made;
        steps.time("write the output", || {
            let tensors = vec![
                ("y", view(&[num_tokens, hidden], &made_of.y)?),
                ("expert_ids", view_ids(&[num_tokens, top_k], &made_of.expert_ids)?),
                ("weights", view(&[num_tokens, top_k], &made_of.weights)?),
            ];
            write(output, tensors, None)
        })?;
        let not_finite = [
            NotFinite::find("the router's logits", &finite, &made_of.logits, experts, dtype),
            NotFinite::find("y", &finite, &made_of.y, hidden, dtype),
        ];
        (num_tokens, hidden, rows_per_expert, not_finite)
    });
    for not_finite in not_finite.iter().flatten() {
        eprintln!("warning: {not_finite}");
    }

    for layer in &layers {
        let (model_type, part) = (layer.info().model_type, layer.info().part);
        let which =
            if part.is_empty() { model_type.into() } else { format!("{model_type} ({part})") };
        print(format_args!(
            "layer   {layer_number} of {}: {which}, {}\n",
            folder.display(),
            layer.config()
        ));
    }
    let x_type = x.dtype_name();
    let w_type = layers.first().map(Block::dtype_on_disk).unwrap_or_default();
    print(format_args!(
        "device  {}, in {dtype} (weights on disk in {w_type})\n",
        backend.describe()
    ));
    print(format_args!("input   {}: x [{num_tokens}, {hidden}] {x_type}\n", input.display()));
    print(format_args!("output  {}: y [{num_tokens}, {hidden}] {dtype}\n", output.display()));
    for not_finite in not_finite.iter().flatten() {
        print(format_args!("range   {not_finite}\n"));
    }
    print("\n");
    print(histogram::describe(&rows_per_expert));
    let mut table = Table::new(&["step", "time"]);
    for (step, duration) in &steps.0 {
        table.row(vec![step.clone(), time(*duration)]);
    }
    print(format_args!("\n{table}"));
    Ok(())
}

/// Formats a row of the comparison. Widths are fixed because several processes print the rows.
fn comparison_row(cells: [&str; 8]) -> String {
    let [device, checkpoint, dtype, tokens, load, time, error, verdict] = cells;
    format!(
        "{device:<9} {checkpoint:<35} {dtype:<5} {tokens:>6}  {load:<16} {time:>8}  {error:>14}  {verdict}\n"
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

/// Compares all recordings on one device, in this process.
fn compare_here(folder: Option<&Path>, place: Place, dtypes: &[DType]) -> Result<bool> {
    let recordings = match folder {
        Some(folder) => Recording::of_folder(folder)?,
        None => Recording::bundled(),
    };
    let backend = Backend::open(place)?;
    let mut good = true;
    for recording in &recordings {
        for &dtype in dtypes {
            good &= dispatch!(dtype, D => compare::<D>(&backend, recording))?;
        }
    }
    Ok(good)
}

fn compare<D: Dtype>(backend: &Backend, recording: &Recording) -> Result<bool> {
    let checkpoint = recording.checkpoint()?;
    let file = recording.file()?;
    let layers = recording.layers(&checkpoint, &file)?;
    let mut steps = Steps::default();
    let run = |layer: &Block, inputs, steps: &mut Steps| backend.forward::<D>(layer, inputs, steps);
    let made = tokens::forward(&layers, &file, &mut steps, run)?;
    let Distance { relative, other_experts } = recording.distance(&file, &layers, &made)?;
    let limit = recording::limit(backend.place(), D::DTYPE);
    // False for NaN, which `relative > limit` would accept.
    let within_limit = relative <= limit;
    let least = made.rows_per_expert.iter().min().copied().unwrap_or(0);
    let most = made.rows_per_expert.iter().max().copied().unwrap_or(0);
    let not_finite = NotFinite::find("y", &made.finite, &made.output.y, made.hidden, D::DTYPE);
    let verdict = match (within_limit, other_experts, not_finite) {
        (true, 0, _) => "ok".into(),
        (_, 0, Some(numbers)) => format!("{} VALUES NOT FINITE", numbers.count()),
        (_, 0, None) => "EXCEEDED".into(),
        (_, tokens, _) => format!("{tokens} TOKENS WITH OTHER EXPERTS"),
    };
    print(comparison_row([
        backend.place().name(),
        &recording.name,
        D::DTYPE.name(),
        &made.num_tokens.to_string(),
        &format!("{least} to {most}"),
        &time(steps.of(FORWARD)),
        &format!("{relative:.1e}"),
        &format!("{limit:.0e} {verdict}"),
    ]));
    Ok(within_limit && other_experts == 0)
}

/// Starts a process of this program for each device, because a process has one driver.
fn compare_everywhere(folder: Option<&Path>, dtype: Option<DType>) -> Result<bool> {
    let program = std::env::current_exe().map_err(io("find", "this program"))?;
    let mut good = true;
    for place in available() {
        let mut command = Command::new(&program);
        command.args(["run", "--no-heading", "--device", place.name()]);
        if let Some(folder) = folder {
            command.arg("--recorded").arg(folder);
        }
        if let Some(dtype) = dtype {
            command.args(["--dtype", dtype.name()]);
        }
        let status = command.stdin(Stdio::null()).status().map_err(io("start", &program))?;
        match status.code() {
            Some(0) => {}
            Some(1) => good = false,
            _ => {
                let why = format!("`run` on this device failed: {status}");
                return Err(Error::Device { device: place.name(), why });
            }
        }
    }
    if !good {
        eprintln!("error: the distance of a device from the recorded output exceeds its limit");
    }
    Ok(good)
}
