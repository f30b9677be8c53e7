//! Chat templates, as Hugging Face renders them, and the ids of the chats that they render.

use std::fmt;
use std::io;
use std::sync::Arc;

use minijinja::Environment;
use minijinja::value::Serde;
use serde_json::{Map, Value as Json};

use super::jinja::{describe, environment, message_of, without_generation_blocks};
use super::special::{Segment, unused_mark};
use super::{TextError, Tokenizer};
use crate::types::TokenId;

/// A rendered chat.
const RENDERED_BYTES_MAX: usize = 4 << 20;
/// A template's source.
const SOURCE_BYTES_MAX: usize = 1 << 20;

/// The template of the paper's models (MIDPO.md 2), for bases that have none. No newline anywhere, no space after `ASSISTANT:`.
/// The authors' prompts have no system turn: its text goes in front of the user's, with a space between.
const PAPER_TEMPLATE: &str = "\
{%- set ns = namespace(system='') -%}
{{- 'BEGINNING OF CONVERSATION: ' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + ns.system + message['content'] -}}
{%- set ns.system = '' -%}
{%- if add_generation_prompt or not loop.last -%}{{- ' ASSISTANT:' -}}{%- endif -%}
{%- elif message['role'] == 'assistant' and not loop.first and loop.previtem['role'] == 'user' -%}
{{- message['content'] + eos_token -}}
{%- elif message['role'] in ['system', 'developer'] and not loop.last -%}
{%- set ns.system = ns.system + message['content'] + ' ' -%}
{%- else -%}
{{- raise_exception('this model takes turns of user and assistant, the user first; a system message goes before a user message') -}}
{%- endif -%}
{%- endfor -%}";

/// Special tokens that templates name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `bos_token`.
    pub bos_token: Option<String>,
    /// `eos_token`.
    pub eos_token: Option<String>,
    /// Others: (`unk_token`, its text), ...
    pub others: Vec<(String, String)>,
}

/// A turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: String,
    /// The words.
    pub content: String,
    /// What else the template may look at: `name`, `tool_calls`, ...
    pub extra: Map<String, Json>,
}

/// What a template renders.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// The turns.
    pub messages: Vec<Message>,
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// The last turn goes on: nothing comes after its words.
    pub continue_final_message: bool,
    /// More variables for the template (`chat_template_kwargs`, `tools`).
    pub kwargs: Map<String, Json>,
}

/// A model's chat template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    environment: Environment<'static>,
    source: String,
    special: SpecialTokens,
    /// The tokenizer puts its start of sequence in front (the built-in template does not write one; Jinja templates do).
    bos: bool,
}

