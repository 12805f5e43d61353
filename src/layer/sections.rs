//! The sections of a layer's workspace.

use crate::config::{MoeConfig, Normalization, Priority};
use crate::dtype::DType;
use crate::error::{Result, product};
use crate::routing_plan::PlanLayout;
use crate::shape::RoutingShape;
use crate::workspace::Section;

/// The operation that errors of a layer name.
pub(super) const OP: &str = "MoeLayer";

/// The sections of a forward pass. Those that a configuration does not use are empty.
pub(super) struct Sections {
    /// The plan of dense products.
    pub(super) dense: Section,
    /// The router's input after its norm.
    pub(super) router_x: Section,
    pub(super) logits: Section,
    pub(super) noise_logits: Section,
    pub(super) expert_ids: Section,
    pub(super) routing_weights: Section,
    /// Capacity: the choices and weights of the router, the plan of slots, and the counts.
    pub(super) chosen: Section,
    pub(super) chosen_weights: Section,
    /// The scores of first choices, for the priority that orders slots by them.
    pub(super) top_scores: Section,
    pub(super) slot_plan: Section,
    pub(super) kept: Section,
    pub(super) dropped: Section,
    /// Overflow: the candidates of each token, the next one, and the requests of the slots.
    pub(super) candidates: Section,
    pub(super) candidate_weights: Section,
    pub(super) next_candidate: Section,
    pub(super) requests: Section,
    pub(super) plan: Section,
    pub(super) shared_act: Section,
    pub(super) shared_y: Section,
    pub(super) shared_gate: Section,
    pub(super) latent_x: Section,
    pub(super) act: Section,
    pub(super) yp: Section,
    pub(super) latent_y: Section,
    pub(super) latent_out: Section,
}

impl Sections {
    pub(super) fn new(config: &MoeConfig, dtype: DType, num_tokens: usize) -> Result<Self> {
        config.check()?;
        let shape = config.routing(num_tokens);
        shape.check(OP)?;
        let slots = shape.slots();
        let words = |used: bool, len: usize| Section::new(OP, if used { len } else { 0 }, 4);
        let matrix = |used: bool, rows: usize, width: usize| {
            let len = if used { product(OP, "rows * width", rows, width)? } else { 0 };
            Section::new(OP, len, dtype.size())
        };
        let bytes = |used: bool, layout: PlanLayout| {
            Section::new(OP, if used { layout.bytes() } else { 0 }, 1)
        };
        let MoeConfig { hidden, intermediate, num_experts, projection, latent, shared, .. } =
            *config;
        let inner = config.expert_hidden();
        let capacity = config.capacity;
        let by_top = capacity.is_some_and(|c| c.priority == Priority::ChoiceByTopWeight);
        let normalizes = capacity.is_some_and(|c| c.normalization != Normalization::None);
        // Each sequence has at least one token.
        let cells = product(OP, "sequences * num_experts", num_tokens.max(1), num_experts)?;
        let (overflows, listed) = (config.candidates() > 0, num_tokens * config.candidates());
        let shared_width = shared.map_or(0, |shared| shared.intermediate);
        let (is_latent, is_shared) = (latent.is_some(), shared.is_some());
        let logit_size = if projection.f32_logits { DType::F32.size() } else { dtype.size() };
        Ok(Self {
            dense: bytes(true, PlanLayout::new(one_expert(num_tokens))?)?,
            router_x: matrix(projection.norm.is_some(), num_tokens, hidden)?,
            logits: Section::new(OP, shape.logits(), logit_size)?,
            // Given logits may be f32; the noise logits have the same type.
            noise_logits: words(projection.noise_gate, shape.logits())?,
            expert_ids: words(true, slots)?,
            routing_weights: words(true, slots)?,
            chosen: words(capacity.is_some(), slots)?,
            chosen_weights: words(normalizes, slots)?,
            top_scores: words(by_top, slots)?,
            slot_plan: bytes(capacity.is_some(), PlanLayout::new(shape.by_slot())?)?,
            kept: words(capacity.is_some(), cells)?,
            dropped: words(capacity.is_some(), cells)?,
            candidates: words(overflows, listed)?,
            candidate_weights: words(overflows, listed)?,
            next_candidate: words(overflows, num_tokens)?,
            requests: words(overflows, slots)?,
            plan: bytes(true, PlanLayout::of_experts(shape, 0..num_experts)?)?,
            shared_act: matrix(is_shared, num_tokens, shared_width)?,
            shared_y: matrix(is_shared, num_tokens, hidden)?,
            shared_gate: words(shared.is_some_and(|shared| shared.sigmoid_gate), num_tokens)?,
            latent_x: matrix(is_latent, num_tokens, inner)?,
            act: matrix(true, slots, intermediate)?,
            yp: matrix(true, slots, inner)?,
            latent_y: matrix(is_latent, num_tokens, inner)?,
            latent_out: matrix(is_latent && is_shared, num_tokens, hidden)?,
        })
    }

    /// The sections that the router needs.
    pub(super) fn of_route(&self) -> Vec<Section> {
        [&[self.dense][..], &self.router_sections()].concat()
    }

    /// The sections that the experts need.
    pub(super) fn of_experts(&self) -> Vec<Section> {
        [&[self.dense][..], &self.expert_sections()].concat()
    }

    /// The sections of a whole pass. Router and experts share the plan of dense products.
    pub(super) fn of_forward(&self) -> Vec<Section> {
        let routing = [self.dense, self.expert_ids, self.routing_weights];
        [&routing[..], &self.router_sections(), &self.expert_sections()].concat()
    }

    fn router_sections(&self) -> [Section; 13] {
        [
            self.router_x,
            self.logits,
            self.noise_logits,
            self.chosen,
            self.chosen_weights,
            self.top_scores,
            self.slot_plan,
            self.kept,
            self.dropped,
            self.candidates,
            self.candidate_weights,
            self.next_candidate,
            self.requests,
        ]
    }

    fn expert_sections(&self) -> [Section; 9] {
        [
            self.plan,
            self.shared_act,
            self.shared_y,
            self.shared_gate,
            self.latent_x,
            self.act,
            self.yp,
            self.latent_y,
            self.latent_out,
        ]
    }
}

/// The shape of the plan of dense products.
pub(super) fn one_expert(num_tokens: usize) -> RoutingShape {
    RoutingShape { num_tokens, num_experts: 1, top_k: 1 }
}
