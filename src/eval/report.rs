//! The report of an evaluation: what was done and what came of it, as Markdown and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::bootstrap::Interval;
use super::gates::{Gates, Places};
use super::judge::Outcome;
use super::prompts::{Class, Prompt};
use super::summary::{Row, Summary};

/// How answers were drawn and judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conditions {
    /// In words.
    pub judge: &'static str,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Of an answer.
    pub max_tokens: u32,
    /// One answer a prompt and variant for each.
    pub seeds: Vec<u64>,
    /// Behind the intervals.
    pub resamples: usize,
}

/// Prompts of one class of one set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PromptCount {
    /// Which.
    pub set: String,
    /// Which.
    pub class: Class,
    /// How many.
    pub prompts: usize,
}

/// An evaluation's report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this program.
    pub version: &'static str,
    /// What was evaluated.
    pub model: String,
    /// How.
    pub conditions: Conditions,
    /// On what.
    pub prompts: Vec<PromptCount>,
    /// What came of it.
    #[serde(flatten)]
    pub summary: Summary,
}

/// How many prompts there are of each set and class, sorted by both.
pub fn count(prompts: &[Prompt]) -> Vec<PromptCount> {
    let mut counts = std::collections::BTreeMap::new();
    for prompt in prompts {
        *counts.entry((&prompt.set, &prompt.class)).or_insert(0) += 1;
    }
    let count = |((set, class), prompts): ((&String, &Class), usize)| PromptCount {
        set: set.clone(),
        class: class.clone(),
        prompts,
    };
    counts.into_iter().map(count).collect()
}

impl Report {
    /// All numbers under their names.
    pub fn to_json(&self) -> String {
        let json = serde_json::to_string_pretty(self);
        // All keys are strings, and numbers that JSON has not become null.
        json.unwrap_or_default() + "\n"
    }

    /// The tables.
    pub fn to_markdown(&self) -> String {
        let mut out = self.conditions_line();
        let summary = &self.summary;
        let rows: Vec<&Row> = summary.slice(None, None).collect();
        section(&mut out, "All prompts", &scores_table(&rows, false));
        let sets = summary.sets();
        for set in std::iter::once(None).chain(sets.into_iter().map(Some)) {
            let of_set = set.map_or(String::new(), |set| format!(": {set}"));
            for (title, outcome) in [("Refusals", Outcome::Refusal), ("Help", Outcome::Help)] {
                let title = format!("{title} by class{of_set}");
                section(&mut out, &title, &self.outcome_table(set, outcome));
            }
        }
        let classes = summary.classes(None);
        let has_scores = rows
            .iter()
            .any(|row| row.reward.is_some() || row.cost.is_some());
        if has_scores && classes.len() > 1 {
            let of_class = |class| summary.slice(None, Some(class));
            let rows: Vec<&Row> = classes.into_iter().flat_map(of_class).collect();
            section(&mut out, "Scores by class", &scores_table(&rows, true));
        }
        if let Some(gates) = &summary.gates {
            section(&mut out, "Gates of the routed variant", &gates_table(gates));
            if !gates.aurocs.is_empty() {
                let title = "AUROC of alpha, harmful against others";
                section(&mut out, title, &auroc_table(gates));
            }
            let title = "Mean gates at the last prompt token, by layer";
            section(&mut out, title, &layers_table(gates));
        }
        out
    }

    fn conditions_line(&self) -> String {
        let Conditions {
            judge,
            temperature,
            max_tokens,
            seeds,
            resamples,
            ..
        } = &self.conditions;
        let mut sets: Vec<String> = Vec::new();
        for count in &self.prompts {
            sets.push(format!("{} {} ({})", count.prompts, count.class, count.set));
        }
        let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
        let sampling = if *temperature > 0.0 {
            format!("temperature {temperature}, seeds {}", seeds.join(", "))
        } else {
            "greedy".to_owned()
        };
        format!(
            "midpo {}, {}: {}; {sampling}, at most {max_tokens} tokens. Judge: {judge}. In brackets: 95 % intervals from {resamples} \
             bootstrap resamples of the prompts.\n",
            self.version,
            self.model,
            sets.join(", ")
        )
    }

    /// Which share of each class comes to `outcome`, by variant; beside refusals, what is neither refused nor helped with.
    fn outcome_table(&self, set: Option<&str>, outcome: Outcome) -> Table {
        let summary = &self.summary;
        let classes = summary.classes(set);
        let all: Vec<&Row> = summary.slice(set, None).collect();
        let rest = outcome == Outcome::Refusal;
        let has_hedges = |row: &&Row| row.outcomes.contains_key(&Outcome::Hedge);
        let hedges = rest && all.iter().any(has_hedges);
        let mut table = Table::new(["variant".to_owned()]);
        for class in &classes {
            let row = summary.slice(set, Some(class)).next();
            let prompts = row.map_or(0, |row| row.prompts);
            table.column(format!("{class} ({prompts})"));
        }
        if hedges {
            table.column("hedges");
        }
        if rest {
            table.column("broken or off topic");
        }
        for row in all {
            let mut cells = vec![row.variant.clone()];
            for class in &classes {
                let mut of_class = summary.slice(set, Some(class));
                let found = of_class.find(|other| other.variant == row.variant);
                cells.push(share(found.and_then(|row| row.outcomes.get(&outcome))));
            }
            if hedges {
                cells.push(share(row.outcomes.get(&Outcome::Hedge)));
            }
            if rest {
                cells.push(share(row.astray.as_ref()));
            }
            table.row(cells);
        }
        table
    }
}

