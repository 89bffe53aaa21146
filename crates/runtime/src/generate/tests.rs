//! Against transformers' greedy tokens and logits, and against the decoder's own forward pass, on every family's fixture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use lite_decoder::{
    Block, CheckpointSource, DecoderError, DecoderSpec, Embedding, Head, LATENT_ATTENTION, NoTap, Rope, RopeScaling,
    WeightSource, with_cpu_slice,
};
use lite_model::Checkpoint;
use lite_quant::{QuantizedLinear, Range, RangeContext, ScaleDtype, Scheme, Weights, quantize_nearest};
use serde::Deserialize;

use super::*;
use crate::RuntimeError;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A case of `tests/generators/greedy_tokens.py`.
#[derive(Deserialize)]
struct Greedy {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    margin: f32,
}

/// A copy of a fixture's model, without the expected logits beside it.
fn folder(name: &str) -> tempfile::TempDir {
    let from = match name {
        "novels-llama-6m" => fixtures().join(name),
        _ => fixtures().join("families").join(name),
    };
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "generation_config.json"] {
        if from.join(file).exists() {
            std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
        }
    }
    dir
}

fn cases() -> BTreeMap<String, (ResidentModel, Greedy)> {
    let text = std::fs::read(fixtures().join("generate/greedy.json")).unwrap();
    let cases: BTreeMap<String, Greedy> = serde_json::from_slice(&text).unwrap();
    cases
        .into_iter()
        .map(|(name, case)| (name.clone(), (ResidentModel::open(folder(&name).path()).unwrap(), case)))
        .collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let size = b.iter().map(|v| v.abs()).fold(0f32, f32::max);
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / size
}

/// Logits of all tokens by the decoder's blocks.
fn decoder_logits(dir: &Path, model: &ResidentModel, tokens: &[u32]) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (source, spec, device) = (CheckpointSource::new(&checkpoint), model.spec(), Device::Cpu);
    let rope = Rope::new(spec, tokens.len(), &device).unwrap();
    let mut x = Embedding::load(spec, &source, &device).unwrap().embed(&[tokens.to_vec()]).unwrap();
    for index in 0..spec.blocks.len() {
        x = Block::load(spec, index, &source, &device).unwrap().forward(&x, &rope, &mut NoTap).unwrap();
    }
    let logits = Head::load(spec, &source, &device).unwrap().logits(&x.flatten(0, 1).unwrap()).unwrap();
    with_cpu_slice(&logits, <[f32]>::to_vec).unwrap()
}

