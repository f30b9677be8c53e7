//! Special tokens in text that is part template, part user: found in what the template wrote, hidden in what the user wrote.
//!
//! The library finds special tokens by their text alone and cannot know who wrote it. So texts are searched and renamed here:
//! [`SpecialTokens::hide`] breaks them in the user's strings by a mark, [`SpecialTokens::split`] finds those left in the
//! rendered chat, and [`SpecialTokens::name`] gives each a name that no text contains, which is what the library then looks for.

use std::collections::HashSet;

use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, Token,
};

use super::TextError;
use crate::types::TokenId;

/// Part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment<'a> {
    /// This token, whatever its text.
    Special(TokenId),
    /// Words: never a special token.
    Words(&'a str),
}

/// The special tokens of a tokenizer, ready to be found.
pub(super) struct SpecialTokens {
    /// Finds the special tokens' texts.
    finder: Aliases,
    /// Finds their names, and the added tokens that are words.
    named: Names,
    /// Every added token, for names made anew.
    added: Vec<(TokenId, AddedToken)>,
    /// Proper suffixes and prefixes of the special tokens' texts.
    tails: HashSet<String>,
    heads: HashSet<String>,
}

/// The names of special tokens: `mark`, a number, `mark`.
pub(super) struct Names {
    aliases: Aliases,
    mark: char,
}

/// An [`AddedVocabulary`] whose ids are ours to choose.
struct Aliases {
    vocabulary: AddedVocabulary,
    /// The token behind the alias `ALIAS_BASE + index`.
    tokens: Vec<TokenId>,
}

/// Aliases are numbered from here, above every real id.
const ALIAS_BASE: u32 = 1 << 31;
/// Characters that no text should contain: supplementary private use area B.
const MARKS: std::ops::RangeInclusive<u32> = 0x10_0000..=0x10_fffd;
/// A special token of one character cannot be told from the user's: it is always a word.
const SPECIAL_CHARS_MIN: usize = 2;

impl SpecialTokens {
    pub(super) fn new(library: &tokenizers::Tokenizer) -> Result<Self, TextError> {
        let mut added: Vec<_> = library
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| (TokenId(id), token))
            .collect();
        added.sort_by_key(|(id, _)| *id);
        let special = || {
            added
                .iter()
                .filter(|(_, token)| is_findable(token))
                .map(|(id, token)| (*id, token.content.as_str()))
        };
        let finder = Aliases::new(
            special().map(|(id, text)| (id, bare(text))),
            None::<&NormalizerWrapper>,
        )?;
        let mark = unused_mark(special().map(|(_, text)| text))?;
        let named = Names::new(&added, mark, library.get_normalizer())?;
        let (mut tails, mut heads) = (HashSet::new(), HashSet::new());
        for (_, text) in special() {
            for (at, _) in text.char_indices().skip(1) {
                let (head, tail) = text.split_at(at);
                heads.insert(head.to_owned());
                tails.insert(tail.to_owned());
            }
        }
        Ok(Self {
            finder,
            named,
            added,
            tails,
            heads,
        })
    }

    /// The texts of all added tokens.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.added.iter().map(|(_, token)| token.content.as_str())
    }

    /// `text` with `mark` inserted so that [`SpecialTokens::split`] finds nothing in it, also when a template trims it or puts
    /// other text around it. `mark` occurs in no text.
    pub(super) fn hide(&self, text: &str, mark: char) -> String {
        let mut hidden = text.to_owned();
        // A mark inside the longest match can leave a shorter one whole: until there is none. Every round breaks at least one.
        loop {
            let mut marked = String::with_capacity(hidden.len() + 16);
            let mut broken = false;
            for (text, id) in self.finder.find(&hidden) {
                let mut characters = text.chars();
                if id.is_some() {
                    broken = true;
                    marked.extend(characters.next());
                    marked.push(mark);
                }
                marked.push_str(characters.as_str());
            }
            hidden = marked;
            if !broken {
                break;
            }
        }
        let trimmed = hidden.trim_start();
        if has_prefix(trimmed, &self.tails) {
            let at = hidden.len() - trimmed.len();
            hidden.insert(at, mark);
        }
        let trimmed = hidden.trim_end();
        if has_suffix(trimmed, &self.heads) {
            hidden.insert(trimmed.len(), mark);
        }
        hidden
    }

    /// Cuts `text` at the special tokens in it.
    pub(super) fn split<'a>(&'a self, text: &'a str) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let mut at = 0;
        for (part, id) in self.finder.find(text) {
            let words = text.get(at..at + part.len()).unwrap_or_default();
            at += part.len();
            segments.push(match id {
                Some(id) => Segment::Special(id),
                None => Segment::Words(words),
            });
        }
        segments
    }

    /// One text in which every special token is written by name, and the names. Words of the text never match a name.
    pub(super) fn name<'a>(
        &'a self,
        segments: &[Segment<'_>],
        library: &tokenizers::Tokenizer,
    ) -> Result<(String, NamesUsed<'a>), TextError> {
        let words = || {
            segments.iter().filter_map(|segment| match segment {
                Segment::Words(words) => Some(*words),
                Segment::Special(_) => None,
            })
        };
        let names = if words().any(|words| words.contains(self.named.mark)) {
            let texts = self.added.iter().map(|(_, token)| token.content.as_str());
            let mark = unused_mark(words().chain(texts))?;
            NamesUsed::Fresh(Box::new(Names::new(
                &self.added,
                mark,
                library.get_normalizer(),
            )?))
        } else {
            NamesUsed::Usual(&self.named)
        };
        let mut text = String::new();
        for segment in segments {
            match segment {
                Segment::Words(words) => text.push_str(words),
                Segment::Special(id) => text.push_str(&names.get().name(*id)),
            }
        }
        Ok((text, names))
    }
}

