//! A sweep as a picture: throughput and latency against the load.

use super::report::{Level, LoadReport};
use crate::plot::{Axis, Chart, Panel, Series};

/// Output tokens a second, and TTFT and inter-token latency, against the levels of `report`, as SVG.
pub fn sweep_svg(report: &LoadReport) -> String {
    let levels = &report.levels;
    let labels: Vec<String> = levels.iter().map(Level::label).collect();
    let load = if labels.iter().any(|label| label.ends_with("/s")) {
        "requests / s"
    } else {
        "concurrent streams"
    };
    // Levels are spread evenly, whatever their numbers: sweeps double.
    let x = || Axis::categories(load, labels.clone());
    let series = |name, value: fn(&Level) -> f64| {
        let points = levels.iter().enumerate();
        Series::line(name, points.map(|(at, level)| (at as f64, value(level))))
    };
    let tokens = Axis::linear("tokens / s").including(0.0, 1.0);
    let throughput = Panel::new("throughput", x(), tokens)
        .series(series("output tok/s", |l| l.output_tokens_per_second));
    // Latencies of one picture span four powers of ten.
    let latency = Panel::new("latency", x(), Axis::log("ms"))
        .series(series("TTFT p50", |l| l.ttft_ms.p50))
        .series(series("TTFT p99", |l| l.ttft_ms.p99))
        .series(series("ITL p50", |l| l.itl_ms.p50))
        .series(series("ITL p99", |l| l.itl_ms.p99));
    Chart::new(format!("{} at {}", report.model, report.url))
        .panel(throughput)
        .panel(latency)
        .to_svg()
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn sweep_svg_has_a_point_for_each_level_and_series() {
        let mut report = report();
        report.model = "a<b>&\"c\"".to_owned();
        let svg = sweep_svg(&report);
        assert_eq!(svg.matches("<circle").count(), 2 * 5);
        for name in ["output tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"] {
            assert!(svg.contains(name), "{name}");
        }
        assert!(svg.contains("a&lt;b&gt;&amp;&quot;c&quot; at http://127.0.0.1:1/"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn sweep_svg_of_no_levels_is_still_a_picture() {
        let mut report = report();
        report.levels.clear();
        assert!(sweep_svg(&report).trim_end().ends_with("</svg>"));
    }
}
