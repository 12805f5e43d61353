//! One MoE block of a checkpoint: its arrays, and their conversion into the weights of a layer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_kernels::{
    Dtype, ExpertWeights, GateUpLayout, GateUpTensors, LatentWeights, MoeConfig, MoeWeights, Owned,
    RouterWeights, SharedWeights, Typed,
};
use rayon::prelude::*;

use crate::block_info::BlockInfo;
use crate::error::{Error, Result};
use crate::names::{Array, Layout, Role};
use crate::source::Source;

/// A block of a checkpoint whose tensors have been found and checked. They are converted by
/// [`load`](Self::load); until then they are on disk, in mapped files that the block keeps open.
#[derive(Debug, Clone)]
pub struct Block {
    pub(crate) info: BlockInfo,
    pub(crate) config: MoeConfig,
    /// Each array with the tensors of its parts.
    pub(crate) arrays: Vec<(Array, Vec<Source>)>,
    pub(crate) layout: &'static Layout,
    /// The prefix of the names of the layer's tensors.
    pub(crate) prefix: String,
    /// The prefixes of the names of the block's tensors.
    pub(crate) modules: Vec<String>,
    /// Names of tensors that the block may have and does not need.
    pub(crate) may_stay: BTreeSet<String>,
}

/// The weights of a block, and their elements that are not finite.
#[non_exhaustive]
pub struct Loaded<D: Dtype> {
    /// The weights.
    pub weights: MoeWeights<Owned, D>,
    /// For each tensor with infinities or NaN after the conversion to `D`: its name and the number
    /// of such elements. If scales are the cause, the name is that of the scales.
    pub not_finite: BTreeMap<String, usize>,
}

impl<D: Dtype> Loaded<D> {
    /// A message about the elements that are not finite: the first tensor with such elements, and
    /// the number of others.
    pub fn warning(&self) -> Option<String> {
        let (name, count) = self.not_finite.first_key_value()?;
        let more = match self.not_finite.len() - 1 {
            0 => String::new(),
            more => format!("; other tensors with some: {more}"),
        };
        Some(format!("tensor `{name}` has infinities or NaN: {count} in {}{more}", D::DTYPE))
    }
}

impl Block {
    /// The configuration, with weights in the order of this checkpoint.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The configuration, to be changed by the caller: the capacity or the router's arithmetic, for
    /// example. A change of the weights' shapes or order makes the layer reject the loaded weights.
    pub fn config_mut(&mut self) -> &mut MoeConfig {
        &mut self.config
    }

    /// The description of the block in config.json: its family, its part, the source of its logits.
    pub fn info(&self) -> &BlockInfo {
        &self.info
    }

    /// The arrays of the block with the names of their tensors, in the order of their use.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.arrays.iter().map(|(array, _)| array)
    }

    /// The element type of the expert weights on disk, in lower case.
    pub fn dtype_on_disk(&self) -> String {
        let down = self.array(Role::Down).and_then(|(_, sources)| sources.first());
        down.map(Source::dtype_name).unwrap_or_default()
    }

    /// The number of parts of its arrays: the total of [`load_with`](Self::load_with)'s progress.
    pub fn num_parts(&self) -> usize {
        self.arrays.iter().map(|(_, sources)| sources.len()).sum()
    }

    /// Reads all weights and converts them to `D`, rounded to nearest.
    ///
    /// # Errors
    /// [`Error::Tensor`] for an id out of range in a table of expert ids. Infinities and NaN are no
    /// errors: [`load_with`](Self::load_with) reports them.
    pub fn load<D: Dtype>(&self) -> Result<MoeWeights<Owned, D>> {
        Ok(self.load_with(|_, _| ())?.weights)
    }

    /// Reads all weights as [`load`](Self::load) does, and counts elements that are not finite.
    ///
    /// After each part of an array, a thread of rayon's pool calls `progress(done, total)`.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    pub fn load_with<D: Dtype>(&self, progress: impl Fn(usize, usize) + Sync) -> Result<Loaded<D>> {
        let (done, total) = (AtomicUsize::new(0), self.num_parts());
        let advance = || progress(done.fetch_add(1, Ordering::Relaxed) + 1, total);
        let reader = Reader { block: self, advance: &advance, not_finite: Mutex::default() };
        let weights = reader.weights()?;
        let not_finite = reader.not_finite.into_inner().unwrap_or_else(|lock| lock.into_inner());
        Ok(Loaded { weights, not_finite })
    }

    /// Reads one array of numbers; `None` if the block has no array of this role.
    ///
    /// # Errors
    /// [`Error::Tensor`] for [`Role::Table`], which has integers.
    pub fn read<D: Dtype>(&self, role: Role) -> Result<Option<Vec<D>>> {
        let reader = Reader { block: self, advance: &|| (), not_finite: Mutex::default() };
        reader.find(role)
    }

    fn array(&self, role: Role) -> Option<&(Array, Vec<Source>)> {
        self.arrays.iter().find(|(array, _)| array.role == role)
    }

    /// Returns whether a checkpoint may have this tensor of the block's modules although the block
    /// does not need it.
    pub(crate) fn may_stay_unread(&self, name: &str) -> bool {
        self.may_stay.contains(name)
            || name.strip_prefix(&self.prefix).is_some_and(|name| self.layout.may_stay_unread(name))
    }
}

