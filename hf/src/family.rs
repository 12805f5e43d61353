//! One family as data: from its config.json to a [`MoeConfig`].

use moe_kernels::{
    Activation, ActivationFunction, ExpertConfig, GroupScore, Groups, Masked, MoeConfig,
    Normalization, RouterConfig, RouterProjection, Scoring, SharedConfig, WeightOrder,
    WeightPosition,
};
use serde_json::{Map, Value};

use crate::block_info::{BlockInfo, LogitsFrom};
use crate::error::{Error, Result};
use crate::keys::{Keys, Names};
use crate::names::Layout;
use crate::quantization::Quantization;
use crate::schedule::Schedule;

/// A row of the table of families. It has the default of transformers' class for each absent key.
pub(super) struct Family {
    /// The values of `model_type`; several if configurations are nested in different ways.
    pub model_types: &'static [&'static str],
    /// The path of nested objects to the block's keys, each with its possible names.
    pub path: &'static [&'static [&'static str]],
    /// The part of a model with several blocks, else empty.
    pub part: &'static str,
    /// The accepted values of the nested object's `model_type`, if transformers builds the class of
    /// that name. Empty for most families, whose classes ignore it.
    pub nested_types: &'static [&'static str],
    /// A model may lack this part. Otherwise, without the nested objects, the keys are at the top.
    pub optional: bool,
    /// The index of the element if a size is a list; `None` for that of the layer.
    pub element: Option<usize>,
    /// The layers with experts.
    pub schedule: Schedule,
    pub keys: SizeKeys,
    /// The defaults of `H`, `I`, `E` and `K`; 0 if the class has none.
    pub sizes: [usize; 4],
    pub activation: Function,
    pub gated: bool,
    pub weight_position: WeightPosition,
    /// The router's product is computed in f32 for every element type.
    pub f32_logits: bool,
    pub rule: Rule,
    pub shared: Shared,
    pub logits: LogitsFrom,
    /// The peculiarities of the family.
    pub special: fn(&Keys<'_>, &mut BlockInfo) -> Result<()>,
    /// The possible prefixes of a layer's tensors; `{layer}` is replaced by its number.
    pub prefixes: &'static [&'static str],
    /// The kinds of checkpoints, the most frequent first.
    pub layouts: &'static [Layout],
}

/// The block of a layer.
pub(super) enum Found {
    Block(Box<BlockInfo>),
    /// No experts: the error names the key that makes the layer dense, or the number of layers.
    Dense(Error),
    /// The model lacks this part.
    Absent,
}

/// The keys of the sizes, each with all of its names.
#[derive(Clone, Copy)]
pub(super) struct SizeKeys {
    pub hidden: Names,
    pub intermediate: Names,
    pub experts: Names,
    pub top_k: Names,
}

/// The source of the activation function.
#[derive(Clone, Copy)]
pub(super) enum Function {
    /// Under a key, with the class default.
    Key(&'static str, &'static str),
    /// Fixed in the class.
    Fixed(ActivationFunction),
}

/// The router, without the values that keys have.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub base: RouterConfig,
    pub renormalize: Flag,
    /// The normalisation, if it is enabled.
    pub normalization: Normalization,
    pub scale: Scale,
    pub groups: Option<GroupRule>,
    /// Optional keys and their supported values.
    pub only: &'static [(&'static str, &'static [&'static str])],
}

#[derive(Clone, Copy)]
pub(super) enum Flag {
    Always,
    Never,
    Key(Names, bool),
}

#[derive(Clone, Copy)]
pub(super) enum Scale {
    One,
    Key(Names, f64),
}

#[derive(Clone, Copy)]
pub(super) struct GroupRule {
    /// The names of the number of groups.
    pub count: Names,
    /// The defaults of the number of groups and of selected groups; 0 for no groups.
    pub defaults: (usize, usize),
    pub score: GroupScore,
    pub masked: Masked,
}

/// The shared expert, of width `count * width`; none if that is 0.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    pub width: Width,
    pub count: (Names, usize),
    pub sigmoid_gate: bool,
    /// The key that adds a bias to each of its projections; empty if it has no such key.
    pub bias: Names,
}

#[derive(Clone, Copy)]
pub(super) enum Width {
    None,
    /// The width of the routed experts.
    Experts,
    Key(Names, usize),
}

pub(super) const NO_SHARED: Shared =
    Shared { width: Width::None, count: (&[], 1), sigmoid_gate: false, bias: &[] };

