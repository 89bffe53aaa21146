//! Fixed records for tests.

use serde_json::json;

use crate::record::*;

fn measured(value: f64, standard_error: f64) -> Measured {
    Measured { value, standard_error }
}

fn text(source: &str) -> TextFact {
    TextFact { source: source.to_owned(), windows: 16, seqlen: 512, sha256: Some("ab".repeat(32)) }
}

/// What a run on a small model might leave.
pub(crate) fn record() -> Record {
    let edges: Vec<f64> = (0..=40).map(|i| 1e-8 * 10f64.powf(f64::from(i) / 4.0)).collect();
    let counts = (0..40u64).map(|i| if (12..30).contains(&i) { 900 - 10 * i.abs_diff(20).pow(2) } else { 0 });
    let layers = 28;
    let error = |layer: usize| 0.05 + 0.004 * ((layer * 7) % 11) as f64;
    let roles = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let linears = (0..layers).flat_map(|layer| {
        roles.iter().enumerate().map(move |(role, name)| Linear {
            module: format!("model.layers.{layer}.{name}"),
            layer,
            shape: [1024, 1024],
            scheme: (role == 6 && layer < 2).then(|| "8 bits, group size 128, asymmetric".to_owned()),
            relative_error: Some(error(layer) * (0.5 + 0.1 * role as f64)),
        })
    });
    let settings = json!({
        "method": "AWQ", "scheme": "4 bits, group size 128, asymmetric", "layout": "awq", "scale_dtype": "bfloat16",
        "scales": "searched by output error", "range": "searched by error",
        "other_schemes": [{"scheme": "8 bits, group size 128, asymmetric", "linears": 2}],
        "overrides": [r"layers\.[01]\..*down_proj"], "quantized_linears": 196, "seed": 0
    });
    let serde_json::Value::Object(settings) = settings else { unreachable!("it was written as an object") };
    let engine = |engine, title, loads, rules: &[&str], serve: &str, serve_language| EngineVerdict {
        engine,
        title,
        loads,
        rules: rules.iter().map(|rule| (*rule).to_owned()).collect(),
        serve: loads.then(|| serve.to_owned()),
        serve_language,
    };
    Record {
        schema: SCHEMA,
        tool: Tool { name: "lite".to_owned(), version: "0.1.0".to_owned() },
        model: ModelFacts {
            name: "Qwen/Qwen3-0.6B".to_owned(),
            base_model: Some("Qwen/Qwen3-0.6B".to_owned()),
            revision: None,
            architecture: "Qwen3ForCausalLM".to_owned(),
            header_sha256: "0f".repeat(32),
        },
        settings,
        calibration: Some(TextFact { windows: 128, seqlen: 2048, ..text("wikitext2, train split") }),
        sizes: Sizes {
            source_bytes: 1_192_099_840,
            output_bytes: 542_000_128,
            quantized_bytes: 230_850_560,
            bits_per_weight: 4.19,
        },
        linears_checked: 196,
        tensors_checked: 114,
        comparison: Some(Comparison {
            text: text("built-in held-out text"),
            tokens: 8192,
            predictions: 8176,
            kl_mean: measured(0.0312, 0.0011),
            kl_percentiles: vec![("p50", 0.0081), ("p90", 0.0712), ("p99", 0.344), ("p99.9", 1.21), ("max", 4.01)],
            kl_histogram: Histogram { edges, counts: counts.collect(), below: 12, above: 0 },
            top1: measured(0.9123, 0.0031),
            perplexity_original: measured(21.43, 0.55),
            perplexity_quantized: measured(21.98, 0.57),
            perplexity_ratio: measured(1.0257, 0.0031),
            delta_p_mean: measured(-0.0034, 0.0004),
            delta_p_rms: measured(0.041, 0.001),
        }),
        layers: (0..layers)
            .map(|layer| Layer {
                layer,
                own_error: Some(error(layer)),
                accumulated_error: Some(0.02 + 0.003 * layer as f64),
                linears_error: Some(error(layer) * 0.8),
                timing: None,
            })
            .collect(),
        linears: linears.collect(),
        experts: Vec::new(),
        fallbacks: vec![Fallback {
            module: "model.layers.3.mlp.down_proj".to_owned(),
            reason: "the Gram matrix is not positive definite; rounded to nearest".to_owned(),
        }],
        engines: vec![
            engine("vllm", "vLLM", true, &[], "vllm serve DIR", "sh"),
            engine(
                "turbomind",
                "LMDeploy (TurboMind)",
                false,
                &["8 bits: TurboMind reads 4-bit integers only"],
                "",
                "sh",
            ),
            engine(
                "transformers",
                "transformers",
                true,
                &["layout `awq` needs the gptqmodel package"],
                "import transformers",
                "python",
            ),
        ],
        files: vec![FileFact { name: "model.safetensors".to_owned(), bytes: 542_000_128, sha256: "cd".repeat(32) }],
        notes: vec!["`lm_head.weight` is tied to the embedding".to_owned()],
    }
}

/// A record whose every name tries to get out of its place.
pub(crate) fn hostile() -> Record {
    let evil = "a</script><script>alert('1')</script>\"'`|\n# injected\n[x](javascript:alert(1))\u{202e}";
    let mut record = record();
    record.model.name = evil.to_owned();
    record.model.base_model = Some(evil.to_owned());
    record.model.architecture = evil.to_owned();
    for value in record.settings.values_mut() {
        *value = evil.into();
    }
    for text in record.calibration.iter_mut().chain(record.comparison.iter_mut().map(|c| &mut c.text)) {
        text.source = evil.to_owned();
        text.sha256 = Some(evil.to_owned());
    }
    for linear in &mut record.linears {
        linear.module = format!("model.layers.{}.{evil}", linear.layer);
        linear.scheme = Some(evil.to_owned());
    }
    for fallback in &mut record.fallbacks {
        (fallback.module, fallback.reason) = (evil.to_owned(), evil.to_owned());
    }
    for engine in &mut record.engines {
        engine.rules = vec![evil.to_owned()];
    }
    for file in &mut record.files {
        file.name = evil.to_owned();
    }
    record.notes = vec![evil.to_owned()];
    record
}
