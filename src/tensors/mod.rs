//! What a layer reads: its weights and its inputs, wherever they are.

mod check;
mod transfer;

use std::marker::PhantomData;

use crate::dtype::Dtype;

pub(crate) use check::{no_gate, no_noise_gate, shape_of};
pub(crate) use transfer::Transfer;

/// A kind of memory, and what holds elements in it: [`Host`], [`Owned`],
/// [`OnDevice`](crate::OnDevice) and [`OwnedOnDevice`](crate::OwnedOnDevice).
pub trait Memory: private::Sealed {
    /// What holds elements of type `T`.
    type Of<T: 'static>;

    /// How many elements it holds.
    fn len<T: 'static>(tensor: &Self::Of<T>) -> usize;
}

pub(crate) mod private {
    pub trait Sealed {}
}

/// Slices `&'a [T]` on the host: what the reference reads.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a>(PhantomData<&'a ()>);

impl private::Sealed for Host<'_> {}

impl<'a> Memory for Host<'a> {
    type Of<T: 'static> = &'a [T];

    fn len<T: 'static>(tensor: &&'a [T]) -> usize {
        tensor.len()
    }
}

/// Vectors `Vec<T>` on the host: what a loader fills.
#[derive(Debug, Clone, Copy)]
pub struct Owned;

impl private::Sealed for Owned {}

impl Memory for Owned {
    type Of<T: 'static> = Vec<T>;

    fn len<T: 'static>(tensor: &Vec<T>) -> usize {
        tensor.len()
    }
}

/// The weights of a layer, as its [`MoeConfig`](crate::MoeConfig) asks for them: what it says nothing of is
/// none. `D` is the element type of the layer.
///
/// [`MoeWeights::plain`] has the experts of a plain layer, and [`with_gate`](Self::with_gate) adds its router. For others
/// [`MoeWeights::new`] and the constructors of the parts take what every layer has; struct update syntax adds the rest:
///
/// ```
/// # use moe_kernels::{ExpertWeights, GateUpTensors, MoeWeights, Owned, RouterWeights, SharedWeights, Typed};
/// # let [gate, selection_bias, gate_up, down, down_bias, shared_gate_up, shared_down] = [(); 7].map(|()| vec![0f32]);
/// let experts = ExpertWeights::new(GateUpTensors::Fused(gate_up), down);
/// let weights = MoeWeights::<Owned, f32> {
///     router: RouterWeights {
///         gate: Some(Typed::F32(gate)),
///         selection_bias: Some(selection_bias),
///         ..RouterWeights::default()
///     },
///     shared: Some(SharedWeights::new(shared_gate_up, shared_down)),
///     ..MoeWeights::new(ExpertWeights { down_bias: Some(down_bias), ..experts })
/// };
/// ```
pub struct MoeWeights<M: Memory, D: Dtype> {
    /// The router's.
    pub router: RouterWeights<M, D>,
    /// The routed experts'.
    pub experts: ExpertWeights<M, D>,
    /// The projections around the experts; there with [`MoeConfig::latent`](crate::MoeConfig::latent).
    pub latent: Option<LatentWeights<M, D>>,
    /// The shared expert's; there with [`MoeConfig::shared`](crate::MoeConfig::shared).
    pub shared: Option<SharedWeights<M, D>>,
    /// `[H]`; there with [`MoeConfig::output_norm`](crate::MoeConfig::output_norm).
    pub output_norm: Option<M::Of<D>>,
}

/// The router's weights, for `E'` experts: those with weights and those without.
pub struct RouterWeights<M: Memory, D: Dtype> {
    /// `[E', H]`; without it every pass is given its logits.
    pub gate: Option<Typed<M, D>>,
    /// `[E']`, of the gate's type; there with [`RouterProjection::bias`](crate::RouterProjection::bias).
    pub bias: Option<Typed<M, D>>,
    /// `[H]`; there with [`RouterProjection::norm`](crate::RouterProjection::norm).
    pub norm: Option<M::Of<D>>,
    /// `[E', H]`; there with [`RouterProjection::noise_gate`](crate::RouterProjection::noise_gate).
    pub noise_gate: Option<Typed<M, D>>,
    /// `[E' - num_sinks]`; there with [`RouterConfig::selection_bias`](crate::RouterConfig::selection_bias).
    pub selection_bias: Option<M::Of<f32>>,
    /// `[E']`; there with [`RouterConfig::expert_scale`](crate::RouterConfig::expert_scale).
    pub expert_scale: Option<M::Of<f32>>,
    /// `[V, K]`, the ids that a token's own number chooses; only for [`Selection::Given`](crate::Selection::Given).
    pub table: Option<M::Of<u32>>,
}

