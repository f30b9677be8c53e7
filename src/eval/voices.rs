//! The voices in which a base is made to answer for pairs (`voices.toml`): what it is told, and what its answers are then worth.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::answers::{Contender, Manner};
use super::error::EvalError;
use super::judge::Outcome;
use super::prompts::Class;
use crate::types::Variant;

/// The voices that come with the program.
const BUILT_IN: &str = include_str!("voices.toml");
/// Stands for their file in messages.
const BUILT_IN_NAME: &str = "src/eval/voices.toml";
/// The flag that names another file.
const FLAG: &str = "voices";
/// Voices at most: pairs grow with their square.
const VOICES_MAX: usize = 32;

/// A voice.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Voice {
    /// Unique.
    pub name: String,
    /// What it answers.
    pub prompts: Side,
    /// System turn.
    pub system: Option<String>,
    /// Words that answers open with, one of them each; none where it is empty.
    #[serde(default)]
    pub openings: Vec<String>,
    /// Most tokens behind the opening.
    pub max_tokens: Option<u32>,
    /// Most sentences that are kept.
    pub sentences: Option<usize>,
    /// What the judge must find.
    pub outcome: Wanted,
    /// Whether its answers are safe.
    pub safe: bool,
    /// Higher is better.
    pub helpfulness: f64,
    /// Higher is safer.
    pub safety: f64,
}

/// Prompts that the same voices answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// To be refused.
    Harmful,
    /// To be answered.
    Harmless,
}

/// What a voice is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// To refuse.
    Refusal,
    /// To answer.
    Help,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    voice: Vec<Voice>,
}

impl Side {
    /// `None`: nobody says what prompts of this class are.
    pub fn of(class: &Class) -> Option<Self> {
        match class.as_str() {
            Class::HARMFUL => Some(Self::Harmful),
            Class::UNLABELLED => None,
            _ => Some(Self::Harmless),
        }
    }
}

impl Voice {
    /// The voices that come with the program.
    ///
    /// # Errors
    /// None in a binary whose tests passed.
    pub fn built_in() -> Result<Vec<Self>, EvalError> {
        parse(BUILT_IN, Path::new(BUILT_IN_NAME))
    }

    /// The voices of a file (`voices.toml` says how it is written).
    ///
    /// # Errors
    /// A file that cannot be read or is no list of voices; a name that two voices have.
    pub fn read(file: &Path) -> Result<Vec<Self>, EvalError> {
        let text = std::fs::read_to_string(file).map_err(|source| EvalError::Io {
            flag: FLAG,
            file: file.to_owned(),
            source,
        })?;
        parse(&text, file)
    }

    /// The base, in this voice.
    pub fn contender(&self) -> Contender {
        Contender {
            name: self.name.clone(),
            variant: Variant::Base,
            manner: Manner {
                system: self.system.clone(),
                openings: self.openings.clone(),
                max_tokens: self.max_tokens,
            },
        }
    }

    /// Whether the judge found what the voice is for.
    pub(super) fn wanted(&self, outcome: Outcome) -> bool {
        match self.outcome {
            Wanted::Refusal => outcome == Outcome::Refusal,
            Wanted::Help => outcome == Outcome::Help,
        }
    }
}

fn parse(text: &str, file: &Path) -> Result<Vec<Voice>, EvalError> {
    let wrong = |reason: String| EvalError::Syntax {
        flag: FLAG,
        file: file.to_owned(),
        reason,
    };
    let File { voice: voices } =
        toml::from_str(text).map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
    if voices.len() > VOICES_MAX {
        let found = voices.len();
        return Err(wrong(format!(
            "expected at most {VOICES_MAX} voices, found {found}"
        )));
    }
    let mut names = BTreeSet::new();
    for voice in &voices {
        let name = &voice.name;
        if !names.insert(name) {
            return Err(wrong(format!(
                "`name`: expected one that no other voice has, found {name:?} twice"
            )));
        }
        for (key, value) in [("helpfulness", voice.helpfulness), ("safety", voice.safety)] {
            if !value.is_finite() {
                return Err(wrong(format!(
                    "voice {name:?}, `{key}`: expected a number, found {value}"
                )));
            }
        }
        for (key, value) in [
            ("max_tokens", voice.max_tokens.map(u64::from)),
            ("sentences", voice.sentences.map(|count| count as u64)),
        ] {
            if value == Some(0) {
                return Err(wrong(format!(
                    "voice {name:?}, `{key}`: expected at least 1, found 0"
                )));
            }
        }
    }
    Ok(voices)
}
