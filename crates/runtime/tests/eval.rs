//! Figures against those of transformers, numpy and lm-evaluation-harness's formulas
//! (`tests/generators/eval_golden.py`).

use std::path::{Path, PathBuf};

use lite_calib::{ModelTokenizer, TaskName, load_task};
use lite_decoder::{Compute, DecoderError, DecoderSpec, WeightSource};
use lite_runtime::eval::{EvalModel, Request, ScoredItem, log_likelihoods, perplexity, score_items};
use lite_runtime::generate::KvPrecision;
use lite_runtime::{RuntimeError, Subject, compare_subjects};
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn model() -> EvalModel {
    EvalModel::open(&root().join("tests/fixtures/novels-llama-6m")).unwrap()
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root().join("tests/fixtures/eval").join(name)).unwrap()).unwrap()
}

fn windows(golden: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(golden["windows"].clone()).unwrap()
}

/// Changes a tensor of some name and shape.
type Change<'a> = dyn Fn(&str, &[usize], &mut [f32]) + 'a;

/// A model with changed weights.
struct Changed<'a> {
    inner: &'a dyn WeightSource,
    change: &'a Change<'a>,
}

impl WeightSource for Changed<'_> {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        let (shape, mut values) = self.inner.load(name)?;
        (self.change)(name, &shape, &mut values);
        Ok((shape, values))
    }

    fn contains(&self, name: &str) -> bool {
        self.inner.contains(name)
    }
}

/// The generator's "quantized" model: rows of 4 bits.
fn round_rows(name: &str, shape: &[usize], values: &mut [f32]) {
    if !name.ends_with("_proj.weight") {
        return;
    }
    for row in values.chunks_mut(shape[1]) {
        let scale = row.iter().fold(0f32, |max, v| max.max(v.abs())) / 7.0;
        row.iter_mut().for_each(|v| *v = (*v / scale).round_ties_even() * scale);
    }
}

fn subject<'a>(name: &'static str, spec: &'a DecoderSpec, source: &'a dyn WeightSource) -> Subject<'a> {
    Subject { name, spec, source, kv: None, engine: None }
}

fn go_on(_: &'static str, _: usize, _: usize) -> bool {
    true
}

fn close(what: &str, found: f64, wanted: &Value, tolerance: f64) {
    let wanted = wanted.as_f64().unwrap();
    assert!((found - wanted).abs() <= tolerance * wanted.abs().max(1e-3), "{what}: {found}, wanted {wanted}");
}

#[test]
fn perplexity_is_that_of_transformers() {
    let (model, golden) = (model(), golden("golden.json"));
    let source = model.source();
    let subject = subject("evaluated", model.spec(), &source);
    for (batch, compute) in [1, 5].into_iter().flat_map(|batch| Compute::every().into_iter().map(move |c| (batch, c))) {
        let found = perplexity(&subject, &windows(&golden), batch, &compute, &go_on).unwrap();
        assert_eq!(found.predictions as u64, golden["predictions"].as_u64().unwrap());
        close("perplexity", found.perplexity.value, &golden["perplexity_original"], 1e-5);
        close("its error", found.perplexity.standard_error, &golden["perplexity_original_standard_error"], 1e-4);
    }
}

#[test]
fn divergence_is_that_of_numpy() {
    let (model, golden) = (model(), golden("golden.json"));
    let source = model.source();
    let coarse = Changed { inner: &source, change: &round_rows };
    let original = subject("original", model.spec(), &source);
    let quantized = subject("quantized", model.spec(), &coarse);
    for compute in Compute::every() {
        let found = compare_subjects(&original, &quantized, &windows(&golden), 4, &compute, &go_on).unwrap();
        let s = found.summary;
        for (key, found) in [
            ("perplexity_original", s.perplexity_original),
            ("perplexity_original_standard_error", s.perplexity_original_standard_error),
            ("perplexity_quantized", s.perplexity_quantized),
            ("perplexity_quantized_standard_error", s.perplexity_quantized_standard_error),
            ("perplexity_ratio", s.perplexity_ratio.value),
            ("perplexity_ratio_standard_error", s.perplexity_ratio.standard_error),
            ("kl_mean", s.kl_mean),
            ("kl_standard_error", s.kl_standard_error),
            ("kl_median", s.kl_median),
            ("kl_p90", s.kl_p90),
            ("kl_p99", s.kl_p99),
            ("kl_p999", s.kl_p999),
            ("kl_max", s.kl_max),
            ("top1", s.top1),
            ("top1_standard_error", s.top1_standard_error),
            ("delta_p_mean", s.delta_p_mean.value),
            ("delta_p_mean_standard_error", s.delta_p_mean.standard_error),
            ("delta_p_rms", s.delta_p_rms.value),
            ("delta_p_rms_standard_error", s.delta_p_rms.standard_error),
        ] {
            close(key, found, &golden[key], 2e-3);
        }
        assert_eq!(s.predictions as u64, golden["predictions"].as_u64().unwrap());
        assert_eq!(s.tokens, found.windows * found.seqlen);
    }
}

