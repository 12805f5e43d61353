//! The weights and inputs of a layer, on the host or on a device.

mod check;
mod transfer;

use std::marker::PhantomData;

use crate::dtype::Dtype;

pub(crate) use check::{no_noise_gate, no_router_gate, shape_of};
pub(crate) use transfer::Transfer;

/// A kind of memory, which determines the type of the tensors in it:
///
/// | kind | tensor of `T` | created by |
/// |---|---|---|
/// | [`Owned`] | `Vec<T>` | a loader; `convert` |
/// | [`Host`] | `&[T]` | `as_host` of `Owned` |
/// | [`OwnedOnDevice`](crate::OwnedOnDevice) | `CudaSlice<T>` | `upload` of `Owned` |
/// | [`OnDevice`](crate::OnDevice) | `CudaView<T>` | `as_views` of `OwnedOnDevice` |
/// | [`OnDeviceMut`](crate::OnDeviceMut) | `CudaViewMut<T>` | the caller, for outputs |
pub trait Memory: private::Sealed {
    /// A tensor of elements of type `T`.
    type Of<T: 'static>;

    /// The number of elements of a tensor.
    fn len<T: 'static>(tensor: &Self::Of<T>) -> usize;
}

pub(crate) mod private {
    pub trait Sealed {}
}

/// Slices `&'a [T]` on the host, which the reference reads.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a>(PhantomData<&'a ()>);

impl private::Sealed for Host<'_> {}

impl<'a> Memory for Host<'a> {
    type Of<T: 'static> = &'a [T];

    fn len<T: 'static>(tensor: &&'a [T]) -> usize {
        tensor.len()
    }
}

/// Vectors `Vec<T>` on the host, which a loader fills.
#[derive(Debug, Clone, Copy)]
pub struct Owned;

impl private::Sealed for Owned {}

impl Memory for Owned {
    type Of<T: 'static> = Vec<T>;

    fn len<T: 'static>(tensor: &Vec<T>) -> usize {
        tensor.len()
    }
}

/// The weights of a layer, of element type `D`. An optional tensor is given exactly if the layer's
/// [`MoeConfig`](crate::MoeConfig) enables it.
///
/// [`MoeWeights::plain`] takes the experts of a plain layer, and
/// [`with_router_gate`](Self::with_router_gate) adds its router. For other layers,
/// [`MoeWeights::new`] and the constructors of the parts take the tensors that every layer has, and
/// struct update syntax adds the optional ones. [`Memory`] lists the kinds of memory and the
/// conversions between them.
///
/// ```
/// # use moe_kernels::{
/// #     ExpertWeights, GateUpTensors, MoeWeights, Owned, RouterWeights, SharedWeights, Typed,
/// # };
/// # let [router_gate, selection_bias, gate_up, down, down_bias] = [(); 5].map(|()| vec![0f32]);
/// # let [shared_gate_up, shared_down] = [(); 2].map(|()| vec![0f32]);
/// let experts = ExpertWeights::new(GateUpTensors::Fused(gate_up), down);
/// let weights = MoeWeights::<Owned, f32> {
///     router: RouterWeights {
///         router_gate: Some(Typed::F32(router_gate)),
///         selection_bias: Some(selection_bias),
///         ..RouterWeights::default()
///     },
///     shared: Some(SharedWeights::new(shared_gate_up, shared_down)),
///     ..MoeWeights::new(ExpertWeights { down_bias: Some(down_bias), ..experts })
/// };
/// ```
pub struct MoeWeights<M: Memory, D: Dtype> {
    /// The weights of the router.
    pub router: RouterWeights<M, D>,
    /// The weights of the routed experts.
    pub experts: ExpertWeights<M, D>,
    /// The projections into and out of the latent width, if
    /// [`MoeConfig::latent`](crate::MoeConfig::latent) is set.
    pub latent: Option<LatentWeights<M, D>>,
    /// The weights of the shared expert, if [`MoeConfig::shared`](crate::MoeConfig::shared) is set.
    pub shared: Option<SharedWeights<M, D>>,
    /// `[H]`, the weight of [`MoeConfig::output_norm`](crate::MoeConfig::output_norm).
    pub output_norm: Option<M::Of<D>>,
}

