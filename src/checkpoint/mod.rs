//! Checkpoints: whatever files a model comes in, checked, as named host tensors. Trusts no file: a bad one is an error that
//! names file, key or tensor, what was expected and what came.

//!
//! [`load`] is the one door; [`load_embedded`] is the same door for files inside the binary, and [`pack`] writes a directory that
//! is loaded alone. Beneath: `hf`, `gguf` (the base), `peft` (an expert), `router` with `pth`, `pickle` and `fold`, `text_parts`
//! (tokenizer and template); `source` knows where files are, `limits` what they may claim.

mod config;
mod error;
mod fingerprint;
mod fold;
mod gguf;
mod hf;
mod json;
mod limits;
mod manifest;
mod mmap;
mod pack;
mod parallel;
mod peft;
mod pickle;
mod plan;
mod pth;
mod rope;
mod router;
mod score;
mod source;
mod tensor;
mod tensor_file;
mod text_parts;
pub mod write;

use std::path::{Path, PathBuf};

pub use config::{GenerationDefaults, LlamaConfig, RopeScaling};
pub use error::CheckpointError;
pub use pack::{Overwrite, pack};
pub use plan::{load_expert, plan};
pub use rope::rope_table;
pub use score::{Normalizer, ScoreCheckpoint, ScoreType, load_score};
pub use source::EmbeddedFiles;
pub use tensor::{HostTensor, TensorBytes};

use manifest::Manifest;
use source::Source;

/// Where a checkpoint's parts are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// A Hugging Face directory, a directory that [`pack`] wrote, a GGUF file, or a directory with one GGUF file.
    pub model: PathBuf,
    /// PEFT directory of the safety expert. Both experts and the router are given, or none of them.
    pub safety: Option<PathBuf>,
    /// PEFT directory of the helpfulness expert.
    pub helpfulness: Option<PathBuf>,
    /// `router.pth`, `router.safetensors`, `router_folded.safetensors`, or a directory with one of them.
    pub router: Option<PathBuf>,
    /// How much of a packed directory is compared with its hashes.
    pub verify: Verify,
}

/// How much of a packed directory is compared with the hashes of its `midpo.json`. Sizes always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// All but the base's weights, which are many gigabytes: hashing them at every start would double its time.
    #[default]
    Small,
    /// Everything.
    All,
}

impl Sources {
    /// A plain model, or a packed directory.
    pub fn model(model: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            safety: None,
            helpfulness: None,
            router: None,
            verify: Verify::default(),
        }
    }

    /// With the experts and the router of one directory, as `midpo train all` leaves them: `safety/`, `helpfulness/`, and a router
    /// there or in `router/`.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] names all that is missing.
    pub fn with_experts(self, directory: &Path) -> Result<Self, CheckpointError> {
        let source = Source::directory(directory);
        let expert = |name: &str| source.inside(name).exists(peft::CONFIG);
        let router = [directory.to_path_buf(), directory.join(ROUTER)]
            .into_iter()
            .find(|place| router::find(&Source::directory(place)).is_ok());
        let missing: Vec<&str> = [
            (expert(SAFETY), "safety/adapter_config.json"),
            (expert(HELPFULNESS), "helpfulness/adapter_config.json"),
            (router.is_some(), "a router"),
        ]
        .into_iter()
        .filter_map(|(is_there, name)| (!is_there).then_some(name))
        .collect();
        if !missing.is_empty() {
            let reason = format!(
                "expected safety/, helpfulness/ and a router ({}) here or in {ROUTER}/; missing: {}",
                router::NAMES.join(", "),
                missing.join(", ")
            );
            return Err(CheckpointError::malformed(directory, reason));
        }
        Ok(Self {
            safety: Some(directory.join(SAFETY)),
            helpfulness: Some(directory.join(HELPFULNESS)),
            router,
            ..self
        })
    }
}

/// A tensor as files hold it: name, row-major axes, numbers.
pub type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// Everything that serving needs of a model, whichever files it came from.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Shape and constants.
    pub config: LlamaConfig,
    /// The base's weights, in Hugging Face's row order.
    pub base: BaseTensors,
    /// Both experts and the router; `None` for a plain Llama.
    pub experts: Option<Experts>,
    /// What the tokenizer is made from.
    pub text: TextParts,
    /// `generation_config.json`, of the base's directory or beside its GGUF file.
    pub generation: GenerationDefaults,
    /// SHA-256, hex, over what the weights are: keys caches, shown at `/version`. Equal weights in another place or container
    /// may differ. Hashed are the configuration; of every file of the base its name, its size and, up to 1 MiB, all of it, else its
    /// first MiB (where its header is), its last page, and 64 pages of 4 KiB spread evenly; and every number of experts and folded
    /// router. A base changed only between the sampled pages is not noticed: [`Verify::All`] is for that.
    pub fingerprint: String,
}

