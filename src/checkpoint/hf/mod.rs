//! A base from a Hugging Face directory: `config.json`, `generation_config.json`, and one `model.safetensors` or shards with an
//! index.

mod config;
pub(super) mod generation;

use std::collections::BTreeMap;

use super::json::Object;
use super::limits::{INDEX_BYTES_MAX, SHARDS_MAX};
use super::source::{Source, is_inside};
use super::tensor_file::{FileTensor, TensorFile, check_finite};
use super::{
    BaseTensors, CheckpointError, GenerationDefaults, HostTensor, LayerTensors, LlamaConfig,
};

pub(crate) use config::FILE as CONFIG;
pub(super) use config::read as read_config;
pub(crate) use generation::FILE as GENERATION;

/// The file of a model in one piece.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The index of a model in shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Old checkpoints keep the rotary frequencies under names that end so.
pub(super) const ROTARY_COPY: &str = ".rotary_emb.inv_freq";
const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// What a Hugging Face directory holds, without its tokenizer.
pub(crate) struct HfParts {
    /// Shape and constants.
    pub(crate) config: LlamaConfig,
    /// Weights, shapes and numbers checked.
    pub(crate) base: BaseTensors,
    /// What a request that says nothing gets.
    pub(crate) generation: GenerationDefaults,
    /// The files of the weights, index first.
    pub(crate) weight_files: Vec<String>,
}

/// Loads configuration and weights.
///
/// # Errors
/// Any [`CheckpointError`]: names the file, and the key or tensor.
pub(crate) fn load(source: &Source) -> Result<HfParts, CheckpointError> {
    let mut config = config::read(source)?;
    let generation = generation::read(source, &mut config)?;
    let (mut weights, weight_files) = Weights::open(source)?;
    let base = weights.take_base(source, &config)?;
    weights.finish("a Llama of this configuration", |name| {
        // Tied ones may keep a copy of the head.
        name.ends_with(ROTARY_COPY) || (config.tie_word_embeddings && name == HEAD)
    })?;
    check_finite(&base.all)?;
    Ok(HfParts {
        config,
        base: base.tensors,
        generation,
        weight_files,
    })
}

/// The tensors of all shards.
pub(super) struct Weights {
    shards: Vec<TensorFile>,
    /// Which shard holds a tensor.
    holder: BTreeMap<String, usize>,
}

/// The base, and all its tensors once more in one list.
struct Taken {
    tensors: BaseTensors,
    all: Vec<FileTensor>,
}

impl Weights {
    /// The shards, and the names of all files read.
    pub(super) fn open(source: &Source) -> Result<(Self, Vec<String>), CheckpointError> {
        if source.exists(SINGLE) {
            let names = vec![SINGLE.to_owned()];
            return Ok((Self::from_shards(source, &names)?, names));
        }
        if !source.exists(INDEX) {
            let hint = if source.exists("pytorch_model.bin") {
                ", found only pytorch_model.bin: convert it to safetensors"
            } else {
                ", found neither"
            };
            let reason = format!("expected {SINGLE} or {INDEX}{hint}");
            return Err(CheckpointError::malformed(&source.path(""), reason));
        }
        let index = Object::parse(&source.path(INDEX), &source.read(INDEX, INDEX_BYTES_MAX)?)?;
        let map = index
            .object("weight_map")?
            .ok_or_else(|| index.error("weight_map", "an object"))?;
        let names = shard_names(source, &map)?;
        let weights = Self::from_shards(source, &names)?;
        weights.check_index(&map, &names)?;
        let files = std::iter::once(INDEX.to_owned()).chain(names).collect();
        Ok((weights, files))
    }

    fn from_shards(source: &Source, names: &[String]) -> Result<Self, CheckpointError> {
        let mut shards = Vec::new();
        let mut holder = BTreeMap::new();
        for (index, name) in names.iter().enumerate() {
            let shard = TensorFile::safetensors(&source.path(name), &source.open(name)?)?;
            for tensor in shard.names() {
                if holder.insert(tensor.to_owned(), index).is_some() {
                    let reason = "expected in one shard only, found in an earlier one too";
                    return Err(CheckpointError::tensor(shard.file(), tensor, reason));
                }
            }
            shards.push(shard);
        }
        Ok(Self { shards, holder })
    }

