//! A run's records as a picture.

use super::progress::Record;
use crate::plot::{Axis, Chart, Panel, Series};

/// What is watched that belongs in one panel: its title and the names.
const PANELS: [(&str, &[&str]); 4] = [
    ("Delta", &["delta", "margin"]),
    ("accuracy", &["accuracy", "sign_accuracy"]),
    ("mean gates", &["alpha", "beta"]),
    (
        "gates at the last prompt token",
        &["alpha_last", "beta_last"],
    ),
];

/// Loss, all that was watched, and the learning rate, against steps, as SVG.
pub fn svg(stage: &str, records: &[Record]) -> String {
    let series = |name: &str, value: &dyn Fn(&Record) -> Option<f64>| {
        let points = records
            .iter()
            .filter_map(|record| Some((record.step as f64, value(record)?)));
        Series::line(name, points.collect::<Vec<_>>())
    };
    let panel = |title: &str| Panel::new(title, Axis::linear("step"), Axis::linear(""));
    let loss = panel("loss")
        .series(series("of the batch", &|record| Some(record.loss)))
        .series(series("smoothed", &|record| Some(record.loss_smoothed)));
    let mut chart = Chart::new(stage).panel(loss);
    for (title, names) in PANELS {
        let watched = names
            .iter()
            .filter(|name| records.iter().any(|record| record.watched(name).is_some()));
        let mut watched = watched.peekable();
        if watched.peek().is_some() {
            let add = |panel: Panel, name: &&str| {
                panel.series(series(name, &|record| record.watched(name)))
            };
            chart = chart.panel(watched.fold(panel(title), add));
        }
    }
    let rate = panel("learning rate").series(series("", &|record| Some(record.learning_rate)));
    chart.panel(rate).to_svg()
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    #[test]
    fn curves_have_a_panel_for_what_was_watched_and_for_nothing_else() {
        let record = |step: usize| Record {
            step,
            steps: 2,
            epoch: 0.5,
            loss: 1.0 / step as f64,
            loss_smoothed: 1.0,
            learning_rate: 1e-3,
            gradient_norm: 1.0,
            tokens: 10,
            tokens_per_second: 1.0,
            seconds: 1.0,
            seconds_left: 1.0,
            watched: Map::from_iter([("delta".to_owned(), json!(step))]),
        };
        let svg = svg("safety", &[record(1), record(2)]);
        for word in ["safety", "loss", "Delta", "learning rate", "smoothed"] {
            assert!(svg.contains(word), "{word}");
        }
        assert!(!svg.contains("accuracy") && !svg.contains("gates"));
    }
}