/// Reads the arrays of a block, and counts elements that are not finite.
struct Reader<'r> {
    block: &'r Block,
    /// Called after each part.
    advance: &'r (dyn Fn() + Sync),
    /// The number of such elements by tensor.
    not_finite: Mutex<BTreeMap<String, usize>>,
}

impl Reader<'_> {
    /// The whole array as `D`.
    fn read<D: Dtype>(&self, (array, sources): &(Array, Vec<Source>)) -> Result<Vec<D>> {
        let zero = D::from_f32(0.0);
        let len = array.shape.iter().product();
        let mut values = vec![zero; array.parts.iter().map(|part| part.elements.len()).sum()];
        let mut left = &mut values[..];
        let mut parts = Vec::with_capacity(sources.len());
        for (part, source) in array.parts.iter().zip(sources) {
            let (out, rest) = left.split_at_mut(part.elements.len());
            parts.push((part, source, out));
            left = rest;
        }
        parts.into_par_iter().try_for_each(|(part, source, out)| {
            source.read_into(part.elements.start, out)?;
            self.finish(source, out);
            Ok::<_, Error>(())
        })?;
        if array.repeated {
            values = vec![values.first().copied().unwrap_or(zero); len];
        }
        if let (true, [rows, columns]) = (array.transposed, &array.shape[..]) {
            let on_disk = values;
            let element = |i| on_disk[i % columns * rows + i / columns];
            values = (0..rows * columns).map(element).collect();
        }
        Ok(values)
    }

    /// Counts the elements of a part that are not finite, and reports progress.
    fn finish<D: Dtype>(&self, source: &Source, values: &[D]) {
        // The chunk size of the conversion.
        let count: usize = values
            .par_chunks(1 << 16)
            .map(|values| values.iter().filter(|value| !value.to_f32().is_finite()).count())
            .sum();
        if count > 0 {
            let codes = || source.names().first().map(|name| (*name, count));
            let found = source.scales_not_finite().or_else(codes);
            if let (Some((name, count)), Ok(mut all)) = (found, self.not_finite.lock()) {
                *all.entry(name.to_string()).or_default() += count;
            }
        }
        (self.advance)();
    }

    /// The ids of a table of the ids of `experts` experts.
    fn read_ids(&self, experts: usize) -> Result<Option<Vec<u32>>> {
        let Some((array, sources)) = self.block.array(Role::Table) else { return Ok(None) };
        let mut ids = Vec::with_capacity(array.shape.iter().product());
        for source in sources {
            if let Source::Plain(tensor) = source {
                ids.extend(tensor.read_ids(experts, "ids of experts")?);
            }
            (self.advance)();
        }
        Ok(Some(ids))
    }

    /// An optional array.
    fn find<D: Dtype>(&self, role: Role) -> Result<Option<Vec<D>>> {
        self.block.array(role).map(|array| self.read(array)).transpose()
    }

    /// An array that the configuration requires.
    fn array<D: Dtype>(&self, role: Role) -> Result<Vec<D>> {
        Ok(self.find(role)?.unwrap_or_default())
    }

    /// A parameter of the router's product: f32 if the product is computed in f32 for every element
    /// type.
    fn typed<D: Dtype>(&self, role: Role) -> Result<Option<Typed<Owned, D>>> {
        Ok(match self.block.config.projection.f32_logits {
            true => self.find(role)?.map(Typed::F32),
            false => self.find(role)?.map(Typed::Element),
        })
    }

    fn weights<D: Dtype>(&self) -> Result<MoeWeights<Owned, D>> {
        let config = &self.block.config;
        let latent = || -> Result<_> {
            Ok(LatentWeights {
                proj_in: self.array(Role::LatentIn)?,
                norm: self.find(Role::LatentNorm)?,
                proj_out: self.array(Role::LatentOut)?,
            })
        };
        let shared = || -> Result<_> {
            Ok(SharedWeights {
                gate_up_bias: self.find(Role::SharedGateUpBias)?,
                down_bias: self.find(Role::SharedDownBias)?,
                sigmoid_gate: self.find(Role::SharedSigmoidGate)?,
                ..SharedWeights::new(self.array(Role::SharedGateUp)?, self.array(Role::SharedDown)?)
            })
        };
        Ok(MoeWeights {
            router: RouterWeights {
                router_gate: self.typed(Role::RouterGate)?,
                bias: self.typed(Role::RouterBias)?,
                norm: self.find(Role::RouterNorm)?,
                selection_bias: self.find(Role::SelectionBias)?,
                expert_scale: self.find(Role::ExpertScale)?,
                table: self.read_ids(config.router_experts())?,
                ..RouterWeights::default()
            },
            experts: ExpertWeights {
                gate_up: match config.experts.gate_up {
                    GateUpLayout::Separate => GateUpTensors::Separate {
                        gate: self.array(Role::Gate)?,
                        up: self.array(Role::Up)?,
                    },
                    _ => GateUpTensors::Fused(self.array(Role::GateUp)?),
                },
                gate_up_bias: self.find(Role::GateUpBias)?,
                down: self.array(Role::Down)?,
                down_bias: self.find(Role::DownBias)?,
                output_bias: self.find(Role::OutputBias)?,
                post_norm: self.find(Role::PostNorm)?,
            },
            latent: config.latent.map(|_| latent()).transpose()?,
            shared: config.shared.map(|_| shared()).transpose()?,
            output_norm: self.find(Role::OutputNorm)?,
        })
    }
}