/// The weights of the router, for `E'` experts: those with weights and the zero experts.
pub struct RouterWeights<M: Memory, D: Dtype> {
    /// `[E', H]`, the projection from tokens to logits. Without it, every pass must be given its
    /// logits.
    pub router_gate: Option<Typed<M, D>>,
    /// `[E']`, of the type of `router_gate`, if
    /// [`RouterProjection::bias`](crate::RouterProjection::bias) is set.
    pub bias: Option<Typed<M, D>>,
    /// `[H]`, the weight of [`RouterProjection::norm`](crate::RouterProjection::norm).
    pub norm: Option<M::Of<D>>,
    /// `[E', H]`, if [`RouterProjection::noise_gate`](crate::RouterProjection::noise_gate) is set.
    pub noise_gate: Option<Typed<M, D>>,
    /// `[E' - num_sinks]`, if [`RouterConfig::selection_bias`](crate::RouterConfig::selection_bias)
    /// is set.
    pub selection_bias: Option<M::Of<f32>>,
    /// `[E']`, if [`RouterConfig::expert_scale`](crate::RouterConfig::expert_scale) is set.
    pub expert_scale: Option<M::Of<f32>>,
    /// `[V, K]`, the expert ids of each entry of a vocabulary, which [`MoeInputs::token_ids`]
    /// selects; optional, and only for [`Selection::Given`](crate::Selection::Given).
    pub table: Option<M::Of<u32>>,
}

/// A tensor in the layer's element type or in f32.
pub enum Typed<M: Memory, D: Dtype> {
    /// In the layer's element type.
    Element(M::Of<D>),
    /// In f32.
    F32(M::Of<f32>),
}

/// The weights of the routed experts. In a layer with a latent width, `H` is that width, except in
/// `output_bias`. [`ExpertConfig`](crate::ExpertConfig) has the order of the dimensions and enables
/// the optional tensors.
pub struct ExpertWeights<M: Memory, D: Dtype> {
    /// `[E, 2I, H]`, or `[E, I, H]` without a gate, in one tensor or two.
    pub gate_up: GateUpTensors<M::Of<D>>,
    /// `[E, 2I]`, or `[E, I]` without a gate, in the order of the features of `gate_up`. For
    /// separate tensors, the `I` biases of gate come before those of up.
    pub gate_up_bias: Option<M::Of<D>>,
    /// `[E, H, I]`
    pub down: M::Of<D>,
    /// `[E, H]`
    pub down_bias: Option<M::Of<D>>,
    /// `[H]`, the width of the layer's output.
    pub output_bias: Option<M::Of<D>>,
    /// `[H]`, the weight of the RMS norm of every expert's output.
    pub post_norm: Option<M::Of<D>>,
}

