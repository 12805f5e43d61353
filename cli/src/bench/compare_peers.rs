//! Measures peers on our tensors, ids and weights. Each peer is checked first, and timed between
//! two measurements of ours.

use std::collections::HashMap;
use std::path::PathBuf;

use moe_bench::{Op, Samples, Tensors};
use moe_kernels::{DType, Dtype, RouterConfig};
use tempfile::TempDir;

use crate::bench::measure::{Bench, SAMPLES, Setting, empty_row};
use crate::bench::peers::{Peer, Peers};
use crate::bench::record::Row;
use crate::error::{Result, io};
use crate::write::{view, view_ids, write};

/// Our name in the protocol of peers.
const OURS: &str = "moe-kernels";

/// The operations that peers implement.
const OPS: [Op; 3] = [Op::Experts, Op::Layer, Op::LayerFromX];

/// The largest accepted relative error `|y - truth| / |truth|`. Outputs and the values between the
/// two products are rounded to the element type.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        DType::BF16 => 2e-2,
    }
}

/// Returns whether peers renormalise the weights for this router; `None` for a router without
/// softmax, which no peer has.
fn renormalize(router: &RouterConfig) -> Option<bool> {
    // The softmax over the selected logits is the softmax over all, renormalised.
    let renormalized = [RouterConfig::softmax_top_k(true), RouterConfig::top_k_softmax()];
    match router {
        router if *router == RouterConfig::softmax_top_k(false) => Some(false),
        router => renormalized.contains(router).then_some(true),
    }
}

/// A larger file of tensors would take minutes to write and to read.
const MAX_FILE_BYTES: usize = 8 << 30;

/// The file of tensors that peers read, in a folder of its own with a random name. Dropping it
/// removes the folder; errors of the removal are ignored.
struct Inputs {
    file: PathBuf,
    _folder: TempDir,
}