/// A shared expert with a width of its own.
pub(super) const fn shared_width(key: Names, default: usize) -> Shared {
    Shared { width: Width::Key(key, default), ..NO_SHARED }
}

/// A number of shared experts of the routed experts' width, merged into one.
pub(super) const fn shared_count(key: Names, default: usize) -> Shared {
    Shared { width: Width::Experts, count: (key, default), ..NO_SHARED }
}

impl Shared {
    /// With biases if the key is true.
    pub const fn with_bias(self, bias: Names) -> Self {
        Self { bias, ..self }
    }
}

/// Softmax over all experts; the largest, without normalisation.
pub(super) const SOFTMAX: Rule = Rule {
    base: RouterConfig::softmax_top_k(false),
    renormalize: Flag::Never,
    normalization: Normalization::Sum { epsilon: 0.0 },
    scale: Scale::One,
    groups: None,
    only: &[],
};

/// Softmax over the largest logits.
pub(super) const TOP_K_SOFTMAX: Rule = Rule { base: RouterConfig::top_k_softmax(), ..SOFTMAX };

/// Sigmoid, selected with a bias, renormalised.
pub(super) const SIGMOID: Rule = Rule {
    base: RouterConfig {
        scoring: Scoring::Sigmoid,
        selection_bias: true,
        ..RouterConfig::softmax_top_k(false)
    },
    renormalize: Flag::Always,
    ..SOFTMAX
};

/// The rule of DeepSeek-V3, with the defaults of the scale and of the groups.
pub(super) const fn deepseek(scale: f64, groups: (usize, usize)) -> Rule {
    Rule {
        renormalize: Flag::Key(&["norm_topk_prob"], true),
        normalization: Normalization::Sum { epsilon: 1e-20 },
        scale: Scale::Key(&["routed_scaling_factor"], scale),
        groups: Some(top_two_groups(groups)),
        ..SIGMOID
    }
}

pub(super) const fn top_two_groups(defaults: (usize, usize)) -> GroupRule {
    GroupRule {
        count: &["n_group"],
        defaults,
        score: GroupScore::TopTwoSum,
        masked: Masked::NegativeInfinity,
    }
}

const FUNCTIONS: &[(&str, ActivationFunction)] = &[
    ("silu", ActivationFunction::Silu),
    ("swish", ActivationFunction::Silu),
    ("gelu", ActivationFunction::Gelu),
    ("gelu_pytorch_tanh", ActivationFunction::GeluTanh),
    ("gelu_new", ActivationFunction::GeluTanh),
    ("gelu_fast", ActivationFunction::GeluTanh),
    ("relu", ActivationFunction::Relu),
    ("relu2", ActivationFunction::ReluSquared),
];

/// The activation function under a key.
pub(super) fn function(keys: &Keys<'_>, key: &str, default: &str) -> Result<ActivationFunction> {
    keys.word(&[key], default, FUNCTIONS)
}

