//! From a chart to SVG, by `plotters`.

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::Coordinates;
use super::{Bar, Chart, Mark, Panel, Series, Shape};

/// Pixels of one panel.
const PANEL: (u32, u32) = (460, 340);
const PANELS_IN_A_ROW: usize = 2;
/// Pixels of the chart's title, of a panel's, of a line of its legend, and of the axes' labels.
const TITLE: u32 = 40;
const PANEL_TITLE: u32 = 26;
const LEGEND_LINE: u32 = 18;
const X_LABELS: u32 = 40;
const Y_LABELS: u32 = 62;
const MARGIN: u32 = 12;
/// Width of a letter, on average: no font is asked, since the reader's browser chooses it.
const LETTER: u32 = 7;
/// Letters at most of one text.
const TEXT_MAX: usize = 110;
/// Points at most of a line; every n-th of more.
const LINE_POINTS: usize = 1000;
/// Points at most of a line whose points are marked.
const MARKED_POINTS: usize = 48;
/// Half the cap of an error bar.
const CAP: i32 = 4;

/// Okabe and Ito's colours without yellow, and grey: told apart by most eyes.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(128, 128, 128),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Plane<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Coordinates, Coordinates>>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

pub(super) fn svg(chart: &Chart) -> String {
    let mut svg = String::new();
    if let Err(error) = draw(chart, &mut svg) {
        // Sizes are the constants above, and writing to a String does not fail.
        unreachable!("a chart is always drawn: {error}");
    }
    svg
}

fn draw(chart: &Chart, svg: &mut String) -> Drawn {
    let columns = chart.panels.len().clamp(1, PANELS_IN_A_ROW);
    let rows = chart.panels.len().div_ceil(columns).max(1);
    let size = (PANEL.0 * columns as u32, TITLE + PANEL.1 * rows as u32);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(TITLE);
    text(
        &head,
        &chart.title,
        (MARGIN as i32, TITLE as i32 / 2),
        16,
        HPos::Left,
    )?;
    let areas = body.split_evenly((rows, columns));
    for (panel, area) in chart.panels.iter().zip(&areas) {
        draw_panel(panel, area)?;
    }
    root.present()
}

fn draw_panel(panel: &Panel, area: &Area<'_>) -> Drawn {
    let legend = legend(&panel.series);
    let legend_height = legend
        .last()
        .map_or(0, |item| (item.line + 1) * LEGEND_LINE);
    let (head, body) = area.split_vertically(PANEL_TITLE);
    let (body, foot) = body.split_vertically(PANEL.1 - PANEL_TITLE - legend_height);
    text(
        &head,
        &panel.title,
        (Y_LABELS as i32, PANEL_TITLE as i32 / 2),
        13,
        HPos::Left,
    )?;
    let (xs, ys): (Vec<_>, Vec<_>) = panel.series.iter().map(Series::extents).unzip();
    let x = panel.x.over(xs.into_iter().flatten());
    let y = panel.y.over(ys.into_iter().flatten());
    let mut plane = ChartBuilder::on(&body)
        .margin_right(MARGIN + 6)
        .margin_top(8)
        .x_label_area_size(X_LABELS)
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d(x, y)?;
    plane
        .configure_mesh()
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 11))
        .axis_desc_style(("sans-serif", 12))
        .x_desc(shortened(&panel.x.label))
        .y_desc(shortened(&panel.y.label))
        .draw()?;
    for (index, series) in panel.series.iter().enumerate() {
        let colour = colour(index);
        match &series.shape {
            Shape::Line(points) => draw_line(panel, &mut plane, points, colour)?,
            Shape::Scatter(marks) => draw_marks(panel, &plane, marks, colour)?,
            Shape::Bars(bars) => draw_bars(panel, &plane, bars, colour)?,
        }
    }
    draw_legend(&foot, &legend)
}

fn colour(index: usize) -> RGBColor {
    COLOURS.into_iter().cycle().nth(index).unwrap_or(BLACK)
}

