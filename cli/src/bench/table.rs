//! Prints the results as tables.

use std::time::Duration;

use crate::bench::record::{Record, Row};
use crate::bench::traffic::Traffic;
use crate::text::{Table, time};

/// Formats a rate with a prefix and a unit.
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

/// The measured ceilings of the device.
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
    format!("measured ceilings: {}\n\n", known.join(", "))
}

/// A table of all rows: times and rooflines, or the counts of the software device.
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
    // Columns without values are omitted.
    let kept: Vec<usize> =
        (0..heading.len()).filter(|&c| cells.iter().any(|cells| cells[c] != "-")).collect();
    let mut table = Table::new(&kept.iter().map(|&c| heading[c]).collect::<Vec<_>>());
    for mut cells in cells {
        table.row(kept.iter().map(|&c| std::mem::take(&mut cells[c])).collect());
    }
    let mut text = format!(
        "{table}\nAll operations are forward. layer: from logits. layer_from_x: with the router projection.\n\
         experts: both products. roofline: the least time of the shape on this device. rate: least bytes or\n\
         FLOPs over time. data: cold is read from memory; warm may be in a cache, and exceed the roofline.\n"
    );
    let mut notes: Vec<String> = Vec::new();
    for row in timed.iter().chain(&others) {
        let Some(note) = &row.note else { continue };
        let not_run = if row.seconds.is_none() { "not measured, " } else { "" };
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

/// The counts of the software device in one call, summed over the kernels of the operation.
fn counts(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "model",
        "T",
        "routing",
        "op",
        "launches",
        "least bytes",
        "moved bytes",
        "ratio",
        "sectors/read",
        "sectors/write",
        "bank conflicts",
        "warp ops/token",
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
        "{table}\nmoved bytes: distinct 32-byte sectors that each kernel reads or writes. ratio: moved over least bytes;\n\
         the least bytes exclude intermediate results between kernels. sectors/read, sectors/write: per\n\
         instruction of a warp. The software device is not timed.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_has_prefix_and_unit() {
        assert_eq!(rate(4.3e12, "B"), "4.3 TB/s");
        assert_eq!(rate(790e12, "FLOP"), "790 TFLOP/s");
        assert_eq!(rate(12.34e9, "B"), "12.3 GB/s");
        assert_eq!(rate(5e5, "B"), "0.5 MB/s");
    }
}