impl Family {
    /// The keys of the block for one layer; `None` if the model lacks the part.
    fn keys<'a>(&self, json: &'a Map<String, Value>, layer: usize) -> Result<Option<Keys<'a>>> {
        let mut keys = Keys::new(json, layer);
        if let Some(element) = self.element {
            keys.element = element;
        }
        let nested = self.path.iter().take(1).any(|names| keys.has_any(names));
        if self.optional && !nested {
            return Ok(None);
        }
        for names in self.path {
            keys = keys.nested(names)?;
        }
        if let (true, [first, ..]) = (nested, self.nested_types) {
            let known: Vec<_> = self.nested_types.iter().map(|name| (*name, ())).collect();
            keys.word(&["model_type"], first, &known)?;
        }
        Ok(Some(keys))
    }

    /// The numbers of the layers with a block.
    pub fn layers(&self, json: &Map<String, Value>) -> Result<Vec<usize>> {
        let Some(mut keys) = self.keys(json, 0)? else { return Ok(Vec::new()) };
        let mut layers = Vec::new();
        for layer in 0..self.schedule.total(&keys)? {
            keys.layer = layer;
            if self.schedule.without_experts(&keys)?.is_none() {
                layers.push(layer);
            }
        }
        Ok(layers)
    }

    /// The block of one layer.
    pub fn block(&'static self, json: &Map<String, Value>, layer: usize) -> Result<Found> {
        let Some(keys) = self.keys(json, layer)? else { return Ok(Found::Absent) };
        if let Some(why) = self.schedule.without_experts(&keys)? {
            return Ok(Found::Dense(why));
        }
        let [hidden, intermediate, experts, top_k] = self.sizes;
        let plain = MoeConfig::new(
            keys.size(self.keys.hidden, hidden)?,
            keys.size(self.keys.intermediate, intermediate)?,
            keys.size(self.keys.experts, experts)?,
            keys.size(self.keys.top_k, top_k)?,
        );
        let function = match self.activation {
            Function::Key(key, default) => function(&keys, key, default)?,
            Function::Fixed(function) => function,
        };
        let activation = Activation { function, ..Activation::default() };
        let config = MoeConfig {
            projection: RouterProjection {
                f32_logits: self.f32_logits,
                ..RouterProjection::default()
            },
            router: self.rule.read(&keys)?,
            experts: ExpertConfig {
                activation,
                gated: self.gated,
                weight_position: self.weight_position,
                ..ExpertConfig::default()
            },
            shared: self.shared.read(&keys, plain.intermediate, activation, self.gated)?,
            ..plain
        };
        let mut block = BlockInfo {
            model_type: self.model_types.first().copied().unwrap_or_default(),
            part: self.part,
            layer,
            config,
            logits: self.logits,
            vocabulary: 0,
            first_expert: 0,
            quantization: Quantization::read(&keys)?,
            prefixes: self.prefixes,
            layouts: self.layouts,
        };
        (self.special)(&keys, &mut block)?;
        if let Some(layout) = self.layouts.first() {
            block.config = layout.config(&block);
        }
        block.config.check()?;
        Ok(Found::Block(Box::new(block)))
    }
}

impl Rule {
    fn read(&self, keys: &Keys<'_>) -> Result<RouterConfig> {
        for (key, values) in self.only {
            if keys.has(key) {
                let known: Vec<_> = values.iter().map(|value| (*value, ())).collect();
                keys.word(&[*key], "", &known)?;
            }
        }
        let mut router = self.base;
        let renormalize = match self.renormalize {
            Flag::Always => true,
            Flag::Never => false,
            Flag::Key(names, default) => keys.flag(names, default)?,
        };
        if renormalize {
            router.normalization = self.normalization;
        }
        if let Scale::Key(names, default) = self.scale {
            router.scale = keys.f32(names, default)?;
        }
        if let Some(groups) = self.groups {
            router.groups = groups.read(keys)?;
        }
        Ok(router)
    }
}

impl GroupRule {
    /// One group is no group.
    pub fn read(&self, keys: &Keys<'_>) -> Result<Option<Groups>> {
        let Self { count, defaults: (num_groups, top_groups), score, masked } = *self;
        let num_groups = keys.count(count, num_groups)?;
        if num_groups <= 1 {
            keys.size(&["topk_group"], 1)?;
            return Ok(None);
        }
        let top_groups = keys.size(&["topk_group"], top_groups)?;
        Ok(Some(Groups { num_groups, top_groups, score, masked }))
    }
}

impl Shared {
    pub fn read(
        &self,
        keys: &Keys<'_>,
        intermediate: usize,
        activation: Activation,
        gated: bool,
    ) -> Result<Option<SharedConfig>> {
        let width = match self.width {
            Width::None => 0,
            Width::Experts => intermediate,
            Width::Key(names, default) => keys.count(names, default)?,
        };
        let (names, default) = self.count;
        let intermediate = width.saturating_mul(keys.count(names, default)?);
        let sigmoid_gate = self.sigmoid_gate;
        let bias = !self.bias.is_empty() && keys.boolean(self.bias, false)?;
        let shared = SharedConfig {
            activation,
            gated,
            gate_up_bias: bias,
            down_bias: bias,
            sigmoid_gate,
            ..SharedConfig::new(intermediate)
        };
        Ok((intermediate > 0).then_some(shared))
    }
}

/// For families without peculiarities.
pub(super) fn plain(_: &Keys<'_>, _: &mut BlockInfo) -> Result<()> {
    Ok(())
}

impl Layout {
    /// With gate, up and down stored as `[in, out]` for each expert.
    pub(super) const fn in_out(self) -> Self {
        let mut layout = self;
        layout.experts.gate_up_order = WeightOrder::InOut;
        layout.experts.down_order = WeightOrder::InOut;
        layout
    }
}