/// Where names come from.
pub(super) enum NamesUsed<'a> {
    /// Made at load.
    Usual(&'a Names),
    /// Made for a text that contains the usual mark.
    Fresh(Box<Names>),
}

impl NamesUsed<'_> {
    pub(super) fn get(&self) -> &Names {
        match self {
            Self::Usual(names) => names,
            Self::Fresh(names) => names,
        }
    }
}

impl Names {
    fn new(
        added: &[(TokenId, AddedToken)],
        mark: char,
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<Self, TextError> {
        let tokens = added.iter().map(|(id, token)| {
            let mut token = token.clone();
            if token.special {
                token.content = name_of(*id, mark);
                token.normalized = false;
                token.single_word = false;
            }
            (*id, token)
        });
        Ok(Self {
            aliases: Aliases::new(tokens, normalizer)?,
            mark,
        })
    }

    fn name(&self, id: TokenId) -> String {
        name_of(id, self.mark)
    }

    /// `text` cut at names and added words, the rest normalised, as the library does before it applies its model.
    pub(super) fn extract(
        &self,
        text: &str,
        normalizer: Option<&NormalizerWrapper>,
    ) -> PreTokenizedString {
        self.aliases
            .vocabulary
            .extract_and_normalize(normalizer, text)
    }

    /// The token behind an id that came of [`Names::extract`] and the model.
    pub(super) fn token(&self, id: u32) -> TokenId {
        self.aliases.token(id).unwrap_or(TokenId(id))
    }
}

impl Aliases {
    fn new(
        tokens: impl Iterator<Item = (TokenId, AddedToken)>,
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<Self, TextError> {
        let (ids, tokens): (Vec<_>, Vec<_>) = tokens.unzip();
        let mut vocabulary = AddedVocabulary::new();
        vocabulary
            .add_tokens(tokens, &Nothing, normalizer)
            .map_err(|error| TextError::Tokenizer {
                reason: format!("added_tokens: {error}"),
            })?;
        Ok(Self {
            vocabulary,
            tokens: ids,
        })
    }

    fn token(&self, id: u32) -> Option<TokenId> {
        let index = id.checked_sub(ALIAS_BASE)?;
        self.tokens.get(index as usize).copied()
    }

    /// The parts of `text`, in order, and whole.
    fn find(&self, text: &str) -> Vec<(String, Option<TokenId>)> {
        let parts = self
            .vocabulary
            .extract_and_normalize(None::<&NormalizerWrapper>, text);
        parts
            .get_splits(OffsetReferential::Original, OffsetType::None)
            .into_iter()
            .map(|(part, _, tokens)| {
                let token = tokens.as_ref().and_then(|tokens| tokens.first());
                (
                    part.to_owned(),
                    token.and_then(|token| self.token(token.id)),
                )
            })
            .collect()
    }
}

fn name_of(id: TokenId, mark: char) -> String {
    format!("{mark}{}{mark}", id.0)
}

/// A special token that is matched by its text alone.
fn bare(text: &str) -> AddedToken {
    AddedToken::from(text, true)
}

fn is_findable(token: &AddedToken) -> bool {
    token.special && token.content.chars().nth(SPECIAL_CHARS_MIN - 1).is_some()
}

/// A private-use character that occurs in none of `texts`.
pub(super) fn unused_mark<'a>(texts: impl Iterator<Item = &'a str>) -> Result<char, TextError> {
    let used: HashSet<u32> = texts
        .flat_map(str::chars)
        .map(u32::from)
        .filter(|code| MARKS.contains(code))
        .collect();
    MARKS
        .rev()
        .find(|code| !used.contains(code))
        .and_then(char::from_u32)
        .ok_or_else(|| TextError::Encode {
            reason: "it contains every private-use character".to_owned(),
        })
}

fn has_prefix(text: &str, set: &HashSet<String>) -> bool {
    let longest = set.iter().map(String::len).max().unwrap_or_default();
    text.char_indices()
        .map(|(at, character)| at + character.len_utf8())
        .take_while(|end| *end <= longest)
        .any(|end| text.get(..end).is_some_and(|head| set.contains(head)))
}

fn has_suffix(text: &str, set: &HashSet<String>) -> bool {
    let longest = set.iter().map(String::len).max().unwrap_or_default();
    text.char_indices()
        .rev()
        .map(|(at, _)| at)
        .take_while(|at| text.len() - at <= longest)
        .any(|at| text.get(at..).is_some_and(|tail| set.contains(tail)))
}

/// A model without words, so that an [`AddedVocabulary`] numbers its tokens from [`ALIAS_BASE`].
struct Nothing;

impl Model for Nothing {
    type Trainer = BpeTrainer;

    fn tokenize(&self, _: &str) -> tokenizers::Result<Vec<Token>> {
        Ok(Vec::new())
    }

    fn token_to_id(&self, _: &str) -> Option<u32> {
        None
    }

    fn id_to_token(&self, _: u32) -> Option<String> {
        None
    }

    fn get_vocab(&self) -> std::collections::HashMap<String, u32> {
        std::collections::HashMap::new()
    }

    fn get_vocab_size(&self) -> usize {
        ALIAS_BASE as usize
    }

    fn save(
        &self,
        _: &std::path::Path,
        _: Option<&str>,
    ) -> tokenizers::Result<Vec<std::path::PathBuf>> {
        Ok(Vec::new())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}