fn draw_line(
    panel: &Panel,
    plane: &mut Plane<'_, '_>,
    points: &[(f64, f64)],
    colour: RGBColor,
) -> Drawn {
    let every = points.len().div_ceil(LINE_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points
        .iter()
        .enumerate()
        .filter(|(at, _)| at % every == 0 || *at == last);
    let kept: Vec<(f64, f64)> = kept.map(|(_, point)| *point).collect();
    let shown = |(x, y): &(f64, f64)| panel.x.shows(*x) && panel.y.shows(*y);
    for piece in kept
        .split(|point| !shown(point))
        .filter(|piece| !piece.is_empty())
    {
        plane.draw_series(LineSeries::new(
            piece.iter().copied(),
            colour.stroke_width(2),
        ))?;
        if kept.len() <= MARKED_POINTS {
            plane.draw_series(
                piece
                    .iter()
                    .map(|point| Circle::new(*point, 3, colour.filled())),
            )?;
        }
    }
    Ok(())
}

fn draw_marks(panel: &Panel, plane: &Plane<'_, '_>, marks: &[Mark], colour: RGBColor) -> Drawn {
    let area = plane.plotting_area();
    let shown = |x: f64, y: f64| panel.x.shows(x) && panel.y.shows(y);
    let width = area.dim_in_pixel().0 as i32;
    let left = area.get_base_pixel().0;
    for mark in marks.iter().filter(|mark| shown(mark.x, mark.y)) {
        if let Some((low, high)) = mark
            .x_interval
            .filter(|(low, high)| shown(*low, mark.y) && shown(*high, mark.y))
        {
            area.draw(&PathElement::new(
                vec![(low, mark.y), (high, mark.y)],
                colour.stroke_width(1),
            ))?;
            for end in [low, high] {
                let cap = PathElement::new(vec![(0, -CAP), (0, CAP)], colour.stroke_width(1));
                area.draw(&(EmptyElement::at((end, mark.y)) + cap))?;
            }
        }
        if let Some((low, high)) = mark
            .y_interval
            .filter(|(low, high)| shown(mark.x, *low) && shown(mark.x, *high))
        {
            area.draw(&PathElement::new(
                vec![(mark.x, low), (mark.x, high)],
                colour.stroke_width(1),
            ))?;
            for end in [low, high] {
                let cap = PathElement::new(vec![(-CAP, 0), (CAP, 0)], colour.stroke_width(1));
                area.draw(&(EmptyElement::at((mark.x, end)) + cap))?;
            }
        }
        let at = (mark.x, mark.y);
        area.draw(&Circle::new(at, 4, colour.filled()))?;
        let label = shortened(&mark.label);
        // To the left of a mark near the right edge, so that it stays in the picture.
        let room = width - (area.map_coordinate(&at).0 - left);
        let (side, anchor) = if room > (label.len() as i32 + 2) * LETTER as i32 {
            (7, HPos::Left)
        } else {
            (-7, HPos::Right)
        };
        let label = Text::new(label, (side, -9), style(12, anchor));
        area.draw(&(EmptyElement::at(at) + label))?;
    }
    Ok(())
}

fn draw_bars(panel: &Panel, plane: &Plane<'_, '_>, bars: &[Bar], colour: RGBColor) -> Drawn {
    let area = plane.plotting_area();
    let shown = |bar: &&Bar| panel.x.shows(bar.low) && panel.x.shows(bar.high) && bar.share > 0.0;
    for bar in bars.iter().filter(shown) {
        let corners = [(bar.low, 0.0), (bar.high, bar.share)];
        area.draw(&Rectangle::new(corners, colour.mix(0.35).filled()))?;
        area.draw(&Rectangle::new(corners, colour.stroke_width(1)))?;
    }
    Ok(())
}

/// A name of the legend, and where it stands.
struct LegendItem {
    name: String,
    colour: RGBColor,
    line: u32,
    left: u32,
}

/// Names of the series, in lines that fit the panel. A single series without a name has none.
fn legend(series: &[Series]) -> Vec<LegendItem> {
    let (mut line, mut left) = (0, Y_LABELS);
    let mut items = Vec::new();
    for (index, series) in series
        .iter()
        .enumerate()
        .filter(|(_, series)| !series.name.is_empty())
    {
        let name = shortened(&series.name);
        let width = name.chars().count() as u32 * LETTER + 34;
        if left + width > PANEL.0 && left > Y_LABELS {
            (line, left) = (line + 1, Y_LABELS);
        }
        items.push(LegendItem {
            name,
            colour: colour(index),
            line,
            left,
        });
        left += width;
    }
    items
}

fn draw_legend(area: &Area<'_>, items: &[LegendItem]) -> Drawn {
    for item in items {
        let (left, middle) = (item.left as i32, (item.line * LEGEND_LINE) as i32 + 7);
        let corners = [(left, middle - 4), (left + 14, middle + 4)];
        area.draw(&Rectangle::new(corners, item.colour.filled()))?;
        text(area, &item.name, (left + 19, middle), 12, HPos::Left)?;
    }
    Ok(())
}

fn text(area: &Area<'_>, words: &str, at: (i32, i32), size: u32, anchor: HPos) -> Drawn {
    area.draw(&Text::new(shortened(words), at, style(size, anchor)))
}

fn style(size: u32, anchor: HPos) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&BLACK)
        .pos(Pos::new(anchor, VPos::Center))
}

/// At most [`TEXT_MAX`] letters, on one line.
fn shortened(text: &str) -> String {
    let mut words: String = text
        .chars()
        .take(TEXT_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(TEXT_MAX).is_some() {
        words.push('…');
    }
    words
}
