//! The training fixtures as pairs, experts and models. `golden.safetensors` was trimmed to what is read here: the `ours_f64`
//! gradients (as f32; of the router's first map the first 16 rows) and the padded batches (ids as u16).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use midpo::checkpoint::{self, Checkpoint, LlamaConfig, RopeScaling, Sources};
use midpo::text::Tokenizer;
use midpo::train::autograd::{Base, ScoreTensors};
use midpo::train::{Objective, Pair, ScorePair, Sequence, Totals};
use midpo::types::TokenId;
use safetensors::SafeTensors;
use serde_json::Value;

pub fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures").join(name)
}

pub fn load(name: &str) -> Checkpoint {
    let dir = fixture(name);
    let sources = Sources {
        model: dir.clone(),
        safety: Some(dir.join("safety")),
        helpfulness: Some(dir.join("helpfulness")),
        router: Some(dir.join("router.pth")),
        verify: checkpoint::Verify::default(),
    };
    checkpoint::load(&sources).unwrap()
}

pub fn base() -> (Checkpoint, Arc<Base>) {
    let checkpoint = load("tiny-routed");
    let base = Base::new(&checkpoint).unwrap();
    (checkpoint, base)
}

pub fn golden() -> Value {
    let file = std::fs::read(fixture("tiny-routed/training/golden.json")).unwrap();
    serde_json::from_slice(&file).unwrap()
}

pub fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap().iter();
    list.map(|x| x.as_f64().unwrap()).collect()
}

/// The unfolded router of a fixture, under the flat names of `router.safetensors`, by candle's own reader of pickles.
pub fn router_tensors(model: &str, layers: usize) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    router_tensors_of(&fixture(model).join("router.pth"), layers)
}

/// Those of a file.
pub fn router_tensors_of(file: &Path, layers: usize) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let gates =
        (0..layers).flat_map(|layer| ["alpha", "beta"].map(|word| format!("layer_{layer}_{word}")));
    let mut tensors = Vec::new();
    for gate in gates {
        let read = candle_core::pickle::PthTensors::new(file, Some(&gate)).unwrap();
        for name in read.tensor_infos().keys() {
            let tensor = read.get(name).unwrap().unwrap();
            let tensor = tensor.to_dtype(candle_core::DType::F32).unwrap();
            let values = tensor.flatten_all().unwrap().to_vec1().unwrap();
            tensors.push((format!("{gate}.{name}"), tensor.dims().to_vec(), values));
        }
    }
    tensors
}

/// A safetensors file.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn open(name: &str) -> Self {
        Self(std::fs::read(fixture(name)).unwrap())
    }

    pub fn training() -> Self {
        Self::open("tiny-routed/training/golden.safetensors")
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).expect(name).data().to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        let (chunks, _) = bytes.as_chunks::<4>();
        chunks.iter().map(|x| f32::from_le_bytes(*x)).collect()
    }

    /// Every f32 tensor.
    pub fn all(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let floats = tensors
            .iter()
            .filter(|(_, view)| view.dtype() == safetensors::Dtype::F32);
        floats
            .map(|(name, view)| (name.to_owned(), view.shape().to_vec(), self.floats(name)))
            .collect()
    }

    /// The rows of a padded batch without padding.
    pub fn sequences(&self, part: &str, side: &str, rows: usize) -> Vec<Vec<TokenId>> {
        let ids = self.bytes(&format!("{part}.{side}_input_ids"));
        let (ids, _) = ids.as_chunks::<2>();
        let mask = self.bytes(&format!("{part}.{side}_attention_mask"));
        let width = mask.len() / rows;
        let rows = ids.chunks(width).zip(mask.chunks(width));
        rows.map(|(ids, mask)| {
            let real = ids.iter().zip(mask).filter(|(_, real)| **real == 1);
            real.map(|(id, _)| TokenId(u32::from(u16::from_le_bytes(*id))))
                .collect()
        })
        .collect()
    }
}

