//! Lines of figures as SVG.

use std::path::Path;

use kiln_examples::Result;
use plotters::prelude::*;

/// What a plot is of.
pub(crate) struct Plot<'a> {
    pub(crate) caption: &'a str,
    pub(crate) x: &'a str,
    /// Whether the upright axis is logarithmic, from a power of ten to another.
    pub(crate) logarithmic: bool,
}

/// A name, and points by rising x.
pub(crate) type Series = (String, Vec<(f64, f64)>);

impl Plot<'_> {
    /// Draws a line for each series.
    ///
    /// # Errors
    /// No points, or none above 0 on a logarithmic axis; a file that can't be written.
    pub(crate) fn draw(&self, path: &Path, series: &[Series]) -> Result<()> {
        let all = || series.iter().flat_map(|(_, points)| points.iter().copied());
        let range = |of: fn((f64, f64)) -> f64| {
            all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
        };
        let ((left, right), (low, high)) = (range(|point| point.0), range(|point| point.1));
        if left > right || (self.logarithmic && low <= 0.0) {
            return Err(format!("{}: nothing to draw", path.display()).into());
        }
        let area = SVGBackend::new(path, (800, 480)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(&area);
        builder.caption(self.caption, ("sans-serif", 16)).margin(12);
        builder.x_label_area_size(36).y_label_area_size(56);
        macro_rules! lines {
            ($y:expr) => {{
                let mut chart = builder.build_cartesian_2d(left..right, $y)?;
                chart.configure_mesh().x_desc(self.x).draw()?;
                for (index, (name, points)) in series.iter().enumerate() {
                    let style = Palette99::pick(index).to_rgba().stroke_width(2);
                    chart
                        .draw_series(LineSeries::new(points.iter().copied(), style))?
                        .label(name)
                        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
                }
                chart
                    .configure_series_labels()
                    .background_style(WHITE.mix(0.8))
                    .border_style(BLACK)
                    .draw()?;
            }};
        }
        match self.logarithmic {
            true => {
                let decade = |x: f64, round: fn(f64) -> f64| 10f64.powf(round(x.log10()));
                lines!((decade(low, f64::floor)..decade(high, f64::ceil)).log_scale());
            }
            false => {
                let room = 0.05 * (high - low);
                lines!(low - room..high + room);
            }
        }
        area.present()?;
        Ok(())
    }
}
