//! Which experts a token gets, from the values that they are chosen by. All of it is f32, whatever weights are
//! computed in, so that every device and every precision has the same ids.

use std::cmp::Ordering;

use super::exact::Number;
use crate::config::{GroupScore, Groups, Masked};

/// The ids of the `count` largest values, strongest first and ties to the lower id, after the groups have masked some.
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

/// Gives experts outside the best groups the masked value.
fn mask(values: &mut [f32], groups: &Groups) {
    let size = values.len() / groups.num_groups;
    let worth: Vec<f32> = values.chunks(size).map(|group| worth(group, groups.score)).collect();
    let best = largest(&worth, groups.top_groups);
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

/// What a group is worth; one of a single expert is worth its value.
fn worth(group: &[f32], score: GroupScore) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in group {
        second = second.max(first.min(value));
        first = first.max(value);
    }
    match score {
        GroupScore::TopTwoSum if group.len() > 1 => (first + second).cleaned(),
        _ => first,
    }
}
