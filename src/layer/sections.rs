//! Where the parts of a pass lie in the workspace.

use super::OP;
use crate::config::MoeConfig;
use crate::dtype::DType;
use crate::error::{Result, product};
use crate::routing_plan::PlanLayout;
use crate::shape::RoutingShape;
use crate::workspace::Section;

/// The parts of a forward pass; those that a configuration has no use for are empty.
pub(super) struct Sections {
    /// The plan of dense products.
    pub(super) dense: Section,
    /// What the router reads after its norm.
    pub(super) router_x: Section,
    pub(super) logits: Section,
    pub(super) noise_logits: Section,
    pub(super) expert_ids: Section,
    pub(super) routing_weights: Section,
    /// What capacity reads and writes: choices and weights before it, the plan of slots, and counts.
    pub(super) chosen: Section,
    pub(super) chosen_weights: Section,
    /// The scores of first choices, where they decide the order of slots.
    pub(super) top_scores: Section,
    pub(super) slot_plan: Section,
    pub(super) kept: Section,
    pub(super) dropped: Section,
    /// What slots that found no room ask: their token's candidates, the next of them, and the requests.
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
        let words = |there: bool, len: usize| Section::new(OP, if there { len } else { 0 }, 4);
        let matrix = |there: bool, rows: usize, width: usize| {
            let len = if there { product(OP, "rows * width", rows, width)? } else { 0 };
            Section::new(OP, len, dtype.size())
        };
        let bytes = |there: bool, layout: PlanLayout| {
            Section::new(OP, if there { layout.bytes() } else { 0 }, 1)
        };
        let MoeConfig { hidden, intermediate, num_experts, projection, latent, shared, .. } =
            *config;
        let inner = config.expert_hidden();
        let capacity = config.capacity;
        let by_top = capacity.is_some_and(|c| c.priority == crate::Priority::ChoiceByTopWeight);
        let normalizes = capacity.is_some_and(|c| c.normalization != crate::Normalization::None);
        // Each sequence has a token at least.
        let cells = product(OP, "sequences * num_experts", num_tokens.max(1), num_experts)?;
        let (overflows, listed) = (config.candidates() > 0, num_tokens * config.candidates());
        let shared_width = shared.map_or(0, |shared| shared.intermediate);
        let (is_latent, is_shared) = (latent.is_some(), shared.is_some());
        let logit_size = if projection.f32_logits { DType::F32.size() } else { dtype.size() };
        Ok(Self {
            dense: bytes(true, PlanLayout::new(one_expert(num_tokens))?)?,
            router_x: matrix(projection.norm.is_some(), num_tokens, hidden)?,
            logits: Section::new(OP, shape.logits(), logit_size)?,
            // Given logits may be f32, and their noise's are of their type.
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

    /// What choosing experts needs.
    pub(super) fn of_route(&self) -> Vec<Section> {
        let Self { dense, router_x, logits, noise_logits, chosen, chosen_weights, .. } = *self;
        let Self { slot_plan, kept, dropped, candidates, candidate_weights, .. } = *self;
        let asked = [candidates, candidate_weights, self.next_candidate, self.requests];
        let kept = [chosen, chosen_weights, self.top_scores, slot_plan, kept, dropped];
        [&[dense, router_x, logits, noise_logits], &kept[..], &asked[..]].concat()
    }

    /// What comes after that.
    pub(super) fn of_experts(&self) -> Vec<Section> {
        let Self { dense, plan, shared_act, shared_y, shared_gate, .. } = *self;
        let Self { latent_x, act, yp, latent_y, latent_out, .. } = *self;
        let routed = [latent_x, act, yp, latent_y, latent_out];
        [&[dense, plan, shared_act, shared_y, shared_gate], &routed[..]].concat()
    }

    /// What both need, and what goes from one to the other. The plan of dense products is made once.
    pub(super) fn of_forward(&self) -> Vec<Section> {
        let (route, experts) = (self.of_route(), self.of_experts());
        [&[self.expert_ids, self.routing_weights], &route[..], &experts[1..]].concat()
    }
}

/// The shape of dense products.
pub(super) fn one_expert(num_tokens: usize) -> RoutingShape {
    RoutingShape { num_tokens, num_experts: 1, top_k: 1 }
}