    /// Every tensor is in the shard that the index says.
    fn check_index(&self, map: &Object, names: &[String]) -> Result<(), CheckpointError> {
        for (tensor, shard) in map.entries() {
            let held_by = self.holder.get(tensor).and_then(|index| names.get(*index));
            if held_by.map(String::as_str) != shard.as_str() {
                let expected = match held_by {
                    Some(held_by) => format!("{held_by}, which holds it"),
                    None => "a shard that holds it".to_owned(),
                };
                return Err(map.error(tensor, expected));
            }
        }
        Ok(())
    }

    pub(super) fn take(
        &mut self,
        name: &str,
        shape: &[usize],
        context: &str,
    ) -> Result<FileTensor, CheckpointError> {
        let index = self.holder.get(name).copied().unwrap_or(0);
        match self.shards.get_mut(index) {
            Some(shard) => shard.take(name, shape, context),
            // `open` finds a shard at least; kept an error all the same.
            None => Err(CheckpointError::MissingTensor {
                file: INDEX.into(),
                name: name.to_owned(),
                expected: format!("shape {shape:?}{context}"),
            }),
        }
    }

    pub(super) fn take_integer(&mut self, name: &str) -> Result<i64, CheckpointError> {
        let index = self.holder.get(name).copied().unwrap_or(0);
        match self.shards.get_mut(index) {
            Some(shard) => shard.take_integer(name),
            None => Err(CheckpointError::MissingTensor {
                file: INDEX.into(),
                name: name.to_owned(),
                expected: "one int64".to_owned(),
            }),
        }
    }

    /// A wrong number of rows in the embedding is told as what it is: a `vocab_size` that belongs to another model.
    fn check_vocab(&self, source: &Source, config: &LlamaConfig) -> Result<(), CheckpointError> {
        let shard = self
            .holder
            .get(EMBEDDING)
            .and_then(|index| self.shards.get(*index));
        let Some((shard, [rows, columns])) =
            shard.and_then(|shard| Some((shard, shard.shape(EMBEDDING)?)))
        else {
            return Ok(());
        };
        if *columns != config.hidden_size || *rows == config.vocab_size {
            return Ok(());
        }
        Err(CheckpointError::Value {
            file: source.path(config::FILE),
            key: "vocab_size".to_owned(),
            expected: format!(
                "{rows}, the rows of `{EMBEDDING}` in {}",
                shard.file().display()
            ),
            found: config.vocab_size.to_string(),
        })
    }

    fn take_base(
        &mut self,
        source: &Source,
        config: &LlamaConfig,
    ) -> Result<Taken, CheckpointError> {
        self.check_vocab(source, config)?;
        let context = format!(
            " ({} says {} layers)",
            source.path(config::FILE).display(),
            config.num_layers
        );
        let (d, vocab) = (config.hidden_size, config.vocab_size);
        let mut all = Vec::new();
        let mut take = |name: &str, shape: &[usize]| -> Result<HostTensor, CheckpointError> {
            let named = self.take(name, shape, &context)?;
            let tensor = named.tensor.clone();
            all.push(named);
            Ok(tensor)
        };
        let embed_tokens = take(EMBEDDING, &[vocab, d])?;
        let mut layers = Vec::new();
        for layer in 0..config.num_layers {
            layers.push(take_layer(layer, config, &mut take)?);
        }
        let norm = take(NORM, &[d])?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(take(HEAD, &[vocab, d])?)
        };
        let tensors = BaseTensors {
            embed_tokens,
            layers,
            norm,
            lm_head,
        };
        Ok(Taken { tensors, all })
    }

    /// Refuses tensors that nobody took: a bias or a layer that we would leave out makes another model.
    pub(super) fn finish(
        self,
        owner: &str,
        harmless: impl Fn(&str) -> bool,
    ) -> Result<(), CheckpointError> {
        self.shards
            .into_iter()
            .try_for_each(|shard| shard.finish(owner, &harmless))
    }
}

