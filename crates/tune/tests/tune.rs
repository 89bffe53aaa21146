//! What tuning must achieve, and what it must not do.

use std::error::Error;
use std::path::Path;

use candle_core::{Device, Tensor};
use lite_decoder::{Block, CheckpointSource, DecoderSpec, NoTap, Rope, with_cpu_slice};
use lite_model::Checkpoint;
use lite_quant::{QuantizedLinear, Range, RangeContext, ScaleDtype, Scheme, quantize_nearest};
use lite_tune::{Side, TuneData, TuneError, TuneLinear, TuneOutcome, TuneSettings, tune_block};

const TOKENS: usize = 48;
const WINDOWS: usize = 24;

/// A fixture block, its linears rounded to nearest, and what it makes of random inputs.
struct Case {
    block: Block,
    rope: Rope,
    linears: Vec<TuneLinear>,
    data: Memory,
}

struct Memory {
    window: usize,
    input: Vec<f32>,
    target: Vec<f32>,
}

impl TuneData for Memory {
    fn windows(&self) -> usize {
        self.input.len() / self.window
    }

    fn read(&self, side: Side, first: usize, count: usize) -> Result<Vec<f32>, Box<dyn Error + Send + Sync>> {
        let values = match side {
            Side::Input => &self.input,
            Side::Target => &self.target,
        };
        let found = values.get(first * self.window..(first + count) * self.window);
        Ok(found.ok_or("no such windows")?.to_vec())
    }
}

/// Reproducible noise in −1..1.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mix = |i: usize| {
        let mixed = (i as u32).wrapping_add(seed << 22).wrapping_mul(2_654_435_761);
        ((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(mix).collect()
}

fn case(family: &str, bits: i64, symmetric: bool, dtype: ScaleDtype) -> Case {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families").join(family);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let spec = DecoderSpec::from_config(checkpoint.config()).unwrap();
    let block = Block::load(&spec, 0, &CheckpointSource::new(&checkpoint), &Device::Cpu).unwrap();
    let rope = Rope::new(&spec, TOKENS, &Device::Cpu).unwrap();
    let scheme = Scheme::new(bits, 16, symmetric, dtype).unwrap();
    let linears = block.spec().sites.iter().map(|site| {
        let target = with_cpu_slice(block.weight(site.id.role).unwrap(), <[f32]>::to_vec).unwrap();
        let (out_features, in_features) = (site.out_features, site.in_features);
        let context = RangeContext { weight: &target, out_features, in_features, gram: None };
        let quantized = quantize_nearest(&context, &scheme, Range::MinMax).unwrap();
        TuneLinear { role: site.id.role, quantized, target }
    });
    let linears = linears.collect();
    // Channels that depend on each other, of different sizes, as hidden states are.
    let mut input = noise(WINDOWS * TOKENS * spec.hidden, 7);
    for row in input.chunks_exact_mut(spec.hidden) {
        (1..row.len()).for_each(|i| row[i] = 0.6 * row[i] + 0.8 * row[i - 1]);
        (0..row.len()).for_each(|i| row[i] *= 1.0 + (i % 7) as f32 / 2.0);
    }
    let x = Tensor::from_vec(input.clone(), (WINDOWS, TOKENS, spec.hidden), &Device::Cpu).unwrap();
    let target = with_cpu_slice(&block.forward(&x, &rope, &mut NoTap).unwrap(), <[f32]>::to_vec).unwrap();
    Case { block, rope, linears, data: Memory { window: TOKENS * spec.hidden, input, target } }
}

impl Case {
    fn tune(&self, settings: &TuneSettings) -> Result<TuneOutcome, TuneError> {
        tune_block(&self.block, self.linears.clone(), &self.rope, &self.data, settings, &|| false)
    }

    /// The error on the last windows, from the float block's own forward pass.
    fn error<'a>(&self, linears: impl Iterator<Item = &'a QuantizedLinear>, held_out: usize) -> f64 {
        let mut block = self.block.clone();
        for (linear, quantized) in self.linears.iter().zip(linears) {
            let shape = (quantized.out_features, quantized.in_features);
            let weight = Tensor::from_vec(quantized.dequantize(), shape, &Device::Cpu).unwrap();
            block.set_weight(linear.role, weight).unwrap();
        }
        let start = (WINDOWS - held_out) * self.data.window;
        let shape = (held_out, TOKENS, self.data.window / TOKENS);
        let x = Tensor::from_vec(self.data.input[start..].to_vec(), shape, &Device::Cpu).unwrap();
        let y = with_cpu_slice(&block.forward(&x, &self.rope, &mut NoTap).unwrap(), <[f32]>::to_vec).unwrap();
        let squares = y.iter().zip(&self.data.target[start..]).map(|(y, t)| f64::from(y - t).powi(2));
        squares.sum::<f64>() / y.len() as f64
    }
}

