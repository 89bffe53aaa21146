//! How near the calibration pass comes to the machine's own rate of matrix products.
//!
//! `cargo bench -p lite --bench rates` prints, for a decoder block of several widths, the rate of a plain
//! square product, of Gram updates, of the forward pass, and of both together as calibration runs them, all
//! measured in the same minute. Useful flops only: a Gram update counts one triangle.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{Device, Tensor};
use lite_decoder::{Block, DecoderError, DecoderSpec, NoTap, Rope, WeightSource};
use lite_linalg::{Mat, Threads, gemm_into, gram_update};
use lite_stats::StatsTap;

/// Seeded noise instead of a checkpoint.
struct Noise(BTreeMap<String, Vec<usize>>);

impl WeightSource for Noise {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        let shape = self.0[name].clone();
        let scale = if shape.len() == 1 { 1.0 } else { 1.0 / (shape[1] as f32).sqrt() };
        Ok((shape.clone(), noise(shape.iter().product(), scale)))
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

fn noise(len: usize, scale: f32) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// The fastest of `runs`, seconds.
fn best(runs: usize, mut work: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn gemm_rate(n: usize) -> f64 {
    let (a, b) = (noise(n * n, 1.0), noise(n * n, 1.0));
    let mut c = vec![0f32; n * n];
    let seconds = best(5, || gemm_into(&mut c, n, 0.0, 1.0, Mat::new(&a, n, n), Mat::new(&b, n, n).t(), Threads::All));
    2.0 * (n as f64).powi(3) / seconds
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = rayon::current_num_threads();
    println!("{threads} threads; Gflop/s, and the share of this machine's own 2048 × 2048 product measured beside it");
    println!(
        "{:>7} {:>7} {:>8} {:>8} | {:>8} | {:>14} | {:>14} | {:>14}",
        "hidden", "inter", "windows", "tokens", "product", "Gram", "forward", "forward + Gram"
    );
    for (hidden, intermediate, heads, kv, windows) in
        [(256, 768, 4, 2, 8), (1024, 2816, 16, 8, 8), (2048, 5632, 32, 8, 8), (4096, 11008, 32, 8, 4)]
    {
        let tokens = 512;
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
            "num_attention_heads": heads, "num_key_value_heads": kv, "num_hidden_layers": 1, "vocab_size": 64,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        });
        let spec = DecoderSpec::from_config(config.as_object().ok_or("an object")?)?;
        let source = Noise(spec.tensors().into_iter().map(|t| (t.name, t.shape)).collect());
        let block = Block::load(&spec, 0, &source, &Device::Cpu)?;
        let rope = Rope::new(&spec, tokens, &Device::Cpu)?;
        let x = Tensor::from_vec(noise(windows * tokens * hidden, 1.0), (windows, tokens, hidden), &Device::Cpu)?;

        let rows = (windows * tokens) as f64;
        let linear: f64 = spec.sites().map(|s| 2.0 * rows * (s.out_features * s.in_features) as f64).sum();
        // Causal attention: half of Q·Kᵀ and of P·V.
        let attention = 2.0 * rows * tokens as f64 * hidden as f64;
        let widths: BTreeMap<_, usize> = spec.sites().map(|s| (s.input, s.in_features)).collect();
        let gram: f64 = widths.values().map(|k| rows * (k * k) as f64).sum();

        let product = gemm_rate(2048);
        let runs = if hidden >= 2048 { 3 } else { 8 };
        let forward = best(runs, || {
            block.forward(&x, &rope, &mut NoTap).expect("the block runs");
        });
        let inputs: Vec<(usize, Vec<f32>)> = widths.values().map(|&k| (k, noise(windows * tokens * k, 1.0))).collect();
        let mut grams: Vec<Vec<f32>> = inputs.iter().map(|(k, _)| vec![0.0; k * k]).collect();
        let grams_only = best(runs, || {
            for ((k, x), gram) in inputs.iter().zip(&mut grams) {
                gram_update(gram, x, windows * tokens, *k);
            }
        });
        let mut tap = StatsTap::new(&spec.blocks[0]);
        let both = best(runs, || {
            block.forward(&x, &rope, &mut tap).expect("the block runs");
        });
        let product = product.max(gemm_rate(2048));
        let cell = |flops: f64, seconds: f64| {
            format!("{:>6.0} ({:>3.0} %)", flops / seconds / 1e9, 100.0 * flops / seconds / product)
        };
        println!(
            "{hidden:>7} {intermediate:>7} {windows:>8} {tokens:>8} | {:>8.0} | {:>14} | {:>14} | {:>14}",
            product / 1e9,
            cell(gram, grams_only),
            cell(linear + attention, forward),
            cell(linear + attention + gram, both)
        );
    }
    Ok(())
}
