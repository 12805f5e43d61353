//! Conversion of weights and inputs from one kind of memory to another.
//!
//! [`MoeWeights::transfer`] and [`MoeInputs::transfer`] visit every tensor; a [`Transfer`] converts
//! one. The conversions on the host are here, those to a device are in `layer/memory.rs`:
//!
//! ```text
//! Owned -as_host-> Host
//! Owned -convert-> Owned
//! Owned -upload-> OwnedOnDevice -as_views-> OnDevice
//! ```

use std::convert::Infallible;

use super::{
    ExpertWeights, Host, LatentWeights, Memory, MoeInputs, MoeWeights, Owned, RouterWeights,
    SharedWeights, Typed,
};
use crate::dtype::{Dtype, Plain};

/// Converts single tensors from one kind of memory to another. Those of the layer's element type
/// `D` become tensors of type `E`; those of any other type keep it.
pub(crate) trait Transfer<'t, From: Memory, To: Memory, D: Dtype, E: Dtype = D> {
    /// The error of a conversion.
    type Error;

    /// Converts a tensor of the layer's element type.
    fn elements(&mut self, tensor: &'t From::Of<D>) -> Result<To::Of<E>, Self::Error>;

    /// Converts a tensor of a fixed type: f32 values, ids or flags.
    fn fixed<T: Plain>(&mut self, tensor: &'t From::Of<T>) -> Result<To::Of<T>, Self::Error>;
}

fn optional<'t, T, U, E>(
    tensor: &'t Option<T>,
    convert: impl FnOnce(&'t T) -> Result<U, E>,
) -> Result<Option<U>, E> {
    tensor.as_ref().map(convert).transpose()
}

impl<M: Memory, D: Dtype> Typed<M, D> {
    fn transfer<'t, N: Memory, E: Dtype, C: Transfer<'t, M, N, D, E>>(
        &'t self,
        by: &mut C,
    ) -> Result<Typed<N, E>, C::Error> {
        Ok(match self {
            Self::Element(tensor) => Typed::Element(by.elements(tensor)?),
            Self::F32(tensor) => Typed::F32(by.fixed(tensor)?),
        })
    }
}

impl<M: Memory, D: Dtype> MoeWeights<M, D> {
    /// Converts every tensor of the weights.
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
                selection_bias: optional(&router.selection_bias, |bias| by.fixed(bias))?,
                expert_scale: optional(&router.expert_scale, |scale| by.fixed(scale))?,
                table: optional(&router.table, |table| by.fixed(table))?,
            },
            experts: ExpertWeights {
                gate_up: experts.gate_up.as_ref().try_map(|tensor| by.elements(tensor))?,
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
    /// Converts every tensor of the inputs.
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
            given_ids: optional(&self.given_ids, |ids| by.fixed(ids))?,
            token_ids: optional(&self.token_ids, |ids| by.fixed(ids))?,
            noise: optional(&self.noise, |noise| by.fixed(noise))?,
            noise_logits: optional(&self.noise_logits, |logits| logits.transfer(by))?,
            selection_noise: optional(&self.selection_noise, |noise| by.fixed(noise))?,
            midpoint_draws: optional(&self.midpoint_draws, |draws| by.fixed(draws))?,
            active: optional(&self.active, |active| by.fixed(active))?,
            sequence_tokens: self.sequence_tokens,
        })
    }
}

/// Borrows vectors as slices.
struct Borrow;

impl<'t, D: Dtype> Transfer<'t, Owned, Host<'t>, D> for Borrow {
    type Error = Infallible;

    fn elements(&mut self, tensor: &'t Vec<D>) -> Result<&'t [D], Infallible> {
        Ok(tensor)
    }

    fn fixed<T: Plain>(&mut self, tensor: &'t Vec<T>) -> Result<&'t [T], Infallible> {
        Ok(tensor)
    }
}

/// Converts the element type: every number is rounded to nearest, ties to even.
struct Convert;

impl<'t, D: Dtype, E: Dtype> Transfer<'t, Owned, Owned, D, E> for Convert {
    type Error = Infallible;

    fn elements(&mut self, tensor: &'t Vec<D>) -> Result<Vec<E>, Infallible> {
        Ok(tensor.iter().map(|value| E::from_f32(value.to_f32())).collect())
    }

    fn fixed<T: Plain>(&mut self, tensor: &'t Vec<T>) -> Result<Vec<T>, Infallible> {
        Ok(tensor.clone())
    }
}

macro_rules! conversions_on_the_host {
    ($Tensors:ident) => {
        impl<D: Dtype> $Tensors<Owned, D> {
            /// Borrows every tensor as a slice, which the reference reads.
            pub fn as_host(&self) -> $Tensors<Host<'_>, D> {
                let Ok(slices) = self.transfer(&mut Borrow);
                slices
            }

            /// Converts the tensors of the layer's element type `D` to `E`: every number is rounded
            /// to nearest, ties to even. Tensors of a fixed type, such as [`Typed::F32`] and the
            /// selection bias, are copied.
            pub fn convert<E: Dtype>(&self) -> $Tensors<Owned, E> {
                let Ok(converted) = self.transfer(&mut Convert);
                converted
            }
        }
    };
}

conversions_on_the_host!(MoeWeights);
conversions_on_the_host!(MoeInputs);

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::tensors::GateUpTensors;

    /// Numbers of the layer's type are rounded to nearest, ties to even; others are copied.
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
