//! The results as people read them on a terminal.

use std::time::Duration;

use crate::bench::record::{Record, Row};
use crate::bench::traffic::Traffic;
use crate::text::{Table, time};

/// Three digits and a unit per second.
fn rate(per_second: f64, unit: &str) -> String {
    let (value, prefix) = match per_second {
        rate if rate >= 1e12 => (rate / 1e12, "T"),
        rate if rate >= 1e9 => (rate / 1e9, "G"),
        rate => (rate / 1e6, "M"),
    };
    let decimals = if value >= 100.0 { 0 } else { 1 };
    format!("{value:.decimals$} {prefix}{unit}/s")
}

fn seconds(value: f64) -> String {
    time(Duration::from_secs_f64(value.max(0.0)))
}

fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "-".into())
}

/// What the machine can do.
pub fn ceilings(record: &Record) -> String {
    let ceilings = &record.ceilings;
    let parts = [
        ("copy", ceilings.copy_bytes_per_second, "B"),
        ("read", ceilings.read_bytes_per_second, "B"),
        ("dense product", ceilings.dense_flops_per_second, "FLOP"),
    ];
    let known: Vec<String> = parts
        .iter()
        .filter_map(|(name, value, unit)| Some(format!("{name} {}", rate((*value)?, unit))))
        .collect();
    if known.is_empty() {
        return String::new();
    }
    format!("ceilings of this run: {}\n\n", known.join(", "))
}

/// All rows: times with their rooflines, or what the software device counted.
pub fn rows(record: &Record) -> String {
    let counted = record.rows.iter().any(|row| row.traffic.is_some());
    if counted { counts(&record.rows) } else { times(&record.rows) }
}

fn times(rows: &[Row]) -> String {
    let heading = [
        "model",
        "T",
        "routing",
        "op",
        "by",
        "time",
        "p10",
        "p90",
        "roofline",
        "bound",
        "% of roofline",
        "rate",
        "% of cuBLAS",
        "data",
    ];
    let (timed, others): (Vec<&Row>, Vec<&Row>) =
        rows.iter().partition(|row| row.seconds.is_some());
    let cells: Vec<Vec<String>> = timed.iter().map(|row| timed_cells(row)).collect();
    // A column that says nothing of any row is left out.
    let kept: Vec<usize> =
        (0..heading.len()).filter(|&c| cells.iter().any(|cells| cells[c] != "-")).collect();
    let mut table = Table::new(&kept.iter().map(|&c| heading[c]).collect::<Vec<_>>());
    for mut cells in cells {
        table.row(kept.iter().map(|&c| std::mem::take(&mut cells[c])).collect());
    }
    let mut text = format!(
        "{table}\nEach op is forward; `layer` is from logits, `layer_from_x` has the gate, `experts` is both products.\n\
         rate: of the least bytes or operations. data: warm may come from a cache, and then be faster than the roofline.\n"
    );
    let mut notes: Vec<String> = Vec::new();
    for row in timed.iter().chain(&others) {
        let Some(note) = &row.note else { continue };
        let not_run = if row.seconds.is_none() { "not run, " } else { "" };
        let note = format!("{}: {not_run}{note}\n", row.by);
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
    text.extend(notes);
    text
}

fn timed_cells(row: &Row) -> Vec<String> {
    let speed = row.seconds.map(|seconds| {
        if row.flops > row.bytes {
            rate(row.flops as f64 / seconds.median, "FLOP")
        } else {
            rate(row.bytes as f64 / seconds.median, "B")
        }
    });
    vec![
        row.model.clone(),
        row.tokens.to_string(),
        row.routing.into(),
        row.op.into(),
        row.by.clone(),
        or_dash(row.seconds.map(|s| seconds(s.median))),
        or_dash(row.seconds.map(|s| seconds(s.p10))),
        or_dash(row.seconds.map(|s| seconds(s.p90))),
        or_dash(row.roofline_seconds.map(seconds)),
        or_dash(row.bound.map(Into::into)),
        or_dash(row.percent_of_roofline.map(|percent| format!("{percent:.1}"))),
        or_dash(speed),
        or_dash(row.dense.as_ref().map(|dense| format!("{:.1}", dense.percent))),
        or_dash(row.cache.clone()),
    ]
}

/// What the software device counted in one call, all kernels of the operation together.
fn counts(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "model",
        "T",
        "routing",
        "op",
        "launches",
        "least bytes",
        "moved",
        "ratio",
        "sectors a read",
        "a write",
        "bank conflicts",
        "warp ops a token",
        "MMAs",
    ]);
    for row in rows {
        let kernels = row.traffic.as_deref().unwrap_or_default();
        let sum = |part: fn(&Traffic) -> u64| kernels.iter().map(part).sum::<u64>();
        let ratio = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let moved = sum(|kernel| kernel.dram_bytes);
        table.row(vec![
            row.model.clone(),
            row.tokens.to_string(),
            row.routing.into(),
            row.op.into(),
            sum(|kernel| kernel.launches).to_string(),
            row.bytes.to_string(),
            moved.to_string(),
            format!("{:.3}", ratio(moved, row.bytes)),
            format!("{:.2}", ratio(sum(|k| k.read_sectors), sum(|k| k.read_requests))),
            format!("{:.2}", ratio(sum(|k| k.write_sectors), sum(|k| k.write_requests))),
            sum(|kernel| kernel.bank_conflicts).to_string(),
            format!("{:.1}", ratio(sum(|kernel| kernel.warp_operations), row.tokens as u64)),
            sum(|kernel| kernel.matrix_multiplications).to_string(),
        ]);
    }
    format!(
        "{table}\nmoved: 32-byte sectors that a kernel reads or writes, each once; ratio: to the least bytes of the\n\
         operation, which for several kernels leave out what is between them. A read or write is one instruction\n\
         of a warp. Nothing was timed: this is the software device.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_three_digits() {
        assert_eq!(rate(4.3e12, "B"), "4.3 TB/s");
        assert_eq!(rate(790e12, "FLOP"), "790 TFLOP/s");
        assert_eq!(rate(12.34e9, "B"), "12.3 GB/s");
        assert_eq!(rate(5e5, "B"), "0.5 MB/s");
    }
}
