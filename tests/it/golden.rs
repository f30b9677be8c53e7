//! Parity with the authors' own code (`tests/fixtures/*/golden`) and with an independent Llama (candle-transformers).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;

use midpo::backend::cpu::{Cpu, CpuOptions};
use midpo::backend::cuda::Storage;
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, KvFormat, StepLayout, StepSequence, WeightFormat};
use midpo::checkpoint::{self, Checkpoint, Sources};
use midpo::eval::perplexity::{Distance, Reader, Windows};
use midpo::model::{ModelOptions, RoutedLlama};
use midpo::types::{BLOCK_TOKENS, BlockId, GateOverride, TokenId, Variant};
use safetensors::SafeTensors;
use serde_json::Value;

/// The fixtures' README: the goldens' own two sources differ by 3.8e-5.
const LOGITS_TOLERANCE: f32 = 2e-4;
/// The fixtures' README: 2e-6 measured.
const GATES_TOLERANCE: f32 = 2e-5;
const POSITIONS: usize = 320;

fn cpu() -> Cpu {
    let options = CpuOptions {
        threads: Some(2),
        isa: None,
    };
    Cpu::new(options).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

pub(crate) fn load(name: &str, experts: bool) -> Checkpoint {
    let dir = fixture(name);
    let part = |part: &str| experts.then(|| dir.join(part));
    let sources = Sources {
        model: dir.clone(),
        safety: part("safety"),
        helpfulness: part("helpfulness"),
        router: part("router.pth"),
        verify: checkpoint::Verify::default(),
    };
    checkpoint::load(&sources).unwrap()
}

/// Exact K and V, room for one sequence.
pub(crate) fn options(weight_format: WeightFormat) -> ModelOptions {
    ModelOptions {
        rows: POSITIONS,
        logit_rows: POSITIONS,
        sequences: 1,
        positions: POSITIONS,
        kv_blocks: POSITIONS / BLOCK_TOKENS,
        kv_format: KvFormat::F32,
        weight_format,
    }
}

/// One sequence at a time on a real model: what the goldens are about.
pub(crate) struct Runner<B: Backend> {
    pub(crate) model: RoutedLlama<B>,
    blocks: Vec<BlockId>,
}

/// All positions of one sequence.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Pass {
    /// (T, V).
    pub(crate) logits: Vec<f32>,
    /// (T, 2L).
    pub(crate) gates: Vec<f32>,
}

impl<B: Backend> Runner<B> {
    fn new(backend: B, checkpoint: &Checkpoint) -> Self {
        Self::with_weights(backend, checkpoint, WeightFormat::Stored)
    }

    fn with_weights(backend: B, checkpoint: &Checkpoint, weight_format: WeightFormat) -> Self {
        Self::of(RoutedLlama::new(backend, checkpoint, options(weight_format)).unwrap())
    }

    pub(crate) fn of(model: RoutedLlama<B>) -> Self {
        // Backwards, so that a backend that ignores the block table fails.
        let blocks = (0..model.limits().blocks as u32).rev();
        let blocks = blocks.map(BlockId::new).collect();
        Self { model, blocks }
    }

    /// Computes `ids` from position `start` on, in chunks of `chunk`.
    pub(crate) fn extend(
        &mut self,
        ids: &[TokenId],
        start: usize,
        gates: GateOverride,
        chunk: usize,
    ) -> Pass {
        let mut pass = Pass::default();
        for (index, tokens) in ids.chunks(chunk).enumerate() {
            let start = start + index * chunk;
            let sequences = [StepSequence {
                rows: tokens.len(),
                start,
                block_table: &self.blocks,
                gates,
            }];
            let logit_rows: Vec<usize> = (0..tokens.len()).collect();
            let layout = StepLayout {
                tokens,
                sequences: &sequences,
                logit_rows: &logit_rows,
            };
            let output = self.model.forward(&layout).unwrap();
            pass.logits.extend_from_slice(output.logits);
            pass.gates.extend_from_slice(output.gates);
        }
        pass
    }

