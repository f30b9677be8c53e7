//! What files may claim at most. Everything beyond is refused before anything is reserved for it; each bound is far above any
//! real Llama, and small enough that no product of two sizes leaves 64 bits.

/// `config.json`, `adapter_config.json` and their like.
pub(crate) const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// `model.safetensors.index.json`: a line a tensor.
pub(crate) const INDEX_BYTES_MAX: u64 = 16 << 20;
/// `tokenizer.json`: the largest in use have 256,000 words and 35 MB.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// `chat_template.jinja`.
pub(crate) const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
/// Header of a safetensors file.
pub(crate) const HEADER_BYTES_MAX: u64 = 16 << 20;
/// `data.pkl` of a `router.pth`: a real one has 40 KB.
pub(crate) const PICKLE_BYTES_MAX: u64 = 2 << 20;
/// Records of a `router.pth`.
pub(crate) const RECORDS_MAX: usize = 1 << 16;
/// Tensors of a `router.pth`.
pub(crate) const ROUTER_TENSORS_MAX: usize = LAYERS_MAX * 12;
/// Shards of one model.
pub(crate) const SHARDS_MAX: usize = 4096;
/// L.
pub(crate) const LAYERS_MAX: usize = 1024;
/// d, m, and all heads side by side.
pub(crate) const WIDTH_MAX: usize = 1 << 20;
/// Rows of the embedding.
pub(crate) const VOCAB_MAX: usize = 1 << 24;
/// Heads of a layer.
pub(crate) const HEADS_MAX: usize = 4096;
/// Size of a head.
pub(crate) const HEAD_DIM_MAX: usize = 4096;
/// Positions.
pub(crate) const POSITIONS_MAX: usize = 1 << 28;
/// r of an expert.
pub(crate) const RANK_MAX: usize = 4096;
/// Ends of sequence.
pub(crate) const EOS_MAX: usize = 256;
/// Parts that `midpo.json` lists.
pub(crate) const PARTS_MAX: usize = SHARDS_MAX + 64;
/// GGUF files named in a message about a directory that has several.
pub(crate) const GGUF_NAMES_MAX: usize = 16;
