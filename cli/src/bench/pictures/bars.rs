//! A bar chart in groups, with a reference line.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{COLOURS, Drawn, draw_legend, error_text, split_legend};

pub struct Bars {
    title: String,
    /// The name of the vertical axis.
    axis: &'static str,
    /// The height of the reference line.
    reference: f64,
    /// The names of the bars of all groups.
    names: Vec<String>,
    pub groups: Vec<Group>,
}

pub struct Group {
    name: String,
    /// For each bar the index of its name, and its height.
    bars: Vec<(usize, f64)>,
}

impl Bars {
    pub fn new(title: String, axis: &'static str, reference: f64) -> Self {
        Self { title, axis, reference, names: Vec::new(), groups: Vec::new() }
    }

    /// Adds a bar to a group. A bar without a finite height is ignored.
    pub fn add(&mut self, group: &str, name: &str, height: Option<f64>) {
        let Some(height) = height.filter(|height| height.is_finite()) else { return };
        let index = self.names.iter().position(|known| known == name).unwrap_or_else(|| {
            self.names.push(name.into());
            self.names.len() - 1
        });
        match self.groups.iter_mut().find(|known| known.name == group) {
            Some(group) => group.bars.push((index, height)),
            None => self.groups.push(Group { name: group.into(), bars: vec![(index, height)] }),
        }
    }

    pub fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Drawn {
        let groups = self.groups.len();
        // Horizontal names of adjacent groups would overlap.
        let crowded = groups > 6;
        let bars = || self.groups.iter().flat_map(|group| &group.bars);
        let highest = bars().map(|bar| bar.1).fold(self.reference, f64::max);
        let top = 1.1 * highest;
        let (area, legend) = split_legend(area);
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(if crowded { 190 } else { 40 })
            .y_label_area_size(78)
            .build_cartesian_2d(0.0..groups as f64, 0.0..top)
            .map_err(error_text)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .y_desc(self.axis)
            .x_labels(0)
            .y_label_formatter(&|height| format!("{height:.*}", if top < 10.0 { 1 } else { 0 }))
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 17))
            .light_line_style(BLACK.mix(0.04))
            .bold_line_style(BLACK.mix(0.12))
            .draw()
            .map_err(error_text)?;
        let width = 0.8 / self.names.len() as f64;
        for index in 0..self.names.len() {
            let style = COLOURS[index % COLOURS.len()].filled();
            let of_this_name =
                self.groups.iter().enumerate().flat_map(|(group, Group { bars, .. })| {
                    let left = group as f64 + 0.1 + index as f64 * width;
                    let bars = bars.iter().filter(move |bar| bar.0 == index);
                    bars.map(move |bar| {
                        Rectangle::new([(left, 0.0), (left + 0.92 * width, bar.1)], style)
                    })
                });
            chart.draw_series(of_this_name).map_err(error_text)?;
        }
        let centred = |size: u32| {
            let anchor = Pos::new(HPos::Center, VPos::Top);
            ("sans-serif", size).into_font().color(&BLACK).pos(anchor)
        };
        for (index, group) in self.groups.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(index as f64 + 0.5, 0.0));
            let style = if crowded {
                let font = ("sans-serif", 15).into_font().transform(FontTransform::Rotate90);
                font.color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center))
            } else {
                centred(15)
            };
            area.draw(&Text::new(group.name.as_str(), (x, y + 8), style)).map_err(error_text)?;
            // With many groups the bars are too narrow for numbers.
            for (name, height) in group.bars.iter().filter(|_| !crowded) {
                let x = index as f64 + 0.1 + (*name as f64 + 0.46) * width;
                let (x, y) = chart.backend_coord(&(x, *height));
                let digits = if *height < 10.0 { 2 } else { 0 };
                let text = Text::new(format!("{height:.digits$}"), (x, y - 15), centred(12));
                area.draw(&text).map_err(error_text)?;
            }
        }
        let line = [(0.0, self.reference), (groups as f64, self.reference)];
        chart
            .draw_series(DashedLineSeries::new(line, 7, 5, BLACK.stroke_width(2)))
            .map_err(error_text)?;
        draw_legend(&legend, self.names.iter().map(String::as_str).zip(COLOURS.into_iter().cycle()))
    }
}