/// A tensor in the layer's element type, or in f32 whatever that is.
pub enum Typed<M: Memory, D: Dtype> {
    /// In the layer's element type.
    Element(M::Of<D>),
    /// In f32.
    F32(M::Of<f32>),
}

/// The routed experts' weights. `N` is `2I` for gated experts, else `I`, and `H` the latent width where there
/// is one; [`ExpertConfig`](crate::ExpertConfig) says in which order their dimensions are.
pub struct ExpertWeights<M: Memory, D: Dtype> {
    /// `[E, N, H]`
    pub gate_up: GateUpTensors<M::Of<D>>,
    /// `[E, N]`, in the order of the features of `gate_up`; where gate and up are separate, first gate's `I`,
    /// then up's.
    pub gate_up_bias: Option<M::Of<D>>,
    /// `[E, H, I]`
    pub down: M::Of<D>,
    /// `[E, H]`
    pub down_bias: Option<M::Of<D>>,
    /// `[H]`
    pub output_bias: Option<M::Of<D>>,
    /// `[H]`, of the norm of every expert's output.
    pub post_norm: Option<M::Of<D>>,
}

/// The gate and up projections of all experts, in one tensor or two; [`ExpertConfig`](crate::ExpertConfig) has their
/// layout. `in` is the experts' input width, `H` or the latent width.
#[derive(Debug, Clone, Copy)]
pub enum GateUpTensors<T> {
    /// `[E, 2I, in]`, or `[E, I, in]` without a gate; `InOut`: `[E, in, 2I]`, or `[E, in, I]`.
    Fused(T),
    /// Each `[E, I, in]`; `InOut`: `[E, in, I]`.
    Separate {
        /// The input of the activation function.
        gate: T,
        /// Multiplied by the function's result.
        up: T,
    },
}

impl<T> GateUpTensors<T> {
    /// References to the tensors.
    pub fn as_ref(&self) -> GateUpTensors<&T> {
        match self {
            Self::Fused(gate_up) => GateUpTensors::Fused(gate_up),
            Self::Separate { gate, up } => GateUpTensors::Separate { gate, up },
        }
    }
}

/// The projections around experts of a width of their own, `L`.
pub struct LatentWeights<M: Memory, D: Dtype> {
    /// `[L, H]`
    pub proj_in: M::Of<D>,
    /// `[L]`; there with [`LatentConfig::norm`](crate::LatentConfig::norm).
    pub norm: Option<M::Of<D>>,
    /// `[H, L]`
    pub proj_out: M::Of<D>,
}

/// The weights of the shared expert, of width `S`.
pub struct SharedWeights<M: Memory, D: Dtype> {
    /// `[2S, H]`, first gate's rows, then up's; `[S, H]` without a gate.
    pub gate_up: M::Of<D>,
    /// `[2S]`, in the order of the rows of `gate_up`; `[S]` without a gate. There with
    /// [`SharedConfig::gate_up_bias`](crate::SharedConfig::gate_up_bias).
    pub gate_up_bias: Option<M::Of<D>>,
    /// `[H, S]`
    pub down: M::Of<D>,
    /// `[H]`; there with [`SharedConfig::down_bias`](crate::SharedConfig::down_bias).
    pub down_bias: Option<M::Of<D>>,
    /// `[H]`; there with [`SharedConfig::sigmoid_gate`](crate::SharedConfig::sigmoid_gate).
    pub sigmoid_gate: Option<M::Of<D>>,
}

impl<M: Memory, D: Dtype> Default for RouterWeights<M, D> {
    /// No tensor at all.
    fn default() -> Self {
        Self {
            gate: None,
            bias: None,
            norm: None,
            noise_gate: None,
            selection_bias: None,
            expert_scale: None,
            table: None,
        }
    }
}

