//! Seconds to tune one block of hidden width 256 and intermediate width 768 on 512-token windows, 8 a step:
//! `cargo run --release -p lite-tune --example timing [steps]`.
// It measures something and says so.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use candle_core::{Device, Tensor};
use lite_decoder::{Block, DecoderError, DecoderSpec, NoTap, Role, Rope, WeightSource, with_cpu_slice};
use lite_quant::{Range, RangeContext, ScaleDtype, Scheme, quantize_nearest};
use lite_tune::{Side, TuneData, TuneLinear, TuneSettings, tune_block};

const TOKENS: usize = 512;
const HIDDEN: usize = 256;
const WINDOWS: usize = 64;

/// Reproducible noise in −1..1.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mix = |i: usize| {
        let mixed = (i as u32).wrapping_add(seed).wrapping_mul(2_654_435_761);
        ((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(mix).collect()
}

/// Random weights of the shapes that are asked for.
struct Random(DecoderSpec);

impl WeightSource for Random {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        let needs = self.0.tensors();
        let index = needs.iter().position(|need| need.name == name).unwrap_or(0);
        let shape = needs[index].shape.clone();
        let mut values = noise(shape.iter().product(), index as u32 * 7919);
        match shape.as_slice() {
            [_, inputs] => values.iter_mut().for_each(|v| *v *= 1.7 / (*inputs as f32).sqrt()),
            _ => values.iter_mut().for_each(|v| *v = 1.0 + 0.2 * *v),
        }
        Ok((shape, values))
    }

    fn contains(&self, _: &str) -> bool {
        true
    }
}

/// Both sides in memory.
struct Memory {
    input: Vec<f32>,
    target: Vec<f32>,
}

impl TuneData for Memory {
    fn windows(&self) -> usize {
        self.input.len() / (TOKENS * HIDDEN)
    }

    fn read(&self, side: Side, first: usize, count: usize) -> Result<Vec<f32>, Box<dyn Error + Send + Sync>> {
        let values = match side {
            Side::Input => &self.input,
            Side::Target => &self.target,
        };
        Ok(values[first * TOKENS * HIDDEN..][..count * TOKENS * HIDDEN].to_vec())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 768, "head_dim": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
        "rms_norm_eps": 1e-6,
    });
    let spec = DecoderSpec::from_config(config.as_object().ok_or("no object")?)?;
    let device = Device::Cpu;
    let block = Block::load(&spec, 0, &Random(spec.clone()), &device)?;
    let rope = Rope::new(&spec, TOKENS, &device)?;
    let scheme = Scheme::new(4, 128, false, ScaleDtype::BF16)?;
    let mut linears = Vec::new();
    for role in [Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down] {
        let weight = block.weight(role).ok_or("no such linear")?;
        let (out_features, in_features) = weight.dims2()?;
        let target = with_cpu_slice(weight, <[f32]>::to_vec)?;
        let context = RangeContext { weight: &target, out_features, in_features, gram: None };
        linears.push(TuneLinear { role, quantized: quantize_nearest(&context, &scheme, Range::Search)?, target });
    }
    let mut input = noise(WINDOWS * TOKENS * HIDDEN, 12_345);
    (1..input.len()).for_each(|i| input[i] += 0.7 * input[i - 1]);
    let x = Tensor::from_vec(input.clone(), (WINDOWS, TOKENS, HIDDEN), &device)?;
    let target = with_cpu_slice(&block.forward(&x, &rope, &mut NoTap)?, <[f32]>::to_vec)?;
    let data = Memory { input, target };
    let steps = std::env::args().nth(1).map_or(Ok(100), |text| text.parse())?;
    let settings = TuneSettings { steps, ..TuneSettings::default() };
    let start = Instant::now();
    let outcome = tune_block(&block, linears, &rope, &data, &settings, &|| false)?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{seconds:.2} s for {steps} steps of 8 windows, {} threads", rayon::current_num_threads());
    let (before, after) = (outcome.held_out_before, outcome.held_out_after);
    println!("held-out error {before:e} before, {after:e} after ({:.1} %)", 100.0 * (after / before - 1.0));
    Ok(())
}
