//! How near the calibration pass comes to the machine's own rate of matrix products.
//!
//! `cargo bench -p lite --bench rates` prints, for a decoder block of several widths, the rate of a plain
//! square product, of Gram updates, of the forward pass, and of both together as calibration runs them, all
//! measured in the same minute. Useful flops only: a Gram update counts one triangle.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

mod common;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lite_decoder::{Block, DecoderSpec, NoTap, Rope};
use lite_linalg::gram_update;
use lite_stats::StatsTap;

use common::{Noise, best, gemm_rate, noise};

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
        let source = Noise::of(&spec);
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
