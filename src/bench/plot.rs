//! A sweep as a picture: throughput and latency against the load, as one SVG that any browser shows.

use std::fmt::Write as _;

use super::report::{Level, LoadReport};
use super::stats::digits;

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 360.0;
const PANEL_WIDTH: f64 = 340.0;
const PANEL_HEIGHT: f64 = 230.0;
const PANEL_TOP: f64 = 64.0;
const PANEL_LEFTS: [f64; 2] = [70.0, 530.0];
/// Blue, orange, green, vermilion of Okabe and Ito: told apart by most eyes.
const COLOURS: [&str; 4] = ["#0072b2", "#e69f00", "#009e73", "#d55e00"];

/// A line of one value a level.
struct Series {
    name: &'static str,
    values: Vec<f64>,
}

/// One pair of axes.
struct Panel<'a> {
    title: &'static str,
    labels: &'a [String],
    series: Vec<Series>,
    scale: Scale,
}

enum Scale {
    /// From 0.
    Linear,
    /// Powers of ten: latencies of one picture span four of them.
    Log,
}

/// Output tokens a second, and TTFT and inter-token latency, against the levels of `report`.
pub fn sweep_svg(report: &LoadReport) -> String {
    let levels = &report.levels;
    let labels: Vec<String> = levels.iter().map(Level::label).collect();
    let series = |name, value: fn(&Level) -> f64| Series {
        name,
        values: levels.iter().map(value).collect(),
    };
    let throughput = Panel {
        title: "output tokens / s",
        labels: &labels,
        series: vec![series("output tok/s", |l| l.output_tokens_per_second)],
        scale: Scale::Linear,
    };
    let latency = Panel {
        title: "latency, ms",
        labels: &labels,
        series: vec![
            series("TTFT p50", |l| l.ttft_ms.p50),
            series("TTFT p99", |l| l.ttft_ms.p99),
            series("ITL p50", |l| l.itl_ms.p50),
            series("ITL p99", |l| l.itl_ms.p99),
        ],
        scale: Scale::Log,
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{}\" y=\"24\" font-size=\"15\">{}</text>\n",
        PANEL_LEFTS[0],
        escape(&format!("{} at {}", report.model, report.url)),
    );
    for (panel, left) in [throughput, latency].iter().zip(PANEL_LEFTS) {
        panel.draw(&mut out, left);
    }
    out.push_str("</svg>\n");
    out
}

impl Panel<'_> {
    fn draw(&self, out: &mut String, left: f64) {
        let axis = self.axis();
        let (bottom, right) = (PANEL_TOP + PANEL_HEIGHT, left + PANEL_WIDTH);
        let y_of = |value: f64| bottom - axis.part(value) * PANEL_HEIGHT;
        let _ = writeln!(
            out,
            "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{}</text>",
            PANEL_TOP - 12.0,
            self.title
        );
        for tick in axis.ticks() {
            let y = y_of(tick);
            let _ = writeln!(
                out,
                "<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 6.0,
                y + 4.0,
                trimmed(tick),
            );
        }
        self.draw_labels(out, left);
        for ((index, series), colour) in self.series.iter().enumerate().zip(COLOURS) {
            let place = |(index, value): (usize, &f64)| {
                (
                    left + self.x_part(index) * PANEL_WIDTH,
                    y_of(*value),
                    *value,
                )
            };
            let points: Vec<(f64, f64, f64)> =
                series.values.iter().enumerate().map(place).collect();
            draw_series(out, series.name, colour, &points);
            let x = left + 84.0 * index as f64;
            let _ = writeln!(
                out,
                "<text x=\"{x}\" y=\"{}\" fill=\"{colour}\">{}</text>",
                bottom + 56.0,
                series.name
            );
        }
    }

    fn draw_labels(&self, out: &mut String, left: f64) {
        let bottom = PANEL_TOP + PANEL_HEIGHT;
        for (index, label) in self.labels.iter().enumerate() {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                left + self.x_part(index) * PANEL_WIDTH,
                bottom + 18.0,
                escape(label),
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            left + PANEL_WIDTH / 2.0,
            bottom + 36.0,
            if self.labels.iter().any(|label| label.ends_with("/s")) {
                "requests / s"
            } else {
                "concurrent streams"
            },
        );
    }

    /// Levels are spread evenly, whatever their numbers: sweeps double.
    fn x_part(&self, index: usize) -> f64 {
        (index as f64 + 0.5) / self.labels.len().max(1) as f64
    }

    fn axis(&self) -> Axis {
        let values = self
            .series
            .iter()
            .flat_map(|series| series.values.iter().copied());
        let positive: Vec<f64> = values
            .filter(|value| value.is_finite() && *value > 0.0)
            .collect();
        let max = positive.iter().copied().fold(0.0, f64::max);
        let min = positive.iter().copied().fold(f64::INFINITY, f64::min);
        if positive.is_empty() {
            return Axis::Linear {
                step: 1.0,
                top: 1.0,
            };
        }
        match self.scale {
            Scale::Linear => {
                let step = nice_step(max / 4.0);
                Axis::Linear {
                    step,
                    top: (max / step).ceil() * step,
                }
            }
            Scale::Log => {
                let low = min.log10().floor();
                Axis::Log {
                    low,
                    high: max.log10().ceil().max(low + 1.0),
                }
            }
        }
    }
}

