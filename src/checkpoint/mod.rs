//! Checkpoints: whatever files a model comes in, checked, as named host tensors. Trusts no file: a bad one is an error that
//! names file, key or tensor, what was expected and what came.

mod config;
mod error;
mod tensor;

pub use config::{GenerationDefaults, LlamaConfig, RopeScaling};
pub use error::CheckpointError;
pub use tensor::{HostTensor, TensorBytes};

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
    /// `generation_config.json`.
    pub generation: GenerationDefaults,
    /// SHA-256 over what the weights are (names, sizes, and a sample of each file), hex: keys caches, shown at `/version`.
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