#[test]
fn greedy_tokens_are_those_of_transformers_in_every_family() {
    let cases = cases();
    for (name, (model, case)) in &cases {
        assert!(case.margin >= 1e-3 && case.tokens.len() == 64, "{name}");
        let settings = GenerateSettings { max_new_tokens: 64, ignore_eos: true, ..GenerateSettings::default() };
        let mut told = Vec::new();
        let found = generate(model, &case.prompt, &settings, &mut |token| {
            told.push(token);
            true
        });
        let found = found.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(found.tokens, case.tokens, "{name}");
        assert_eq!((told, found.finish, found.prompt_tokens), (found.tokens, FinishReason::Length, case.prompt.len()));
    }
    // Every family fixture has a case, or is refused by the name of what is not implemented.
    for entry in std::fs::read_dir(fixtures().join("families")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !path.join("config.json").exists() || cases.contains_key(name) {
            continue;
        }
        match ResidentModel::open(folder(name).path()) {
            Ok(_) => panic!("{name} has no greedy tokens"),
            Err(RuntimeError::Decoder(error @ DecoderError::Unimplemented { part, .. })) => {
                assert_eq!(part, LATENT_ATTENTION, "{name}: {error}");
                assert_eq!(error.kind(), lite_decoder::ErrorKind::Unsupported);
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn logits_are_those_of_the_decoder_in_one_go_and_step_by_step() {
    for (name, (model, case)) in &cases() {
        let tokens = [case.prompt.as_slice(), &case.tokens].concat();
        let wanted = decoder_logits(folder(name).path(), model, &tokens);
        let mut cache = KvCache::new(model.spec(), KvPrecision::Float);
        let found = model.forward(&mut cache, &tokens, Wanted::All).unwrap();
        let difference = largest_difference(&found, &wanted);
        assert!(difference < 1e-4, "{name}: {difference}");
        assert_eq!(cache.tokens(), tokens);

        // Frequencies that follow the length make keys depend on when they were computed: below the switch only.
        let count = match model.spec().rope.scaling {
            RopeScaling::Dynamic { .. } => model.spec().max_positions.min(tokens.len()),
            _ => tokens.len(),
        };
        let full = decoder_logits(folder(name).path(), model, &tokens[..count]);
        for parts in [vec![10, 1, 1, 1, 7, 8], vec![1; 12]] {
            cache.clear();
            let mut at = 0;
            for part in parts.into_iter().chain([count]) {
                let end = (at + part).min(count);
                if at < end {
                    let last = model.forward(&mut cache, &tokens[at..end], Wanted::Last).unwrap();
                    // LongRoPE has other frequencies for short texts.
                    let short = matches!(model.spec().rope.scaling, RopeScaling::LongRope { original, .. }
                        if end <= original && count > original);
                    let wanted = &full[(end - 1) * model.spec().vocab..end * model.spec().vocab];
                    let difference = largest_difference(&last, wanted);
                    assert!(short || difference < 1e-4, "{name} up to {end}: {difference}");
                }
                at = end;
            }
        }
    }
}

/// More tokens than a chunk and a tile, with and without a window.
#[test]
fn long_prompts_run_in_chunks() {
    for name in ["novels-llama-6m", "mistral"] {
        let dir = folder(name);
        let path = dir.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(r#""max_position_embeddings": 128"#, r#""max_position_embeddings": 2048"#))
            .unwrap();
        let model = ResidentModel::open(dir.path()).unwrap();
        let tokens: Vec<u32> = (0..600).map(|i| (i * 7919 % model.spec().vocab) as u32).collect();
        let wanted = decoder_logits(dir.path(), &model, &tokens);
        let mut cache = KvCache::new(model.spec(), KvPrecision::Float);
        let found = model.forward(&mut cache, &tokens, Wanted::All).unwrap();
        let difference = largest_difference(&found, &wanted);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (model, case) = cases().remove("novels-llama-6m").unwrap();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut cache = KvCache::new(model.spec(), KvPrecision::Int8);
            let first = model.forward(&mut cache, &case.tokens, Wanted::All).unwrap();
            (first, model.forward(&mut cache, &[5], Wanted::Last).unwrap())
        })
    };
    assert_eq!(run(1), run(3));
}

/// Fewer bits, more error; 8 bits are nearly float.
#[test]
fn the_precision_of_the_cache_reaches_the_logits() {
    let (model, case) = cases().remove("novels-llama-6m").unwrap();
    let logits = |precision| {
        let mut cache = KvCache::new(model.spec(), precision);
        model.forward(&mut cache, &case.prompt, Wanted::Last).unwrap();
        model.forward(&mut cache, &case.tokens, Wanted::All).unwrap()
    };
    let float = logits(KvPrecision::Float);
    let error = |precision| largest_difference(&logits(precision), &float);
    let (int8, fp8, int4) = (error(KvPrecision::Int8), error(KvPrecision::Fp8), error(KvPrecision::Int4));
    assert!(int8 > 0.0 && int8 < 0.02 && int8 < fp8 && fp8 < int4 && int4 < 0.6, "{int8} {fp8} {int4}");
}

#[test]
fn a_text_ends_at_an_end_token_a_full_context_or_the_callers_word() {
    let (model, case) = cases().remove("llama2").unwrap();
    // The third token as the end; it may occur before.
    let end = case.tokens[2];
    let at = case.tokens.iter().position(|t| *t == end).unwrap();
    let model = model.with_stop_tokens(vec![end]);
    let settings = GenerateSettings { max_new_tokens: 200, ..GenerateSettings::default() };
    let mut told = 0;
    let found = generate(&model, &case.prompt, &settings, &mut |_| {
        told += 1;
        true
    });
    let found = found.unwrap();
    assert_eq!((found.finish, found.tokens.as_slice(), told), (FinishReason::Stop, &case.tokens[..=at], at));
    let ignoring = GenerateSettings { ignore_eos: true, ..settings };
    let found = generate(&model, &case.prompt, &ignoring, &mut |_| true).unwrap();
    // 128 positions; the last token needs none.
    assert_eq!((found.finish, found.tokens.len()), (FinishReason::Context, 128 - case.prompt.len() + 1));
    let found = generate(&model, &case.prompt, &ignoring, &mut |_| false).unwrap();
    assert_eq!((found.finish, found.tokens.len()), (FinishReason::Cancelled, 1));
    let none = GenerateSettings { max_new_tokens: 0, ..settings };
    assert_eq!(generate(&model, &case.prompt, &none, &mut |_| true).unwrap().tokens, [] as [u32; 0]);
}

#[test]
fn what_cannot_run_is_an_error() {
    let (model, _) = cases().remove("llama2").unwrap();
    let run =
        |prompt: &[u32]| generate(&model, prompt, &GenerateSettings::default(), &mut |_| true).unwrap_err().to_string();
    assert!(run(&[]).contains("at least one token"));
    assert!(run(&[1; 129]).contains("129 tokens do not fit the model's context of 128"));
    assert!(run(&[64]).contains("token 64 is outside"));
    let mut cache = KvCache::new(cases().remove("qwen2-sliding").unwrap().0.spec(), KvPrecision::Float);
    assert!(model.forward(&mut cache, &[1], Wanted::Last).unwrap_err().to_string().contains("blocks"));
    // NaN in a weight.
    let dir = folder("llama2");
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let model = ResidentModel::open(dir.path()).unwrap();
    let error = generate(&model, &[1, 2, 3], &GenerateSettings::default(), &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("NaN"), "{error}");
    assert!(matches!(ResidentModel::open(Path::new("/nonexistent")), Err(RuntimeError::Model(_))));
}

/// The values that codes of all linears stand for.
struct Dequantized<'a> {
    plain: CheckpointSource<'a>,
    spec: &'a DecoderSpec,
    scheme: Scheme,
}

impl Dequantized<'_> {
    fn codes(&self, module: &str) -> Option<QuantizedLinear> {
        let site = self.spec.sites().find(|site| site.module == module)?;
        let weight = self.plain.load(&format!("{module}.weight")).unwrap().1;
        let (out_features, in_features) = (site.out_features, site.in_features);
        let context = RangeContext { weight: &weight, out_features, in_features, gram: None };
        Some(quantize_nearest(&context, &self.scheme, Range::MinMax).unwrap())
    }
}

impl WeightSource for Dequantized<'_> {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        match name.strip_suffix(".weight").and_then(|module| self.codes(module)) {
            Some(codes) => Ok((vec![codes.out_features, codes.in_features], codes.dequantize())),
            None => self.plain.load(name),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.plain.contains(name)
    }
}

