//! Loss curves as pictures.

use std::{ops::Range, path::Path};

use kiln::{quant::files::write_atomically, training::RunReport};
use plotters::prelude::*;

use crate::Result;

/// Writes the losses of a run as an SVG: of every step, and on held-out data.
///
/// # Errors
/// A run without steps, and the operating system's refusal.
pub fn write_curve(path: &Path, report: &RunReport) -> Result<()> {
    let steps: Vec<(f64, f64)> =
        report.steps.iter().map(|step| ((step.step + 1) as f64, step.loss)).collect();
    let held_out: Vec<(f64, f64)> =
        report.evaluations.iter().map(|evaluation| (evaluation.steps as f64, evaluation.score)).collect();
    let [steps, held_out] = [steps, held_out]
        .map(|points| points.into_iter().filter(|(_, loss)| loss.is_finite()).collect::<Vec<_>>());
    let finite = || steps.iter().chain(&held_out);
    let range = |of: fn(&(f64, f64)) -> f64| -> Range<f64> {
        let (least, most) = finite().map(of).fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
        let room = (most - least).max(1e-6) * 0.05;
        least - room..most + room
    };
    if finite().next().is_none() {
        return Err("a run without steps has no curve".into());
    }
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (800, 450)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(range(|point| point.0), range(|point| point.1))?;
        chart.configure_mesh().x_desc("steps").y_desc("loss in nats").draw()?;
        let legend = |color: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color);
        chart
            .draw_series(LineSeries::new(steps.iter().copied(), BLUE))?
            .label("training")
            .legend(legend(BLUE));
        let line = LineSeries::new(held_out.iter().copied(), RED.stroke_width(2)).point_size(3);
        chart.draw_series(line)?.label("held out").legend(legend(RED));
        chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
        root.present()?;
    }
    write_atomically(path, |file| std::io::Write::write_all(file, text.as_bytes()))?;
    Ok(())
}
