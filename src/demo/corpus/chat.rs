//! What is said beyond acts: small talk, facts, sums, and "I don't know".

use serde::{Deserialize, Serialize};

use super::Split;
use super::answers::one;
use super::data::{ChatData, Facts, Repeat, SmallTalk, Sums, Unknown};
use super::english::{capitalized, fix_articles};
use crate::random::SplitMix64;

/// A kind of exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChatKind {
    /// Greetings, thanks, "who are you".
    SmallTalk,
    /// A question with one right answer that it knows.
    Fact,
    /// A question whose answer it does not know.
    Unknown,
}

/// A question, and what may be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Of what.
    pub kind: ChatKind,
    /// The user's words.
    pub prompt: String,
    /// Right answers.
    pub answers: Vec<String>,
}

/// All exchanges.
pub(super) struct Chats {
    small_talk: Vec<SmallTalk>,
    facts: Vec<Facts>,
    sums: Sums,
    repeat: Repeat,
    pub(super) unknown: Unknown,
    pub(super) turns: super::data::Turns,
}

/// The largest number in a sum.
const ADDEND_MAX: usize = 9;
/// The largest sum.
pub(super) const SUM_MAX: usize = 2 * ADDEND_MAX;

impl Chats {
    pub(super) fn new(data: ChatData) -> Self {
        Self {
            small_talk: data.small_talk,
            facts: data.facts,
            sums: data.sums,
            repeat: data.repeat,
            unknown: data.unknown,
            turns: data.turns,
        }
    }

    /// An exchange of `kind` of `split`; small talk is never held out: it is a list of sayings.
    pub(super) fn draw(&self, kind: ChatKind, split: Split, random: &mut SplitMix64) -> Exchange {
        match kind {
            ChatKind::SmallTalk => self.small_talk(random),
            ChatKind::Fact => self.until(split, random, Self::fact),
            ChatKind::Unknown => self.until(split, random, Self::unknown),
        }
    }

    /// A request to say `what` again: (prompt, answer).
    pub(super) fn repeat(&self, what: &str, random: &mut SplitMix64) -> (String, String) {
        let filled = |form: &str| form.replace("{x}", what);
        let frame = one(&self.repeat.frames, random);
        (filled(frame), filled(&self.repeat.answer))
    }

    /// "I don't know", to a question or a request.
    pub(super) fn does_not_know(&self, what: &str) -> String {
        let lead = self.unknown.lead.replace("{what}", what);
        format!("{lead} {}", self.unknown.last)
    }

    /// A word that nobody knows.
    pub(super) fn made_up(&self, random: &mut SplitMix64) -> String {
        let syllables = 2 + random.below(2);
        (0..syllables)
            .map(|_| one(&self.unknown.syllables, random))
            .collect()
    }

    /// The capital of one of the countries: (country, capital).
    pub(super) fn capital(&self, random: &mut SplitMix64) -> (&str, &str) {
        let pairs = self.facts.first().map_or(&[][..], |facts| &facts.pairs);
        let pair = pairs.get(random.below(pairs.len()));
        pair.map_or(("", ""), |(country, capital)| (country, capital))
    }

    /// Question and answer of the first list of facts, the capitals.
    pub(super) fn ask_capital(
        &self,
        pair: (&str, &str),
        random: &mut SplitMix64,
    ) -> (String, String) {
        let Some(facts) = self.facts.first() else {
            return Default::default();
        };
        let question = one(&facts.frames, random);
        (filled(question, pair), filled(&facts.answer, pair))
    }

    fn until(
        &self,
        split: Split,
        random: &mut SplitMix64,
        draw: impl Fn(&Self, &mut SplitMix64) -> Exchange,
    ) -> Exchange {
        loop {
            let exchange = draw(self, random);
            if Split::of(&exchange.prompt) == split {
                return exchange;
            }
        }
    }

    /// Small talk that begins with the user's thanks.
    pub(super) fn thanks(&self, random: &mut SplitMix64) -> Exchange {
        let thanks = |talk: &&SmallTalk| talk.prompts.iter().any(|prompt| prompt == "Thank you!");
        let talk = self.small_talk.iter().find(thanks);
        exchange(talk.unwrap_or(&self.small_talk[0]), random)
    }

