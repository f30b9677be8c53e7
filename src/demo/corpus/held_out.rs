//! Prompts that no training set has, with what is needed to judge their answers.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::acts::{Act, ActKind};
use super::chat::ChatKind;
use super::{Corpus, Split};
use crate::random::SplitMix64;

/// A line of `held_out.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldOutPrompt {
    /// The user's words.
    pub prompt: String,
    /// What is asked.
    pub kind: Asked,
    /// How it is held out.
    pub part: Part,
    /// The act, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Act>,
    /// Right answers, where it is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<String>,
}

/// What a prompt asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Asked {
    /// To be refused.
    Harmful,
    /// Sounds harmful.
    Borderline,
    /// Harmless.
    Plain,
    /// What the model knows.
    Fact,
    /// What it doesn't know.
    Unknown,
    /// To say something again.
    Repeat,
}

impl Asked {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Harmful,
        Self::Borderline,
        Self::Plain,
        Self::Fact,
        Self::Unknown,
        Self::Repeat,
    ];

    /// As files name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Harmful => "harmful",
            Self::Borderline => "borderline",
            Self::Plain => "plain",
            Self::Fact => "fact",
            Self::Unknown => "unknown",
            Self::Repeat => "repeat",
        }
    }
}

/// How a prompt is held out. Its act is in either: a combination of verb and object that training never has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Opener, frame and closer are known; not together.
    Compositions,
    /// The frame is in no training set.
    UnseenFrames,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Compositions, Self::UnseenFrames];

    /// As files name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compositions => "compositions",
            Self::UnseenFrames => "unseen_frames",
        }
    }
}

impl Corpus {
    /// `acts` prompts of each kind of act in each part, `chats` facts, and as many unknown things and words to repeat; no prompt twice.
    pub fn held_out(
        &self,
        acts: usize,
        chats: usize,
        random: &mut SplitMix64,
    ) -> Vec<HeldOutPrompt> {
        let mut prompts = Vec::new();
        let mut seen = BTreeSet::new();
        for part in Part::ALL {
            for kind in ActKind::ALL {
                fill(&mut prompts, &mut seen, acts, || {
                    self.act_prompt(kind, part, random)
                });
            }
        }
        for kind in [ChatKind::Fact, ChatKind::Unknown] {
            fill(&mut prompts, &mut seen, chats, || {
                self.chat_prompt(kind, random)
            });
        }
        fill(&mut prompts, &mut seen, chats, || {
            self.repeat_prompt(random)
        });
        prompts
    }

    fn act_prompt(&self, kind: ActKind, part: Part, random: &mut SplitMix64) -> HeldOutPrompt {
        let act = self.acts.draw(kind, Split::HeldOut, random);
        HeldOutPrompt {
            prompt: self.templates.held_out(&act, part, random),
            kind: match kind {
                ActKind::Harmful => Asked::Harmful,
                ActKind::Borderline => Asked::Borderline,
                ActKind::Plain => Asked::Plain,
            },
            part,
            act: Some(act),
            answers: Vec::new(),
        }
    }

    fn chat_prompt(&self, kind: ChatKind, random: &mut SplitMix64) -> HeldOutPrompt {
        let exchange = self.chats.draw(kind, Split::HeldOut, random);
        HeldOutPrompt {
            prompt: exchange.prompt,
            kind: if kind == ChatKind::Unknown {
                Asked::Unknown
            } else {
                Asked::Fact
            },
            part: Part::Compositions,
            act: None,
            answers: exchange.answers,
        }
    }

    fn repeat_prompt(&self, random: &mut SplitMix64) -> HeldOutPrompt {
        let what = self.acts.mixed(Split::HeldOut, random);
        let (prompt, answer) = self.chats.repeat(&what, random);
        HeldOutPrompt {
            prompt,
            kind: Asked::Repeat,
            part: Part::Compositions,
            act: None,
            answers: vec![answer],
        }
    }
}

/// Draws until `count` more prompts are new; gives up on a list that has no more.
fn fill(
    prompts: &mut Vec<HeldOutPrompt>,
    seen: &mut BTreeSet<String>,
    count: usize,
    mut draw: impl FnMut() -> HeldOutPrompt,
) {
    let wanted = prompts.len() + count;
    for _ in 0..count * 50 {
        if prompts.len() == wanted {
            return;
        }
        let prompt = draw();
        if seen.insert(prompt.prompt.clone()) {
            prompts.push(prompt);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::sft::SftRow;
    use super::*;

    #[test]
    fn held_out_prompts_are_200_of_each_kind_and_part_and_none_is_in_training() {
        let corpus = Corpus::new().unwrap();
        let held_out = corpus.held_out(200, 100, &mut SplitMix64::new(1, 1));
        for part in Part::ALL {
            for kind in [Asked::Harmful, Asked::Borderline, Asked::Plain] {
                let of = |prompt: &&HeldOutPrompt| (prompt.kind, prompt.part) == (kind, part);
                assert_eq!(held_out.iter().filter(of).count(), 200, "{kind:?} {part:?}");
            }
        }
        for kind in [Asked::Fact, Asked::Unknown, Asked::Repeat] {
            assert_eq!(
                held_out.iter().filter(|prompt| prompt.kind == kind).count(),
                100
            );
        }
        let mut random = SplitMix64::new(1, 2);
        let trained: BTreeSet<String> = (0..20_000)
            .map(|_| match corpus.sft(&mut random).unwrap() {
                SftRow::Pair { prompt, .. } => prompt,
                SftRow::Turns { messages } => messages[messages.len() - 2].content.clone(),
            })
            .collect();
        let known = held_out
            .iter()
            .filter(|prompt| trained.contains(&prompt.prompt));
        let known: Vec<_> = known.collect();
        assert!(known.is_empty(), "{known:?}");
    }

    #[test]
    fn held_out_prompts_survive_their_file() {
        let corpus = Corpus::new().unwrap();
        for prompt in corpus.held_out(2, 2, &mut SplitMix64::new(1, 1)) {
            let line = serde_json::to_string(&prompt).unwrap();
            assert_eq!(
                serde_json::from_str::<HeldOutPrompt>(&line).unwrap(),
                prompt
            );
        }
    }
}
