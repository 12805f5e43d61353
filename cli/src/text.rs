//! Output as text: stdout, warnings, tables and times.

use std::io::Write;
use std::time::Duration;

/// Prints to stdout. A closed pipe is no error.
pub fn print(text: impl std::fmt::Display) {
    let mut stdout = std::io::stdout().lock();
    let _ = write!(stdout, "{text}").and_then(|()| stdout.flush());
}

/// Prints a warning to stderr.
pub fn warn(text: &str) {
    eprintln!("warning: {}", escaped(text));
}

/// Escapes text from a file for the terminal: control characters, line separators and characters
/// that change the direction of writing.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => safe.extend(c.escape_unicode()),
            c if c.is_control() => safe.extend(c.escape_default()),
            c => safe.push(c),
        }
    }
    safe
}

/// Rows of cells under a heading. Columns of numbers are aligned to the right.
pub struct Table {
    heading: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heading: &[&str]) -> Self {
        Self { heading: heading.iter().map(|&cell| cell.into()).collect(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |column: usize| {
            let cells =
                self.rows.iter().filter_map(|row| row.get(column)).chain(self.heading.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        // A column of numbers may contain words in place of a missing number.
        let number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
        let right = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).any(number)
                && self
                    .rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .all(|cell| number(cell) || !cell.chars().any(|c| c.is_ascii_digit()))
        };
        let layout: Vec<(usize, bool)> =
            (0..self.heading.len()).map(|c| (width(c), right(c))).collect();
        for row in std::iter::once(&self.heading).chain(&self.rows) {
            let mut line = String::new();
            for (cell, (width, right)) in row.iter().zip(&layout) {
                let padded =
                    if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
                line.push_str(&padded);
                line.push_str("  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Formats a duration with three digits and a unit.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "us"),
    };
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$} {unit}")
}

/// Parses a time limit in seconds.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escaped("a `b` \u{1b}[2J\r\n\t\u{9b}1m"), "a `b` \\u{1b}[2J\\r\\n\\t\\u{9b}1m");
        assert_eq!(escaped("x\u{202e}y\u{2066}\u{feff}"), "x\\u{202e}y\\u{2066}\\u{feff}");
        assert_eq!(escaped("Größe 模型 C:\\x"), "Größe 模型 C:\\x");
    }

    #[test]
    fn table_columns_are_aligned() {
        let mut table = Table::new(&["op", "error"]);
        table.row(vec!["permute".into(), "0".into()]);
        table.row(vec!["route".into(), "1.2e-7".into()]);
        assert_eq!(table.to_string(), "op        error\npermute       0\nroute    1.2e-7\n");
    }

    #[test]
    fn seconds_parses_nonnegative_numbers() {
        assert_eq!(seconds("2.5"), Ok(Duration::from_millis(2500)));
        for bad in ["-1", "soon", "NaN", "inf"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn time_has_three_digits_and_a_unit() {
        assert_eq!(time(Duration::from_micros(1500)), "1.50 ms");
        assert_eq!(time(Duration::from_millis(12_340)), "12.3 s");
        assert_eq!(time(Duration::from_nanos(950)), "0.95 us");
    }
}