/// What `text` makes a tokenizer and a chat template from.
#[derive(Clone, Debug)]
pub struct TextParts {
    /// `tokenizer.json`; made from the metadata for a GGUF file.
    pub tokenizer_json: Vec<u8>,
    /// Jinja source: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, or GGUF's `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// Text of the start-of-sequence token, for templates.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token, for templates.
    pub eos_token: Option<String>,
    /// Other special tokens that templates may name (`unk_token`, `pad_token`, ...).
    pub special_tokens: Vec<(String, String)>,
}

/// The weights of a Llama. Shapes are (outputs, inputs) as in Hugging Face.
#[derive(Clone, Debug)]
pub struct BaseTensors {
    /// (vocab, d).
    pub embed_tokens: HostTensor,
    /// One a layer.
    pub layers: Vec<LayerTensors>,
    /// (d).
    pub norm: HostTensor,
    /// (vocab, d); `None` where the head is the embedding.
    pub lm_head: Option<HostTensor>,
}

impl BaseTensors {
    /// Every matrix: (outputs, inputs).
    pub fn matrices(&self) -> impl Iterator<Item = &HostTensor> {
        let layers = self.layers.iter().flat_map(|layer| {
            [
                &layer.q_proj,
                &layer.k_proj,
                &layer.v_proj,
                &layer.o_proj,
                &layer.gate_proj,
                &layer.up_proj,
                &layer.down_proj,
            ]
        });
        let ends = [Some(&self.embed_tokens), self.lm_head.as_ref()];
        layers.chain(ends.into_iter().flatten())
    }
}

/// The weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// (d).
    pub input_layernorm: HostTensor,
    /// (heads * head_dim, d).
    pub q_proj: HostTensor,
    /// (kv_heads * head_dim, d).
    pub k_proj: HostTensor,
    /// (kv_heads * head_dim, d).
    pub v_proj: HostTensor,
    /// (d, heads * head_dim).
    pub o_proj: HostTensor,
    /// (d).
    pub post_attention_layernorm: HostTensor,
    /// (m, d).
    pub gate_proj: HostTensor,
    /// (m, d).
    pub up_proj: HostTensor,
    /// (d, m).
    pub down_proj: HostTensor,
}

/// Both experts and the folded router.
#[derive(Clone, Debug)]
pub struct Experts {
    /// S of MIDPO.md 1.
    pub safety: Expert,
    /// H of MIDPO.md 1.
    pub helpfulness: Expert,
    /// One a layer.
    pub router: Vec<RouterLayer>,
}

impl Experts {
    /// w: both ranks together.
    pub fn width(&self) -> usize {
        self.safety.rank + self.helpfulness.rank
    }

    /// One expert in both places, for variants with fixed gates: nothing was trained to route, every gate is half open.
    pub fn alone(expert: Expert, base: &LlamaConfig) -> Self {
        let gate = FoldedGate {
            weight: vec![0.0; base.intermediate_size],
            bias: 0.0,
        };
        let layer = RouterLayer {
            safety: gate.clone(),
            helpfulness: gate,
        };
        Self {
            router: vec![layer; expert.layers.len()],
            helpfulness: expert.clone(),
            safety: expert,
        }
    }
}

/// A LoRA on every layer's `mlp.down_proj`.
#[derive(Clone, Debug)]
pub struct Expert {
    /// r.
    pub rank: usize,
    /// s: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub scale: f32,
    /// One a layer.
    pub layers: Vec<ExpertLayer>,
}

/// One layer of an expert.
#[derive(Clone, Debug)]
pub struct ExpertLayer {
    /// (r, m), row-major.
    pub lora_a: Vec<f32>,
    /// (d, r), row-major, not scaled.
    pub lora_b: Vec<f32>,
}

/// The folded gates of one layer.
#[derive(Clone, Debug)]
pub struct RouterLayer {
    /// alpha.
    pub safety: FoldedGate,
    /// beta.
    pub helpfulness: FoldedGate,
}