fn draw_series(out: &mut String, name: &str, colour: &str, points: &[(f64, f64, f64)]) {
    let line: Vec<String> = points
        .iter()
        .map(|(x, y, _)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        line.join(" ")
    );
    for (x, y, value) in points {
        let _ = writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"><title>{name}: {}</title></circle>",
            digits(*value),
        );
    }
}

enum Axis {
    /// 0 to `top`, which is a whole number of `step`.
    Linear { step: f64, top: f64 },
    /// Powers of ten from `low` to `high`.
    Log { low: f64, high: f64 },
}

impl Axis {
    /// Where a value is, 0 at the bottom, 1 at the top.
    fn part(&self, value: f64) -> f64 {
        let part = match self {
            Self::Linear { top, .. } => value / top,
            Self::Log { low, high } => (value.max(f64::MIN_POSITIVE).log10() - low) / (high - low),
        };
        if part.is_finite() {
            part.clamp(0.0, 1.0)
        } else {
            0.0
        }
    }

    fn ticks(&self) -> Vec<f64> {
        match self {
            Self::Linear { step, top } => {
                let count = (top / step).round() as usize;
                (0..=count).map(|tick| tick as f64 * step).collect()
            }
            Self::Log { low, high } => {
                let count = (high - low).round() as usize;
                (0..=count)
                    .map(|tick| 10f64.powf(low + tick as f64))
                    .collect()
            }
        }
    }
}

/// The least of 1, 2, 5 times a power of ten that is at least `wanted`.
fn nice_step(wanted: f64) -> f64 {
    let power = 10f64.powf(wanted.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| step * power >= wanted);
    step.unwrap_or(10.0) * power
}

/// A tick without needless zeros.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn nice_step_is_one_two_or_five_times_a_power_of_ten() {
        for (wanted, want) in [
            (0.3, 0.5),
            (1.0, 1.0),
            (17.0, 20.0),
            (21.0, 50.0),
            (900.0, 1000.0),
        ] {
            assert!((nice_step(wanted) / want - 1.0).abs() < 1e-9, "{wanted}");
        }
    }

    #[test]
    fn sweep_svg_has_a_point_for_each_level_and_series_inside_the_panels() {
        let mut report = report();
        report.model = "a<b>&\"c\"".to_owned();
        let svg = sweep_svg(&report);
        assert_eq!(svg.matches("<circle").count(), 2 * 5);
        assert_eq!(svg.matches("<polyline").count(), 5);
        assert!(svg.contains("a&lt;b&gt;&amp;&quot;c&quot; at http://127.0.0.1:1/"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let heights = svg
            .split("cy=\"")
            .skip(1)
            .filter_map(|rest| rest.split('"').next());
        for y in heights.filter_map(|y| y.parse::<f64>().ok()) {
            assert!((PANEL_TOP..=PANEL_TOP + PANEL_HEIGHT).contains(&y), "{y}");
        }
    }

    #[test]
    fn sweep_svg_of_no_levels_is_still_a_picture() {
        let mut report = report();
        report.levels.clear();
        assert!(sweep_svg(&report).ends_with("</svg>\n"));
    }
}