#[test]
fn tasks_are_scored_as_the_harness_does() {
    let dir = root().join("tests/fixtures/novels-llama-6m");
    let (model, golden) = (model(), golden("tasks.json"));
    let source = model.source();
    let subject = subject("evaluated", model.spec(), &source);
    let tokenizer = ModelTokenizer::from_dir(&dir, model.spec().vocab).unwrap();
    for name in TaskName::ALL {
        let wanted = &golden[name.name()];
        let task = load_task(name, &root().join("tests/fixtures/eval/tasks"), None, 0).unwrap();
        let prompts: Vec<&Vec<(String, String)>> = task.items.iter().map(|item| &item.requests).collect();
        let wanted_items = wanted["items"].as_array().unwrap();
        let wanted_prompts: Vec<Vec<(String, String)>> =
            wanted_items.iter().map(|item| serde_json::from_value(item["requests"].clone()).unwrap()).collect();
        assert_eq!(prompts, wanted_prompts.iter().collect::<Vec<_>>(), "{}", name.name());
        let requests: Vec<Request> = task
            .items
            .iter()
            .flat_map(|item| &item.requests)
            .map(|(context, continuation)| {
                let (context, continuation) = tokenizer.encode_pair(context, continuation).unwrap();
                Request { context, continuation }
            })
            .collect();
        // In one part, and in parts of a few tokens.
        let parts = [(1 << 20, Compute::cpu()), (50 * 256 * 4, Compute::cpu())];
        let elsewhere = Compute::every().into_iter().skip(1).map(|compute| (1 << 20, compute));
        for (bytes, compute) in parts.into_iter().chain(elsewhere) {
            let found = log_likelihoods(&subject, &requests, bytes, &compute, &go_on).unwrap();
            let mut rest = found.as_slice();
            let mut items = Vec::new();
            for (item, wanted) in task.items.iter().zip(wanted_items) {
                let (own, after) = rest.split_at(item.requests.len());
                rest = after;
                let wanted: Vec<f64> = serde_json::from_value(wanted["log_likelihoods"].clone()).unwrap();
                for (found, wanted) in own.iter().zip(&wanted) {
                    assert!((found - wanted).abs() < 1e-3, "{}: {found} {wanted}", name.name());
                }
                items.push(ScoredItem {
                    log_likelihoods: own.to_vec(),
                    lengths: item.lengths.clone(),
                    gold: item.gold,
                });
            }
            let score = score_items(&items);
            close("acc", score.acc.value, &wanted["acc"], 1e-9);
            close("its error", score.acc.standard_error, &wanted["acc_stderr"], 1e-9);
            if name.has_acc_norm() {
                close("acc_norm", score.acc_norm.value, &wanted["acc_norm"], 1e-9);
            }
        }
    }
}

