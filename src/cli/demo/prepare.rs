//! What a demo's training starts from: corpus, tokenizer, the base's shape, and the recipe of its stages.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::recipe::{BaseShape, DemoRecipe, TokenizerSize};
use super::say;
use crate::checkpoint::TextParts;
use crate::checkpoint::write::TextFiles;
use crate::cli::CliError;
use crate::demo::corpus::{self, Corpus, Written};
use crate::text::{BytePairs, Tokenizer};

/// The demo's tokens, by id.
const SPECIAL_TOKENS: [&str; 6] = ["<pad>", BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"];
const BOS: &str = "<s>";
const EOS: &str = "</s>";
const PAD_ID: u32 = 0;
const BOS_ID: u32 = 1;
const EOS_ID: u32 = 2;
/// Words stand right behind the tokens of their roles: no newline, no space.
const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

/// Inside a demo's output.
pub(super) const HELD_OUT: &str = "data/held_out.jsonl";
const DATA: &str = "data";
const BASE: &str = "base";
const RECIPE: &str = "recipe.toml";

/// Writes `data/`, `base/` and `recipe.toml` into `output`; returns the recipe's path.
///
/// # Errors
/// A file that cannot be written, a vocabulary that is too small.
pub(super) fn prepare(recipe: &DemoRecipe, output: &Path) -> Result<PathBuf, CliError> {
    let data = output.join(DATA);
    for Written { path, rows } in
        corpus::write(&Corpus::new()?, recipe.seed, &recipe.corpus, &data)?
    {
        say(&format!("{}: {rows} lines", path.display()))?;
    }
    let base = output.join(BASE);
    fs::create_dir_all(&base).map_err(CliError::io(base.display().to_string()))?;
    let texts = texts(&data.join("sft.jsonl"), recipe.tokenizer)?;
    let vocab_size = write_tokenizer(texts, recipe, &base)?;
    say(&format!(
        "{}: a tokenizer of {vocab_size} tokens",
        base.display()
    ))?;
    write_text(&base.join("config.json"), &config(recipe.base, vocab_size))?;
    write_text(
        &base.join("generation_config.json"),
        &generation(recipe.evaluation.temperature),
    )?;
    let file = output.join(RECIPE);
    write_text(&file, &recipe.train.to_string())?;
    Ok(file)
}

/// Everything that is said in the first lines of a training file.
fn texts(file: &Path, size: TokenizerSize) -> Result<Vec<String>, CliError> {
    let failed = || CliError::io(file.display().to_string());
    let lines = BufReader::new(File::open(file).map_err(failed())?).lines();
    let mut texts = Vec::new();
    for line in lines.take(size.lines) {
        let line: Value = serde_json::from_str(&line.map_err(failed())?)
            .map_err(std::io::Error::from)
            .map_err(failed())?;
        collect(&line, &mut texts);
    }
    Ok(texts)
}

fn collect(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::String(text) => texts.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| collect(value, texts)),
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, _)| *name != "role")
            .for_each(|(_, value)| collect(value, texts)),
        _ => {}
    }
}

fn write_tokenizer(
    texts: Vec<String>,
    recipe: &DemoRecipe,
    base: &Path,
) -> Result<usize, CliError> {
    let pairs = BytePairs {
        vocab_size: recipe.tokenizer.vocab_size,
        special_tokens: &SPECIAL_TOKENS,
        bos_token: BOS,
    };
    let tokenizer_json = pairs.train(texts.into_iter())?;
    let vocab_size = Tokenizer::new(&tokenizer_json)?.vocab_size();
    let parts = TextParts {
        tokenizer_json,
        chat_template: Some(TEMPLATE.to_owned()),
        bos_token: Some(BOS.to_owned()),
        eos_token: Some(EOS.to_owned()),
        special_tokens: vec![(
            "pad_token".to_owned(),
            SPECIAL_TOKENS[PAD_ID as usize].to_owned(),
        )],
    };
    TextFiles::of(&parts, recipe.base.max_position_embeddings).write(base)?;
    Ok(vocab_size)
}

fn config(shape: BaseShape, vocab_size: usize) -> String {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_attention_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": true,
        "initializer_range": 0.02,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    });
    format!("{config:#}\n")
}

/// As the demo is measured, so it is served.
fn generation(temperature: f32) -> String {
    let config = json!({
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "do_sample": true,
        // 0.7f32 as f64 has digits that nobody wrote.
        "temperature": (f64::from(temperature) * 1e6).round() / 1e6,
    });
    format!("{config:#}\n")
}

fn write_text(file: &Path, text: &str) -> Result<(), CliError> {
    fs::write(file, text).map_err(CliError::io(file.display().to_string()))
}
