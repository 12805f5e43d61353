//! How the rows of a run spread over the experts, as text.

/// More experts than this are shown by the busiest and the count of the rest.
const MOST_BARS: usize = 32;
const BAR: usize = 40;

/// `rows_per_expert` as a line of numbers and a bar for each expert.
pub fn describe(rows_per_expert: &[usize]) -> String {
    let experts = rows_per_expert.len();
    let rows: usize = rows_per_expert.iter().sum();
    let most = rows_per_expert.iter().copied().max().unwrap_or(0);
    let least = rows_per_expert.iter().copied().min().unwrap_or(0);
    let empty = rows_per_expert.iter().filter(|&&rows| rows == 0).count();
    let mean = rows as f64 / experts.max(1) as f64;
    let mut text = format!(
        "rows per expert: {rows} over {experts}, min {least}, mean {mean:.1}, max {most}, {empty} empty\n"
    );
    if rows == 0 {
        return text;
    }
    let mut order: Vec<usize> = (0..experts).collect();
    if experts > MOST_BARS {
        order.sort_by_key(|&expert| (std::cmp::Reverse(rows_per_expert[expert]), expert));
        order.truncate(MOST_BARS);
    }
    let wide = experts.to_string().len();
    let wide_rows = most.to_string().len();
    for expert in order {
        let rows = rows_per_expert[expert];
        // Anything at all shows as one mark.
        let bar = "#".repeat((rows * BAR).div_ceil(most));
        text.push_str(format!("  expert {expert:>wide$} {rows:>wide_rows$} {bar}").trim_end());
        text.push('\n');
    }
    if experts > MOST_BARS {
        text.push_str(&format!(
            "  the busiest {MOST_BARS}; {} more have fewer rows\n",
            experts - MOST_BARS
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion() {
        let text = describe(&[20, 0, 1, 10]);
        assert!(
            text.starts_with("rows per expert: 31 over 4, min 0, mean 7.8, max 20, 1 empty\n"),
            "{text}"
        );
        let bars: Vec<usize> = text.lines().skip(1).map(|line| line.matches('#').count()).collect();
        assert_eq!(bars, [40, 0, 2, 20]);
    }

    #[test]
    fn many_experts_show_the_busiest() {
        let mut rows = vec![1; 128];
        rows[77] = 9;
        let text = describe(&rows);
        assert_eq!(text.lines().count(), 1 + MOST_BARS + 1);
        assert!(
            text.lines().nth(1).is_some_and(|line| line.starts_with("  expert  77 9 ###")),
            "{text}"
        );
        assert!(text.ends_with("96 more have fewer rows\n"), "{text}");
    }

    #[test]
    fn nothing_is_no_bars() {
        assert_eq!(describe(&[0, 0]).lines().count(), 1);
    }
}
