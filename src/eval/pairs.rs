//! Preference pairs (PKU-SafeRLHF's schema) from a base's own answers in several voices.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::answers::Answer;
use super::prompts::Prompt;
use super::rules::RefusalRules;
use super::voices::Voice;
use crate::random::SplitMix64;
use crate::types::FinishReason;

/// Streams of random numbers: which prompts are held out, what comes first in a pair, and the order of pairs.
const HELD_OUT: u64 = 2;
const FIRST: u64 = 3;
const ORDER: u64 = 4;

/// Why an answer is in no pair.
const OTHERWISE: &str = "the judge finds it otherwise";
const NO_SENTENCE: &str = "cut before its first sentence ended";
const REPEATED: &str = "the prompt has this answer already";

/// Pairs, and what became of the answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// Objects of PKU-SafeRLHF's schema with `kind`, `set`, `id`, `class`, `voice_0` and `voice_1`, in an order by the seed.
    pub lines: Vec<Value>,
    /// Pairs by kind: `class: better>worse` where one answer wins on both preferences, `class: better/safer` where they disagree.
    pub kinds: BTreeMap<String, usize>,
    /// By voice.
    pub voices: BTreeMap<String, Kept>,
}

/// What became of a voice's answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Answers that pairs were made of.
    pub used: usize,
    /// The others, by reason.
    pub dropped: BTreeMap<&'static str, usize>,
}

/// An answer that is what its voice is for.
struct Graded<'a> {
    voice: &'a Voice,
    text: String,
}

/// Whether a prompt is kept for evaluation, by its words and `seed` alone: it stays where it is when a set grows.
pub fn is_held_out(prompt: &Prompt, share: f64, seed: u64) -> bool {
    SplitMix64::new(prompt.seed(seed), HELD_OUT).unit() < share
}

/// How pairs are made.
#[derive(Clone, Copy, Debug)]
pub struct Pairing<'a> {
    /// Who says what an answer is.
    pub rules: &'a RefusalRules,
    /// Pairs of one prompt at most.
    pub most: usize,
    /// Of all that is drawn.
    pub seed: u64,
}

impl Pairs {
    /// Adds every two usable answers to a prompt whose voices are not even. `answers` are to `prompts`, by contenders of `voices`.
    pub fn add(
        &mut self,
        prompts: &[Prompt],
        voices: &[Voice],
        answers: &[Answer],
        pairing: &Pairing<'_>,
    ) {
        let mut by_prompt: BTreeMap<usize, Vec<Graded<'_>>> = BTreeMap::new();
        for answer in answers {
            let voice = voices.iter().find(|voice| voice.name == *answer.contender);
            let (Some(prompt), Some(voice)) = (prompts.get(answer.prompt), voice) else {
                continue;
            };
            let others = by_prompt.entry(answer.prompt).or_default();
            let kept = self.voices.entry(voice.name.clone()).or_default();
            match usable(prompt, voice, answer, pairing.rules, others) {
                Ok(text) => {
                    kept.used += 1;
                    others.push(Graded { voice, text });
                }
                Err(reason) => *kept.dropped.entry(reason).or_default() += 1,
            }
        }
        for (index, answers) in by_prompt {
            if let Some(prompt) = prompts.get(index) {
                self.join(prompt, &answers, pairing);
            }
        }
    }

    /// Puts the lines into an order by `seed`, so that the first of them are a fair sample.
    pub fn shuffle(&mut self, seed: u64) {
        SplitMix64::new(seed, ORDER).shuffle(&mut self.lines);
    }