    fn greedy(&mut self, prompt: &[TokenId], gates: GateOverride, tokens: usize) -> Vec<u32> {
        let vocabulary = self.model.vocabulary();
        let mut pass = self.extend(prompt, 0, gates, POSITIONS);
        let mut answer = Vec::new();
        while answer.len() < tokens {
            let last = &pass.logits[pass.logits.len() - vocabulary..];
            let best = (0..vocabulary)
                .max_by(|a, b| last[*a].total_cmp(&last[*b]))
                .unwrap() as u32;
            let position = prompt.len() + answer.len();
            answer.push(best);
            pass = self.extend(&[TokenId(best)], position, gates, 1);
        }
        answer
    }
}

pub(crate) struct Goldens {
    manifest: Value,
    file: Vec<u8>,
}

impl Goldens {
    pub(crate) fn open(name: &str) -> Self {
        let dir = fixture(name).join("golden");
        let manifest = std::fs::read(dir.join("manifest.json")).unwrap();
        let file = std::fs::read(dir.join("inference_f32.safetensors")).unwrap();
        Self {
            manifest: serde_json::from_slice(&manifest).unwrap(),
            file,
        }
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.file).unwrap();
        let bytes = tensors.tensor(name).ok()?.data().to_vec();
        Some(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
        )
    }

    pub(crate) fn ids(&self, prompt: &str) -> Vec<TokenId> {
        let tensors = SafeTensors::deserialize(&self.file).unwrap();
        let bytes = tensors
            .tensor(&format!("{prompt}.input_ids"))
            .unwrap()
            .data()
            .to_vec();
        let ids = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b));
        ids.map(|id| TokenId(u32::try_from(id).unwrap())).collect()
    }

    fn prompts(&self) -> &[Value] {
        self.manifest["prompts"].as_array().unwrap()
    }
}

pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let worst = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, f32::max);
    assert!(
        worst <= tolerance,
        "{what}: differs by {worst}, more than {tolerance}"
    );
}

fn check_goldens<B: Backend>(model: &str, backend: B, chunk: usize) {
    // A bf16 base stays exact in f32, and its experts are then kept in f32 too, as the authors' numbers were computed.
    let runner = Runner::with_weights(backend, &load(model, true), WeightFormat::F32);
    check_runner(model, runner, chunk);
}

pub(crate) fn check_runner<B: Backend>(model: &str, mut runner: Runner<B>, chunk: usize) {
    let goldens = Goldens::open(model);
    let (layers, vocabulary) = (runner.model.layers(), runner.model.vocabulary());
    for prompt in goldens.prompts() {
        let name = prompt["name"].as_str().unwrap();
        let ids = goldens.ids(name);
        for variant in Variant::ALL {
            let what = format!("{model} {name} {} in chunks of {chunk}", variant.as_str());
            let pass = runner.extend(&ids, 0, variant.gates(), chunk);
            let key = format!("{name}.{}.logits", variant.as_str());
            let whole = goldens.floats(&key);
            let want = whole
                .or_else(|| goldens.floats(&format!("{key}_last16")))
                .expect(&key);
            let got = &pass.logits[pass.logits.len() - want.len()..];
            assert_close(&what, got, &want, LOGITS_TOLERANCE);
            assert!(want.len() >= 16.min(ids.len()) * vocabulary);
            if variant != Variant::Routed {
                continue;
            }
            for (column, gate) in ["alpha", "beta"].into_iter().enumerate() {
                let want = goldens.floats(&format!("{name}.{gate}")).unwrap();
                let got: Vec<f32> = (0..layers)
                    .flat_map(|layer| {
                        pass.gates
                            .iter()
                            .skip(2 * layer + column)
                            .step_by(2 * layers)
                    })
                    .copied()
                    .collect();
                assert_close(&format!("{what} {gate}"), &got, &want, GATES_TOLERANCE);
            }
        }
    }
}