fn take_layer(
    layer: usize,
    config: &LlamaConfig,
    take: &mut impl FnMut(&str, &[usize]) -> Result<HostTensor, CheckpointError>,
) -> Result<LayerTensors, CheckpointError> {
    let mut take =
        |(name, shape): (&str, Vec<usize>)| take(&in_layer(layer, name), shape.as_slice());
    let [
        input_layernorm,
        q_proj,
        k_proj,
        v_proj,
        o_proj,
        post_attention_layernorm,
        gate_proj,
        up_proj,
        down_proj,
    ] = layer_shapes(config);
    Ok(LayerTensors {
        input_layernorm: take(input_layernorm)?,
        q_proj: take(q_proj)?,
        k_proj: take(k_proj)?,
        v_proj: take(v_proj)?,
        o_proj: take(o_proj)?,
        post_attention_layernorm: take(post_attention_layernorm)?,
        gate_proj: take(gate_proj)?,
        up_proj: take(up_proj)?,
        down_proj: take(down_proj)?,
    })
}

fn in_layer(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

/// Names within a layer, and shapes, in the order of [`LayerTensors`].
fn layer_shapes(config: &LlamaConfig) -> [(&'static str, Vec<usize>); 9] {
    let (d, m) = (config.hidden_size, config.intermediate_size);
    let q = config.num_heads * config.head_dim;
    let kv = config.num_kv_heads * config.head_dim;
    [
        ("input_layernorm", vec![d]),
        ("self_attn.q_proj", vec![q, d]),
        ("self_attn.k_proj", vec![kv, d]),
        ("self_attn.v_proj", vec![kv, d]),
        ("self_attn.o_proj", vec![d, q]),
        ("post_attention_layernorm", vec![d]),
        ("mlp.gate_proj", vec![m, d]),
        ("mlp.up_proj", vec![m, d]),
        ("mlp.down_proj", vec![d, m]),
    ]
}

/// Names and shapes of a trunk: all but the head.
pub(super) fn trunk_shapes(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let d = config.hidden_size;
    let mut shapes = vec![(EMBEDDING.to_owned(), vec![config.vocab_size, d])];
    for layer in 0..config.num_layers {
        let layers = layer_shapes(config).into_iter();
        shapes.extend(layers.map(|(name, shape)| (in_layer(layer, name), shape)));
    }
    shapes.push((NORM.to_owned(), vec![d]));
    shapes
}

/// Names and shapes of a base.
pub(super) fn tensor_shapes(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let mut shapes = trunk_shapes(config);
    if !config.tie_word_embeddings {
        shapes.push((HEAD.to_owned(), vec![config.vocab_size, config.hidden_size]));
    }
    shapes
}

/// The distinct shards of an index, in order of name: plain names of files that are there.
fn shard_names(source: &Source, map: &Object) -> Result<Vec<String>, CheckpointError> {
    let mut names = BTreeMap::new();
    for (tensor, _) in map.entries() {
        let name = map
            .string(tensor)?
            .filter(|name| is_inside(name, 1))
            .ok_or_else(|| map.error(tensor, "the name of a file in the same directory"))?;
        names.entry(name.to_owned()).or_insert(tensor);
        if names.len() > SHARDS_MAX {
            return Err(map.error(tensor, format!("at most {SHARDS_MAX} shards")));
        }
    }
    if names.is_empty() {
        return Err(CheckpointError::malformed(
            &source.path(INDEX),
            "expected `weight_map` to name a shard, found it empty",
        ));
    }
    for (name, tensor) in &names {
        if !source.exists(name) {
            return Err(map.error(tensor, "a file that is there"));
        }
    }
    Ok(names.into_keys().collect())
}