impl ChatTemplate {
    /// `source`: Jinja as in `tokenizer_config.json`; `None`: the paper's template.
    ///
    /// # Errors
    /// [`TextError::TemplateSource`] says where it is no Jinja.
    pub fn new(source: Option<&str>, special: SpecialTokens) -> Result<Self, TextError> {
        let bos = source.is_none();
        let mut special = special;
        if bos {
            special.eos_token.get_or_insert_with(|| "</s>".to_owned());
        }
        let source = source.unwrap_or(PAPER_TEMPLATE);
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TextError::TooLong {
                what: "the chat template",
                limit: SOURCE_BYTES_MAX,
                found: source.len(),
            });
        }
        let mut environment = environment()?;
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| TextError::TemplateSource {
                reason: describe(&error),
            })?;
        Ok(Self(Arc::new(Inner {
            environment,
            source: source.to_owned(),
            special,
            bos,
        })))
    }

    /// The text of `chat`.
    ///
    /// # Errors
    /// [`TextError::Template`]: the template refuses the chat or fails on it.
    pub fn render(&self, chat: &Chat) -> Result<String, TextError> {
        self.render_marked(chat, None)
    }

    /// The ids of `chat`. Special tokens that the template writes are special tokens; what the chat's strings say never is,
    /// however the template trims or joins them.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<TokenId>, TextError> {
        let mark = self.mark(chat, tokenizer)?;
        let rendered = self.render_marked(chat, Some((tokenizer, mark)))?;
        let segments = tokenizer.special().split(&rendered);
        let words: Vec<String> = segments
            .iter()
            .map(|segment| match segment {
                Segment::Words(words) => words.replace(mark, ""),
                Segment::Special(_) => String::new(),
            })
            .collect();
        let segments: Vec<Segment<'_>> = segments
            .iter()
            .zip(&words)
            .map(|(segment, words)| match segment {
                Segment::Words(_) => Segment::Words(words),
                special => *special,
            })
            .collect();
        tokenizer.encode_segments(&segments, self.0.bos)
    }

    /// A character that occurs nowhere.
    fn mark(&self, chat: &Chat, tokenizer: &Tokenizer) -> Result<char, TextError> {
        let mut texts = vec![self.0.source.clone()];
        let special = &self.0.special;
        texts.extend(special.bos_token.clone());
        texts.extend(special.eos_token.clone());
        texts.extend(special.others.iter().map(|(_, text)| text.clone()));
        texts.extend(tokenizer.special().texts().map(str::to_owned));
        let mut collect = |text: &str| {
            texts.push(text.to_owned());
            text.to_owned()
        };
        for message in &chat.messages {
            collect(&message.role);
            collect(&message.content);
            map_object(&message.extra, &mut collect);
        }
        map_object(&chat.kwargs, &mut collect);
        unused_mark(texts.iter().map(String::as_str))
    }

    /// Renders with the chat's strings hidden from `hide`'s tokenizer by a mark.
    fn render_marked(
        &self,
        chat: &Chat,
        hide: Option<(&Tokenizer, char)>,
    ) -> Result<String, TextError> {
        let mut hidden = |text: &str| match hide {
            Some((tokenizer, mark)) => tokenizer.special().hide(text, mark),
            None => text.to_owned(),
        };
        let end = continuation_end(chat)?;
        let mut context = self.special_variables();
        for (name, value) in [("tools", Json::Null), ("documents", Json::Null)] {
            context.insert(name.to_owned(), value);
        }
        context.extend(map_object(&chat.kwargs, &mut hidden));
        let last = chat.messages.len().checked_sub(1);
        let messages = chat.messages.iter().enumerate().map(|(index, message)| {
            let mut object = Map::new();
            let mut content = hidden(&message.content);
            if let (Some(end), true) = (end, Some(index) == last) {
                content.push(end);
                content.push(' ');
            }
            object.insert("role".to_owned(), hidden(&message.role).into());
            object.insert("content".to_owned(), content.into());
            for (key, value) in map_object(&message.extra, &mut hidden) {
                object.entry(key).or_insert(value);
            }
            Json::Object(object)
        });
        let messages: Vec<Json> = messages.collect();
        context.insert("messages".to_owned(), messages.into());
        context.insert(
            "add_generation_prompt".to_owned(),
            chat.add_generation_prompt.into(),
        );
        let rendered = self.run(context)?;
        match end {
            Some(end) => cut_at(rendered, end),
            None => Ok(rendered),
        }
    }

    fn special_variables(&self) -> Map<String, Json> {
        let special = &self.0.special;
        let named = [
            ("bos_token", &special.bos_token),
            ("eos_token", &special.eos_token),
        ];
        named
            .into_iter()
            .filter_map(|(name, text)| Some((name.to_owned(), text.clone()?.into())))
            .chain(
                special
                    .others
                    .iter()
                    .map(|(name, text)| (name.clone(), text.clone().into())),
            )
            .collect()
    }

    fn run(&self, context: Map<String, Json>) -> Result<String, TextError> {
        let mut output = Limited::default();
        let result = self.0.environment.get_template(NAME).and_then(|template| {
            template
                .render_captured_to(Serde(&context), &mut output)
                .map(drop)
        });
        if output.full {
            return Err(TextError::TooLong {
                what: "the rendered chat",
                limit: RENDERED_BYTES_MAX,
                found: RENDERED_BYTES_MAX + 1,
            });
        }
        result.map_err(|error| TextError::Template {
            message: message_of(&error),
        })?;
        String::from_utf8(output.bytes).map_err(|error| TextError::Template {
            message: error.to_string(),
        })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.0.source)
            .field("special", &self.0.special)
            .finish_non_exhaustive()
    }
}

const NAME: &str = "chat_template";

/// A writer with an end.
#[derive(Default)]
struct Limited {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > RENDERED_BYTES_MAX {
            self.full = true;
            return Err(io::Error::other("the rendered chat is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The mark that is put after the words of the last message when it shall go on.
fn continuation_end(chat: &Chat) -> Result<Option<char>, TextError> {
    if !chat.continue_final_message {
        return Ok(None);
    }
    let refuse = |message: &str| {
        Err(TextError::Template {
            message: message.to_owned(),
        })
    };
    if chat.add_generation_prompt {
        return refuse("continue_final_message and add_generation_prompt cannot both be true");
    }
    if chat.messages.is_empty() {
        return refuse("continue_final_message needs a message");
    }
    Ok(Some(CONTINUATION_END))
}

/// A noncharacter: no text in interchange has it, and [`cut_at`] takes the last.
const CONTINUATION_END: char = '\u{fdd0}';

/// Ends the text where the last message's words end, without the spaces that the template trims from them.
fn cut_at(mut rendered: String, end: char) -> Result<String, TextError> {
    let Some(at) = rendered.rfind(end) else {
        return Err(TextError::Template {
            message: "continue_final_message: the chat template leaves out the last message"
                .to_owned(),
        });
    };
    let trims = !rendered
        .get(at + end.len_utf8()..)
        .is_some_and(|rest| rest.starts_with(' '));
    rendered.truncate(at);
    if trims {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}

/// `object` with every string and key replaced.
fn map_object(
    object: &Map<String, Json>,
    replace: &mut impl FnMut(&str) -> String,
) -> Map<String, Json> {
    object
        .iter()
        .map(|(key, value)| (replace(key), map_json(value, replace)))
        .collect()
}

fn map_json(value: &Json, replace: &mut impl FnMut(&str) -> String) -> Json {
    match value {
        Json::String(text) => replace(text).into(),
        Json::Array(values) => values
            .iter()
            .map(|value| map_json(value, replace))
            .collect(),
        Json::Object(object) => map_object(object, replace).into(),
        other => other.clone(),
    }
}
