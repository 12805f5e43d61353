//! Bringing all tensors of a layer from one memory to another.

use std::convert::Infallible;

use super::{
    ExpertWeights, GateUpTensors, Host, LatentWeights, Memory, MoeInputs, MoeWeights, Owned,
    RouterWeights, SharedWeights, Typed,
};
use crate::dtype::Dtype;

/// Brings tensors from one memory to another, each by its element type; those of the layer's type `D` become `E`.
pub(crate) trait Transfer<'t, From: Memory, To: Memory, D: Dtype, E: Dtype = D> {
    /// What can go wrong.
    type Error;

    /// A tensor in the layer's element type.
    fn elements(&mut self, tensor: &'t From::Of<D>) -> Result<To::Of<E>, Self::Error>;

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
    fn transfer<'t, N: Memory, E: Dtype, C: Transfer<'t, M, N, D, E>>(
        &'t self,
        by: &mut C,
    ) -> Result<Typed<N, E>, C::Error> {
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
    pub(crate) fn transfer<'t, N: Memory, E: Dtype, C: Transfer<'t, M, N, D, E>>(
        &'t self,
        by: &mut C,
    ) -> Result<MoeWeights<N, E>, C::Error> {
        let Self { router, experts, latent, shared, output_norm } = self;
        Ok(MoeWeights {
            router: RouterWeights {
                router_gate: optional(&router.router_gate, |gate| gate.transfer(by))?,
                bias: optional(&router.bias, |bias| bias.transfer(by))?,
                norm: optional(&router.norm, |norm| by.elements(norm))?,
                noise_gate: optional(&router.noise_gate, |gate| gate.transfer(by))?,
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
                    proj_in: by.elements(&latent.proj_in)?,
                    norm: optional(&latent.norm, |norm| by.elements(norm))?,
                    proj_out: by.elements(&latent.proj_out)?,
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
    pub(crate) fn transfer<'t, N: Memory, E: Dtype, C: Transfer<'t, M, N, D, E>>(
        &'t self,
        by: &mut C,
    ) -> Result<MoeInputs<N, E>, C::Error> {
        Ok(MoeInputs {
            x: by.elements(&self.x)?,
            router_x: optional(&self.router_x, |x| by.elements(x))?,
            logits: optional(&self.logits, |logits| logits.transfer(by))?,
            given_ids: optional(&self.given_ids, |ids| by.ids(ids))?,
            token_ids: optional(&self.token_ids, |ids| by.ids(ids))?,
            noise: optional(&self.noise, |noise| by.floats(noise))?,
            noise_logits: optional(&self.noise_logits, |logits| logits.transfer(by))?,
            selection_noise: optional(&self.selection_noise, |noise| by.floats(noise))?,
            midpoint_draws: optional(&self.midpoint_draws, |draws| by.floats(draws))?,
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

/// From one element type to another: every number as the nearest one, ties to even.
struct Convert;

impl<'t, D: Dtype, E: Dtype> Transfer<'t, Owned, Owned, D, E> for Convert {
    type Error = Infallible;

    fn elements(&mut self, tensor: &'t Vec<D>) -> Result<Vec<E>, Infallible> {
        Ok(tensor.iter().map(|value| E::from_f32(value.to_f32())).collect())
    }

    fn floats(&mut self, tensor: &'t Vec<f32>) -> Result<Vec<f32>, Infallible> {
        Ok(tensor.clone())
    }

    fn ids(&mut self, tensor: &'t Vec<u32>) -> Result<Vec<u32>, Infallible> {
        Ok(tensor.clone())
    }

    fn flags(&mut self, tensor: &'t Vec<u8>) -> Result<Vec<u8>, Infallible> {
        Ok(tensor.clone())
    }
}

impl<D: Dtype> MoeWeights<Owned, D> {
    /// The same weights for a layer of element type `E`: every number of type `D` as the nearest one, ties to even.
    /// Tensors that are f32 in a layer of any type, such as [`Typed::F32`] and the selection bias, stay as they are.
    pub fn convert<E: Dtype>(&self) -> MoeWeights<Owned, E> {
        match self.transfer(&mut Convert) {
            Ok(weights) => weights,
            Err(never) => match never {},
        }
    }
}

impl<D: Dtype> MoeInputs<Owned, D> {
    /// The same inputs for a layer of element type `E`, as [`MoeWeights::convert`] has the weights.
    pub fn convert<E: Dtype>(&self) -> MoeInputs<Owned, E> {
        match self.transfer(&mut Convert) {
            Ok(inputs) => inputs,
            Err(never) => match never {},
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::tensors::GateUpTensors;

    /// Numbers of the layer's type are rounded to nearest, ties to even, and others are left alone.
    #[test]
    fn conversion_rounds_to_nearest() {
        let tie = 1.0 + 2f32.powi(-8);
        let numbers = vec![tie, 1e-3, -70_000.0, f32::INFINITY];
        let experts = ExpertWeights::new(GateUpTensors::Fused(numbers.clone()), numbers.clone());
        let shared = SharedWeights {
            down_bias: Some(numbers.clone()),
            ..SharedWeights::new(numbers.clone(), numbers.clone())
        };
        let weights = MoeWeights::<Owned, f32> {
            router: RouterWeights {
                router_gate: Some(Typed::F32(numbers.clone())),
                noise_gate: Some(Typed::Element(numbers.clone())),
                selection_bias: Some(numbers.clone()),
                ..RouterWeights::default()
            },
            shared: Some(shared),
            ..MoeWeights::new(experts)
        };
        let narrow = weights.convert::<bf16>();
        let bits = |numbers: &[bf16]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let want = bits(&numbers.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
        assert_eq!(want[0], bf16::ONE.to_bits());
        assert_eq!(bits(&narrow.experts.down), want);
        assert_eq!(
            narrow.shared.and_then(|shared| shared.down_bias).map(|b| bits(&b)),
            Some(want.clone())
        );
        assert_eq!(narrow.router.selection_bias, Some(numbers.clone()));
        assert!(matches!(&narrow.router.router_gate, Some(Typed::F32(gate)) if *gate == numbers));
        assert!(
            matches!(&narrow.router.noise_gate, Some(Typed::Element(gate)) if bits(gate) == want)
        );
        let inputs = MoeInputs::<Owned, f32> { active: Some(vec![1]), ..MoeInputs::new(numbers) };
        let inputs = inputs.convert::<f16>();
        assert_eq!((inputs.x[2], inputs.active), (f16::NEG_INFINITY, Some(vec![1])));
    }
}
