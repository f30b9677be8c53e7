//! The demo's corpus (demo/README.md): prompts, answers and preferences, all of them written by this program from the lists in
//! `demo/corpus/`. A function of a seed; what is held out is not: it is decided by hashes of what is said, the same for all seeds.

mod acts;
mod answers;
mod chat;
mod data;
mod english;
mod error;
mod held_out;
mod pairs;
mod sft;
mod template;
mod turns;
mod write;

pub use acts::{Act, ActKind};
pub use answers::AnswerKind;
pub use chat::{ChatKind, Exchange};
pub use error::CorpusError;
pub use held_out::{Asked, HeldOutPrompt, Part};
pub use pairs::{PairRow, PairSet};
pub use sft::{SftRow, Turn};
pub use write::{Sizes, Written, held_out_of, write};

pub(super) use english::words;

use std::collections::BTreeSet;

use acts::Acts;
use chat::Chats;
use data::{ChatData, Data};
use template::Templates;

use crate::random::SplitMix64;

/// Everything that can be said.
pub struct Corpus {
    data: Data,
    acts: Acts,
    templates: Templates,
    chats: Chats,
}

/// Whether training may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Split {
    /// It may.
    Train,
    /// It never does.
    HeldOut,
}

impl Split {
    /// One in five is held out: by a hash of `name`, so that no seed and no order of lists moves it.
    fn of(name: &str) -> Self {
        const HELD_OUT_SHARE: f64 = 0.2;
        const STREAM: u64 = 0x5711;
        let draw = SplitMix64::new(english::hash(name), STREAM).unit();
        if draw < HELD_OUT_SHARE {
            Self::HeldOut
        } else {
            Self::Train
        }
    }
}

impl Corpus {
    /// From the lists inside the binary.
    ///
    /// # Errors
    /// None in a binary whose tests passed: [`CorpusError::Data`] names a list that is not as it must be.
    pub fn new() -> Result<Self, CorpusError> {
        let data = Data::embedded()?;
        let acts = Acts::new(&data)?;
        let templates = Templates::new(&data.templates);
        let chats = Chats::new(ChatData::embedded()?);
        Ok(Self {
            data,
            acts,
            templates,
            chats,
        })
    }

    /// Number of templates: (in training, held out as compositions, with frames that training never has).
    pub fn templates(&self) -> (usize, usize, usize) {
        self.templates.counts()
    }

    /// Number of combinations of verb and object: (in training, held out).
    pub fn combinations(&self, kind: ActKind) -> (usize, usize) {
        self.acts.counts(kind)
    }

    /// The words of an answer of `kind` to `act`.
    ///
    /// # Errors
    /// None for an act of this corpus: [`CorpusError::Unknown`] for one of a class or domain that it does not have.
    pub fn answer(
        &self,
        act: &Act,
        kind: AnswerKind,
        random: &mut SplitMix64,
    ) -> Result<String, CorpusError> {
        answers::text(&self.data, act, kind, random)
    }

    /// Every word that an answer may have, in small letters; numbers up to those of sums.
    ///
    /// # Errors
    /// As [`Corpus::new`].
    pub fn lexicon(&self) -> Result<BTreeSet<String>, CorpusError> {
        let strings = Data::strings()?;
        let said = strings.iter().map(|text| english::said_to_user(text));
        let mut lexicon: BTreeSet<String> = said
            .flat_map(|text| words(&text).collect::<Vec<_>>())
            .collect();
        // "my boss's": lists have people without the ending.
        let people = self.data.acts.people.iter();
        lexicon.extend(people.flat_map(|person| words(&format!("{person}'s")).collect::<Vec<_>>()));
        lexicon.extend((0..=chat::SUM_MAX).map(|number| number.to_string()));
        lexicon.extend(["an".to_owned()]);
        Ok(lexicon)
    }

    pub(super) fn data(&self) -> &Data {
        &self.data
    }
}
