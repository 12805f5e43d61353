//! candle as a peer of moe-kernels' benches: replies to JSON requests on stdin, one a line.

mod clock;
#[cfg(feature = "cuda")]
mod fused;
mod input;
mod layer;
mod peers;
mod truth;

use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use candle_core::Device;
use clap::{Parser, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::input::Input;
use crate::peers::Peers;

const VERSION: &str = "candle 0.11";

/// candle as a peer of moe-kernels' benches.
#[derive(Parser)]
struct Arguments {
    /// The device.
    #[arg(long)]
    device: DeviceKind,
    /// The layer and its input, as safetensors.
    #[arg(long)]
    inputs: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Request {
    Check { check: String },
    Time { time: String, boundary: String, samples: usize },
}

fn main() {
    let arguments = Arguments::parse();
    let (first, peers) = match start(&arguments) {
        Ok(peers) => (greeting(&peers), Some(peers)),
        Err(error) => {
            (json!({ "peers": [], "unavailable": [], "error": format!("{error:#}") }), None)
        }
    };
    send(&first);
    let Some(peers) = peers else { std::process::exit(2) };
    for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
        send(
            &answer(&peers, &line).unwrap_or_else(|error| json!({ "error": format!("{error:#}") })),
        );
    }
}

fn start(arguments: &Arguments) -> Result<Peers> {
    let device = match arguments.device {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Cuda => Device::new_cuda(0)?,
    };
    Ok(Peers::new(Input::read(&arguments.inputs)?, device))
}

fn greeting(peers: &Peers) -> Value {
    let (mut able, mut unable) = (Vec::new(), Vec::new());
    for name in ["candle", "candle-fused"] {
        match peers.boundaries(name) {
            Ok(boundaries) => {
                able.push(json!({ "name": name, "version": VERSION, "boundaries": boundaries }));
            }
            Err(_) => unable.push(json!({ "name": name, "why": peers.fused_lacks() })),
        }
    }
    json!({ "peers": able, "unavailable": unable })
}

fn answer(peers: &Peers, line: &str) -> Result<Value> {
    let request = serde_json::from_str(line).map_err(|_| {
        anyhow::anyhow!("not a request: {}", line.chars().take(80).collect::<String>())
    })?;
    match request {
        Request::Check { check: peer } => {
            let mut worst = 0f64;
            for boundary in peers.boundaries(&peer)? {
                let got = peers.call(&peer, boundary)?(0)?;
                worst = worst.max(truth::relative_error(&got, &peers.truth(boundary)?)?);
            }
            Ok(json!({ "relative_error": worst }))
        }
        Request::Time { time: peer, boundary, samples } => {
            ensure!((1..=1000).contains(&samples), "samples are from 1 to 1000, not {samples}");
            let call = peers.call(&peer, &boundary)?;
            let seconds = clock::seconds_per_call(&peers.device, samples, call)?;
            let cache = if peers.device.is_cuda() { "cold" } else { "warm" };
            let note = peers.note();
            Ok(json!({ "seconds": seconds, "launch": "eager", "cache": cache, "note": note }))
        }
    }
}

fn send(message: &Value) {
    println!("{message}");
    std::io::stdout().flush().expect("stdout is open");
}
