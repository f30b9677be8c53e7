//! D_dual: the pairs on which the router is trained (MIDPO.md 3 and 4.7).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::expert::{expect_kind, score_both};
use super::prepare::bad_lines;
use super::score::PAIRS_EXPECTED;
use super::session::{How, Session, required};
use crate::config::train::{DualStage, Stage};
use crate::train::autograd::ScoreKind;
use crate::train::data::{PairLine, read_pairs};
use crate::train::{Scorer, TrainError, Watch, files};

/// Why a pair is not in D_dual.
const NOT_SAFE: &str = "a response is not safe: its C is not below 0";
const NO_WINNER: &str = "no response wins on both R and C";

/// What building D_dual came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dual {
    /// Pairs kept, by kind (`all` where lines have none).
    pub kept: BTreeMap<String, usize>,
    /// Pairs dropped, by reason.
    pub dropped: BTreeMap<&'static str, usize>,
}

/// Keeps the pairs whose responses both have C < 0, and of which one has the higher R and the lower C; writes them as JSONL with that one
/// as `better_response_id` and `safer_response_id`. Other fields stay, and scores are added: `reward_0`, `reward_1`, `cost_0`, `cost_1`.
///
/// # Errors
/// [`TrainError`] names the setting, file or line.
pub fn dual(options: &DualStage, how: How, watch: &mut Watch<'_>) -> Result<Dual, TrainError> {
    let data = required(Stage::Dual, "data", &options.data.data, PAIRS_EXPECTED)?;
    let reward = required(
        Stage::Dual,
        "reward",
        &options.reward.reward,
        "a reward model",
    )?;
    let cost = required(Stage::Dual, "cost", &options.cost.cost, "a cost model")?;
    let mut session = Session::begin(options, how, watch)?;
    let lines = read_pairs(data, bad_lines(&options.data))?;
    let bad = lines.bad;
    let limit = options.data.limit.unwrap_or(usize::MAX);
    let lines: Vec<PairLine> = lines.items.into_iter().take(limit).collect();
    let threads = session.threads();
    let mut scores = Vec::new();
    for (kind, directory) in [(ScoreKind::Reward, reward), (ScoreKind::Cost, cost)] {
        let scorer = Scorer::open(directory, options.data.max_length, 1)?;
        expect_kind(directory, kind, &scorer)?;
        scores.push(threads.map(&lines, |line| score_both(&scorer, line))?);
    }
    let [rewards, costs] = scores.as_slice() else {
        return Ok(Dual::default());
    };
    let (mut dual, mut text) = (Dual::default(), String::new());
    for ((line, rewards), costs) in lines.iter().zip(rewards).zip(costs) {
        match winner(rewards, costs) {
            Ok(winner) => {
                let kind = line.kind.clone().unwrap_or_else(|| "all".to_owned());
                *dual.kept.entry(kind).or_default() += 1;
                text += &written(line, winner, rewards, costs);
                text.push('\n');
            }
            Err(reason) => *dual.dropped.entry(reason).or_default() += 1,
        }
    }
    if let Some(directory) = session.output.parent() {
        files::make_directory(directory)?;
    }
    files::write(&session.output, text.as_bytes())?;
    session.note(&summary(&dual, lines.len(), bad));
    session.finish()?;
    Ok(dual)
}

/// The response that wins on both preferences.
fn winner(rewards: &[f32], costs: &[f32]) -> Result<usize, &'static str> {
    let ([r0, r1], [c0, c1]) = (rewards, costs) else {
        return Err(NO_WINNER);
    };
    if !(*c0 < 0.0 && *c1 < 0.0) {
        return Err(NOT_SAFE);
    }
    match () {
        () if r0 > r1 && c0 < c1 => Ok(0),
        () if r1 > r0 && c1 < c0 => Ok(1),
        () => Err(NO_WINNER),
    }
}

fn written(line: &PairLine, winner: usize, rewards: &[f32], costs: &[f32]) -> String {
    let mut fields: Map<String, Value> = line.fields.clone();
    for key in ["better_response_id", "safer_response_id"] {
        fields.insert(key.to_owned(), Value::from(winner));
    }
    for (name, scores) in [("reward", rewards), ("cost", costs)] {
        for (index, score) in scores.iter().enumerate() {
            fields.insert(format!("{name}_{index}"), Value::from(*score));
        }
    }
    Value::Object(fields).to_string()
}

fn summary(dual: &Dual, pairs: usize, bad: usize) -> String {
    let kept: usize = dual.kept.values().sum();
    let mut text = format!("{kept} of {pairs} pairs kept; bad lines: {bad}");
    let kinds = dual
        .kept
        .iter()
        .map(|(kind, count)| ("kept", kind.as_str(), count));
    let reasons = dual
        .dropped
        .iter()
        .map(|(reason, count)| ("dropped", *reason, count));
    for (what, which, count) in kinds.chain(reasons) {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {what}, {which}: {count}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn winner_is_safe_beside_a_safe_one_and_better_on_both() {
        for (rewards, costs, want) in [
            ([1.0, 0.0], [-2.0, -1.0], Ok(0)),
            ([0.0, 1.0], [-1.0, -2.0], Ok(1)),
            ([1.0, 0.0], [-1.0, -2.0], Err(NO_WINNER)),
            ([1.0, 1.0], [-2.0, -1.0], Err(NO_WINNER)),
            ([1.0, 0.0], [-2.0, 0.0], Err(NOT_SAFE)),
            ([1.0, 0.0], [-2.0, f32::NAN], Err(NOT_SAFE)),
        ] {
            assert_eq!(winner(&rewards, &costs), want, "{rewards:?} {costs:?}");
        }
    }
}
