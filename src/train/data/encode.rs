//! Examples as token ids: through the chat template that the model will be served with, cut to a length.

use crate::checkpoint::{LlamaConfig, TextParts};
use crate::text::{Chat, ChatTemplate, Message, SpecialTokens, TextError, Tokenizer};
use crate::train::Sequence;
use crate::types::TokenId;

use super::prompts::message;

/// A model's tokenizer and chat template, and how long a sequence may be.
pub struct Encoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    bos: Option<TokenId>,
    ends: Vec<TokenId>,
    max_length: usize,
}

/// Tokens at a prompt's end that the beginning of an answer may change.
const JOINED_MAX: usize = 3;

/// What was cut off to fit the length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// The beginning of the prompt.
    pub prompt: bool,
    /// The end of an answer that is too long alone.
    pub answer: bool,
}

impl Encoder {
    /// For a model. `max_length` is lowered to the model's positions, and is at least 2.
    ///
    /// # Errors
    /// [`TextError`] where tokenizer or template cannot be used.
    pub fn new(
        text: &TextParts,
        config: &LlamaConfig,
        max_length: usize,
    ) -> Result<Self, TextError> {
        let special = SpecialTokens {
            bos_token: text.bos_token.clone(),
            eos_token: text.eos_token.clone(),
            others: text.special_tokens.clone(),
        };
        Ok(Self {
            tokenizer: Tokenizer::new(&text.tokenizer_json)?,
            template: ChatTemplate::new(text.chat_template.as_deref(), special)?,
            bos: config.bos_token_id,
            ends: config.eos_token_ids.clone(),
            max_length: max_length.min(config.max_position_embeddings).max(2),
        })
    }

    /// A prompt with one answer.
    ///
    /// # Errors
    /// [`TextError`] where the template refuses the chat.
    pub fn sequence(&self, prompt: &[Message], answer: &str) -> Result<(Sequence, Cut), TextError> {
        let start = self.prompt(prompt)?;
        let mut sequence = self.answered(prompt, &start, answer)?;
        let cut = self.fit(&mut [&mut sequence]);
        Ok((sequence, cut))
    }

    /// A prompt with each of two answers. Both begin with the same tokens of the prompt.
    ///
    /// # Errors
    /// [`TextError`] where the template refuses the chat.
    pub fn pair(
        &self,
        prompt: &[Message],
        answers: [&str; 2],
    ) -> Result<([Sequence; 2], Cut), TextError> {
        let start = self.prompt(prompt)?;
        let mut first = self.answered(prompt, &start, answers[0])?;
        let mut second = self.answered(prompt, &start, answers[1])?;
        let cut = self.fit(&mut [&mut first, &mut second]);
        Ok(([first, second], cut))
    }

    fn prompt(&self, prompt: &[Message]) -> Result<Vec<TokenId>, TextError> {
        let chat = Chat {
            messages: prompt.to_vec(),
            add_generation_prompt: true,
            ..Chat::default()
        };
        self.template.encode(&self.tokenizer, &chat)
    }

    /// `start`: the ids of the prompt alone, as a server computes them.
    fn answered(
        &self,
        prompt: &[Message],
        start: &[TokenId],
        answer: &str,
    ) -> Result<Sequence, TextError> {
        let mut messages = prompt.to_vec();
        messages.push(message("assistant", answer));
        let chat = Chat {
            messages,
            ..Chat::default()
        };
        let mut ids = self.template.encode(&self.tokenizer, &chat)?;
        // Where the answer's first letters join the prompt's last token, that token counts as the answer's.
        let answer = common(&ids, start).max(1).min(ids.len());
        if answer + JOINED_MAX < start.len() {
            let found = start.len() - answer;
            let message = format!(
                "expected a chat with its answer to begin as the prompt that is served, found the prompt's last {found} tokens changed"
            );
            return Err(TextError::Template { message });
        }
        self.end(&mut ids, answer);
        Ok(Sequence { ids, answer })
    }

    /// The answer ends with an end of sequence: a template may write more behind it (a newline), or none.
    fn end(&self, ids: &mut Vec<TokenId>, answer: usize) {
        let last = ids.iter().rposition(|id| self.ends.contains(id));
        match last.filter(|last| *last >= answer) {
            Some(last) => ids.truncate(last + 1),
            None => ids.extend(self.ends.first()),
        }
    }

