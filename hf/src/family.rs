//! One family: how its config.json becomes a [`MoeConfig`], as data.

use serde_json::{Map, Value};

use crate::config::{
    Activation, ActivationFunction, ExpertConfig, GroupScore, Groups, Masked, MoeConfig,
    Normalization, RouterConfig, RouterProjection, Scoring, SharedConfig, WeightOrder,
    WeightPosition,
};
use crate::error::{Error, Result};
use crate::hf::keys::Keys;
use crate::hf::names::Layout;
use crate::hf::quantization::Quantization;
use crate::hf::schedule::Schedule;
use crate::hf::{Block, LogitsFrom};

/// A row of the table of families. Absent keys mean the default of transformers' class, which the row has.
pub(super) struct Family {
    /// The `model_type` of config.json; more than one where configurations come in several wrappings.
    pub model_types: &'static [&'static str],
    /// The nested objects that lead to the block's keys, each with the names it may have.
    pub path: &'static [&'static [&'static str]],
    /// Which of a model's blocks it is, where there are several; else empty.
    pub part: &'static str,
    /// The `model_type`s of the nested object that this row is for, where transformers builds what it names; else empty,
    /// as most classes know what they nest and ignore the name.
    pub nested_types: &'static [&'static str],
    /// A model may be without this part; otherwise, without the nested objects, the keys stand at the top.
    pub optional: bool,
    /// Which element counts where a size is a list; none for that of the layer.
    pub element: Option<usize>,
    /// Which layers have experts.
    pub schedule: Schedule,
    pub keys: SizeKeys,
    /// The defaults of `H`, `I`, `E` and `K`; 0 where the class has none.
    pub sizes: [usize; 4],
    pub activation: Function,
    pub gated: bool,
    pub weight_position: WeightPosition,
    /// The router's product is computed in f32 whatever the model's type is.
    pub f32_logits: bool,
    pub rule: Rule,
    pub shared: Shared,
    pub logits: LogitsFrom,
    /// What is peculiar to the family.
    pub special: fn(&Keys<'_>, &mut Block) -> Result<()>,
    /// What stands before the names of a layer; `{layer}` stands for its number.
    pub prefixes: &'static [&'static str],
    /// The kinds of checkpoints, the most frequent first.
    pub layouts: &'static [Layout],
}

/// What a layer has of a family.
pub(super) enum Found {
    Block(Box<Block>),
    /// No experts: the key that makes the layer dense, or that ends before it.
    Dense(Error),
    /// The model is without this part.
    Absent,
}

/// Keys of the sizes, each with all of its names.
#[derive(Clone, Copy)]
pub(super) struct SizeKeys {
    pub hidden: Names,
    pub intermediate: Names,
    pub experts: Names,
    pub top_k: Names,
}

pub(super) type Names = &'static [&'static str];

/// Where the name of the activation function is.
#[derive(Clone, Copy)]
pub(super) enum Function {
    /// Under a key, with the class default.
    Key(&'static str, &'static str),
    /// In the code.
    Fixed(ActivationFunction),
}

/// The router, less what only a key says.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub base: RouterConfig,
    pub renormalize: Flag,
    /// What renormalising is.
    pub normalization: Normalization,
    pub scale: Scale,
    pub groups: Option<GroupRule>,
    /// Keys that may be absent, and the values under which the rule is this one.
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
    /// The defaults of the number of groups and of those that are chosen; 0 for no groups.
    pub defaults: (usize, usize),
    pub score: GroupScore,
    pub masked: Masked,
}

/// The shared expert: `count` times `width` wide, and none where that is 0.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    pub width: Width,
    pub count: (Names, usize),
    pub sigmoid_gate: bool,
    /// The key that gives every projection of it a bias; none where it cannot have any.
    pub bias: Names,
}

#[derive(Clone, Copy)]
pub(super) enum Width {
    None,
    /// That of the routed experts.
    Experts,
    Key(Names, usize),
}

pub(super) const NO_SHARED: Shared =
    Shared { width: Width::None, count: (&[], 1), sigmoid_gate: false, bias: &[] };

/// A shared expert with a width of its own.
pub(super) const fn shared_width(key: Names, default: usize) -> Shared {
    Shared { width: Width::Key(key, default), ..NO_SHARED }
}

/// So many shared experts of the routed ones' width, in one.
pub(super) const fn shared_count(key: Names, default: usize) -> Shared {
    Shared { width: Width::Experts, count: (key, default), ..NO_SHARED }
}

impl Shared {
    /// With biases if the key says so.
    pub const fn with_bias(self, bias: Names) -> Self {
        Self { bias, ..self }
    }
}

/// Softmax over all experts, the largest as they are.
pub(super) const SOFTMAX: Rule = Rule {
    base: RouterConfig::softmax_top_k(false),
    renormalize: Flag::Never,
    normalization: Normalization::Sum { epsilon: 0.0 },
    scale: Scale::One,
    groups: None,
    only: &[],
};

/// The largest logits, and softmax over those.
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
    /// The keys of the block, as one layer sees them; none if the model does not have the part that the block is in.
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

    /// The numbers of the layers that have a block.
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
        let mut block = Block {
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
    /// One group is none.
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

/// For families with nothing peculiar.
pub(super) fn plain(_: &Keys<'_>, _: &mut Block) -> Result<()> {
    Ok(())
}

impl Layout {
    /// Names whose gate, up and down are stored transposed, each expert's `[in, out]`.
    pub(super) const fn in_out(self) -> Self {
        let mut layout = self;
        layout.experts.gate_up_order = WeightOrder::InOut;
        layout.experts.down_order = WeightOrder::InOut;
        layout
    }
}
