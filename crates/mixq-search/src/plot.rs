//! The front as a picture.

use plotters::prelude::*;

use crate::{Error, Front, Result, Trial};

const SIZE: (u32, u32) = (800, 500);
const MIB: f64 = 1024.0 * 1024.0;

impl Front {
    /// An SVG of memory (MiB) and score: `trials` as dots, the front as a line.
    ///
    /// # Errors
    /// [`Error::Plot`] if the drawing library fails.
    pub fn to_svg(&self, trials: &[Trial]) -> Result<String> {
        let dots: Vec<(f64, f64)> =
            trials.iter().filter_map(|trial| Some((trial.bytes as f64 / MIB, trial.score?))).collect();
        let front: Vec<(f64, f64)> = self.points.iter().map(|p| (p.bytes as f64 / MIB, p.score)).collect();
        let mut svg = String::new();
        draw(&mut svg, &dots, &front).map_err(|e| Error::Plot(e.to_string()))?;
        Ok(svg)
    }
}

fn draw(
    svg: &mut String,
    dots: &[(f64, f64)],
    front: &[(f64, f64)],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let all = || dots.iter().chain(front);
    let x = range(all().map(|point| point.0));
    let y = range(all().map(|point| point.1));
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(x, y)?;
    chart.configure_mesh().x_desc("memory (MiB)").y_desc("score").light_line_style(TRANSPARENT).draw()?;
    chart.draw_series(dots.iter().map(|&point| Circle::new(point, 3, BLACK.mix(0.25).filled())))?;
    chart.draw_series(LineSeries::new(front.iter().copied(), BLUE.stroke_width(2)))?;
    chart.draw_series(front.iter().map(|&point| Circle::new(point, 4, BLUE.filled())))?;
    root.present()?;
    Ok(())
}

/// The values with a margin; never empty.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = if high > low { 0.05 * (high - low) } else { 0.05 * high.abs().max(1.0) };
    low - margin..high + margin
}
