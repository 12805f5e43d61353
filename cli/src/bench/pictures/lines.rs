//! A chart of time against the number of tokens, with logarithmic axes.

use std::time::Duration;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{COLOURS, Drawn, draw_legend, error_text, split_legend};
use crate::text::time;

/// One line of the chart.
pub struct Line {
    pub name: String,
    /// Pairs of T and seconds.
    pub points: Vec<(f64, f64)>,
    pub dashed: bool,
}

impl Line {
    /// Adds a point to the line of this name. Creates the line if there is none.
    pub fn extend(lines: &mut Vec<Self>, name: &str, point: (f64, f64)) {
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Self { name: name.into(), points: vec![point], dashed: false }),
        }
    }
}

pub struct Lines {
    pub title: String,
    pub lines: Vec<Line>,
}

impl Lines {
    pub fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Drawn {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let range = |values: &mut dyn Iterator<Item = f64>, margin: f64| {
            let (low, high) =
                values.fold((f64::INFINITY, 0f64), |(low, high), v| (low.min(v), high.max(v)));
            low / margin..high * margin
        };
        let tokens = range(&mut points().map(|point| point.0), 1.3);
        let seconds = range(&mut points().map(|point| point.1), 1.6);
        let (area, legend) = split_legend(area);
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(48)
            .y_label_area_size(78)
            .build_cartesian_2d(tokens.log_scale().base(2.0), seconds.log_scale())
            .map_err(error_text)?;
        chart
            .configure_mesh()
            .x_desc("tokens (T)")
            .y_desc("time of one call")
            .x_label_formatter(&|tokens| format!("{tokens:.0}"))
            .y_label_formatter(&|seconds| time(Duration::from_secs_f64(*seconds)))
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 17))
            .light_line_style(BLACK.mix(0.04))
            .bold_line_style(BLACK.mix(0.12))
            .draw()
            .map_err(error_text)?;
        let colour = |index: usize, line: &Line| {
            if line.dashed { BLACK } else { COLOURS[index % COLOURS.len()] }
        };
        for (index, line) in self.lines.iter().enumerate() {
            let colour = colour(index, line);
            let (points, style) = (line.points.iter().copied(), colour.stroke_width(2));
            let drawn = if line.dashed {
                chart.draw_series(DashedLineSeries::new(points.clone(), 7, 5, style))
            } else {
                chart.draw_series(LineSeries::new(points.clone(), style))
            };
            drawn.map_err(error_text)?;
            let dots = points.map(|point| Circle::new(point, 4, colour.filled()));
            chart.draw_series(dots).map_err(error_text)?;
        }
        let names = self.lines.iter().enumerate();
        draw_legend(&legend, names.map(|(index, line)| (line.name.as_str(), colour(index, line))))
    }
}