fn check_greedy<B: Backend>(model: &str, backend: B) {
    let goldens = Goldens::open(model);
    let mut runner = Runner::with_weights(backend, &load(model, true), WeightFormat::F32);
    for prompt in goldens.prompts() {
        let name = prompt["name"].as_str().unwrap();
        for variant in Variant::ALL {
            let want = &prompt["variants"][variant.as_str()]["greedy"];
            let want: Vec<u32> = serde_json::from_value(want.clone()).unwrap();
            let got = runner.greedy(&goldens.ids(name), variant.gates(), want.len());
            assert_eq!(got, want, "{model} {name} {}", variant.as_str());
        }
    }
}

/// Perplexity as a text's own windows would give it, from the authors' logits; and that a format is at no distance from itself.
#[test]
fn perplexity_of_a_window_is_that_of_the_authors_logits() {
    let goldens = Goldens::open("tiny-routed");
    let checkpoint = load("tiny-routed", true);
    let mut compared = 0;
    for prompt in goldens.prompts() {
        let name = prompt["name"].as_str().unwrap();
        let ids = goldens.ids(name);
        let logits = goldens.floats(&format!("{name}.safety.logits"));
        let Some(logits) = logits.filter(|_| ids.len() > 2) else {
            continue;
        };
        let windows = Windows {
            tokens: &ids[1..],
            context: ids.len() - 1,
            bos: Some(ids[0]),
        };
        let options = windows.model_options(KvFormat::F32, WeightFormat::F32);
        let model = |gates: GateOverride| {
            Reader::new(
                RoutedLlama::new(cpu(), &checkpoint, options).unwrap(),
                gates,
            )
        };
        let mut safety = model(Variant::Safety.gates());
        let vocabulary = checkpoint.config.vocab_size;
        let scored = windows.context / 2;
        let first = ids.len() - scored;
        let want = (first..ids.len()).map(|target| {
            let row = &logits[(target - 1) * vocabulary..][..vocabulary];
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            sum.ln() - f64::from(row[ids[target].index()])
        });
        let want = want.sum::<f64>() / scored as f64;
        let own = safety.read(&windows, 0).unwrap().logits.to_vec();
        let got = safety.perplexity;
        assert_eq!(got.surprise.count(), scored, "{name}");
        let error = (got.value().ln() - want).abs();
        assert!(
            error < f64::from(LOGITS_TOLERANCE),
            "{name}: differs by {error}"
        );
        let (mut same, mut other) = (Distance::default(), Distance::default());
        same.add(&own, safety.read(&windows, 0).unwrap());
        let mut base = model(Variant::Base.gates());
        other.add(&own, base.read(&windows, 0).unwrap());
        let nothing = (same.relative_error.most(), same.divergence.most());
        assert_eq!((nothing, same.same_top.mean()), ((0.0, 0.0), 1.0), "{name}");
        assert!(
            other.relative_error.mean() > 1e-3 && other.divergence.mean() > 0.0,
            "{name}"
        );
        compared += 1;
    }
    assert!(compared > 0);
}

const MODELS: [&str; 2] = ["tiny-routed", "tiny-gqa"];

#[test]
fn reference_backend_gives_the_authors_numbers() {
    for model in MODELS {
        check_goldens(model, Reference, POSITIONS);
    }
}

#[test]
fn cpu_backend_gives_the_authors_numbers() {
    for (model, chunk) in MODELS
        .into_iter()
        .flat_map(|model| [(model, POSITIONS), (model, 13)])
    {
        check_goldens(model, cpu(), chunk);
    }
}

#[test]
fn greedy_continuations_are_the_authors_tokens() {
    for model in MODELS {
        check_greedy(model, cpu());
    }
}