#[test]
fn tuning_lowers_the_error_on_windows_it_never_saw() {
    // Three matrices and one; symmetric and not; both half types of scales.
    for (family, symmetric, dtype) in [
        ("llama3", false, ScaleDtype::F16),
        ("phi3-partial", true, ScaleDtype::BF16),
        ("internlm2", false, ScaleDtype::F32),
        ("qwen3", true, ScaleDtype::F16),
    ] {
        let case = case(family, 3, symmetric, dtype);
        let outcome = case.tune(&TuneSettings::default()).unwrap();
        assert!(outcome.kept, "{family}");
        let (before, after) = (outcome.held_out_before, outcome.held_out_after);
        assert!(after < 0.8 * before, "{family}: {before} to {after}");
        // What is said is true of what is returned.
        let given = case.error(case.linears.iter().map(|l| &l.quantized), 3);
        let tuned = case.error(outcome.linears.iter().map(|l| &l.quantized), 3);
        assert!((given - before).abs() < 1e-5 * before && (tuned - after).abs() < 1e-5 * after, "{family}");
        for (linear, tuned) in case.linears.iter().zip(&outcome.linears) {
            assert_eq!(tuned.role, linear.role);
            tuned.quantized.check().unwrap();
            assert_eq!(tuned.quantized.zeros, linear.quantized.zeros);
            assert!(tuned.quantized.scales.iter().all(|&s| dtype.round(s) == s && s > 0.0));
            assert!(tuned.quantized.codes.iter().all(|&code| code <= 7));
            let changed = tuned.quantized.codes.iter().zip(&linear.quantized.codes).filter(|(a, b)| a != b).count();
            assert_eq!(changed, tuned.changed_codes);
        }
        assert!(outcome.linears.iter().any(|l| l.changed_codes > 0));
    }
}

#[test]
fn what_is_not_better_is_not_kept() {
    let case = case("llama2", 4, false, ScaleDtype::F16);
    // Rates at which Adam only shakes.
    let wild = TuneSettings { steps: 3, lr_scale: 1.0, lr_code: 1.0, ..TuneSettings::default() };
    for settings in [wild, TuneSettings { steps: 0, ..TuneSettings::default() }] {
        let outcome = case.tune(&settings).unwrap();
        assert!(!outcome.kept && outcome.held_out_after >= outcome.held_out_before);
        for (linear, same) in case.linears.iter().zip(&outcome.linears) {
            assert!(linear.quantized == same.quantized && same.changed_codes == 0);
        }
    }
    let outcome = tune_block(&case.block, Vec::new(), &case.rope, &case.data, &TuneSettings::default(), &|| false);
    let outcome = outcome.unwrap();
    assert!(outcome.held_out_before == 0.0 && outcome.linears.is_empty() && !outcome.kept);
}

