//! A checkpoint of seeded random weights, of the shape of a 7B Llama unless told otherwise, for measurements where no
//! real one is at hand: `cargo run --release -p lite --example synthetic -- DIR [--layers N] [--hidden N]
//! [--intermediate N] [--heads N] [--kv-heads N] [--vocab N]`.
//!
//! The same flags give the same bytes. Some input channels are larger than others, as in trained models, so that a scale
//! search has something to find. The tokenizer is the bundled model's.
#![allow(clippy::print_stdout, reason = "an example says what it made")]

use std::path::{Path, PathBuf};

use lite_decoder::DecoderSpec;
use lite_model::{CheckpointWriter, Dtype, OutputTensor};
use rayon::prelude::*;

/// One in this many channels is an outlier.
const OUTLIERS: usize = 61;

struct Shape {
    layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
}

/// SplitMix64 (Steele, Lea and Flood 2014): the value at `index` of stream `seed`.
fn random(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Nearly normal, variance 1: four uniform 16-bit numbers.
fn normal(bits: u64) -> f32 {
    let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
    (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
}

/// bf16 values of one tensor.
fn values(seed: u64, shape: &[usize]) -> Vec<u8> {
    let width = shape.last().copied().unwrap_or(1).max(1);
    let matrix = shape.len() > 1;
    let scale = if matrix { 1.0 / (width as f32).sqrt() } else { 0.1 };
    let mut bytes = vec![0u8; shape.iter().product::<usize>() * 2];
    bytes.par_chunks_mut(width * 2).enumerate().for_each(|(row, out)| {
        for (column, out) in out.chunks_exact_mut(2).enumerate() {
            let noise = normal(random(seed, (row * width + column) as u64)) * scale;
            let outlier = column % OUTLIERS == 0;
            // Norm weights around 1, with outlier channels; matrices around 0.
            let value = if matrix { noise } else { 1.0 + noise + if outlier { 6.0 } else { 0.0 } };
            out.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
        }
    });
    bytes
}

fn write(dir: &Path, shape: &Shape) -> Result<u64, Box<dyn std::error::Error>> {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "num_hidden_layers": shape.layers, "vocab_size": shape.vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    });
    let spec = DecoderSpec::from_config(config.as_object().ok_or("an object")?)?;
    let tensors: Vec<OutputTensor> =
        spec.tensors().into_iter().map(|t| OutputTensor { name: t.name, dtype: Dtype::BF16, shape: t.shape }).collect();
    std::fs::create_dir_all(dir)?;
    let writer = CheckpointWriter::create(dir, tensors.clone(), 5_000_000_000)?;
    for (index, tensor) in tensors.iter().enumerate() {
        writer.write(&tensor.name, &values(random(0x11fe, index as u64), &tensor.shape))?;
    }
    let written = writer.finish()?;
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/novels-llama-6m");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(bundled.join(file), dir.join(file))?;
    }
    Ok(written.total_bytes)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: synthetic DIR [--layers N] …")?);
    let mut shape = Shape { layers: 32, hidden: 4096, intermediate: 11008, heads: 32, kv_heads: 32, vocab: 32000 };
    while let Some(flag) = args.next() {
        let slot = match flag.as_str() {
            "--layers" => &mut shape.layers,
            "--hidden" => &mut shape.hidden,
            "--intermediate" => &mut shape.intermediate,
            "--heads" => &mut shape.heads,
            "--kv-heads" => &mut shape.kv_heads,
            "--vocab" => &mut shape.vocab,
            other => return Err(format!("`{other}` is no flag of this example").into()),
        };
        *slot = args.next().ok_or_else(|| format!("{flag} needs a number"))?.parse()?;
    }
    let bytes = write(&dir, &shape)?;
    println!("{}: {bytes} bytes", dir.display());
    Ok(())
}
