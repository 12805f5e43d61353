//! A text histogram of the rows of each expert.

/// With more experts only those with the most rows have a bar.
const MAX_BARS: usize = 32;
/// The length of the longest bar.
const BAR_WIDTH: usize = 40;

/// Formats a line of statistics, and a bar for each expert.
pub fn describe(rows_per_expert: &[usize]) -> String {
    let experts = rows_per_expert.len();
    let rows: usize = rows_per_expert.iter().sum();
    let most = rows_per_expert.iter().copied().max().unwrap_or(0);
    let least = rows_per_expert.iter().copied().min().unwrap_or(0);
    let empty = rows_per_expert.iter().filter(|&&rows| rows == 0).count();
    let mean = rows as f64 / experts.max(1) as f64;
    let mut text = format!(
        "rows per expert: {rows} rows, {experts} experts, min {least}, mean {mean:.1}, max {most}, {empty} empty\n"
    );
    if rows == 0 {
        return text;
    }
    let mut order: Vec<usize> = (0..experts).collect();
    if experts > MAX_BARS {
        order.sort_by_key(|&expert| (std::cmp::Reverse(rows_per_expert[expert]), expert));
        order.truncate(MAX_BARS);
    }
    let expert_width = experts.to_string().len();
    let rows_width = most.to_string().len();
    for expert in order {
        let rows = rows_per_expert[expert];
        // An expert with any rows has at least one mark.
        let bar = "#".repeat((rows * BAR_WIDTH).div_ceil(most));
        let line = format!("  expert {expert:>expert_width$} {rows:>rows_width$} {bar}");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    if experts > MAX_BARS {
        text.push_str(&format!("  and {} experts with fewer rows\n", experts - MAX_BARS));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_lengths_are_proportional_to_rows() {
        let text = describe(&[20, 0, 1, 10]);
        assert!(
            text.starts_with(
                "rows per expert: 31 rows, 4 experts, min 0, mean 7.8, max 20, 1 empty\n"
            ),
            "{text}"
        );
        let bars: Vec<usize> = text.lines().skip(1).map(|line| line.matches('#').count()).collect();
        assert_eq!(bars, [40, 0, 2, 20]);
    }

    #[test]
    fn many_experts_print_those_with_most_rows() {
        let mut rows = vec![1; 128];
        rows[77] = 9;
        let text = describe(&rows);
        assert_eq!(text.lines().count(), 1 + MAX_BARS + 1);
        assert!(
            text.lines().nth(1).is_some_and(|line| line.starts_with("  expert  77 9 ###")),
            "{text}"
        );
        assert!(text.ends_with("and 96 experts with fewer rows\n"), "{text}");
    }

    #[test]
    fn empty_histogram_prints_no_bars() {
        assert_eq!(describe(&[0, 0]).lines().count(), 1);
    }
}