#[test]
fn base_variant_is_bit_equal_to_a_model_loaded_without_experts() {
    for (model, format) in MODELS
        .into_iter()
        .flat_map(|model| [(model, WeightFormat::Stored), (model, WeightFormat::BF16)])
    {
        let goldens = Goldens::open(model);
        let mut routed = Runner::with_weights(cpu(), &load(model, true), format);
        let mut plain = Runner::with_weights(cpu(), &load(model, false), format);
        for name in ["chat", "long"] {
            let (ids, gates) = (goldens.ids(name), Variant::Base.gates());
            let want = plain.extend(&ids, 0, gates, POSITIONS);
            let got = routed.extend(&ids, 0, gates, 7);
            let bits = |pass: &Pass| pass.logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{model} {name} {format:?}");
            assert!(
                plain
                    .model
                    .forward(&empty_layout())
                    .unwrap()
                    .gates
                    .is_empty()
            );
        }
    }
}

fn empty_layout() -> StepLayout<'static> {
    StepLayout {
        tokens: &[],
        sequences: &[],
        logit_rows: &[],
    }
}

/// Weights, K and V in two bytes, and on a GPU activations too.
fn check_rounded<B: Backend>(backend: B, model: &str, chunk: usize) {
    let goldens = Goldens::open(model);
    let options = ModelOptions {
        kv_format: KvFormat::BF16,
        ..options(WeightFormat::BF16)
    };
    let what = format!("{model} on {} in chunks of {chunk}", backend.name());
    let model = RoutedLlama::new(backend, &load(model, true), options).unwrap();
    let mut runner = Runner::of(model);
    for variant in [Variant::Routed, Variant::Base, Variant::Both] {
        let pass = runner.extend(&goldens.ids("chat"), 0, variant.gates(), chunk);
        let key = format!("chat.{}.logits", variant.as_str());
        let want = goldens.floats(&key).unwrap();
        // The fixtures' README: bf16 arithmetic moves the logits by up to 0.29.
        assert_close(&what, &pass.logits, &want, 0.29);
        let moved = pass.logits.iter().zip(&want);
        let moved = moved.fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(
            moved > LOGITS_TOLERANCE,
            "{what}: rounding must show, else this ran in f32"
        );
    }
}

#[test]
fn bf16_weights_and_cache_stay_within_their_rounding() {
    check_rounded(cpu(), "tiny-routed", POSITIONS);
}

/// The whole model through the GPU's kernels, prompts whole (attention_prefill) and token by token (attention_decode).
#[test]
fn cuda_backend_gives_the_authors_numbers_within_its_rounding() {
    if let Some(reason) = cuda_emu::ABSENT {
        eprintln!("skipped: {reason}");
        return;
    }
    let cuda = |storage| super::cuda::emulated(storage, cuda_emu::Schedule::Descending);
    check_rounded(cuda(Storage::BF16), "tiny-routed", POSITIONS);
    check_rounded(cuda(Storage::BF16), "tiny-gqa", 1);
    check_rounded(cuda(Storage::F16), "tiny-gqa", 20);
}

