//! Texts and chats become token ids, away from the threads that serve connections where they are long.

use std::collections::BTreeMap;

use serde_json::Value;

use super::AppState;
use super::error::{ApiError, echo};
use super::unsupported;
use crate::openai::{ChatMessage, Content, Role};
use crate::text::{Chat, ChatTemplate, Message, TextError, Tokenizer};
use crate::types::TokenId;

/// Bytes of text up to which tokenizing takes well under a millisecond: less than moving it elsewhere is worth.
const INLINE_BYTES_MAX: usize = 4096;

/// A chat as the template takes it.
/// # Errors
/// Names the message that cannot be put to this model.
pub fn chat(
    messages: Vec<ChatMessage>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    kwargs: Option<BTreeMap<String, Value>>,
) -> Result<Chat, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "expected at least one message",
        ));
    }
    let continue_final_message = continue_final_message.unwrap_or(false);
    if continue_final_message && add_generation_prompt == Some(true) {
        let message = "not together with `continue_final_message`";
        return Err(ApiError::invalid("add_generation_prompt", message));
    }
    let messages = messages.into_iter().enumerate();
    let messages = messages.map(|(at, message)| turn(at, message));
    Ok(Chat {
        messages: messages.collect::<Result<_, _>>()?,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        kwargs: kwargs.unwrap_or_default().into_iter().collect(),
    })
}

fn turn(at: usize, message: ChatMessage) -> Result<Message, ApiError> {
    if matches!(message.role, Role::Tool | Role::Function) {
        return Err(ApiError::unsupported(
            format!("messages[{at}].role"),
            "tools are not served",
        ));
    }
    unsupported::refuse_in_message(at, &message.unknown)?;
    let content = message.content.ok_or_else(|| {
        ApiError::invalid(
            format!("messages[{at}].content"),
            "expected a text, found none",
        )
    })?;
    let mut extra: serde_json::Map<String, Value> =
        unsupported::template_fields(message.unknown).collect();
    if let Some(name) = message.name {
        extra.insert("name".to_owned(), Value::String(name));
    }
    Ok(Message {
        role: message.role.as_str().to_owned(),
        content: content_text(at, content)?,
        extra,
    })
}

fn content_text(at: usize, content: Content) -> Result<String, ApiError> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) if parts.is_empty() => {
            let message = "expected at least one part";
            return Err(ApiError::invalid(
                format!("messages[{at}].content"),
                message,
            ));
        }
        Content::Parts(parts) => parts,
    };
    let texts = parts.into_iter().enumerate().map(|(index, part)| {
        let place = format!("messages[{at}].content[{index}]");
        if part.kind != "text" {
            let hint = format!(
                "only parts of type `text` are, found `{}`",
                echo(&part.kind)
            );
            return Err(ApiError::unsupported(format!("{place}.type"), &hint));
        }
        let missing = || ApiError::invalid(format!("{place}.text"), "expected a text, found none");
        part.text.ok_or_else(missing)
    });
    // One below the other, as vLLM joins them.
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// The ids of a chat.
/// # Errors
/// [`ApiError::Text`] with the template's own message.
pub async fn encode_chat(state: &AppState, chat: Chat) -> Result<Vec<TokenId>, ApiError> {
    let bytes = chat
        .messages
        .iter()
        .map(|message| message.content.len())
        .sum();
    let template: ChatTemplate = state.model().template.clone();
    encode(state, bytes, "messages", move |tokenizer| {
        template.encode(tokenizer, &chat)
    })
    .await
}

/// The ids of texts, each with the tokenizer's own special tokens around it where `special` says so.
/// # Errors
/// [`ApiError::Text`].
pub async fn encode_texts(
    state: &AppState,
    texts: Vec<String>,
    special: bool,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let bytes = texts.iter().map(String::len).sum();
    let work = move |tokenizer: &Tokenizer| {
        texts
            .iter()
            .map(|text| tokenizer.encode(text, special))
            .collect()
    };
    encode(state, bytes, "prompt", work).await
}

async fn encode<T: Send + 'static>(
    state: &AppState,
    bytes: usize,
    param: &'static str,
    work: impl FnOnce(&Tokenizer) -> Result<T, TextError> + Send + 'static,
) -> Result<T, ApiError> {
    let tokenizer = state.model().tokenizer.clone();
    let result = if bytes <= INLINE_BYTES_MAX {
        work(&tokenizer)
    } else {
        let task = tokio::task::spawn_blocking(move || work(&tokenizer));
        task.await.map_err(|error| {
            tracing::error!(%error, "tokenizing broke off");
            ApiError::Internal
        })?
    };
    result.map_err(|source| ApiError::Text { param, source })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn check(messages: &str) -> Result<Chat, String> {
        let messages = serde_json::from_str(messages).unwrap();
        chat(messages, None, None, None).map_err(|error| error.body().error.param.unwrap())
    }

    #[test]
    fn chat_joins_text_parts_and_maps_developer_to_system() {
        let chat = check(
            r#"[{"role":"developer","content":"be kind"},
                {"role":"user","name":"eve","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]"#,
        )
        .unwrap();
        assert_eq!(chat.messages[0].role, "system");
        assert_eq!(chat.messages[1].content, "a\nb");
        assert_eq!(chat.messages[1].extra["name"], "eve");
        assert!(chat.add_generation_prompt && !chat.continue_final_message);
    }

    #[test]
    fn chat_names_the_message_that_cannot_be_served() {
        for (messages, param) in [
            ("[]", "messages"),
            (r#"[{"role":"user"}]"#, "messages[0].content"),
            (r#"[{"role":"user","content":null}]"#, "messages[0].content"),
            (r#"[{"role":"user","content":[]}]"#, "messages[0].content"),
            (r#"[{"role":"tool","content":"x"}]"#, "messages[0].role"),
            (
                r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url"}]}]"#,
                "messages[0].content[1].type",
            ),
            (
                r#"[{"role":"user","content":[{"type":"text"}]}]"#,
                "messages[0].content[0].text",
            ),
            (
                r#"[{"role":"assistant","content":"x","tool_calls":[{}]}]"#,
                "messages[0].tool_calls",
            ),
        ] {
            assert_eq!(check(messages), Err(param.to_owned()), "{messages}");
        }
    }

    #[test]
    fn chat_cannot_both_go_on_and_begin_an_answer() {
        let message = || serde_json::from_str(r#"[{"role":"assistant","content":"x"}]"#).unwrap();
        let error = chat(message(), Some(true), Some(true), None).unwrap_err();
        assert_eq!(
            error.body().error.param.as_deref(),
            Some("add_generation_prompt")
        );
        let goes_on = chat(message(), None, Some(true), None).unwrap();
        assert!(goes_on.continue_final_message && !goes_on.add_generation_prompt);
    }
}
