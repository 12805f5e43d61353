//! Draws pictures of the results, each as SVG and as PNG.

mod bars;
mod lines;

use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::bench::record::{Record, Row};
use crate::error::{Error, Result};
use crate::write::replace;

use bars::Bars;
use lines::{Line, Lines};

/// Width and height, in pixels.
const SIZE: (u32, u32) = (1100, 680);

/// Colours that are distinct for most colour-blind people (the first six by Okabe and Ito), ours
/// first.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(110, 110, 110),
    RGBColor(106, 61, 154),
    RGBColor(140, 86, 75),
    RGBColor(128, 128, 0),
];

const OURS: &str = "moe-kernels";

/// Draws a picture of each kind that has data. Returns the SVG files; each has a PNG of the same
/// name.
pub fn draw(record: &Record, folder: &Path) -> Result<Vec<PathBuf>> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        // It fails only for invalid fonts, which the tests would show.
        let _ = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    let timed: Vec<&Row> = record.rows.iter().filter(|row| row.seconds.is_some()).collect();
    let origin = format!("{}, {}", record.device.name, &record.date[..10]);
    let mut files = Vec::new();
    for model in distinct(timed.iter().map(|row| row.model.as_str())) {
        let rows: Vec<&Row> = timed.iter().copied().filter(|row| row.model == model).collect();
        let against = against_roofline(&rows, &origin);
        files.push(draw_both(folder, &format!("time-{model}"), &Picture::Lines(against))?);
        let operations = operations(&rows, &origin);
        if operations.lines.len() > 1 {
            let name = format!("operations-{model}");
            files.push(draw_both(folder, &name, &Picture::Lines(operations))?);
        }
        let peers = peer_ratios(&rows, &origin);
        if !peers.groups.is_empty() {
            files.push(draw_both(folder, &format!("peers-{model}"), &Picture::Bars(peers))?);
        }
    }
    let rooflines = percent_of_roofline(&timed, &origin);
    if !rooflines.groups.is_empty() {
        files.push(draw_both(folder, "roofline", &Picture::Bars(rooflines))?);
    }
    Ok(files)
}

/// The distinct names, in the order of their first occurrence.
fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found = Vec::new();
    names.for_each(|name| {
        if !found.contains(&name) {
            found.push(name)
        }
    });
    found
}

/// The operation that pictures show: the layer if it was measured.
fn main_op(rows: &[&Row]) -> &'static str {
    let has = |op| rows.iter().any(|row| row.op == op && row.by == OURS);
    let ops = ["layer", "layer_from_x", "experts"];
    ops.into_iter().find(|op| has(*op)).or_else(|| rows.first().map(|row| row.op)).unwrap_or("")
}

fn median(row: &Row) -> f64 {
    row.seconds.map_or(f64::NAN, |seconds| seconds.median)
}

/// `, zipf routing` unless all rows have uniform routing.
fn routing(rows: &[&Row]) -> String {
    let names = distinct(rows.iter().map(|row| row.routing));
    if names == ["uniform"] { String::new() } else { format!(", {} routing", names.join(" and ")) }
}

/// The title of a picture of one operation of one model. `rows` is not empty.
fn title(what: &str, rows: &[&Row], origin: &str) -> String {
    let Row { model, dtype, boundary, .. } = rows[0];
    format!("{model}, {dtype} {boundary}: {what} ({origin}){}", routing(rows))
}

/// The name of a line or a bar, with the routing unless it is uniform.
fn label(row: &Row, name: &str) -> String {
    if row.routing == "uniform" { name.into() } else { format!("{name}, {}", row.routing) }
}

/// Time against T: ours, peers and the roofline.
fn against_roofline(rows: &[&Row], origin: &str) -> Lines {
    let op = main_op(rows);
    let rows: Vec<&Row> = rows.iter().copied().filter(|row| row.op == op).collect();
    let mut lines: Vec<Line> = Vec::new();
    for row in &rows {
        Line::extend(&mut lines, &label(row, &row.by), (row.tokens as f64, median(row)));
    }
    for row in rows.iter().filter(|row| row.by == OURS) {
        if let Some(roofline) = row.roofline_seconds {
            Line::extend(&mut lines, &label(row, "roofline"), (row.tokens as f64, roofline));
        }
    }
    for line in lines.iter_mut().filter(|line| line.name.starts_with("roofline")) {
        line.dashed = true;
    }
    Lines { title: title("time of one call", &rows, origin), lines }
}