impl Bench<'_> {
    /// Measures all peers at one setting. Returns `Ok(false)` if our output or a peer's is wrong.
    pub fn peers<D: Dtype>(&mut self, setting: Setting<'_, D>) -> Result<bool> {
        let wanted = OPS.iter().any(|op| self.request.ops.contains(op));
        if self.request.peers.is_empty() || !wanted || self.request.is_over() {
            return Ok(true);
        }
        let (model, num_tokens) = (setting.model, setting.draw.shape.num_tokens);
        let Some(renormalize) = renormalize(&model.config.router) else {
            let mut row = empty_row::<D>(Op::Layer, setting.model, setting.draw);
            row.by = "peers".into();
            row.note = Some(format!("peers route by softmax, {} does not", model.name));
            self.push(row)?;
            return Ok(true);
        };
        let bytes = size_of::<D>() * 3 * model.config.down_len();
        if bytes > MAX_FILE_BYTES {
            let gib = (bytes >> 30).to_string();
            let mut row = empty_row::<D>(Op::Layer, setting.model, setting.draw);
            row.by = "peers".into();
            row.note = Some(format!(
                "the weights of {} are {gib} GiB, more than the limit for a file",
                model.name
            ));
            self.push(row)?;
            return Ok(true);
        }
        self.progress.set_message(format!("write tensors for peers, {} T{num_tokens}", model.name));
        let inputs = self.inputs(setting, renormalize)?;
        let mut good = true;
        for program in &self.request.peers {
            let mut peers = Peers::start(program, self.place, &inputs.file)?;
            for absent in peers.greeting.unavailable.clone() {
                // Reported once, not for every shape.
                let reported =
                    |row: &Row| row.by == absent.name && row.note.as_ref() == Some(&absent.why);
                if self.record.rows.iter().any(reported) {
                    continue;
                }
                let mut row = empty_row::<D>(Op::Layer, setting.model, setting.draw);
                row.by = absent.name;
                row.version = None;
                row.note = Some(absent.why);
                self.push(row)?;
            }
            if peers.greeting.checks.iter().any(|name| name == OURS) {
                let error = peers.check(OURS)?;
                good &= error.as_ref().is_ok_and(|error| *error <= tolerance(D::DTYPE));
                self.note_our_error(setting, error);
            }
            for peer in peers.greeting.peers.clone() {
                good &= self.peer(&mut peers, &peer, setting)?;
            }
        }
        Ok(good)
    }

    /// Measures a peer at each of its boundaries.
    fn peer<D: Dtype>(
        &mut self,
        peers: &mut Peers,
        peer: &Peer,
        setting: Setting<'_, D>,
    ) -> Result<bool> {
        let num_tokens = setting.draw.shape.num_tokens;
        self.progress.set_message(format!("{}, {} T{num_tokens}", peer.name, setting.model.name));
        let error = peers.check(&peer.name)?;
        let good = error.as_ref().map_or(true, |error| *error <= tolerance(D::DTYPE));
        for op in OPS {
            let has = peer.boundaries.iter().any(|boundary| boundary == op.boundary());
            let wanted = self.request.ops_with(setting.draw.routing).any(|wanted| wanted == op);
            if !has || !wanted || self.request.is_over() {
                continue;
            }
            let mut row = empty_row::<D>(op, setting.model, setting.draw);
            row.by = peer.name.clone();
            row.version = Some(peer.version.clone());
            match &error {
                Err(why) => row.note = Some(why.clone()),
                Ok(error) if !good => {
                    row.relative_error = Some(*error);
                    row.note = Some("not timed: the result is wrong".into());
                }
                Ok(error) => {
                    row.relative_error = Some(*error);
                    let before = self.time(op, setting)?.0.median();
                    match peers.time(&peer.name, op.boundary(), SAMPLES)? {
                        Err(why) => row.note = Some(why),
                        Ok(timed) => {
                            row.launch = timed.launch;
                            row.cache = timed.cache;
                            row.note = timed.note;
                            row.set_times(&Samples::new(timed.seconds), &self.ceilings);
                            row.ours_around = Some([before, self.time(op, setting)?.0.median()]);
                        }
                    }
                }
            }
            self.push(row)?;
        }
        Ok(good)
    }

    /// Records the error of our own layer, which the program of peers has computed.
    fn note_our_error<D: Dtype>(
        &mut self,
        setting: Setting<'_, D>,
        error: std::result::Result<f64, String>,
    ) {
        let key = empty_row::<D>(Op::Layer, setting.model, setting.draw);
        let ours = self.record.rows.iter_mut().rev().find(|row| {
            (row.op, row.tokens, row.routing) == (key.op, key.tokens, key.routing)
                && (&row.model, &row.by) == (&key.model, &key.by)
        });
        let Some(row) = ours else { return };
        match error {
            Ok(error) => row.relative_error = Some(error),
            Err(why) => row.note = Some(format!("the result was not checked: {why}")),
        }
    }

    /// Writes the tensors of a setting.
    fn inputs<D: Dtype>(&self, setting: Setting<'_, D>, renormalize: bool) -> Result<Inputs> {
        let Setting { model, loaded, draw } = setting;
        let (config, t) = (&model.config, draw.shape.num_tokens);
        let (e, k) = (config.num_experts, config.top_k);
        let (h, i) = (config.hidden, config.intermediate);
        let Tensors { x, router_gate, gate_up, down } = loaded.tensors(t);
        let logits: Vec<D> = draw.logits.iter().map(|&logit| D::from_f32(logit)).collect();
        let y = loaded.output(draw)?;
        let notes = HashMap::from([
            ("model".to_string(), model.name.clone()),
            ("routing".to_string(), draw.routing.name().to_string()),
            ("dtype".to_string(), D::DTYPE.name().to_string()),
            ("top_k".to_string(), k.to_string()),
            ("renormalize".to_string(), renormalize.to_string()),
        ]);
        let tensors = vec![
            ("x", view(&[t, h], &x)?),
            ("router_gate", view(&[e, h], &router_gate)?),
            ("logits", view(&[t, e], &logits)?),
            ("gate_up", view(&[e, 2 * i, h], &gate_up)?),
            ("down", view(&[e, h, i], &down)?),
            ("expert_ids", view_ids(&[t, k], &draw.expert_ids)?),
            ("weights", view(&[t, k], &draw.weights)?),
            ("y", view(&[t, h], &y)?),
        ];
        // The folder is removed if the write fails as well.
        let folder = tempfile::Builder::new().prefix("moe-kernels-peers-").tempdir();
        let folder = folder.map_err(io("create a folder in", std::env::temp_dir()))?;
        let file = folder.path().join("inputs.safetensors");
        write(&file, tensors, Some(notes))?;
        Ok(Inputs { file, _folder: folder })
    }
}