impl<M: Memory, D: Dtype> ExpertWeights<M, D> {
    /// Their projections alone, without biases or a norm.
    pub fn new(gate_up: GateUpTensors<M::Of<D>>, down: M::Of<D>) -> Self {
        Self {
            gate_up,
            gate_up_bias: None,
            down,
            down_bias: None,
            output_bias: None,
            post_norm: None,
        }
    }
}

impl<M: Memory, D: Dtype> LatentWeights<M, D> {
    /// Its two matrices alone, without a norm.
    pub fn new(proj_in: M::Of<D>, proj_out: M::Of<D>) -> Self {
        Self { proj_in, norm: None, proj_out }
    }
}

impl<M: Memory, D: Dtype> SharedWeights<M, D> {
    /// Its two matrices alone, without biases or a gate of its own.
    pub fn new(gate_up: M::Of<D>, down: M::Of<D>) -> Self {
        Self { gate_up, gate_up_bias: None, down, down_bias: None, sigmoid_gate: None }
    }
}

/// What one pass over `T` tokens reads besides the weights.
pub struct MoeInputs<M: Memory, D: Dtype> {
    /// `[T, H]`: what the experts read.
    pub x: M::Of<D>,
    /// `[T, H]`: what the router reads, if it is not `x`.
    pub router_x: Option<M::Of<D>>,
    /// `[T, E']`: logits of the caller's, instead of the product with the gate.
    pub logits: Option<Typed<M, D>>,
    /// `[T, K]`: the ids of the experts, for [`Selection::Given`](crate::Selection::Given), such as those of an
    /// earlier pass; instead of those in a table.
    pub given_ids: Option<M::Of<u32>>,
    /// `[T]`: each token's row in the table of ids.
    pub token_ids: Option<M::Of<u32>>,
    /// `[T, E']`: noise that is added to the logits, times
    /// [`RouterConfig::noise_deviation`](crate::RouterConfig::noise_deviation).
    pub noise: Option<M::Of<f32>>,
    /// `[T, E']`, of the logits' type: noise is multiplied by `softplus` of these first. They take the place of the
    /// product with [`RouterWeights::noise_gate`].
    pub noise_logits: Option<Typed<M, D>>,
    /// `[T, K, E']`, where [`Scoring::Sparsemixer`](crate::Scoring::Sparsemixer) is that of training: added for the
    /// selection alone, a row for each choice; standard Gumbel.
    pub selection_noise: Option<M::Of<f32>>,
    /// `[T, K]`, there with `selection_noise`: uniform in `[0, 1)`.
    pub midpoint_draws: Option<M::Of<f32>>,
    /// `[T]`: 0 for tokens that no routed expert sees, such as padding; all are seen without it.
    pub active: Option<M::Of<u8>>,
    /// Tokens of a sequence, for which capacity is counted; without it the batch is one.
    pub sequence_tokens: Option<usize>,
}

impl<M: Memory, D: Dtype> MoeInputs<M, D> {
    /// Tokens `[T, H]` alone.
    pub fn new(x: M::Of<D>) -> Self {
        Self {
            x,
            router_x: None,
            logits: None,
            given_ids: None,
            token_ids: None,
            noise: None,
            noise_logits: None,
            selection_noise: None,
            midpoint_draws: None,
            active: None,
            sequence_tokens: None,
        }
    }

    /// Tokens `[T, H]` and their logits `[T, E']`, in the layer's element type.
    pub fn with_logits(x: M::Of<D>, logits: M::Of<D>) -> Self {
        Self { logits: Some(Typed::Element(logits)), ..Self::new(x) }
    }
}

impl<M: Memory, D: Dtype> MoeWeights<M, D> {
    /// Experts alone: every pass is given its logits.
    pub fn new(experts: ExpertWeights<M, D>) -> Self {
        Self {
            router: RouterWeights::default(),
            experts,
            latent: None,
            shared: None,
            output_norm: None,
        }
    }

    /// Plain experts, `gate_up` `[E, 2I, H]` and `down` `[E, H, I]`, without a gate: every pass is given its
    /// logits.
    pub fn plain(gate_up: M::Of<D>, down: M::Of<D>) -> Self {
        Self::new(ExpertWeights::new(GateUpTensors::Fused(gate_up), down))
    }

    /// Adds the router's projection `[E', H]`, in the layer's element type.
    pub fn with_gate(mut self, gate: M::Of<D>) -> Self {
        self.router.gate = Some(Typed::Element(gate));
        self
    }
}