#[test]
fn linears_that_are_not_given_stay_float() {
    let mut case = case("llama3", 3, false, ScaleDtype::F16);
    // Down's input is close to independent noise here, which leaves little to gain.
    for (kept, share) in [(0, 0.95), (3, 0.95), (6, 1.0)] {
        let all = case.linears.clone();
        case.linears = vec![all[kept].clone()];
        let outcome = case.tune(&TuneSettings { steps: 30, ..TuneSettings::default() }).unwrap();
        assert_eq!((outcome.linears.len(), outcome.linears[0].role), (1, all[kept].role));
        let before = case.error(case.linears.iter().map(|l| &l.quantized), 3);
        assert!((outcome.held_out_before - before).abs() < 1e-5 * before);
        assert!(outcome.kept && outcome.held_out_after < share * before, "{before} to {}", outcome.held_out_after);
        case.linears = all;
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let case = case("internlm3-bias", 3, false, ScaleDtype::F16);
    let settings = TuneSettings::default();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.tune(&settings).unwrap())
    };
    let one = run(1);
    assert!(one.linears.iter().any(|l| l.changed_codes > 0));
    assert!(one == run(2), "two threads give other bytes than one");
    assert!(one == run(5), "five threads give other bytes than one");
    assert!(one != case.tune(&TuneSettings { seed: 1, ..settings }).unwrap(), "the seed chooses the windows");
}

#[test]
fn undefined_values_are_errors() {
    let mut case = case("llama2", 4, false, ScaleDtype::F16);
    let settings = TuneSettings { steps: 20, ..TuneSettings::default() };
    // In a window to tune on and in a held-out one, on both sides.
    for at in [5, (WINDOWS - 1) * case.data.window] {
        for side in [Side::Input, Side::Target] {
            for bad in [f32::NAN, f32::INFINITY] {
                let values = match side {
                    Side::Input => &mut case.data.input,
                    Side::Target => &mut case.data.target,
                };
                let good = std::mem::replace(&mut values[at], bad);
                let result = case.tune(&settings);
                assert!(matches!(result, Err(TuneError::NotFinite { .. })), "{at} {side:?} {bad}: {result:?}");
                match side {
                    Side::Input => case.data.input[at] = good,
                    Side::Target => case.data.target[at] = good,
                }
            }
        }
    }
    case.linears[2].target[3] = f32::NAN;
    assert!(matches!(case.tune(&settings), Err(TuneError::NotFinite { .. })));
}

#[test]
fn what_does_not_fit_is_refused() {
    let good = || case("llama2", 4, false, ScaleDtype::F16);
    let settings = TuneSettings::default();
    let message = |case: &Case, settings: &TuneSettings| case.tune(settings).unwrap_err().to_string();
    for bad in [
        TuneSettings { windows_per_step: 0, ..settings },
        TuneSettings { lr_code: f32::NAN, ..settings },
        TuneSettings { lr_scale: -0.1, ..settings },
        TuneSettings { reach: 0.5, ..settings },
    ] {
        assert!(matches!(good().tune(&bad), Err(TuneError::Setting { .. })));
    }
    let mut case = good();
    case.linears.push(case.linears[0].clone());
    assert_eq!(message(&case, &settings), "Q was given twice");
    case.linears.pop();
    case.linears[1].target.pop();
    assert!(message(&case, &settings).contains("K has a target of 2303 values, wanted 2304"));
    let mut case = good();
    case.linears[0].quantized.codes[7] = 16;
    assert_eq!(message(&case, &settings), "Q holds the code 16, wanted at most 15");
    case.linears[0].quantized.codes[7] = 15;
    case.linears[0].quantized.scales[1] = 0.0;
    assert_eq!(message(&case, &settings), "Q holds the scale 0, wanted a positive normal number");
    case.linears[0].quantized.scales.pop();
    assert!(matches!(case.tune(&settings), Err(TuneError::Quant { .. })));
    case.linears.remove(0);
    case.linears[0].role = lite_decoder::Role::Qkv;
    assert_eq!(message(&case, &settings), "Qkv is not a linear of block 0");
    let mut case = good();
    case.data.target.truncate(case.data.window * 3);
    assert!(matches!(case.tune(&settings), Err(TuneError::Data(_))));
    case.data.input.truncate(case.data.window);
    assert!(matches!(case.tune(&settings), Err(TuneError::TooFewWindows { found: 1 })));
    let case = good();
    let stopped = tune_block(&case.block, case.linears.clone(), &case.rope, &case.data, &settings, &|| true);
    assert!(matches!(stopped, Err(TuneError::Cancelled)));
}