/// Time against T for each of our operations.
fn operations(rows: &[&Row], origin: &str) -> Lines {
    let ours: Vec<&Row> = rows.iter().copied().filter(|row| row.by == OURS).collect();
    let mut lines = Vec::new();
    for row in &ours {
        Line::extend(&mut lines, &label(row, row.op), (row.tokens as f64, median(row)));
    }
    let (model, dtype) = rows.first().map_or(("", ""), |row| (&row.model, row.dtype));
    Lines { title: format!("{model}, {dtype}: time of each operation ({origin})"), lines }
}

/// The percentage of the roofline's speed for each model.
fn percent_of_roofline(rows: &[&Row], origin: &str) -> Bars {
    let op = main_op(rows);
    let rows: Vec<&Row> = rows
        .iter()
        .copied()
        .filter(|row| row.by == OURS && row.op == op && row.percent_of_roofline.is_some())
        .collect();
    let title = format!("Percentage of the roofline, {op} ({origin}){}", routing(&rows));
    let mut bars = Bars::new(title, "% of the roofline's speed", 100.0);
    for row in rows {
        bars.add(&row.model, &label(row, &format!("T={}", row.tokens)), row.percent_of_roofline);
    }
    bars
}

/// The time of each peer over ours, for each T.
fn peer_ratios(rows: &[&Row], origin: &str) -> Bars {
    let op = main_op(rows);
    let rows: Vec<&Row> = rows.iter().copied().filter(|row| row.op == op).collect();
    let title = title("peers", &rows, origin);
    let mut bars = Bars::new(title, "time / time of moe-kernels", 1.0);
    for row in rows.iter().filter(|row| row.by != OURS) {
        let ratio = row.ours_around.map(|[before, after]| 2.0 * median(row) / (before + after));
        bars.add(&label(row, &format!("T={}", row.tokens)), &row.by, ratio);
    }
    bars
}

/// Splits off a strip on the right for the legend.
fn split_legend<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
) -> (DrawingArea<DB, Shift>, DrawingArea<DB, Shift>) {
    const WIDTH: i32 = 190;
    area.split_horizontally(SIZE.0 as i32 - WIDTH)
}

/// Draws a line of the legend for each name.
fn draw_legend<'n, DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    names: impl Iterator<Item = (&'n str, RGBColor)>,
) -> Drawn {
    for (index, (name, colour)) in names.enumerate() {
        let y = 56 + 24 * index as i32;
        let mark = Rectangle::new([(4, y - 4), (24, y + 4)], colour.filled());
        area.draw(&mark).map_err(error_text)?;
        let middle = Pos::new(HPos::Left, VPos::Center);
        let style = ("sans-serif", 15).into_font().color(&BLACK).pos(middle);
        area.draw(&Text::new(name, (32, y), style)).map_err(error_text)?;
    }
    Ok(())
}

/// Replaces the C library's function, which the drawing library calls: newer C libraries have it
/// under a version that RHEL 9 does not have. The linker finds this one first. In f64 the squares
/// do not overflow.
#[unsafe(no_mangle)]
extern "C" fn hypotf(x: f32, y: f32) -> f32 {
    let (x, y) = (f64::from(x), f64::from(y));
    (x * x + y * y).sqrt() as f32
}

/// A picture of any kind.
enum Picture {
    Lines(Lines),
    Bars(Bars),
}

/// The result of drawing; the error is a text.
type Drawn = std::result::Result<(), String>;

/// Makes a text of an error of plotters, whose type depends on the backend, for `map_err`.
fn error_text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Picture {
    fn draw<DB: DrawingBackend>(&self, backend: DB) -> Drawn {
        let area = backend.into_drawing_area();
        area.fill(&WHITE).map_err(error_text)?;
        match self {
            Self::Lines(lines) => lines.draw(&area)?,
            Self::Bars(bars) => bars.draw(&area)?,
        }
        area.present().map_err(error_text)
    }
}

/// Draws a picture as PNG and as SVG. Returns the path of the SVG.
fn draw_both(folder: &Path, name: &str, picture: &Picture) -> Result<PathBuf> {
    let make = |ending: &str| -> Result<PathBuf> {
        let path = folder.join(format!("{name}.{ending}"));
        let mut drawn = Ok(());
        replace(&path, |part, _| {
            drawn = match ending {
                "svg" => picture.draw(SVGBackend::new(part, SIZE)),
                _ => picture.draw(BitMapBackend::new(part, SIZE)),
            };
            Ok(())
        })?;
        drawn.map_err(|why| Error::Picture { picture: path.display().to_string(), why })?;
        Ok(path)
    };
    make("png")?;
    make("svg")
}