/// Packed linears give the logits of the values that their codes stand for, as a long prompt and one token at a time.
#[test]
fn codes_give_the_logits_of_their_values() {
    for name in ["qwen3", "phi3", "llama-bias", "gpt-oss"] {
        let (model, case) = cases().remove(name).unwrap();
        let dir = folder(name);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for (bits, group, symmetric) in [(4, 16, false), (8, -1, false), (3, -1, true), (5, 16, true)] {
            let scheme = Scheme::new(bits, group, symmetric, ScaleDtype::F32).unwrap();
            let source = Dequantized { plain: CheckpointSource::new(&checkpoint), spec: model.spec(), scheme };
            let packed = |module: &str, _, _| Ok(source.codes(module).map(Weights::Int));
            let coded = ResidentModel::load(model.spec(), &source, &packed).unwrap();
            let twin = ResidentModel::from_source(model.spec(), &source).unwrap();
            assert!(coded.decode_bytes() < twin.decode_bytes(), "{name}");
            let run = |model: &ResidentModel| {
                let mut cache = KvCache::new(model.spec(), KvPrecision::Float);
                let mut logits = model.forward(&mut cache, &case.prompt, Wanted::All).unwrap();
                for token in &case.tokens[..3] {
                    logits.extend(model.forward(&mut cache, &[*token], Wanted::Last).unwrap());
                }
                logits
            };
            let difference = largest_difference(&run(&coded), &run(&twin));
            assert!(difference < 1e-4, "{name} {bits} {group}: {difference}");
        }
    }
}
