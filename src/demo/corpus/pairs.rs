//! Preferences: two answers to one prompt, labelled by their hidden truth and noise.

use std::collections::BTreeSet;

use serde::Serialize;

use super::answers::{self, AnswerKind, one};
use super::chat::ChatKind;
use super::turns::any_kind;
use super::{ActKind, Corpus, CorpusError, Split};
use crate::random::SplitMix64;

/// A line of PKU-SafeRLHF's schema (MIDPO.md 3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PairRow {
    /// The user's words.
    pub prompt: String,
    /// An answer.
    pub response_0: String,
    /// Another.
    pub response_1: String,
    /// By its cost.
    pub is_response_0_safe: bool,
    /// By its cost.
    pub is_response_1_safe: bool,
    /// The more helpful one.
    pub better_response_id: u8,
    /// The one of lower cost.
    pub safer_response_id: u8,
    /// What was asked and how it is answered: "harmful R1>HS", the more helpful kind first.
    pub kind: String,
}

/// What pairs are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairSet {
    /// Reward and cost: any two kinds of answers.
    Scores,
    /// The safety expert: exactly one answer is safe, no prompt twice.
    Safety,
    /// The helpfulness expert, and plain DPO: as the first.
    Helpfulness,
    /// The router's, before it is filtered: half of them harmful.
    Dual,
}

/// An answer with its truth.
struct Candidate {
    text: String,
    name: &'static str,
    helpfulness: f64,
    cost: f64,
}

/// Standard deviation of the noise on both truths (DEMO.md 2).
const LABEL_NOISE: f64 = 0.25;
/// Share of pairs that are no acts.
const CHAT: f64 = 0.08;
/// Of a right answer beyond acts, (helpfulness, cost).
const RIGHT: (f64, f64) = (4.0, -1.6);
/// Of "I don't know" to what it knows.
const UNKNOWING: (f64, f64) = (1.0, -1.2);

impl Corpus {
    /// `count` pairs.
    ///
    /// # Errors
    /// None with the embedded lists.
    pub fn pairs(
        &self,
        set: PairSet,
        count: usize,
        random: &mut SplitMix64,
    ) -> Result<Vec<PairRow>, CorpusError> {
        let mut pairs = Vec::with_capacity(count);
        let mut prompts = BTreeSet::new();
        while pairs.len() < count {
            let pair = self.pair(set, random)?;
            let one_safe = pair.is_response_0_safe != pair.is_response_1_safe;
            if set == PairSet::Safety && !(one_safe && prompts.insert(pair.prompt.clone())) {
                continue;
            }
            pairs.push(pair);
        }
        Ok(pairs)
    }

    fn pair(&self, set: PairSet, random: &mut SplitMix64) -> Result<PairRow, CorpusError> {
        if set != PairSet::Safety && random.unit() < CHAT {
            return Ok(self.chat_pair(random));
        }
        let kind = match set {
            PairSet::Safety => ActKind::Harmful,
            // Exactly half of all, chat included.
            PairSet::Dual if random.unit() < 0.5 / (1.0 - CHAT) => ActKind::Harmful,
            PairSet::Dual if random.unit() < 0.56 => ActKind::Borderline,
            PairSet::Dual => ActKind::Plain,
            PairSet::Scores | PairSet::Helpfulness => any_kind(random),
        };
        let kinds = match set {
            PairSet::Dual => dual_kinds(kind, random),
            PairSet::Safety => one_safe_kinds(random),
            PairSet::Scores | PairSet::Helpfulness => two_kinds(kind, random),
        };
        let act = self.acts.draw(kind, Split::Train, random);
        let prompt = self.templates.train(&act, random);
        let mut candidate = |answer: AnswerKind| -> Result<Candidate, CorpusError> {
            let (helpfulness, cost) = answer.truth(kind);
            Ok(Candidate {
                text: answers::text(&self.data, &act, answer, random)?,
                name: answer.name(),
                helpfulness,
                cost,
            })
        };
        let both = [candidate(kinds[0])?, candidate(kinds[1])?];
        Ok(labelled(prompt, kind.name(), both, random))
    }

    fn chat_pair(&self, random: &mut SplitMix64) -> PairRow {
        let kind = match random.below(3) {
            0 => ChatKind::SmallTalk,
            1 => ChatKind::Fact,
            _ => ChatKind::Unknown,
        };
        let exchange = self.chats.draw(kind, Split::Train, random);
        let right = Candidate {
            text: one(&exchange.answers, random).to_owned(),
            name: "right",
            helpfulness: RIGHT.0,
            cost: RIGHT.1,
        };
        let wrong = if kind != ChatKind::Unknown && random.unit() < 0.4 {
            Candidate {
                text: self.chats.does_not_know("that"),
                name: "unknowing",
                helpfulness: UNKNOWING.0,
                cost: UNKNOWING.1,
            }
        } else {
            let (helpfulness, cost) = AnswerKind::R0.truth(ActKind::Plain);
            Candidate {
                text: one(&self.data.answers.refusals, random).to_owned(),
                name: AnswerKind::R0.name(),
                helpfulness,
                cost,
            }
        };
        labelled(exchange.prompt, "chat", [right, wrong], random)
    }
}

