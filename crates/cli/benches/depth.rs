//! Peak memory against depth: `cargo bench -p lite --bench depth` writes synthetic checkpoints of 4, 8, 16 and 32
//! equal blocks, quantizes and evaluates each with the real binary, and prints what the runs say of their own peak.
//! Greedy continuations, which hold a whole model, are left out.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::path::Path;
use std::process::Command;

use lite_decoder::DecoderSpec;
use lite_model::{CheckpointWriter, Dtype, OutputTensor};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 2816;

fn write_model(dir: &Path, layers: usize) -> Result<u64, Box<dyn std::error::Error>> {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_hidden_layers": layers, "vocab_size": 4096, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    });
    let spec = DecoderSpec::from_config(config.as_object().ok_or("an object")?)?;
    let tensors: Vec<OutputTensor> =
        spec.tensors().into_iter().map(|t| OutputTensor { name: t.name, dtype: Dtype::BF16, shape: t.shape }).collect();
    let writer = CheckpointWriter::create(dir, tensors.clone(), 1 << 40)?;
    let mut state = 1u64;
    for tensor in &tensors {
        let scale = tensor.shape.get(1).map_or(0.0, |k| 1.0 / (*k as f32).sqrt());
        let count: usize = tensor.shape.iter().product();
        let mut bytes = Vec::with_capacity(count * 2);
        for _ in 0..count {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let noise = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
            let value = if scale == 0.0 { 1.0 + 0.1 * noise } else { noise * scale };
            bytes.extend(half::bf16::from_f32(value).to_le_bytes());
        }
        writer.write(&tensor.name, &bytes)?;
    }
    let written = writer.finish()?;
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/novels-llama-6m/tokenizer.json");
    std::fs::copy(tokenizer, dir.join("tokenizer.json"))?;
    Ok(written.total_bytes)
}

/// The events that the binary prints.
fn run(verb: &str, model: &Path, flags: &[&str]) -> Result<Vec<serde_json::Value>, Box<dyn std::error::Error>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lite"));
    let output = command.arg(verb).arg(model).args(flags).args(["--format", "json"]).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

fn mib(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "hidden {HIDDEN}, intermediate {INTERMEDIATE}; peak MiB of auto_awq --no-search-scale and of eval, 4 windows of 512 tokens"
    );
    println!(
        "{:>7} {:>12} {:>12} {:>12} {:>9} {:>12} {:>12} {:>12}",
        "layers", "model MiB", "planned", "auto_awq", "seconds", "eval", "--against", "eval float"
    );
    for layers in [4, 8, 16, 32] {
        let dir = tempfile::tempdir()?;
        let model = dir.path().join("model");
        std::fs::create_dir(&model)?;
        let bytes = write_model(&model, layers)?;
        let out = dir.path().join("out");
        let (from, to) = (model.to_string_lossy(), out.to_string_lossy());
        let flags = ["--work-dir", &to, "--calib-dataset", "random", "--calib-samples", "4", "--calib-seqlen", "512"];
        let events = run("auto_awq", &model, &[&flags[..], &["--no-search-scale", "--eval-samples", "2"]].concat())?;
        let of = |kind: &str| events.iter().find(|e| e["event"] == kind).ok_or(format!("no {kind} among the events"));
        let (plan, summary) = (of("plan")?, of("summary")?);
        let peak = |model: &Path, more: &[&str]| -> Result<f64, Box<dyn std::error::Error>> {
            let flags = ["--dataset", "builtin", "--windows", "4", "--seqlen", "512", "--canary", "0"];
            let events = run("eval", model, &[&flags[..], more].concat())?;
            Ok(mib(&events.last().ok_or("eval says nothing")?["peak_resident_bytes"]))
        };
        println!(
            "{layers:>7} {:>12.0} {:>12.0} {:>12.0} {:>9.1} {:>12.0} {:>12.0} {:>12.0}",
            bytes as f64 / f64::from(1 << 20),
            mib(&plan["memory"]["peak"]),
            mib(&summary["peak_resident_bytes"]),
            summary["seconds"].as_f64().unwrap_or(f64::NAN),
            peak(&out, &[])?,
            peak(&out, &["--against", &from])?,
            peak(&model, &[])?
        );
    }
    Ok(())
}
