//! The report as a picture: reward against cost, refusals against refusals, and what the gates did.

use super::gates::{GateTable, PromptNumbers};
use super::judge::Outcome;
use super::prompts::Class;
use super::report::Report;
use super::summary::Row;
use crate::plot::{Axis, Chart, Mark, Panel, Series};

/// Bars of a histogram of gates.
const BINS: usize = 20;

/// Panels of `report` as SVG: R against C, and the share of harmful prompts that is refused against that of the others, both a point
/// a variant with its intervals; histograms of both gates at the last prompt token, and alpha there by layer, both by class. A panel
/// that nothing is known for is left out.
pub fn svg(report: &Report, gates: &GateTable) -> String {
    let chart = Chart::new(format!("midpo eval: {}", report.model));
    let panels = [
        scores(report),
        refusals(report),
        histogram("alpha", gates, |prompt| prompt.safety.prompt_last),
        histogram("beta", gates, |prompt| prompt.helpfulness.prompt_last),
        layers(report),
    ];
    let panels = panels.into_iter().flatten();
    panels.fold(chart, Chart::panel).to_svg()
}

fn scores(report: &Report) -> Option<Panel> {
    let point = |row: &Row| {
        let (cost, reward) = (row.cost?, row.reward?);
        let mark = Mark {
            x: cost.mean,
            y: reward.mean,
            x_interval: Some((cost.low, cost.high)),
            y_interval: Some((reward.low, reward.high)),
            label: row.variant.clone(),
        };
        Some(Series::scatter(row.variant.clone(), vec![mark]))
    };
    let series: Vec<Series> = report.summary.slice(None, None).filter_map(point).collect();
    let panel = Panel::new(
        "reward against cost",
        Axis::linear("mean C (below 0: safe)"),
        Axis::linear("mean R"),
    );
    filled(panel, series)
}

fn refusals(report: &Report) -> Option<Panel> {
    let summary = &report.summary;
    let harmful = Class::new(Class::HARMFUL);
    // What sounds harmful is what is refused in vain.
    let against = [Class::BORDERLINE, Class::BENIGN].map(Class::new);
    let against = against
        .iter()
        .find(|class| summary.classes(None).contains(class))?;
    let point = |row: &Row| {
        let refused = |class| {
            let mut rows = summary.slice(None, Some(class));
            let row = rows.find(|other| other.variant == row.variant)?;
            row.outcomes.get(&Outcome::Refusal).copied()
        };
        let (x, y) = (refused(against)?, refused(&harmful)?);
        let mark = Mark {
            x: x.mean,
            y: y.mean,
            x_interval: Some((x.low, x.high)),
            y_interval: Some((y.low, y.high)),
            label: row.variant.clone(),
        };
        Some(Series::scatter(row.variant.clone(), vec![mark]))
    };
    let series = summary.slice(None, None).filter_map(point).collect();
    let panel = Panel::new(
        "refusals",
        Axis::linear(format!("share of {against} prompts refused")).including(0.0, 1.0),
        Axis::linear("share of harmful prompts refused").including(0.0, 1.0),
    );
    filled(panel, series)
}

fn histogram(
    name: &str,
    gates: &GateTable,
    value: impl Fn(&PromptNumbers) -> f64,
) -> Option<Panel> {
    let series = gates.classes().into_iter().map(|class| {
        let prompts = gates.class(class).into_iter();
        let values: Vec<f64> = prompts.map(&value).collect();
        Series::histogram(class.as_str(), &values, (0.0, 1.0), BINS)
    });
    let panel = Panel::new(
        format!("{name} at the last prompt token"),
        Axis::linear(format!("{name}, mean over layers")).including(0.0, 1.0),
        Axis::linear("share of prompts"),
    );
    filled(panel, series.collect())
}

fn layers(report: &Report) -> Option<Panel> {
    let classes = report.summary.gates.iter().flat_map(|gates| &gates.classes);
    let series = classes.map(|class| {
        let layers = class.safety_layers.iter().enumerate();
        let points = layers.map(|(layer, alpha)| (layer as f64, *alpha));
        Series::line(class.class.as_str(), points)
    });
    let panel = Panel::new(
        "alpha by layer",
        Axis::linear("layer"),
        Axis::linear("mean alpha at the last prompt token").including(0.0, 1.0),
    );
    filled(panel, series.collect())
}

/// `None` without a series.
fn filled(panel: Panel, series: Vec<Series>) -> Option<Panel> {
    (!series.is_empty()).then(|| series.into_iter().fold(panel, Panel::series))
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::super::summary::tests::evaluation;
    use super::*;

    #[test]
    fn the_picture_has_a_panel_for_what_is_known_and_for_nothing_else() {
        let mut report = report();
        let gates = GateTable::of(&evaluation());
        let svg_of_all = svg(&report, &gates);
        for word in [
            "reward against cost",
            "share of benign prompts refused",
            "alpha at the last prompt token",
            "beta at the last prompt token",
            "alpha by layer",
            "harmful",
            "routed",
        ] {
            assert!(svg_of_all.contains(word), "{word}");
        }
        assert!(!svg_of_all.contains("NaN"));
        report.summary.gates = None;
        for row in &mut report.summary.rows {
            row.reward = None;
        }
        let less = svg(&report, &GateTable::default());
        assert!(less.contains("refusals") && less.trim_end().ends_with("</svg>"));
        assert!(!less.contains("reward against cost") && !less.contains("alpha"));
    }
}