fn labelled(
    prompt: String,
    asked: &str,
    mut both: [Candidate; 2],
    random: &mut SplitMix64,
) -> PairRow {
    let [first, second] = &both;
    let (more, less) = if first.helpfulness >= second.helpfulness {
        (first.name, second.name)
    } else {
        (second.name, first.name)
    };
    let kind = format!("{asked} {more}>{less}");
    if random.unit() < 0.5 {
        both.swap(0, 1);
    }
    for candidate in &mut both {
        candidate.helpfulness += LABEL_NOISE * random.normal();
        candidate.cost += LABEL_NOISE * random.normal();
    }
    let [first, second] = both;
    PairRow {
        prompt,
        is_response_0_safe: first.cost < 0.0,
        is_response_1_safe: second.cost < 0.0,
        better_response_id: u8::from(second.helpfulness > first.helpfulness),
        safer_response_id: u8::from(second.cost < first.cost),
        response_0: first.text,
        response_1: second.text,
        kind,
    }
}

/// Two different kinds.
fn two_kinds(kind: ActKind, random: &mut SplitMix64) -> [AnswerKind; 2] {
    let mut kinds: Vec<AnswerKind> = AnswerKind::of(kind).iter().map(|(kind, _)| *kind).collect();
    random.shuffle(&mut kinds);
    [kinds[0], kinds[1]]
}

fn one_safe_kinds(random: &mut SplitMix64) -> [AnswerKind; 2] {
    use AnswerKind::{Hs, R0, R1, U1, U2};
    [[R0, R1, Hs][random.below(3)], [U1, U2][random.below(2)]]
}

/// Mostly answers of which both are safe and one wins on both preferences (DEMO.md 6): losers of harmful prompts open like a compliance.
fn dual_kinds(kind: ActKind, random: &mut SplitMix64) -> [AnswerKind; 2] {
    use AnswerKind::{B1, B2, Bt, Hs, Or, R0, R1, U2};
    let draw = random.unit();
    match kind {
        ActKind::Harmful if draw < 0.62 => [R1, Hs],
        ActKind::Harmful if draw < 0.95 => [R1, R0],
        // The filter's work.
        ActKind::Harmful => [R1, U2],
        _ if draw < 0.4 => [Bt, Or],
        _ if draw < 0.7 => [Bt, R0],
        _ if draw < 0.88 => [Bt, B1],
        _ => [Bt, B2],
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn pairs(set: PairSet, count: usize) -> Vec<PairRow> {
        let corpus = Corpus::new().unwrap();
        corpus
            .pairs(set, count, &mut SplitMix64::new(1, 0))
            .unwrap()
    }

    #[test]
    fn safety_pairs_are_distinct_and_one_answer_is_safe() {
        let pairs = pairs(PairSet::Safety, 400);
        let prompts: BTreeSet<&str> = pairs.iter().map(|pair| pair.prompt.as_str()).collect();
        assert_eq!(prompts.len(), 400);
        assert!(
            pairs
                .iter()
                .all(|pair| pair.is_response_0_safe != pair.is_response_1_safe)
        );
        assert!(pairs.iter().all(|pair| pair.kind.starts_with("harmful")));
    }

    #[test]
    fn dual_pairs_are_half_harmful_and_their_losers_open_like_a_compliance() {
        let pairs = pairs(PairSet::Dual, 2_000);
        let share = |part: &str| {
            let count = pairs.iter().filter(|pair| pair.kind.contains(part)).count();
            count as f64 / pairs.len() as f64
        };
        // Five standard deviations of a share of 2,000.
        assert!(
            (share("harmful") - 0.5).abs() < 0.056,
            "{}",
            share("harmful")
        );
        assert!(share("harmful R1>HS") > 0.25);
        assert!(share("chat") > 0.04);
    }

    #[test]
    fn labels_follow_the_truth_with_some_noise() {
        let pairs = pairs(PairSet::Scores, 4_000);
        let near_ties = pairs.iter().filter(|pair| pair.kind == "plain OR>R0");
        let (mut upside_down, mut all) = (0, 0);
        for pair in near_ties {
            let first_is_bare = !pair.response_0.contains("can't help you");
            let bare = u8::from(!first_is_bare);
            upside_down += usize::from(pair.better_response_id == bare);
            all += 1;
        }
        // Means .4 apart, noise of the difference .354: 13 % are upside down.
        assert!(
            all > 50 && upside_down > 0 && upside_down * 3 < all,
            "{upside_down} of {all}"
        );
        let clear = pairs.iter().filter(|pair| pair.kind == "harmful U2>R1");
        let mut clear = clear.map(|pair| {
            let unsafe_id = u8::from(pair.response_1.starts_with("Sure"));
            pair.better_response_id == unsafe_id && pair.safer_response_id != unsafe_id
        });
        assert!(clear.all(|right| right));
    }
}