/// R, C and lengths of rows.
fn scores_table(rows: &[&Row], by_class: bool) -> Table {
    let mut table = Table::new(["variant".to_owned()]);
    if by_class {
        table = Table::new(["class".to_owned(), "variant".to_owned()]);
    }
    let has = |value: fn(&Row) -> &Option<Interval>| rows.iter().any(|row| value(row).is_some());
    let (reward, cost) = (has(|row| &row.reward), has(|row| &row.cost));
    if reward {
        table.column("R");
    }
    if cost {
        table.column("C");
        table.column("C < 0");
    }
    table.column("tokens");
    table.column("cut");
    for row in rows {
        let mut cells = Vec::new();
        if by_class {
            let class = row.class.as_ref().map_or("", Class::as_str);
            cells.push(class.to_owned());
        }
        cells.push(row.variant.clone());
        if reward {
            cells.push(number(row.reward.as_ref()));
        }
        if cost {
            cells.push(number(row.cost.as_ref()));
            cells.push(share(row.safe.as_ref()));
        }
        let tokens = row
            .tokens
            .map_or(String::new(), |t| format!("{:.0}", t.mean));
        cells.push(tokens);
        cells.push(row.cut.map_or(String::new(), |c| percent(c.mean) + " %"));
        table.row(cells);
    }
    table
}

fn gates_table(gates: &Gates) -> Table {
    let mut table = Table::new(["class".to_owned()]);
    for gate in ["alpha", "beta"] {
        for place in PLACES {
            table.column(format!("{gate}, {place}"));
        }
    }
    for class in &gates.classes {
        let mut cells = vec![class.class.as_str().to_owned()];
        for gate in [&class.safety, &class.helpfulness] {
            cells.extend(places(gate));
        }
        table.row(cells);
    }
    table
}

fn auroc_table(gates: &Gates) -> Table {
    let mut table = Table::new(["harmful against".to_owned()]);
    for place in PLACES {
        table.column(format!("alpha, {place}"));
    }
    table.column("best layer");
    for auroc in &gates.aurocs {
        let mut cells = vec![auroc.against.clone()];
        cells.extend(places(&auroc.safety));
        let layers = auroc.layers.iter().enumerate();
        let best = layers.max_by(|a, b| a.1.total_cmp(b.1));
        cells.push(best.map_or(String::new(), |(layer, area)| {
            format!("{area:.3} (layer {layer})")
        }));
        table.row(cells);
    }
    table
}

fn layers_table(gates: &Gates) -> Table {
    let mut table = Table::new(["layer".to_owned()]);
    for gate in ["alpha", "beta"] {
        for class in &gates.classes {
            table.column(format!("{gate}, {}", class.class));
        }
    }
    for auroc in &gates.aurocs {
        table.column(format!("AUROC against {}", auroc.against));
    }
    let layers = gates.classes.first().map_or(0, |c| c.safety_layers.len());
    for layer in 0..layers {
        let cell = |values: &[f64]| {
            values
                .get(layer)
                .map_or(String::new(), |v| format!("{v:.3}"))
        };
        let mut cells = vec![layer.to_string()];
        cells.extend(gates.classes.iter().map(|class| cell(&class.safety_layers)));
        cells.extend(
            gates
                .classes
                .iter()
                .map(|class| cell(&class.helpfulness_layers)),
        );
        cells.extend(gates.aurocs.iter().map(|auroc| cell(&auroc.layers)));
        table.row(cells);
    }
    table
}

/// Where gates are looked at, in the order of [`places`].
const PLACES: [&str; 3] = ["last prompt token", "mean over prompt", "mean over answer"];

fn places(places: &Places<Option<Interval>>) -> [String; 3] {
    let Places {
        prompt_last,
        prompt_mean,
        answer_mean,
    } = places;
    [prompt_last, prompt_mean, answer_mean].map(|interval| number(interval.as_ref()))
}

fn number(interval: Option<&Interval>) -> String {
    interval.map_or(String::new(), |Interval { mean, low, high }| {
        format!("{mean:.3} [{low:.3}, {high:.3}]")
    })
}

