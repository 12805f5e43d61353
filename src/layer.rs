//! The layer: its operations in order.

mod contexts;
mod experts;
mod memory;
mod outputs;
mod pass;
mod route;
mod scores;
mod sections;

pub use memory::{OnDevice, OnDeviceMut, OwnedOnDevice};
pub use outputs::RoutingOutputs;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};

use crate::config::MoeConfig;
use crate::device::Device;
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len};
use crate::shape::RoutingShape;
use crate::tensors::{MoeInputs, MoeWeights, Typed, no_router_gate, shape_of};
use crate::workspace::{Arena, Section, Workspace};
use experts::Routing;
use pass::Pass;
use sections::{OP, Sections};

/// A Mixture-of-Experts layer on a device. The caller owns its weights and its workspace.
///
/// One forward pass enqueues the operations that the configuration enables, in this order: the norm
/// and projection of the router, `route`, `capacity`, `plan`, the products of the shared expert,
/// those of the routed experts, and `combine`. It allocates nothing and reads nothing back, and its
/// launches depend on the number of tokens only, so a captured graph replays with any routing.
///
/// To capture a pass on a stream of `CudaContext::new_stream`, call
/// `CudaContext::disable_event_tracking` before the buffers are allocated: otherwise cudarc waits
/// for events from before the capture, which CUDA rejects. Call [`Device::warm_up`] before the
/// capture as well.
#[derive(Debug, Clone)]
pub struct MoeLayer {
    device: Device,
    config: MoeConfig,
}

impl MoeLayer {
    /// Creates a layer of this configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`], which names the field.
    pub fn new(device: &Device, config: MoeConfig) -> Result<Self> {
        config.check()?;
        Ok(Self { device: device.clone(), config })
    }

    /// The configuration.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The size of the workspace in bytes for a pass over at most `num_tokens` tokens, or any part
    /// of a pass. It needs no device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a configuration or a shape out of range.
    pub fn workspace_bytes(config: &MoeConfig, dtype: DType, num_tokens: usize) -> Result<usize> {
        config.check()?;
        Section::total(OP, &Sections::new(config, dtype, num_tokens)?.of_forward())
    }

