//! What a block with experts costs beside a dense one of the same active parameters.
//!
//! `cargo bench -p lite --bench experts` prints seconds of the forward pass for a block in the shape of Qwen3-30B-A3B (128
//! experts, 8 of them per token) and for a dense block whose feed-forward is as wide as those 8 together, on the same
//! tokens. A ratio of 1 is the cost of the active parameters, 11 that of running every expert on every token (attention
//! costs the same in both); `limit` is 1.3 times the cost of the active parameters and the router.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

mod common;

use candle_core::{Device, Tensor};
use lite_decoder::{Block, DecoderSpec, NoTap, Rope};

use common::{Noise, best, gemm_rate, noise};

const HIDDEN: usize = 2048;
const WIDTH: usize = 768;
const EXPERTS: usize = 128;
const TOP_K: usize = 8;
const TOKENS: usize = 512;

/// A block, what it needs, and the flops of its linears for one token.
fn block(architecture: &str, width: usize) -> Result<(Block, Rope, f64), Box<dyn std::error::Error>> {
    let config = serde_json::json!({
        "architectures": [architecture], "hidden_size": HIDDEN, "intermediate_size": width,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 1, "vocab_size": 64,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH, "norm_topk_prob": true,
    });
    let spec = DecoderSpec::from_config(config.as_object().ok_or("an object")?)?;
    let block = Block::load(&spec, 0, &Noise::of(&spec), &Device::Cpu)?;
    let rope = Rope::new(&spec, TOKENS, &Device::Cpu)?;
    let linears: f64 = spec.sites().map(|s| 2.0 * (s.out_features * s.in_features) as f64).sum();
    Ok((block, rope, linears))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let product = gemm_rate(2048) / 1e9;
    println!("{} threads; a 2048 x 2048 product runs at {product:.0} Gflop/s", rayon::current_num_threads());
    println!("{:>8} {:>8} | {:>8} {:>8} {:>7} {:>7}", "windows", "tokens", "dense s", "experts s", "ratio", "limit");
    let (dense, dense_rope, linears) = block("Qwen3ForCausalLM", TOP_K * WIDTH)?;
    let (experts, rope, _) = block("Qwen3MoeForCausalLM", WIDTH)?;
    let router = 2.0 * (EXPERTS * HIDDEN) as f64;
    for windows in [3, 8, 32] {
        let shape = (windows, TOKENS, HIDDEN);
        let x = Tensor::from_vec(noise(windows * TOKENS * HIDDEN, 1.0), shape, &Device::Cpu)?;
        let of = |block: &Block, rope: &Rope| {
            best(3, || {
                block.forward(&x, rope, &mut NoTap).expect("the block runs");
            })
        };
        let (plain, mixed) = (of(&dense, &dense_rope), of(&experts, &rope));
        println!(
            "{windows:>8} {:>8} | {plain:>8.3} {mixed:>8.3} {:>7.2} {:>7.2}",
            windows * TOKENS,
            mixed / plain,
            1.3 * (1.0 + router / linears)
        );
    }
    Ok(())
}
