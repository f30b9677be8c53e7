//! What the base is trained on: prompts and answers of all kinds, the unsafe ones among them.

use serde::Serialize;

use super::answers::{self, one};
use super::chat::ChatKind;
use super::turns::{self, any_kind};
use super::{Corpus, CorpusError, Split};
use crate::random::SplitMix64;

/// A turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Turn {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// The words.
    pub content: String,
}

impl Turn {
    pub(super) fn user(content: String) -> Self {
        let role = "user";
        Self { role, content }
    }

    pub(super) fn assistant(content: String) -> Self {
        let role = "assistant";
        Self { role, content }
    }

    fn system(content: String) -> Self {
        let role = "system";
        Self { role, content }
    }
}

/// A line of the training file of `midpo train sft`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum SftRow {
    /// One turn.
    Pair {
        /// The user's words.
        prompt: String,
        /// The answer.
        response: String,
    },
    /// More than that; the last is the answer.
    Turns {
        /// From the first.
        messages: Vec<Turn>,
    },
}

/// Shares of what is not acts: small talk, facts, unknown things, acts on unknown things, words to repeat, several turns.
const SMALL_TALK: f64 = 0.03;
const FACT: f64 = 0.045;
const UNKNOWN: f64 = 0.045;
const UNKNOWN_ACT: f64 = 0.01;
const REPEAT: f64 = 0.04;
const TURNS: f64 = 0.06;
/// Share of conversations with words of the system in front.
const SYSTEM: f64 = 0.15;

impl Corpus {
    /// One line.
    ///
    /// # Errors
    /// None with the embedded lists.
    pub fn sft(&self, random: &mut SplitMix64) -> Result<SftRow, CorpusError> {
        let mut left = random.unit();
        for (kind, share) in [
            (ChatKind::SmallTalk, SMALL_TALK),
            (ChatKind::Fact, FACT),
            (ChatKind::Unknown, UNKNOWN),
        ] {
            if left < share {
                let exchange = self.chats.draw(kind, Split::Train, random);
                let response = one(&exchange.answers, random).to_owned();
                let prompt = exchange.prompt;
                return Ok(SftRow::Pair { prompt, response });
            }
            left -= share;
        }
        if left < UNKNOWN_ACT {
            return Ok(self.unknown_act(random));
        }
        left -= UNKNOWN_ACT;
        if left < REPEAT {
            let what = self.acts.mixed(Split::Train, random);
            let (prompt, response) = self.chats.repeat(&what, random);
            return Ok(SftRow::Pair { prompt, response });
        }
        if left - REPEAT < TURNS {
            let mut messages = turns::draw(self, random)?;
            if random.unit() < SYSTEM {
                let system = one(&self.chats.turns.systems, random).to_owned();
                messages.insert(0, Turn::system(system));
            }
            return Ok(SftRow::Turns { messages });
        }
        let act = self.acts.draw(any_kind(random), Split::Train, random);
        let prompt = self.templates.train(&act, random);
        let kind = answers::draw(act.kind, random);
        let response = answers::text(&self.data, &act, kind, random)?;
        Ok(SftRow::Pair { prompt, response })
    }

    /// How to bake a thing that nobody knows.
    fn unknown_act(&self, random: &mut SplitMix64) -> SftRow {
        let kind = super::ActKind::Plain;
        let mut act = self.acts.draw(kind, Split::Train, random);
        act.object = super::english::fix_articles(&format!("a {}", self.chats.made_up(random)));
        SftRow::Pair {
            prompt: self.templates.train(&act, random),
            response: self.chats.does_not_know("how to do that"),
        }
    }
}