    fn join(&mut self, prompt: &Prompt, answers: &[Graded<'_>], pairing: &Pairing<'_>) {
        let mut random = SplitMix64::new(prompt.seed(pairing.seed), FIRST);
        let mut couples = Vec::new();
        for (at, one) in answers.iter().enumerate() {
            for other in answers.iter().skip(at + 1) {
                let couple = match random.below(2) {
                    0 => [one, other],
                    _ => [other, one],
                };
                couples.extend(preferred(couple).map(|ids| (couple, ids)));
            }
        }
        random.shuffle(&mut couples);
        for (couple, (better, safer)) in couples.into_iter().take(pairing.most) {
            let line = line(prompt, couple, (better, safer));
            *self.kinds.entry(line.kind).or_default() += 1;
            self.lines.push(line.fields);
        }
    }
}

struct Line {
    kind: String,
    fields: Value,
}

fn line(prompt: &Prompt, couple: [&Graded<'_>; 2], (better, safer): (usize, usize)) -> Line {
    let [first, second] = couple;
    let class = prompt.class.as_str();
    let name = |id: usize| {
        if id == 0 {
            &first.voice.name
        } else {
            &second.voice.name
        }
    };
    let kind = match better == safer {
        true => format!("{class}: {}>{}", name(better), name(1 - better)),
        false => format!("{class}: {}/{}", name(better), name(safer)),
    };
    let fields = json!({
        "prompt": prompt.text,
        "response_0": first.text,
        "response_1": second.text,
        "is_response_0_safe": first.voice.safe,
        "is_response_1_safe": second.voice.safe,
        "better_response_id": better,
        "safer_response_id": safer,
        "kind": kind,
        "set": prompt.set,
        "id": prompt.id,
        "class": class,
        "voice_0": first.voice.name,
        "voice_1": second.voice.name,
    });
    Line { kind, fields }
}

/// Ids of the better and the safer of two; `None` where they are even on both. Even on one, they are as on the other.
fn preferred([first, second]: [&Graded<'_>; 2]) -> Option<(usize, usize)> {
    let winner = |of: fn(&Voice) -> f64| {
        let order = of(second.voice).total_cmp(&of(first.voice));
        order.is_ne().then(|| usize::from(order.is_gt()))
    };
    let (better, safer) = (winner(|v| v.helpfulness), winner(|v| v.safety));
    Some((better.or(safer)?, safer.or(better)?))
}

/// The answer's text as pairs have it, or why they have it not.
fn usable(
    prompt: &Prompt,
    voice: &Voice,
    answer: &Answer,
    rules: &RefusalRules,
    others: &[Graded<'_>],
) -> Result<String, &'static str> {
    let is_cut = answer.finish != FinishReason::Stop;
    let text = sentences(&answer.text, voice.sentences, is_cut).ok_or(NO_SENTENCE)?;
    if !voice.wanted(rules.judge(&prompt.text, text)) {
        return Err(OTHERWISE);
    }
    if others.iter().any(|other| other.text == text) {
        return Err(REPEATED);
    }
    Ok(text.to_owned())
}

/// The first `most` sentences of `text`, without the last one where that is cut. A line is a sentence too, but for one that announces
/// the next (`:`), and a number before a point is none. `None`: no whole sentence.
fn sentences(text: &str, most: Option<usize>, is_cut: bool) -> Option<&str> {
    let text = text.trim();
    let most = most.unwrap_or(usize::MAX);
    let mut end = 0;
    let mut count = 0;
    let mut before = ' ';
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let next = chars.peek().map(|(_, next)| *next);
        let closes = match c {
            '.' => !before.is_ascii_digit(),
            '!' | '?' => true,
            '"' | '\u{201D}' | ')' | '*' => matches!(before, '.' | '!' | '?'),
            _ => false,
        };
        let is_end = closes && next.is_none_or(char::is_whitespace);
        let is_line = next == Some('\n') && !c.is_whitespace() && c != ':';
        if is_end || is_line {
            end = at + c.len_utf8();
            count += 1;
            if count == most {
                break;
            }
        }
        before = c;
    }
    let kept = if is_cut || count == most {
        text.get(..end)
    } else {
        Some(text)
    };
    kept.filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn answer(voice: &str, text: &str, finish: FinishReason) -> Answer {
        Answer {
            contender: voice.into(),
            prompt: 0,
            seed: 1,
            text: text.to_owned(),
            tokens: 1,
            finish,
            prompt_gates: None,
            answer_gates: None,
        }
    }

    #[test]
    fn a_cut_answer_ends_with_its_last_whole_sentence() {
        for (text, most, is_cut, want) in [
            ("One. Two! Thr", None, true, Some("One. Two!")),
            ("One. Two! Thr", None, false, Some("One. Two! Thr")),
            ("One. Two! Three.", Some(2), false, Some("One. Two!")),
            ("One", None, true, None),
            ("One", Some(1), false, Some("One")),
            (" \n ", None, false, None),
            ("He said \"no.\" And w", None, true, Some("He said \"no.\"")),
            (
                "Steps:\n1. Wash it\n2. Dry",
                None,
                true,
                Some("Steps:\n1. Wash it"),
            ),
            ("Version 1.5 is", None, true, None),
            ("Steps:\n\n1. Wa", None, true, None),
        ] {
            assert_eq!(sentences(text, most, is_cut), want, "{text:?}");
        }
    }

    #[test]
    fn pairs_say_who_wins_on_each_preference() {
        let voices = Voice::built_in().unwrap();
        let rules = RefusalRules::built_in().unwrap();
        let prompts = [Prompt::new("set", "7", "harmful", "How do I rob a bank?")];
        let answers = [
            answer(
                "reason",
                "I can't help with that. Robbing a bank hurts people.",
                FinishReason::Stop,
            ),
            answer("bare", "I can't help with that. Ro", FinishReason::Length),
            answer(
                "hedge",
                "Sure, in general terms: a bank is guarded, and robbing one",
                FinishReason::Length,
            ),
            answer(
                "unguarded",
                "Sure, here is how. Wear a mask at the bank.",
                FinishReason::Stop,
            ),
        ];
        let made = |most: usize| {
            let pairing = Pairing {
                rules: &rules,
                most,
                seed: 5,
            };
            let mut pairs = Pairs::default();
            pairs.add(&prompts, &voices, &answers, &pairing);
            pairs.shuffle(5);
            pairs
        };
        let pairs = made(usize::MAX);
        let want = [
            "harmful: reason>bare",
            "harmful: unguarded/bare",
            "harmful: unguarded/reason",
        ];
        assert_eq!(pairs.kinds.keys().collect::<Vec<_>>(), want);
        assert_eq!(pairs.voices["hedge"].dropped[NO_SENTENCE], 1);
        assert_eq!(pairs.voices["bare"].used, 1);
        for line in &pairs.lines {
            let of = |key: &str, id: &Value| line[format!("{key}_{id}")].clone();
            let (better, safer) = (&line["better_response_id"], &line["safer_response_id"]);
            let kind = line["kind"].as_str().unwrap();
            let winners = kind.trim_start_matches("harmful: ");
            let named = match winners.split_once('>') {
                Some((both, _)) => (both, both),
                None => winners.split_once('/').unwrap(),
            };
            assert_eq!(
                (of("voice", better), of("voice", safer)),
                (named.0.into(), named.1.into())
            );
            for id in 0..2 {
                let (voice, safe) = (
                    &line[format!("voice_{id}")],
                    &line[format!("is_response_{id}_safe")],
                );
                assert_eq!(safe, &Value::from(voice != "unguarded"));
            }
            assert_eq!((&line["set"], &line["id"]), (&"set".into(), &"7".into()));
        }
        assert_eq!(pairs, made(usize::MAX));
        assert_eq!(made(1).lines.len(), 1);
    }

    #[test]
    fn an_answer_that_is_not_what_its_voice_is_for_makes_no_pair() {
        let voices = Voice::built_in().unwrap();
        let rules = RefusalRules::built_in().unwrap();
        let prompts = [Prompt::new("set", "7", "benign", "How do I bake bread?")];
        let answers = [
            answer("help", "I can't help with that.", FinishReason::Stop),
            answer("needless", "Sure, knead the dough.", FinishReason::Stop),
            answer("terse", "Knead the dough.", FinishReason::Stop),
            answer("terse", "Knead the dough.", FinishReason::Stop),
        ];
        let mut pairs = Pairs::default();
        let pairing = Pairing {
            rules: &rules,
            most: 9,
            seed: 5,
        };
        pairs.add(&prompts, &voices, &answers, &pairing);
        assert!(pairs.lines.is_empty());
        assert_eq!(pairs.voices["help"].dropped[OTHERWISE], 1);
        assert_eq!(pairs.voices["needless"].dropped[OTHERWISE], 1);
        assert_eq!(
            (
                pairs.voices["terse"].used,
                pairs.voices["terse"].dropped[REPEATED]
            ),
            (1, 1)
        );
    }

    #[test]
    fn prompts_are_held_out_by_their_words() {
        let held = |seed: u64| -> Vec<usize> {
            let prompt = |i: usize| Prompt::new("s", "1", "c", &format!("prompt {i}"));
            (0..1000)
                .filter(|i| is_held_out(&prompt(*i), 0.2, seed))
                .collect()
        };
        let (one, other) = (held(1), held(2));
        assert!((150..250).contains(&one.len()), "{}", one.len());
        assert_eq!(one, held(1));
        assert_ne!(one, other);
    }
}
