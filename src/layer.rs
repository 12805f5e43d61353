//! A whole layer: the operations in order.

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};

use crate::config::MoeConfig;
use crate::device::Device;
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, product};
use crate::ops::combine::{CombineInputs, combine_fwd_into};
use crate::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd_into, grouped_gemm_gate_up_fwd_into,
};
use crate::ops::plan::plan_fwd_into;
use crate::ops::route::{RouteInputs, route_fwd_into};
use crate::routing_plan::PlanLayout;
use crate::shape::RoutingShape;
use crate::workspace::{Section, Workspace};

const OP: &str = "MoeLayer";

/// The experts' weights, in the order of a checkpoint: output features, then input features.
pub struct Experts<'a, D> {
    /// `[E, 2I, H]`: of each expert `I` rows of the gate projection, then `I` of the up projection.
    pub gate_up: CudaView<'a, D>,
    /// `[E, H, I]`
    pub down: CudaView<'a, D>,
}

/// A Mixture-of-Experts layer on a device. It holds no weights and no memory: those are the caller's.
///
/// One forward pass enqueues `route`, `plan`, two `grouped_gemm`s (the first gathers tokens and
/// applies the activation) and `combine`. Nothing is allocated, nothing is read back, and the launches depend
/// on the number of tokens alone, so a captured graph replays with any routing.
///
/// To capture a pass on a stream of `CudaContext::new_stream`, call
/// `CudaContext::disable_event_tracking` before the buffers are allocated: otherwise cudarc waits for
/// events from before the capture, which CUDA refuses. [`Device::warm_up`] comes before as well.
#[derive(Debug, Clone)]
pub struct MoeLayer {
    device: Device,
    config: MoeConfig,
}

/// Where the parts of a forward pass lie in the workspace.
struct Sections {
    plan: Section,
    expert_ids: Section,
    weights: Section,
    act: Section,
    yp: Section,
    /// Only for a pass that starts from the tokens: the plan of the gate's product, and its result.
    gate_plan: Section,
    logits: Section,
}

impl Sections {
    fn new(config: &MoeConfig, dtype: DType, num_tokens: usize) -> Result<Self> {
        config.check_layer()?;
        let shape = config.routing(num_tokens);
        shape.check(OP)?;
        let slots = shape.slots();
        let act = product(OP, "rows * intermediate", slots, config.intermediate)?;
        let yp = product(OP, "rows * hidden", slots, config.hidden)?;
        Ok(Self {
            plan: Section::new(OP, PlanLayout::new(shape)?.bytes(), 1)?,
            expert_ids: Section::new(OP, slots, size_of::<u32>())?,
            weights: Section::new(OP, slots, size_of::<f32>())?,
            act: Section::new(OP, act, dtype.size())?,
            yp: Section::new(OP, yp, dtype.size())?,
            gate_plan: Section::new(OP, PlanLayout::new(one_expert(num_tokens))?.bytes(), 1)?,
            logits: Section::new(OP, shape.logits(), dtype.size())?,
        })
    }

    fn bytes(&self) -> Result<usize> {
        let Self { plan, expert_ids, weights, act, yp, gate_plan, logits } = *self;
        Section::total(OP, &[plan, expert_ids, weights, act, yp, gate_plan, logits])
    }
}

/// A dense product is a grouped one with a single expert that every token goes to.
fn one_expert(num_tokens: usize) -> RoutingShape {
    RoutingShape { num_tokens, num_experts: 1, top_k: 1 }
}

impl MoeLayer {
    /// A layer of this configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported), which names the field.
    pub fn new(device: &Device, config: MoeConfig) -> Result<Self> {
        config.check_layer()?;
        Ok(Self { device: device.clone(), config })
    }

    /// What it computes.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Bytes of workspace that a pass over at most `num_tokens` tokens needs: a pure function, known
    /// before there is a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range.
    pub fn workspace_bytes(config: &MoeConfig, dtype: DType, num_tokens: usize) -> Result<usize> {
        Sections::new(config, dtype, num_tokens)?.bytes()
    }

    /// From tokens and router logits: `x` `[T, H]`, `logits` `[T, E]` to `y` `[T, H]`.
    ///
    /// `T` is what the length of `x` says. Asynchronous, ordered on `stream`. Products accumulate in
    /// f32; the activations and each expert's output are rounded to `D` once, and so is `y`.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) for a buffer or a workspace that does not fit,
    /// [`Error::Mismatch`](crate::Error::Mismatch) for a stream of another context, and what a launch can meet.
    pub fn forward<D: Dtype>(
        &self,
        stream: &CudaStream,
        x: &CudaView<'_, D>,
        logits: &CudaView<'_, D>,
        experts: &Experts<'_, D>,
        workspace: &mut Workspace<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let num_tokens = self.num_tokens(x, experts, y)?;
        let sections = Sections::new(&self.config, D::DTYPE, num_tokens)?;
        let mut arena = workspace.view_mut(OP, sections.bytes()?)?;
        self.enqueue(stream, x, logits, experts, &sections, &mut arena, y)
    }

