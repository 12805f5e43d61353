//! NLLB-MoE's capacity in evaluation: the configuration, and the number of rows of an expert.

use moe_kernels::{
    CapacityConfig, CapacityLimit, MoeConfig, Normalization, Priority, RoutingShape,
};
use moe_kernels_hf::from_config;
use serde_json::json;

/// `math.ceil(fraction * tokens)` of Python where it is one more than the exact quotient, of all
/// fractions of two decimals and 0 to 512 tokens; made by `math.ceil(float(f"0.{hundredths:02}") *
/// tokens)`.
const ONE_MORE: [(usize, &[usize]); 10] = [
    (7, &[100, 200, 300, 400]),
    (14, &[50, 100, 150, 200, 300, 350, 400, 450]),
    (17, &[300]),
    (28, &[25, 50, 75, 100, 150, 175, 200, 225, 275, 300, 325, 350, 375, 400, 425, 450]),
    (34, &[150, 300, 350]),
    (54, &[450]),
    (55, &[100, 180, 200, 220, 340, 360, 380, 400, 420, 440, 460]),
    (56, &[25, 50, 75, 100, 150, 175, 200, 225, 275, 300, 325, 350, 375, 400, 425, 450]),
    (68, &[75, 150, 175, 300, 325, 350, 375]),
    (81, &[300]),
];

fn nllb(fraction: &str, before: bool, prioritized: bool) -> MoeConfig {
    let text = json!({
        "model_type": "nllb-moe", "d_model": 4, "encoder_ffn_dim": 2, "decoder_ffn_dim": 2,
        "num_experts": 6, "moe_token_dropout": 0.2, "encoder_sparse_step": 1, "encoder_layers": 2,
        "normalize_router_prob_before_dropping": before, "batch_prioritized_routing": prioritized,
        "moe_eval_capacity_token_fraction": "FRACTION",
    });
    let text = text.to_string().replace("\"FRACTION\"", fraction);
    from_config(&text, 0).unwrap()
}

#[test]
fn capacity_is_computed_as_in_python() {
    let rows = |fraction: &str, tokens: usize| {
        let config = nllb(fraction, false, false);
        config.capacity.unwrap().rows(&config.routing(tokens), tokens).unwrap()
    };
    assert_eq!(rows("0.15", 20), 3);
    // The double after that of 0.11, which a parser that rounds twice reads as 0.11.
    assert_eq!((rows("0.11", 100), rows("0.11000000000000001", 100)), (11, 12));
    for hundredths in 1..100 {
        let capacity = nllb(&format!("0.{hundredths:02}"), false, false).capacity.unwrap();
        let more = ONE_MORE.iter().find(|(of, _)| *of == hundredths).map_or(&[][..], |of| of.1);
        for tokens in 0..=512 {
            let shape = RoutingShape { num_tokens: tokens, num_experts: 6, top_k: 2 };
            let wanted = (hundredths * tokens).div_ceil(100) + usize::from(more.contains(&tokens));
            let got = capacity.rows(&shape, tokens).unwrap();
            assert_eq!(got, wanted, "0.{hundredths:02} of {tokens} tokens");
        }
    }
    // A fraction of 1 or more is no limit.
    assert!(nllb("1.0", false, false).capacity.is_none());
    assert!(nllb("7", false, false).capacity.is_none());
}

/// The fields that the two keys of the router's order decide. The library tests that a layer with
/// such a configuration routes as the model does.
#[test]
fn keys_of_the_order_of_routing() {
    for (before, prioritized) in [(false, false), (false, true), (true, false), (true, true)] {
        let config = nllb("0.25", before, prioritized);
        let priority = if prioritized { Priority::ChoiceByTopWeight } else { Priority::Choice };
        let sum = Normalization::SumAtLeast { min: f32::EPSILON };
        let (router, capacity) =
            if before { (sum, Normalization::None) } else { (Normalization::None, sum) };
        assert_eq!(config.router.normalization, router);
        let limit = CapacityLimit::TokenFraction { fraction: 0.25 };
        let wanted =
            CapacityConfig { normalization: capacity, ..CapacityConfig::new(limit, priority) };
        assert_eq!(config.capacity, Some(wanted));
        assert_eq!((config.router.scale, config.top_k), (0.8, 2));
    }
}
