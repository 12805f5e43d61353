//! The selection of a token's experts from their values. It is in f32 for weights of any precision,
//! so that every device and every precision has the same ids.

use std::cmp::Ordering;

use super::exact::Number;
use crate::config::{GroupScore, Groups, Masked};

/// The ids of the `count` largest values, strongest first and ties to the lower id, after the
/// groups have masked some.
pub(super) fn choose(mut values: Vec<f32>, groups: Option<&Groups>, count: usize) -> Vec<usize> {
    if let Some(groups) = groups {
        mask(&mut values, groups);
    }
    largest(&values, count)
}

/// The `count` largest of numbers without NaN, in the order (value descending, id ascending).
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let order = |&a: &usize, &b: &usize| {
        // `partial_cmp` has -0 equal +0, which `total_cmp` does not.
        values[b].partial_cmp(&values[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
    };
    let mut ids: Vec<usize> = (0..values.len()).collect();
    if (1..ids.len()).contains(&count) {
        // No two ids are equal in this order, so this splits them as a full sort would.
        ids.select_nth_unstable_by(count - 1, order);
    }
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}

/// Sets the values outside the best groups to the masked value.
fn mask(values: &mut [f32], groups: &Groups) {
    let size = values.len() / groups.num_groups;
    let scores: Vec<f32> =
        values.chunks(size).map(|group| group_score(group, groups.score)).collect();
    let best = largest(&scores, groups.top_groups);
    let masked = match groups.masked {
        Masked::NegativeInfinity => f32::NEG_INFINITY,
        Masked::Zero => 0.0,
    };
    for (group, values) in values.chunks_mut(size).enumerate() {
        if !best.contains(&group) {
            values.fill(masked);
        }
    }
}

/// The score of a group; for a single expert its value.
fn group_score(group: &[f32], score: GroupScore) -> f32 {
    let (mut largest, mut next_largest) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in group {
        next_largest = next_largest.max(largest.min(value));
        largest = largest.max(value);
    }
    match score {
        GroupScore::TopTwoSum if group.len() > 1 => (largest + next_largest).cleaned(),
        _ => largest,
    }
}