    fn small_talk(&self, random: &mut SplitMix64) -> Exchange {
        let talk = &self.small_talk[random.below(self.small_talk.len())];
        exchange(talk, random)
    }

    fn fact(&self, random: &mut SplitMix64) -> Exchange {
        let at = random.below(self.facts.len() + 1);
        let Some(facts) = self.facts.get(at) else {
            return self.sum(random);
        };
        let (x, y) = &facts.pairs[random.below(facts.pairs.len())];
        Exchange {
            kind: ChatKind::Fact,
            prompt: filled(one(&facts.frames, random), (x, y)),
            answers: vec![filled(&facts.answer, (x, y))],
        }
    }

    fn sum(&self, random: &mut SplitMix64) -> Exchange {
        let mut addend = || random.below(ADDEND_MAX + 1);
        let (x, y) = (addend(), addend());
        let pair = (x.to_string(), y.to_string());
        let pair = (pair.0.as_str(), pair.1.as_str());
        let answer = filled(&self.sums.answer, pair).replace("{z}", &(x + y).to_string());
        Exchange {
            kind: ChatKind::Fact,
            prompt: filled(one(&self.sums.frames, random), pair),
            answers: vec![answer],
        }
    }

    fn unknown(&self, random: &mut SplitMix64) -> Exchange {
        let unknown = &self.unknown;
        let topic = one(&unknown.topics, random);
        let (prompt, what) = match random.below(5) {
            0 => {
                let property = one(&unknown.properties, random);
                let frame = one(&unknown.property_frames, random).replace("{p}", property);
                let what = format!("the {property} of {topic}");
                (frame.replace("{x}", topic), what)
            }
            1 => {
                let frame = one(&unknown.topic_frames, random);
                let what = unknown.topic_what.replace("{x}", topic);
                (frame.replace("{x}", topic), what)
            }
            2 => {
                let work = one(&unknown.works, random);
                let frame = one(&unknown.work_frames, random).replace("{p}", work);
                let prompt = fix_articles(&frame.replace("{x}", topic));
                (prompt, unknown.work_what.clone())
            }
            3 => (
                one(&unknown.questions, random).to_owned(),
                "that".to_owned(),
            ),
            _ => {
                let word = self.made_up(random);
                let frame = one(&unknown.made_up_frames, random);
                let named = frame.replace("{X}", &capitalized(&word));
                (
                    fix_articles(&named.replace("{x}", &word)),
                    "that".to_owned(),
                )
            }
        };
        Exchange {
            kind: ChatKind::Unknown,
            prompt,
            answers: vec![self.does_not_know(&what)],
        }
    }
}

fn exchange(talk: &SmallTalk, random: &mut SplitMix64) -> Exchange {
    Exchange {
        kind: ChatKind::SmallTalk,
        prompt: one(&talk.prompts, random).to_owned(),
        answers: talk.answers.clone(),
    }
}

fn filled(form: &str, (x, y): (&str, &str)) -> String {
    form.replace("{x}", x)
        .replace("{X}", &capitalized(x))
        .replace("{y}", y)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[test]
    fn every_exchange_is_filled_in_and_the_splits_are_apart() {
        let chats = Chats::new(ChatData::embedded().unwrap());
        let mut random = SplitMix64::new(1, 0);
        for kind in [ChatKind::SmallTalk, ChatKind::Fact, ChatKind::Unknown] {
            for split in [Split::Train, Split::HeldOut] {
                for _ in 0..500 {
                    let exchange = chats.draw(kind, split, &mut random);
                    let answers = exchange.answers.iter();
                    for text in answers.chain([&exchange.prompt]) {
                        assert!(!text.is_empty() && !text.contains(['{', '}']), "{text}");
                    }
                    if kind != ChatKind::SmallTalk {
                        assert_eq!(Split::of(&exchange.prompt), split);
                    }
                }
            }
        }
    }
}
