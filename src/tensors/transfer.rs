//! Bringing all tensors of a layer from one memory to another.

use std::convert::Infallible;

use super::{
    ExpertWeights, GateUpTensors, Host, LatentWeights, Memory, MoeInputs, MoeWeights, Owned,
    RouterWeights, SharedWeights, Typed,
};
use crate::dtype::Dtype;

/// Brings tensors from one memory to another, each by its element type.
pub(crate) trait Transfer<'t, From: Memory, To: Memory, D: Dtype> {
    /// What can go wrong.
    type Error;

    /// A tensor in the layer's element type.
    fn elements(&mut self, tensor: &'t From::Of<D>) -> Result<To::Of<D>, Self::Error>;

    /// A tensor in f32.
    fn floats(&mut self, tensor: &'t From::Of<f32>) -> Result<To::Of<f32>, Self::Error>;

    /// A tensor of ids.
    fn ids(&mut self, tensor: &'t From::Of<u32>) -> Result<To::Of<u32>, Self::Error>;

    /// A tensor of flags.
    fn flags(&mut self, tensor: &'t From::Of<u8>) -> Result<To::Of<u8>, Self::Error>;
}

fn optional<'t, T, U, E>(
    tensor: &'t Option<T>,
    bring: impl FnOnce(&'t T) -> Result<U, E>,
) -> Result<Option<U>, E> {
    tensor.as_ref().map(bring).transpose()
}

impl<M: Memory, D: Dtype> Typed<M, D> {
    fn transfer<'t, N: Memory, C: Transfer<'t, M, N, D>>(
        &'t self,
        by: &mut C,
    ) -> Result<Typed<N, D>, C::Error> {
        Ok(match self {
            Self::Element(tensor) => Typed::Element(by.elements(tensor)?),
            Self::F32(tensor) => Typed::F32(by.floats(tensor)?),
        })
    }
}

impl<M: Memory, D: Dtype> MoeWeights<M, D> {
    /// The same weights in another memory.
    ///
    /// # Errors
    /// Those of `by`.
    pub(crate) fn transfer<'t, N: Memory, C: Transfer<'t, M, N, D>>(
        &'t self,
        by: &mut C,
    ) -> Result<MoeWeights<N, D>, C::Error> {
        let Self { router, experts, latent, shared, output_norm } = self;
        Ok(MoeWeights {
            router: RouterWeights {
                gate: optional(&router.gate, |gate| gate.transfer(by))?,
                bias: optional(&router.bias, |bias| bias.transfer(by))?,
                norm: optional(&router.norm, |norm| by.elements(norm))?,
                selection_bias: optional(&router.selection_bias, |bias| by.floats(bias))?,
                expert_scale: optional(&router.expert_scale, |scale| by.floats(scale))?,
                table: optional(&router.table, |table| by.ids(table))?,
            },
            experts: ExpertWeights {
                gate_up: match &experts.gate_up {
                    GateUpTensors::Fused(gate_up) => GateUpTensors::Fused(by.elements(gate_up)?),
                    GateUpTensors::Separate { gate, up } => {
                        GateUpTensors::Separate { gate: by.elements(gate)?, up: by.elements(up)? }
                    }
                },
                gate_up_bias: optional(&experts.gate_up_bias, |bias| by.elements(bias))?,
                down: by.elements(&experts.down)?,
                down_bias: optional(&experts.down_bias, |bias| by.elements(bias))?,
                output_bias: optional(&experts.output_bias, |bias| by.elements(bias))?,
                post_norm: optional(&experts.post_norm, |norm| by.elements(norm))?,
            },
            latent: optional(latent, |latent| {
                Ok(LatentWeights {
                    before: by.elements(&latent.before)?,
                    norm: optional(&latent.norm, |norm| by.elements(norm))?,
                    after: by.elements(&latent.after)?,
                })
            })?,
            shared: optional(shared, |shared| {
                Ok(SharedWeights {
                    gate_up: by.elements(&shared.gate_up)?,
                    gate_up_bias: optional(&shared.gate_up_bias, |bias| by.elements(bias))?,
                    down: by.elements(&shared.down)?,
                    down_bias: optional(&shared.down_bias, |bias| by.elements(bias))?,
                    sigmoid_gate: optional(&shared.sigmoid_gate, |gate| by.elements(gate))?,
                })
            })?,
            output_norm: optional(output_norm, |norm| by.elements(norm))?,
        })
    }
}

impl<M: Memory, D: Dtype> MoeInputs<M, D> {
    /// The same inputs in another memory.
    ///
    /// # Errors
    /// Those of `by`.
    pub(crate) fn transfer<'t, N: Memory, C: Transfer<'t, M, N, D>>(
        &'t self,
        by: &mut C,
    ) -> Result<MoeInputs<N, D>, C::Error> {
        Ok(MoeInputs {
            x: by.elements(&self.x)?,
            router_x: optional(&self.router_x, |x| by.elements(x))?,
            logits: optional(&self.logits, |logits| logits.transfer(by))?,
            given_ids: optional(&self.given_ids, |ids| by.ids(ids))?,
            token_ids: optional(&self.token_ids, |ids| by.ids(ids))?,
            noise: optional(&self.noise, |noise| by.floats(noise))?,
            noise_logits: optional(&self.noise_logits, |logits| logits.transfer(by))?,
            active: optional(&self.active, |active| by.flags(active))?,
            sequence_tokens: self.sequence_tokens,
        })
    }
}

/// From a loader's vectors to the reference's slices.
struct Lend;

impl<'t, D: Dtype> Transfer<'t, Owned, Host<'t>, D> for Lend {
    type Error = Infallible;

    fn elements(&mut self, tensor: &'t Vec<D>) -> Result<&'t [D], Infallible> {
        Ok(tensor)
    }

    fn floats(&mut self, tensor: &'t Vec<f32>) -> Result<&'t [f32], Infallible> {
        Ok(tensor)
    }

    fn ids(&mut self, tensor: &'t Vec<u32>) -> Result<&'t [u32], Infallible> {
        Ok(tensor)
    }

    fn flags(&mut self, tensor: &'t Vec<u8>) -> Result<&'t [u8], Infallible> {
        Ok(tensor)
    }
}

impl<D: Dtype> MoeWeights<Owned, D> {
    /// The same weights as slices.
    pub fn as_host(&self) -> MoeWeights<Host<'_>, D> {
        match self.transfer(&mut Lend) {
            Ok(weights) => weights,
            Err(never) => match never {},
        }
    }
}

impl<D: Dtype> MoeInputs<Owned, D> {
    /// The same inputs as slices.
    pub fn as_host(&self) -> MoeInputs<Host<'_>, D> {
        match self.transfer(&mut Lend) {
            Ok(inputs) => inputs,
            Err(never) => match never {},
        }
    }
}