/// Logits of the last position by candle-transformers' Llama, f32.
fn candle_logits(model: &str, ids: &[TokenId]) -> Vec<f32> {
    use candle_core::{DType, Device, Tensor};
    use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
    let dir = fixture(model);
    let config = std::fs::read(dir.join("config.json")).unwrap();
    let config: LlamaConfig = serde_json::from_slice(&config).unwrap();
    let config = config.into_config(false);
    let mut tensors = std::collections::HashMap::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
        }
    }
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap()))
        .collect();
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let llama = Llama::load(builder, &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
    let ids = Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    llama
        .forward(&ids, 0, &mut cache)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

#[test]
fn base_agrees_with_candles_llama() {
    for model in MODELS {
        let goldens = Goldens::open(model);
        let mut runner = Runner::new(cpu(), &load(model, false));
        let vocabulary = runner.model.vocabulary();
        for prompt in goldens.prompts() {
            let name = prompt["name"].as_str().unwrap();
            let ids = goldens.ids(name);
            let pass = runner.extend(&ids, 0, Variant::Base.gates(), POSITIONS);
            let got = &pass.logits[pass.logits.len() - vocabulary..];
            assert_close(
                &format!("{model} {name}"),
                got,
                &candle_logits(model, &ids),
                LOGITS_TOLERANCE,
            );
        }
    }
}

/// The real model that MIDPO_TEST_GGUF names, against transformers' numbers for its weights widened to f32.
#[test]
fn a_real_gguf_gives_transformers_numbers() {
    let Some(path) = std::env::var_os("MIDPO_TEST_GGUF").map(PathBuf::from) else {
        println!("MIDPO_TEST_GGUF names no file: nothing to test");
        return;
    };
    let checkpoint = checkpoint::load(&Sources::model(path)).unwrap();
    let mut exact = Runner::with_weights(cpu(), &checkpoint, WeightFormat::F32);
    let exact = check_real_model(&mut exact, true);
    assert!(
        exact.iter().all(|error| error.abs() < 1e-3),
        "f32: {exact:?}"
    );
    // Activations in int8 are noise: llama.cpp's own errors here are 0.09 in root mean square and up to 0.16, another order of sums
    // draws others. A wrong nibble, scale or minimum errs by units.
    let rounded = check_real_model(&mut Runner::new(cpu(), &checkpoint), false);
    let squares: f64 = rounded.iter().map(|error| error * error).sum();
    let spread = (squares / rounded.len() as f64).sqrt();
    assert!(spread < 0.15, "int8: {spread} of {rounded:?}");
}

/// Errors of the log-probabilities of each prompt's five likeliest next tokens.
fn check_real_model<B: Backend>(runner: &mut Runner<B>, greedy: bool) -> Vec<f64> {
    let mut errors = Vec::new();
    let golden = std::fs::read(fixture("smollm2").join("golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let vocabulary = runner.model.vocabulary();
    for case in golden["cases"].as_array().unwrap() {
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
        let prompt: Vec<TokenId> = ids("prompt_ids").into_iter().map(TokenId).collect();
        let pass = runner.extend(&prompt, 0, Variant::Base.gates(), POSITIONS);
        let last = &pass.logits[pass.logits.len() - vocabulary..];
        let total: f64 = last.iter().map(|logit| f64::from(*logit).exp()).sum();
        for top in case["first_token_top5"].as_array().unwrap() {
            let (id, want) = (top[0].as_u64().unwrap() as usize, top[1].as_f64().unwrap());
            errors.push(f64::from(last[id]) - total.ln() - want);
        }
        if !greedy {
            continue;
        }
        // Where the two best logits are 0.01 apart, f32 sums in another order may choose the other: no case is that close.
        let want = ids("greedy_ids");
        assert!(case["smallest_gap_of_two_best_logits"].as_f64().unwrap() > 1e-2);
        assert_eq!(
            runner.greedy(&prompt, Variant::Base.gates(), want.len()),
            want
        );
    }
    errors
}

/// Beside a bf16 base the experts' A and s B are rounded to bf16, the gates' rows are not.
#[test]
fn experts_beside_a_bf16_base_move_the_numbers_by_their_rounding_only() {
    let goldens = Goldens::open("tiny-gqa");
    let mut runner = Runner::new(cpu(), &load("tiny-gqa", true));
    for variant in [Variant::Routed, Variant::Both] {
        let pass = runner.extend(&goldens.ids("chat"), 0, variant.gates(), 13);
        let key = format!("chat.{}.logits", variant.as_str());
        let want = goldens.floats(&key).expect(&key);
        // A 2^-9 of the experts' part; the whole of it moves the logits by several units.
        assert_close(&key, &pass.logits, &want, 0.08);
        let moved = pass.logits.iter().zip(&want);
        assert!(moved.clone().any(|(a, b)| (a - b).abs() > LOGITS_TOLERANCE));
    }
}