    /// Enqueues a whole pass: `inputs` of `T` tokens to `y` `[T, H]`.
    ///
    /// `T` follows from the length of `inputs.x`. The call is asynchronous, ordered on `stream`.
    /// Products accumulate in f32; each intermediate tensor and `y` is rounded to `D` once. Logits
    /// that are not given are the product of the tokens with the router gate, in f32 or rounded to
    /// `D`, by [`f32_logits`](crate::RouterProjection::f32_logits).
    ///
    /// In f16, each expert's output is multiplied by its routing weight before it is rounded, so
    /// the output itself may exceed the range of f16 (65504). All other stored values overflow to
    /// infinity beyond that range: logits that are not f32 (which may then select other experts),
    /// activations, the weighted outputs, the output of the shared expert, and the outputs of the
    /// experts if they have a norm ([`post_norm`](crate::ExpertConfig::post_norm)) or apply the
    /// weight earlier ([`weight_position`](crate::ExpertConfig::weight_position)).
    ///
    /// # Errors
    /// [`Error::Length`] for a buffer or a workspace of another length, [`Error::Presence`] and
    /// [`Error::Mismatch`] for weights or inputs that contradict the configuration,
    /// [`Error::Context`] for a stream or a buffer of another `CudaContext`, and any launch error.
    pub fn forward<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let pass = self.pass(stream, inputs.check(OP, &self.config)?, weights)?;
        inputs.check_route(OP, &self.config, weights)?;
        check_len(OP, "y", y.len(), inputs.x.len())?;
        pass.contexts.inputs(inputs)?;
        pass.contexts.written("y", y)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_forward())?;
        let dense =
            pass.dense(&mut arena, pass.projects_by_gemm(inputs) || pass.has_dense_experts())?;
        let mut outputs = RoutingOutputs::new(
            arena.take(pass.sections.expert_ids)?,
            arena.take(pass.sections.routing_weights)?,
        );
        pass.route(inputs, dense.as_ref(), &mut arena, &mut outputs)?;
        let routing = Routing {
            expert_ids: &outputs.expert_ids.as_view(),
            routing_weights: &outputs.routing_weights.as_view(),
        };
        pass.experts(&inputs.x, routing, dense.as_ref(), &mut arena, y)
    }

    /// The first part of [`forward`](Self::forward): the logits of the router `[T, E']`, in f32 or
    /// `D`, by [`f32_logits`](crate::RouterProjection::f32_logits), for auxiliary losses for
    /// example. They are those of the product, before noise, multiplier and soft-cap;
    /// [`router_scores`](Self::router_scores) has the later steps.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Mismatch`] for weights without a router
    /// gate or logits of the wrong type.
    pub fn router_logits<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let pass = self.pass(stream, inputs.check(OP, &self.config)?, weights)?;
        let router_gate = weights.router.router_gate.as_ref().ok_or_else(|| no_router_gate(OP))?;
        if logits.is_f32() != self.config.projection.f32_logits {
            let why = "the type of `logits` contradicts `projection.f32_logits`".into();
            return Err(Error::Mismatch { op: OP, why });
        }
        check_len(OP, "logits", logits.len(), pass.shape.logits())?;
        pass.contexts.inputs(inputs)?;
        pass.contexts.logits("logits", logits)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_route())?;
        let dense = pass.dense(&mut arena, pass.projects_by_gemm(inputs))?;
        pass.router_gemm(
            inputs,
            router_gate,
            weights.router.bias.as_ref(),
            dense.as_ref(),
            &mut arena,
            logits,
        )
    }

    /// The first half of [`forward`](Self::forward): the experts of each token, `expert_ids` and
    /// `routing_weights` `[T, K]`. Dropped slots and slots of inactive tokens have the id
    /// `u32::MAX`. [`route_into`](Self::route_into) has further outputs.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn route<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        expert_ids: &mut CudaViewMut<'_, u32>,
        routing_weights: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let outputs =
            &mut RoutingOutputs::new(expert_ids.slice_mut(..), routing_weights.slice_mut(..));
        self.route_into(stream, inputs, weights, workspace, outputs)
    }

    /// [`route`](Self::route) with optional outputs, such as the counts of a layer with capacity.
    /// It can be captured like a whole pass.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Presence`] for counts of a layer without
    /// capacity.
    pub fn route_into<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        let pass = self.pass(stream, inputs.check(OP, &self.config)?, weights)?;
        inputs.check_route(OP, &self.config, weights)?;
        outputs.check(OP, &self.config, pass.shape, inputs.sequence_tokens)?;
        pass.contexts.inputs(inputs)?;
        pass.contexts.outputs(outputs)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_route())?;
        let dense = pass.dense(&mut arena, pass.projects_by_gemm(inputs))?;
        pass.route(inputs, dense.as_ref(), &mut arena, outputs)
    }

    /// The second half of [`forward`](Self::forward), for a given routing: `expert_ids` and
    /// `routing_weights` `[T, K]`. Slots whose id is not below the number of experts are ignored.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    #[allow(clippy::too_many_arguments, reason = "the parts of a layer")]
    pub fn forward_routed<D: Dtype>(
        &self,
        stream: &CudaStream,
        x: &CudaView<'_, D>,
        expert_ids: &CudaView<'_, u32>,
        routing_weights: &CudaView<'_, f32>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let pass = self.pass(stream, shape_of(OP, &self.config, x.len())?, weights)?;
        check_len(OP, "y", y.len(), x.len())?;
        check_len(OP, "expert_ids", expert_ids.len(), pass.shape.slots())?;
        check_len(OP, "routing_weights", routing_weights.len(), pass.shape.slots())?;
        pass.contexts.read("x", x)?;
        pass.contexts.read("expert_ids", expert_ids)?;
        pass.contexts.read("routing_weights", routing_weights)?;
        pass.contexts.written("y", y)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_experts())?;
        let dense = pass.dense(&mut arena, pass.has_dense_experts())?;
        pass.experts(x, Routing { expert_ids, routing_weights }, dense.as_ref(), &mut arena, y)
    }

    /// Checks the weights for a pass of this shape.
    fn pass<'p, 'w, D: Dtype>(
        &'p self,
        stream: &'p CudaStream,
        shape: RoutingShape,
        weights: &'p MoeWeights<OnDevice<'w>, D>,
    ) -> Result<Pass<'p, 'w, D>> {
        Pass::new(&self.device, &self.config, stream, shape, weights)
    }
}