/// Figures of one comparison by every way to compute, engine and cache simulated too.
#[test]
fn every_way_to_compute_gives_one_comparison() {
    let (model, golden) = (model(), golden("golden.json"));
    let source = model.source();
    let coarse = Changed { inner: &source, change: &round_rows };
    let original = subject("original", model.spec(), &source);
    let quantized = Subject { kv: Some(&KvPrecision::Int8), ..subject("quantized", model.spec(), &coarse) };
    let run = |compute: &Compute| {
        compare_subjects(&original, &quantized, &windows(&golden)[..4], 3, compute, &go_on).unwrap()
    };
    let wanted = run(&Compute::cpu());
    for compute in &Compute::every()[1..] {
        let found = run(compute);
        let near = |what: &str, a: f64, b: f64| assert!((a - b).abs() <= 1e-4 * b.abs(), "{what}: {a}, wanted {b}");
        near("kl", found.summary.kl_mean, wanted.summary.kl_mean);
        near("perplexity", found.summary.perplexity_quantized, wanted.summary.perplexity_quantized);
        near("original", found.summary.perplexity_original, wanted.summary.perplexity_original);
        assert_eq!(found.layers.len(), wanted.layers.len());
        for (found, wanted) in found.layers.iter().zip(&wanted.layers) {
            near("own error", found.own, wanted.own);
            near("accumulated error", found.accumulated, wanted.accumulated);
        }
    }
}

#[test]
fn a_coarser_cache_diverges_more() {
    let (model, golden) = (model(), golden("golden.json"));
    let source = model.source();
    let original = subject("original", model.spec(), &source);
    let kl = |precision: &KvPrecision| {
        let quantized = Subject { name: "quantized", kv: Some(precision), ..original };
        let found = compare_subjects(&original, &quantized, &windows(&golden)[..3], 2, Compute::cpu(), &go_on).unwrap();
        found.summary.kl_mean
    };
    let [none, eight, fp8, four] =
        [KvPrecision::Float, KvPrecision::Int8, KvPrecision::Fp8, KvPrecision::Int4].map(|precision| kl(&precision));
    assert_eq!(none, 0.0, "nothing is rounded");
    assert!(0.0 < eight && eight < fp8 && fp8 < four, "{eight} {fp8} {four}");
}

#[test]
fn damage_and_differences_are_named() {
    let cpu = Compute::cpu();
    let (model, golden) = (model(), golden("golden.json"));
    let windows = windows(&golden);
    let source = model.source();
    let broken = |wanted: &'static str| {
        move |name: &str, _: &[usize], values: &mut [f32]| {
            if name == wanted {
                values[3] = f32::NAN;
            }
        }
    };
    let change = broken("model.layers.2.mlp.down_proj.weight");
    let damaged = Changed { inner: &source, change: &change };
    let damaged = subject("evaluated", model.spec(), &damaged);
    let error = perplexity(&damaged, &windows, 4, &cpu, &go_on).unwrap_err();
    assert!(matches!(error, RuntimeError::NotFinite { block: 2, which: "evaluated" }), "{error}");
    let original = subject("original", model.spec(), &source);
    let error = compare_subjects(&original, &damaged, &windows, 4, &cpu, &go_on).unwrap_err();
    assert!(matches!(error, RuntimeError::NotFinite { block: 2, .. }), "{error}");
    let change = broken("model.norm.weight");
    let damaged = Changed { inner: &source, change: &change };
    let damaged = subject("quantized", model.spec(), &damaged);
    for error in [
        perplexity(&damaged, &windows, 4, &cpu, &go_on).unwrap_err(),
        compare_subjects(&original, &damaged, &windows, 4, &cpu, &go_on).unwrap_err(),
    ] {
        assert!(matches!(error, RuntimeError::LogitsNotFinite { which: "quantized" }), "{error}");
    }
    let (mut other_vocab, mut other_depth) = (model.spec().clone(), model.spec().clone());
    other_vocab.vocab = 4095;
    other_depth.blocks.pop();
    for (spec, wanted) in
        [(&other_vocab, "4096 tokens in the vocabulary, this checkpoint 4095"), (&other_depth, "layers")]
    {
        let error =
            compare_subjects(&original, &subject("quantized", spec, &source), &windows, 4, &cpu, &go_on).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
    }
    let stop = |step: &'static str, _: usize, _: usize| step != "head";
    assert!(matches!(perplexity(&original, &windows, 4, &cpu, &stop), Err(RuntimeError::Interrupted)));
    assert!(perplexity(&original, &[vec![1]], 4, &cpu, &go_on).is_err(), "one token predicts nothing");
    assert!(perplexity(&original, &[vec![1, 2], vec![3]], 4, &cpu, &go_on).is_err());
}
