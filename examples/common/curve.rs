//! The loss over a training, kept with its checkpoints and drawn as SVG.

use super::cli::Outcome;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Losses in bits per byte, each with the tokens trained on before it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Curve {
    /// Of every step.
    pub training: Vec<(u64, f64)>,
    /// Of the validation part, now and then.
    pub validation: Vec<(u64, f64)>,
}

const SIZE: (u32, u32) = (900, 500);

impl Curve {
    /// Mean training loss of the last steps.
    pub fn recent(&self) -> f64 {
        let last = &self.training[self.training.len().saturating_sub(20)..];
        last.iter().map(|(_, loss)| loss).sum::<f64>() / last.len().max(1) as f64
    }

    /// Draws the losses, and as a line what gzip needs, into an SVG file.
    pub fn draw(&self, path: &Path, title: &str, gzip: f64) -> Outcome<()> {
        let mut svg = String::new();
        self.plot(&mut svg, title, gzip).map_err(|error| format!("{}: {error}", path.display()))?;
        std::fs::write(path, svg).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    fn plot(&self, svg: &mut String, title: &str, gzip: f64) -> Outcome<()> {
        let all = || self.training.iter().chain(&self.validation);
        let tokens = all().map(|&(tokens, _)| tokens).max().unwrap_or(0).max(1);
        let losses = all().map(|&(_, loss)| loss);
        let lowest = losses.clone().fold(gzip, f64::min);
        // the first steps are far above all others
        let highest = losses.fold(gzip, f64::max).min(2.0 * gzip).max(lowest + 0.1);
        let bottom = (lowest - 0.1).max(0.0);

        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(15)
            .x_label_area_size(45)
            .y_label_area_size(60)
            .build_cartesian_2d(0..tokens, bottom..highest)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("bytes trained on")
            .y_desc("bits per byte")
            .draw()?;

        let visible =
            |points: &[(u64, f64)]| points.iter().copied().filter(|p| p.1 <= highest).collect::<Vec<_>>();
        let grey = RGBColor(150, 150, 150);
        chart
            .draw_series(LineSeries::new([(0, gzip), (tokens, gzip)], grey.stroke_width(2)))?
            .label(format!("gzip -9 on the validation part: {gzip:.3}"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], grey.stroke_width(2)));
        chart
            .draw_series(LineSeries::new(visible(&self.training), BLUE.mix(0.5)))?
            .label("training")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLUE.mix(0.5)));
        chart
            .draw_series(LineSeries::new(visible(&self.validation), RED.stroke_width(2)).point_size(3))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], RED.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(grey)
            .draw()?;
        root.present()?;
        Ok(())
    }
}