    /// From tokens alone: the router projection `gate` `[E, H]` gives the logits, rounded to `D` as the
    /// families' own code does, and the rest is [`forward`](Self::forward).
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_from_x<D: Dtype>(
        &self,
        stream: &CudaStream,
        x: &CudaView<'_, D>,
        gate: &CudaView<'_, D>,
        experts: &Experts<'_, D>,
        workspace: &mut Workspace<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let MoeConfig { hidden, num_experts, .. } = self.config;
        let num_tokens = self.num_tokens(x, experts, y)?;
        check_len(
            OP,
            "gate",
            gate.len(),
            product(OP, "num_experts * hidden", num_experts, hidden)?,
        )?;
        let sections = Sections::new(&self.config, D::DTYPE, num_tokens)?;
        let mut arena = workspace.view_mut(OP, sections.bytes()?)?;
        let (gate_plan, mut arena) = sections.gate_plan.split(OP, &mut arena)?;
        let (mut logits, mut arena) = sections.logits.split(OP, &mut arena)?;
        let mut logits = sections.logits.elements::<D>(OP, &mut logits)?;

        let device = &self.device;
        let plan = plan_fwd_into(device, stream, one_expert(num_tokens), None, gate_plan)?;
        let rows = Rows::Grouped;
        grouped_gemm_fwd_into(
            device,
            stream,
            &plan,
            num_experts,
            hidden,
            rows,
            x,
            LinearWeights::new(gate),
            &mut logits,
        )?;
        self.enqueue(stream, x, &logits.as_view(), experts, &sections, &mut arena, y)
    }

    #[allow(clippy::too_many_arguments, reason = "each is a part of a layer")]
    fn enqueue<D: Dtype>(
        &self,
        stream: &CudaStream,
        x: &CudaView<'_, D>,
        logits: &CudaView<'_, D>,
        experts: &Experts<'_, D>,
        sections: &Sections,
        arena: &mut CudaViewMut<'_, u8>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let MoeConfig { hidden, intermediate, router, .. } = self.config;
        let shape = self.config.routing(x.len() / hidden);
        let (plan, mut arena) = sections.plan.split(OP, arena)?;
        let (mut expert_ids, mut arena) = sections.expert_ids.split(OP, &mut arena)?;
        let (mut weights, mut arena) = sections.weights.split(OP, &mut arena)?;
        let (mut act, mut arena) = sections.act.split(OP, &mut arena)?;
        let (mut yp, _) = sections.yp.split(OP, &mut arena)?;
        let mut expert_ids = sections.expert_ids.elements::<u32>(OP, &mut expert_ids)?;
        let mut weights = sections.weights.elements::<f32>(OP, &mut weights)?;
        let mut act = sections.act.elements::<D>(OP, &mut act)?;
        let mut yp = sections.yp.elements::<D>(OP, &mut yp)?;

        let device = &self.device;
        let inputs = RouteInputs::new(logits);
        route_fwd_into(device, stream, shape, &router, &inputs, &mut expert_ids, &mut weights)?;
        let plan = plan_fwd_into(device, stream, shape, Some(&expert_ids.as_view()), plan)?;
        let Experts { gate_up, down } = experts;
        grouped_gemm_gate_up_fwd_into(
            device,
            stream,
            &plan,
            &self.config.experts,
            intermediate,
            hidden,
            Rows::Gathered,
            x,
            GateUpWeights::fused(gate_up),
            None,
            &mut act,
        )?;
        let act = act.as_view();
        grouped_gemm_fwd_into(
            device,
            stream,
            &plan,
            hidden,
            intermediate,
            Rows::Grouped,
            &act,
            LinearWeights { w: down, bias: None, order: self.config.experts.down_order },
            &mut yp,
        )?;
        let (yp, weights) = (yp.as_view(), weights.as_view());
        combine_fwd_into(device, stream, &plan, hidden, &CombineInputs::new(&yp, &weights), y)
    }

    /// Holds the buffers against the configuration before anything is launched.
    fn num_tokens<D: Dtype>(
        &self,
        x: &CudaView<'_, D>,
        experts: &Experts<'_, D>,
        y: &CudaViewMut<'_, D>,
    ) -> Result<usize> {
        let config = &self.config;
        let num_tokens = x.len() / config.hidden;
        check_len(OP, "x", x.len(), num_tokens * config.hidden)?;
        check_len(OP, "y", y.len(), x.len())?;
        check_len(OP, "gate_up", experts.gate_up.len(), config.gate_up_len())?;
        check_len(OP, "down", experts.down.len(), config.down_len())?;
        Ok(num_tokens)
    }
}