/// A gate's logit as an affine map of h: `<weight, h> + bias` (MIDPO.md 1, "The router folds").
#[derive(Clone, Debug, PartialEq)]
pub struct FoldedGate {
    /// (m).
    pub weight: Vec<f32>,
    /// a0.
    pub bias: f32,
}

/// What loading found: the checkpoint, and the files that it came from.
struct Loaded {
    checkpoint: Checkpoint,
    base: BaseFiles,
    experts: Option<ExpertFiles>,
}

/// The files of a base, relative to their source.
struct BaseFiles {
    source: Source,
    kind: BaseKind,
    weights: Vec<String>,
}

/// What a base comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BaseKind {
    HuggingFace,
    Gguf,
}

/// The files of experts and router.
#[derive(Clone)]
struct ExpertFiles {
    safety: Source,
    helpfulness: Source,
    router: Source,
    router_name: String,
}

/// Loads a checkpoint: every file that it needs, every number checked.
///
/// # Errors
/// Any [`CheckpointError`]: names the file, the key or tensor, what was expected and what came.
pub fn load(sources: &Sources) -> Result<Checkpoint, CheckpointError> {
    load_all(sources).map(|loaded| loaded.checkpoint)
}

/// Loads a checkpoint from files in the binary, laid out as [`pack`] writes them; `midpo.json` may be left out, and the router
/// unfolded. There are experts where there is `safety/adapter_config.json`. `name` stands for the directory in messages.
///
/// # Errors
/// As [`load`].
pub fn load_embedded(name: &str, files: EmbeddedFiles) -> Result<Checkpoint, CheckpointError> {
    let source = Source::embedded(name, files);
    if source.exists(manifest::FILE) {
        return load_packed(&source, Verify::All).map(|loaded| loaded.checkpoint);
    }
    let has_experts = source.inside(SAFETY).exists(peft::CONFIG);
    let experts = has_experts
        .then(|| ExpertFiles::inside(&source))
        .transpose()?;
    load_directory(source, experts).map(|loaded| loaded.checkpoint)
}

/// Directory of the safety expert among all experts, and in a packed checkpoint.
const SAFETY: &str = "safety";
/// Directory of the helpfulness expert, likewise.
const HELPFULNESS: &str = "helpfulness";
/// Directory of the router among all experts, where it is not beside them.
const ROUTER: &str = "router";

impl ExpertFiles {
    /// Those of a packed or embedded checkpoint.
    fn inside(source: &Source) -> Result<Self, CheckpointError> {
        Ok(Self {
            safety: source.inside(SAFETY),
            helpfulness: source.inside(HELPFULNESS),
            router: source.clone(),
            router_name: router::find(source)?.to_owned(),
        })
    }

    /// Those that the user names; all or none.
    fn named(sources: &Sources) -> Result<Option<Self>, CheckpointError> {
        let parts = [
            ("the safety expert", &sources.safety),
            ("the helpfulness expert", &sources.helpfulness),
            ("the router", &sources.router),
        ];
        let given = parts.iter().find(|(_, path)| path.is_some());
        let missing = parts.iter().find(|(_, path)| path.is_none());
        if let (Some((given, _)), Some((missing, _))) = (given, missing) {
            return Err(CheckpointError::PartialExperts { given, missing });
        }
        let (Some(safety), Some(helpfulness), Some(router)) =
            (&sources.safety, &sources.helpfulness, &sources.router)
        else {
            return Ok(None);
        };
        let (router, router_name) = if router.is_dir() {
            let source = Source::directory(router);
            let name = router::find(&source)?.to_owned();
            (source, name)
        } else {
            parent_and_name(router)?
        };
        Ok(Some(Self {
            safety: Source::directory(safety),
            helpfulness: Source::directory(helpfulness),
            router,
            router_name,
        }))
    }

    fn load(&self, base: &LlamaConfig) -> Result<Experts, CheckpointError> {
        Ok(Experts {
            safety: peft::load(&self.safety, base)?,
            helpfulness: peft::load(&self.helpfulness, base)?,
            router: router::load(&self.router, &self.router_name, base)?,
        })
    }
}

/// A file as its directory and its name there.
fn parent_and_name(file: &Path) -> Result<(Source, String), CheckpointError> {
    let name = file.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| CheckpointError::malformed(file, "expected the name of a file"))?;
    let parent = file.parent().unwrap_or(Path::new(""));
    Ok((Source::directory(parent), name.to_owned()))
}