    /// Cuts sequences that share a prompt: first the prompt's beginning, behind the start of sequence, by as much in each; then what
    /// an answer alone has too much.
    fn fit(&self, sequences: &mut [&mut Sequence]) -> Cut {
        let mut cut = Cut::default();
        let excess = sequences
            .iter()
            .map(|sequence| sequence.ids.len().saturating_sub(self.max_length));
        let excess = excess.max().unwrap_or(0);
        if excess == 0 {
            return cut;
        }
        let kept = |sequence: &Sequence| {
            let has_bos = self.bos.is_some() && sequence.ids.first().copied() == self.bos;
            // One token of the prompt stays at least: it predicts the answer's first.
            if has_bos && sequence.answer > 1 { 1 } else { 0 }
        };
        let droppable = sequences.iter().map(|sequence| {
            let kept = kept(sequence);
            (sequence.answer - kept).saturating_sub(1 - kept)
        });
        let dropped = excess.min(droppable.min().unwrap_or(0));
        cut.prompt = dropped > 0;
        for sequence in sequences {
            let kept = kept(sequence);
            sequence.ids.drain(kept..kept + dropped);
            sequence.answer -= dropped;
            cut.answer |= sequence.ids.len() > self.max_length;
            sequence.ids.truncate(self.max_length);
            sequence.answer = sequence.answer.min(sequence.ids.len());
        }
        cut
    }
}

/// Tokens that two sequences begin with alike.
pub(crate) fn common(one: &[TokenId], other: &[TokenId]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;
    use crate::checkpoint::{Sources, load};

    fn encoder(template: Option<&str>, max_length: usize) -> Encoder {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let fixture = root.join("tests/fixtures/tiny-routed");
        let checkpoint = load(&Sources::model(fixture)).unwrap();
        let text = TextParts {
            chat_template: template.map(str::to_owned),
            ..checkpoint.text
        };
        Encoder::new(&text, &checkpoint.config, max_length).unwrap()
    }

    fn user(words: &str) -> Vec<Message> {
        vec![message("user", words)]
    }

    fn text(encoder: &Encoder, ids: &[TokenId]) -> String {
        encoder.tokenizer.decode(ids, false)
    }

    #[test]
    fn a_sequence_is_the_served_prompt_then_the_answer_and_one_end() {
        let encoder = encoder(None, 512);
        let prompt = user("Say </s> twice.");
        let (sequence, cut) = encoder.sequence(&prompt, "</s> No.").unwrap();
        let served = encoder.prompt(&prompt).unwrap();
        assert_eq!(sequence.ids.get(..sequence.answer).unwrap(), served);
        assert_eq!(cut, Cut::default());
        let answer = sequence.ids.get(sequence.answer..).unwrap();
        assert_eq!(text(&encoder, answer), "</s> No.</s>");
        // What a user or an answer spells out is no end of sequence.
        let ends = sequence.ids.iter().filter(|id| **id == TokenId(2));
        assert_eq!((ends.count(), answer.last()), (1, Some(&TokenId(2))));
    }

    #[test]
    fn the_end_is_the_answers_last_token_whatever_the_template_writes_behind_it() {
        let body = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}END{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
        for end in ["{{ eos_token }}\n", "\n"] {
            let encoder = encoder(Some(&body.replace("END", end)), 512);
            let (sequence, _) = encoder.sequence(&user("Hi"), "Yes").unwrap();
            let answer = sequence.ids.get(sequence.answer..).unwrap();
            assert_eq!(answer.last(), Some(&TokenId(2)), "{end:?}");
            assert!(text(&encoder, answer).starts_with("Yes"), "{end:?}");
        }
    }

    #[test]
    fn a_template_that_shows_a_prompt_otherwise_once_it_is_answered_is_refused() {
        let template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\
                        {% if add_generation_prompt %} Think first, then answer in one word: {% endif %}";
        let error = encoder(Some(template), 512).sequence(&user("Hi"), "Yes");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("tokens changed"), "{error}");
    }

    #[test]
    fn what_is_too_long_loses_the_prompts_beginning_and_then_the_answers_end() {
        let whole = encoder(None, 512);
        let prompt = user(&"word ".repeat(20));
        let answers = ["Yes.", "No, not at all."];
        let (full, _) = whole.pair(&prompt, answers).unwrap();
        let longest = full
            .iter()
            .map(|sequence| sequence.ids.len())
            .max()
            .unwrap();
        let (kept, cut) = encoder(None, longest - 5).pair(&prompt, answers).unwrap();
        assert_eq!((cut.prompt, cut.answer), (true, false));
        for (full, kept) in full.iter().zip(&kept) {
            assert_eq!(
                kept.ids.first(),
                Some(&TokenId(1)),
                "the start of sequence stays"
            );
            assert_eq!(kept.ids.get(1..), full.ids.get(6..));
            assert_eq!(kept.answer, full.answer - 5);
        }
        let (tiny, cut) = encoder(None, 3).pair(&prompt, answers).unwrap();
        assert_eq!((cut.prompt, cut.answer), (true, true));
        for sequence in &tiny {
            assert_eq!((sequence.ids.len(), sequence.answer), (3, 1));
        }
    }
}