fn share(interval: Option<&Interval>) -> String {
    interval.map_or(String::new(), |Interval { mean, low, high }| {
        format!(
            "{} % [{}, {}]",
            percent(*mean),
            percent(*low),
            percent(*high)
        )
    })
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

fn section(out: &mut String, title: &str, table: &Table) {
    let _ = write!(out, "\n**{title}**\n\n{}", table.to_markdown());
}

/// A table of Markdown: names on the left, numbers on the right.
struct Table {
    names: usize,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With the columns that name a row.
    fn new<const N: usize>(names: [String; N]) -> Self {
        Self {
            names: N,
            head: names.into(),
            rows: Vec::new(),
        }
    }

    fn column(&mut self, title: impl Into<String>) {
        self.head.push(title.into());
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn to_markdown(&self) -> String {
        let line = |cells: &[String]| {
            // A set or contender may have any name.
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rules =
            (0..self.head.len()).map(|column| if column < self.names { "---" } else { "--:" });
        let rules: Vec<String> = rules.map(str::to_owned).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        line(&self.head) + &line(&rules) + &rows
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::summary::tests::evaluation;
    use super::*;

    pub(in super::super) fn report() -> Report {
        let evaluation = evaluation();
        Report {
            version: "0.0.0",
            model: "tiny".to_owned(),
            conditions: Conditions {
                judge: "rules",
                temperature: 0.7,
                top_k: 50,
                top_p: 1.0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                max_tokens: 32,
                seeds: vec![1, 2],
                resamples: 50,
            },
            prompts: count(&evaluation.prompts),
            summary: Summary::of(&evaluation, 50),
        }
    }

    /// The cells of the line that begins with `start`, in the section `title`.
    fn cells(markdown: &str, title: &str, start: &str) -> Vec<String> {
        let section = markdown.split(&format!("**{title}**\n")).nth(1).unwrap();
        let section = section.split("\n**").next().unwrap();
        let line = section
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap();
        let cells = line.trim_matches('|').split(" | ");
        cells.map(|cell| cell.trim().to_owned()).collect()
    }

    #[test]
    fn tables_tell_what_the_summary_holds() {
        let markdown = report().to_markdown();
        assert!(
            markdown.contains(": 2 harmful (far), 1 benign (far), 1 plain (far), 2 harmful (near)"),
            "{markdown}"
        );
        assert!(markdown.contains("temperature 0.7, seeds 1, 2, at most 32 tokens"));
        let all = cells(&markdown, "All prompts", "| base |");
        assert!(all[2].starts_with("0.750 ["), "{all:?}");
        assert_eq!(&all[4..], ["45", "0.0 %"]);
        let head = cells(&markdown, "Refusals by class", "| variant |");
        assert_eq!(
            head,
            [
                "variant",
                "harmful (4)",
                "benign (2)",
                "plain (2)",
                "broken or off topic"
            ]
        );
        let routed = cells(&markdown, "Refusals by class", "| routed |");
        assert!(
            routed[1].starts_with("100.0 % [") && routed[2].starts_with("0.0 % ["),
            "{routed:?}"
        );
        let help = cells(&markdown, "Help by class", "| routed |");
        assert_eq!(help.len(), 4);
        assert!(help[1].starts_with("0.0 %") && help[2].starts_with("100.0 %"));
        let far = cells(&markdown, "Refusals by class: far", "| base |");
        assert!(far[4].starts_with("25.0 % ["), "{far:?}");
        let by_class = cells(&markdown, "Scores by class", "| harmful | routed |");
        assert!(
            by_class[2].starts_with("1.000 [") && by_class[4].starts_with("100.0 %"),
            "{by_class:?}"
        );
        let gates = cells(&markdown, "Gates of the routed variant", "| harmful |");
        assert!(gates[1].starts_with("0.620 ["), "{gates:?}");
        let auroc = cells(
            &markdown,
            "AUROC of alpha, harmful against others",
            "| plain |",
        );
        assert!(
            auroc[1].starts_with("0.875 [") && auroc[4] == "0.875 (layer 0)",
            "{auroc:?}"
        );
        let layer = cells(
            &markdown,
            "Mean gates at the last prompt token, by layer",
            "| 0 |",
        );
        assert_eq!((layer.len(), layer[1].as_str()), (1 + 6 + 3, "0.740"));
        // Every line of a table has the columns of its head.
        for table in markdown.split("\n\n").filter(|part| part.starts_with("| ")) {
            let columns = |line: &str| line.matches(" | ").count();
            let mut lines = table.lines();
            let head = columns(lines.next().unwrap());
            assert!(lines.all(|line| columns(line) == head), "{table}");
        }
    }

    #[test]
    fn json_has_every_number_under_its_name() {
        let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
        assert_eq!(json["conditions"]["seeds"][1], 2);
        assert_eq!(json["prompts"][0]["set"], "far");
        let row = &json["rows"][1];
        assert_eq!(
            (&row["variant"], &row["set"]),
            (&"routed".into(), &serde_json::Value::Null)
        );
        assert_eq!(row["outcomes"]["refusal"]["mean"], 0.5);
        assert_eq!(json["gates"]["aurocs"][0]["against"], "all harmless");
        assert!(json["gates"]["classes"][0]["safety"]["prompt_last"]["low"].is_f64());
    }

    #[test]
    fn a_name_with_a_bar_stays_in_its_cell() {
        let mut table = Table::new(["variant".to_owned()]);
        table.row(vec!["a|b".to_owned()]);
        assert_eq!(table.to_markdown(), "| variant |\n| --- |\n| a\\|b |\n");
    }
}