pub fn pair(better: Vec<TokenId>, worse: Vec<TokenId>, margin: f32) -> Pair {
    let same = better
        .iter()
        .zip(&worse)
        .take_while(|(a, b)| a == b)
        .count();
    let sequence = |ids| Sequence { ids, answer: same };
    Pair {
        better: sequence(better),
        worse: sequence(worse),
        first_difference: same,
        margin,
        reference: None,
        line: 1,
    }
}

/// The pairs of `safety`, `helpfulness` or `router`, with their clamped margins.
pub fn pairs(part: &str) -> Vec<Pair> {
    let (golden, tensors) = (golden(), Tensors::training());
    let count = golden[part]["rows"].as_array().unwrap().len();
    let margins = match &golden[part]["ours_f64"]["margin"] {
        Value::Array(_) => numbers(&golden[part]["ours_f64"]["margin"]),
        _ => vec![0.0; count],
    };
    let better = tensors.sequences(part, "better", count);
    let worse = tensors.sequences(part, "worse", count);
    let sides = better.into_iter().zip(worse).zip(margins);
    sides
        .map(|((better, worse), margin)| pair(better, worse, margin as f32))
        .collect()
}

/// Rows of `pairs.jsonl` in the paper's template; `safer`: ordered by `safer_response_id`, not `better_response_id`.
pub fn score_pairs(rows: &[usize], safer: bool) -> Vec<ScorePair> {
    let tokenizer = std::fs::read(fixture("tiny-routed/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::new(&tokenizer).unwrap();
    let lines = std::fs::read_to_string(fixture("tiny-routed/training/pairs.jsonl")).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    rows.iter()
        .map(|row| {
            let line = &lines[*row];
            let winner = if safer {
                "safer_response_id"
            } else {
                "better_response_id"
            };
            let winner = line[winner].as_u64().unwrap();
            let prompt = line["prompt"].as_str().unwrap();
            let prompt = format!("BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:");
            let answer = tokenizer.encode_trusted(&prompt, true).unwrap().len();
            let sequence = |id: u64| {
                let response = line[format!("response_{id}")].as_str().unwrap();
                let text = format!("{prompt}{response}</s>");
                let ids = tokenizer.encode_trusted(&text, true).unwrap();
                Sequence { ids, answer }
            };
            let safe = |id: u64| line[format!("is_response_{id}_safe")].as_bool();
            ScorePair {
                better: sequence(winner),
                worse: sequence(1 - winner),
                better_safe: safe(winner),
                worse_safe: safe(1 - winner),
            }
        })
        .collect()
}

/// `reward` or `cost` of the training fixtures.
pub fn score_tensors(name: &str) -> ScoreTensors {
    let tensors = Tensors::open(&format!("tiny-routed/training/{name}/model.safetensors")).all();
    let named = tensors.into_iter().map(|(name, _, values)| (name, values));
    ScoreTensors {
        config: LlamaConfig {
            vocab_size: 512,
            hidden_size: 32,
            intermediate_size: 88,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 4,
            head_dim: 8,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: 512,
            tie_word_embeddings: false,
            bos_token_id: Some(TokenId(1)),
            eos_token_ids: vec![TokenId(2)],
        },
        tensors: named.collect(),
    }
}

pub fn totals<O: Objective>(objective: &O, items: &[O::Item]) -> Totals {
    let totals = items.iter().map(|item| objective.totals(item));
    totals.fold(Totals::default(), |sum, item| sum + item)
}

pub fn close(what: &str, got: f64, want: f64, tolerance: f64) {
    let difference = (got - want).abs();
    assert!(
        difference <= tolerance,
        "{what}: {got}, expected {want}: differs by {difference}"
    );
}

pub fn all_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let differences = got.iter().zip(want).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0f32, f32::max);
    assert!(worst <= tolerance, "{what}: differs by {worst}");
}