/// The gate and up projections of all experts, in one tensor or two; `T` is the type of a tensor.
/// [`ExpertConfig`](crate::ExpertConfig) has their layout. `in` is the width of the experts' input:
/// `H` or the latent width.
#[derive(Debug, Clone, Copy)]
pub enum GateUpTensors<T> {
    /// `[E, 2I, in]`, or `[E, I, in]` without a gate; in order `InOut` `[E, in, 2I]` or `[E, in,
    /// I]`.
    Fused(T),
    /// Each `[E, I, in]`; in order `InOut` `[E, in, I]`.
    Separate {
        /// The input of the activation function.
        gate: T,
        /// The factor of the function's result.
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

    /// Converts each tensor, or returns the first error.
    pub(crate) fn try_map<U, E>(
        self,
        mut convert: impl FnMut(T) -> Result<U, E>,
    ) -> Result<GateUpTensors<U>, E> {
        Ok(match self {
            Self::Fused(gate_up) => GateUpTensors::Fused(convert(gate_up)?),
            Self::Separate { gate, up } => {
                GateUpTensors::Separate { gate: convert(gate)?, up: convert(up)? }
            }
        })
    }
}

/// The projections into and out of the latent width `L`, in which the experts compute.
pub struct LatentWeights<M: Memory, D: Dtype> {
    /// `[L, H]`
    pub proj_in: M::Of<D>,
    /// `[L]`, the weight of [`LatentConfig::norm`](crate::LatentConfig::norm).
    pub norm: Option<M::Of<D>>,
    /// `[H, L]`
    pub proj_out: M::Of<D>,
}

/// The weights of the shared expert, of width `S`.
pub struct SharedWeights<M: Memory, D: Dtype> {
    /// `[2S, H]`, the rows of gate before those of up; `[S, H]` without a gate.
    pub gate_up: M::Of<D>,
    /// `[2S]`, in the order of the rows of `gate_up`; `[S]` without a gate. Given if
    /// [`SharedConfig::gate_up_bias`](crate::SharedConfig::gate_up_bias) is set.
    pub gate_up_bias: Option<M::Of<D>>,
    /// `[H, S]`
    pub down: M::Of<D>,
    /// `[H]`, if [`SharedConfig::down_bias`](crate::SharedConfig::down_bias) is set.
    pub down_bias: Option<M::Of<D>>,
    /// `[H]`, if [`SharedConfig::sigmoid_gate`](crate::SharedConfig::sigmoid_gate) is set.
    pub sigmoid_gate: Option<M::Of<D>>,
}

impl<M: Memory, D: Dtype> Default for RouterWeights<M, D> {
    /// No tensors.
    fn default() -> Self {
        Self {
            router_gate: None,
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
    /// The projections alone, without biases or a norm.
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
    /// The two projections alone, `[L, H]` and `[H, L]`, without a norm.
    pub fn new(proj_in: M::Of<D>, proj_out: M::Of<D>) -> Self {
        Self { proj_in, norm: None, proj_out }
    }
}

impl<M: Memory, D: Dtype> SharedWeights<M, D> {
    /// The two matrices alone, `[2S, H]` and `[H, S]`, without biases or a sigmoid gate.
    pub fn new(gate_up: M::Of<D>, down: M::Of<D>) -> Self {
        Self { gate_up, gate_up_bias: None, down, down_bias: None, sigmoid_gate: None }
    }
}

/// The inputs of one pass over `T` tokens. Every field but `x` is optional.
pub struct MoeInputs<M: Memory, D: Dtype> {
    /// `[T, H]`, the tokens. The experts read them.
    pub x: M::Of<D>,
    /// `[T, H]`, which the router reads in place of `x`.
    pub router_x: Option<M::Of<D>>,
    /// `[T, E']`, logits in place of the product with [`RouterWeights::router_gate`].
    pub logits: Option<Typed<M, D>>,
    /// `[T, K]`, the expert ids for [`Selection::Given`](crate::Selection::Given), such as those of
    /// an earlier pass, in place of [`RouterWeights::table`].
    pub given_ids: Option<M::Of<u32>>,
    /// `[T]`, the row of each token in [`RouterWeights::table`].
    pub token_ids: Option<M::Of<u32>>,
    /// `[T, E']`, noise. The router adds it to the logits, times
    /// [`RouterConfig::noise_deviation`](crate::RouterConfig::noise_deviation).
    pub noise: Option<M::Of<f32>>,
    /// `[T, E']`, of the type of the logits. The router multiplies the noise by `softplus` of
    /// these. They replace the product with [`RouterWeights::noise_gate`].
    pub noise_logits: Option<Typed<M, D>>,
    /// `[T, K, E']`, standard Gumbel noise, required by the training form of
    /// [`Scoring::Sparsemixer`](crate::Scoring::Sparsemixer). Each of the `K` choices adds its own
    /// row to the logits, for the selection only.
    pub selection_noise: Option<M::Of<f32>>,
    /// `[T, K]`, uniform in `[0, 1)`, required together with `selection_noise`.
    pub midpoint_draws: Option<M::Of<f32>>,
    /// `[T]`, flags. A token with flag 0, such as padding, is sent to no routed expert. Without
    /// flags all tokens are active.
    pub active: Option<M::Of<u8>>,
    /// The number of tokens of a sequence; capacity counts rows per sequence. `None` makes the
    /// batch one sequence.
    pub sequence_tokens: Option<usize>,
}

impl<M: Memory, D: Dtype> MoeInputs<M, D> {
    /// The tokens `[T, H]` alone.
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

    /// The tokens `[T, H]` and their logits `[T, E']`, both in the layer's element type.
    pub fn with_logits(x: M::Of<D>, logits: M::Of<D>) -> Self {
        Self { logits: Some(Typed::Element(logits)), ..Self::new(x) }
    }
}

impl<M: Memory, D: Dtype> MoeWeights<M, D> {
    /// The routed experts alone. Every pass must be given its logits.
    pub fn new(experts: ExpertWeights<M, D>) -> Self {
        Self {
            router: RouterWeights::default(),
            experts,
            latent: None,
            shared: None,
            output_norm: None,
        }
    }

    /// Plain experts, `gate_up` `[E, 2I, H]` and `down` `[E, H, I]`, without a router gate: every
    /// pass must be given its logits.
    pub fn plain(gate_up: M::Of<D>, down: M::Of<D>) -> Self {
        Self::new(ExpertWeights::new(GateUpTensors::Fused(gate_up), down))
    }

    /// Adds the router gate `[E', H]`, in the layer's element type.
    pub fn with_router_gate(mut self, router_gate: M::Of<D>) -> Self {
        self.router.router_gate = Some(Typed::Element(router_gate));
        self
    }
}