fn load_all(sources: &Sources) -> Result<Loaded, CheckpointError> {
    let experts = ExpertFiles::named(sources)?;
    if !sources.model.is_dir() {
        return load_file(&sources.model, experts);
    }
    let source = Source::directory(&sources.model);
    if !source.exists(manifest::FILE) {
        if !source.exists(hf::CONFIG)
            && let Some(file) = only_gguf(&sources.model)?
        {
            return load_file(&file, experts);
        }
        return load_directory(source, experts);
    }
    if experts.is_some() {
        let reason = "expected a base alone, since experts and router are given too; found a packed checkpoint";
        return Err(CheckpointError::malformed(
            &source.path(manifest::FILE),
            reason,
        ));
    }
    load_packed(&source, sources.verify)
}

/// The GGUF file of a directory that is no Hugging Face one; `None` where there is none.
fn only_gguf(directory: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let io = |source| CheckpointError::io(directory, source);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|end| end == "gguf") && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    if let [_, _, ..] = files.as_slice() {
        let names = files.iter().filter_map(|file| file.file_name());
        let named: Vec<_> = names
            .take(limits::GGUF_NAMES_MAX)
            .map(|name| name.to_string_lossy())
            .collect();
        let more = if files.len() > named.len() {
            ", ..."
        } else {
            ""
        };
        let reason = format!(
            "expected config.json or one GGUF file, found {}: {}{more}; name one of them",
            files.len(),
            named.join(", ")
        );
        return Err(CheckpointError::malformed(directory, reason));
    }
    Ok(files.pop())
}

/// A directory that [`pack`] wrote: only what its manifest lists is looked at.
fn load_packed(source: &Source, verify: Verify) -> Result<Loaded, CheckpointError> {
    let manifest = Manifest::read(source)?;
    manifest.verify(source, verify)?;
    let source = source.only(manifest.names());
    let experts = manifest
        .experts
        .then(|| ExpertFiles::inside(&source))
        .transpose()?;
    match manifest.base {
        BaseKind::HuggingFace => load_directory(source, experts),
        BaseKind::Gguf => load_gguf(source, manifest::GGUF.to_owned(), experts),
    }
}

fn load_directory(source: Source, experts: Option<ExpertFiles>) -> Result<Loaded, CheckpointError> {
    let parts = hf::load(&source)?;
    let text = text_parts::read(&source)?;
    let base = BaseFiles {
        source,
        kind: BaseKind::HuggingFace,
        weights: parts.weight_files,
    };
    Loaded::join(
        parts.config,
        parts.base,
        text,
        parts.generation,
        base,
        experts,
    )
}

fn load_file(file: &Path, experts: Option<ExpertFiles>) -> Result<Loaded, CheckpointError> {
    let (source, name) = parent_and_name(file)?;
    load_gguf(source, name, experts)
}

fn load_gguf(
    source: Source,
    name: String,
    experts: Option<ExpertFiles>,
) -> Result<Loaded, CheckpointError> {
    let file = source.path(&name);
    let opened = source.open(&name)?;
    if !opened.as_slice().starts_with(b"GGUF") {
        let reason = "expected a directory or a GGUF file, found another file";
        return Err(CheckpointError::malformed(&file, reason));
    }
    let (mut config, base, mut text) = gguf::load(&file, &opened)?;
    let generation = hf::generation::read(&source, &mut config)?;
    text_parts::read_beside(&source, &mut text)?;
    let files = BaseFiles {
        source,
        kind: BaseKind::Gguf,
        weights: vec![name],
    };
    Loaded::join(config, base, text, generation, files, experts)
}

impl Loaded {
    fn join(
        config: LlamaConfig,
        base: BaseTensors,
        text: TextParts,
        generation: GenerationDefaults,
        files: BaseFiles,
        expert_files: Option<ExpertFiles>,
    ) -> Result<Self, CheckpointError> {
        let experts = expert_files
            .as_ref()
            .map(|files| files.load(&config))
            .transpose()?;
        let fingerprint = fingerprint::of(&config, &files, experts.as_ref())?;
        let checkpoint = Checkpoint {
            config,
            base,
            experts,
            text,
            generation,
            fingerprint,
        };
        Ok(Self {
            checkpoint,
            base: files,
            experts: expert_files,
        })
    }
}
