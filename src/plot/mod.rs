//! Pictures of numbers: panels of lines, points or histograms as one SVG that any browser shows. A [`Chart`] says what is shown;
//! what it looks like is decided here alone. Numbers that no axis can show (NaN, infinite, not positive on a log axis) are left out.

mod axis;
mod draw;

pub use axis::Axis;

/// A picture: a title over panels, two in a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    title: String,
    panels: Vec<Panel>,
}

/// One pair of axes and what is drawn between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    title: String,
    x: Axis,
    y: Axis,
    series: Vec<Series>,
}

/// Values of one name and colour.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    name: String,
    shape: Shape,
}

#[derive(Clone, Debug, PartialEq)]
enum Shape {
    Line(Vec<(f64, f64)>),
    Scatter(Vec<Mark>),
    Bars(Vec<Bar>),
}

/// A point of a scatter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mark {
    /// Where on the x axis.
    pub x: f64,
    /// Where on the y axis.
    pub y: f64,
    /// Ends of the horizontal error bar.
    pub x_interval: Option<(f64, f64)>,
    /// Ends of the vertical error bar.
    pub y_interval: Option<(f64, f64)>,
    /// Written beside it.
    pub label: String,
}

/// A bar of a histogram, from `low` to `high` on the x axis and from 0 to `share` on the y axis.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bar {
    low: f64,
    high: f64,
    share: f64,
}

impl Chart {
    /// No panel yet.
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            panels: Vec::new(),
        }
    }

    /// With one more panel.
    #[must_use]
    pub fn panel(mut self, panel: Panel) -> Self {
        self.panels.push(panel);
        self
    }

    /// The picture, an SVG document.
    pub fn to_svg(&self) -> String {
        draw::svg(self)
    }
}

impl Panel {
    /// Empty axes.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        Self {
            title: title.into(),
            x,
            y,
            series: Vec::new(),
        }
    }

    /// With one more series. Colours come in a fixed order and return after eight.
    #[must_use]
    pub fn series(mut self, series: Series) -> Self {
        self.series.push(series);
        self
    }
}

impl Series {
    /// Points joined in their order; what cannot be shown leaves a gap. Few points are marked with circles; of very many, every
    /// n-th is drawn.
    pub fn line(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self {
            name: name.into(),
            shape: Shape::Line(points.into_iter().collect()),
        }
    }

    /// Points with error bars and labels.
    pub fn scatter(name: impl Into<String>, marks: Vec<Mark>) -> Self {
        Self {
            name: name.into(),
            shape: Shape::Scatter(marks),
        }
    }

    /// The share of `values` in each of `bins` equal parts of `low..=high`. Values outside count in no bar, but in the whole.
    pub fn histogram(
        name: impl Into<String>,
        values: &[f64],
        (low, high): (f64, f64),
        bins: usize,
    ) -> Self {
        let bins = bins.max(1);
        let width = (high - low) / bins as f64;
        let mut counts = vec![0usize; bins];
        for value in values.iter().filter(|value| (low..=high).contains(*value)) {
            // The last bar holds its upper end.
            let bin = (((value - low) / width) as usize).min(bins - 1);
            if let Some(count) = counts.get_mut(bin) {
                *count += 1;
            }
        }
        let bar = |(bin, count): (usize, usize)| Bar {
            low: low + bin as f64 * width,
            high: low + (bin + 1) as f64 * width,
            share: count as f64 / values.len().max(1) as f64,
        };
        Self {
            name: name.into(),
            shape: Shape::Bars(counts.into_iter().enumerate().map(bar).collect()),
        }
    }

    /// All numbers that stand on the x axis, and on the y axis.
    fn extents(&self) -> (Vec<f64>, Vec<f64>) {
        match &self.shape {
            Shape::Line(points) => points.iter().copied().unzip(),
            Shape::Scatter(marks) => {
                let ends = |at: f64, interval: Option<(f64, f64)>| {
                    let (low, high) = interval.unwrap_or((at, at));
                    [at, low, high]
                };
                let x = marks.iter().flat_map(|mark| ends(mark.x, mark.x_interval));
                let y = marks.iter().flat_map(|mark| ends(mark.y, mark.y_interval));
                (x.collect(), y.collect())
            }
            Shape::Bars(bars) => {
                let x = bars.iter().flat_map(|bar| [bar.low, bar.high]);
                let y = bars.iter().map(|bar| bar.share).chain([0.0]);
                (x.collect(), y.collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Series) -> String {
        let panel = Panel::new("p", Axis::linear("x"), Axis::linear("y")).series(series);
        Chart::new("t").panel(panel).to_svg()
    }

    #[test]
    fn a_line_with_a_value_that_cannot_be_shown_has_a_gap() {
        let points = [
            (0.0, 1.0),
            (1.0, 2.0),
            (2.0, f64::NAN),
            (3.0, 1.0),
            (4.0, 3.0),
        ];
        let whole = chart(Series::line("a", points.map(|(x, _)| (x, 1.0 + x))));
        let broken = chart(Series::line("a", points));
        let lines = |svg: &str| svg.matches("stroke-width=\"2\"").count();
        assert_eq!(lines(&broken), lines(&whole) + 1);
        assert_eq!(broken.matches("<circle").count(), 4);
        assert!(!broken.contains("NaN"), "{broken}");
    }

    #[test]
    fn text_is_escaped_wherever_it_stands() {
        let mark = Mark {
            label: "<mark>".to_owned(),
            ..Mark::default()
        };
        let panel = Panel::new("<panel>", Axis::linear("<x>"), Axis::linear("<y>"))
            .series(Series::scatter("<series>", vec![mark]));
        let svg = Chart::new("<chart> & \"more\"").panel(panel).to_svg();
        for word in ["chart", "panel", "x", "y", "series", "mark"] {
            assert!(svg.contains(&format!("&lt;{word}&gt;")), "{word}: {svg}");
            assert!(!svg.contains(&format!("<{word}>")), "{word}");
        }
        assert!(svg.contains("&amp; &quot;more&quot;"));
    }

    #[test]
    fn a_histogram_gives_each_value_to_one_bar_and_outsiders_to_none() {
        let values = [0.0, 0.09, 0.5, 1.0, 7.0];
        let series = Series::histogram("h", &values, (0.0, 1.0), 10);
        let Shape::Bars(bars) = &series.shape else {
            panic!("no bars");
        };
        let shares: Vec<f64> = bars.iter().map(|bar| bar.share).collect();
        let want = [0.4, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.2];
        assert_eq!(shares, want);
        assert!(Series::histogram("h", &[], (0.0, 1.0), 0).extents().1 == [0.0, 0.0]);
    }

    #[test]
    fn a_chart_of_nothing_is_still_a_picture() {
        assert!(Chart::new("").to_svg().trim_end().ends_with("</svg>"));
        for series in [
            Series::line("a", []),
            Series::line("a", [(f64::NAN, f64::INFINITY)]),
            Series::line("a", [(3.0, 3.0)]),
            Series::scatter("a", vec![]),
            Series::histogram("a", &[], (0.0, 0.0), 3),
        ] {
            let svg = chart(series);
            assert!(
                svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"),
                "{svg}"
            );
        }
    }

    #[test]
    fn a_long_line_is_thinned_and_keeps_its_end() {
        let points = (0..100_000).map(|x| (f64::from(x), f64::from(x % 7)));
        let svg = chart(Series::line("a", points));
        assert!(svg.len() < 100_000, "{}", svg.len());
        assert!(!svg.contains("<circle"));
    }
}
