//! Attention in tiles and composed, against its definition in f64.

use candle_core::Device;

use super::*;
use crate::DecoderSpec;

/// More than two tiles, the last one ragged.
const TOKENS: usize = 2 * TILE + 37;
const WINDOWS: usize = 2;

struct Scaled {
    keys: f32,
    values: f32,
}

impl KvTransform for Scaled {
    fn apply(&self, part: KvPart, heads: &mut [f32], head_dim: usize) {
        assert_eq!((head_dim, heads.len() % head_dim), (8, 0));
        let factor = if part == KvPart::Keys { self.keys } else { self.values };
        heads.iter_mut().for_each(|v| *v *= factor);
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    with_cpu_slice(x, <[f32]>::to_vec).unwrap()
}

/// The definition, in f64: rotation, scores of all visible keys, softmax, weighted sum.
fn definition(inputs: &Inputs, spec: &GqaSpec, rope: &Rope) -> Vec<f64> {
    let (dim, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    let projections: Vec<(Role, usize, Vec<f32>)> =
        inputs.projections.iter().map(|(role, x)| (*role, x.dim(1).unwrap(), values(x))).collect();
    let columns = spec.columns();
    let head = |part: usize, row: usize, head: usize| -> Vec<f64> {
        let (role, columns) = &columns[part];
        let (_, stride, data) = projections.iter().find(|(r, ..)| r == role).unwrap();
        data[row * stride + columns[head]..][..dim].iter().map(|v| f64::from(*v)).collect()
    };
    let turned = |part: usize, row: usize, index: usize, norm: Option<Norm>| -> Vec<f64> {
        let mut x = head(part, row, index);
        if let Some(norm) = norm {
            let normed = if spec.norm_all_heads {
                (0..columns[part].1.len()).flat_map(|index| head(part, row, index)).collect()
            } else {
                x.clone()
            };
            let mean = normed.iter().map(|v| v * v).sum::<f64>() / normed.len() as f64;
            let factor = 1.0 / (mean + f64::from(norm.spec.eps)).sqrt();
            let weights = values(norm.weight);
            let weights = if spec.norm_all_heads { &weights[index * dim..] } else { &weights };
            let plus = if norm.spec.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
            x.iter_mut().zip(weights).for_each(|(v, w)| *v *= factor * (plus + f64::from(*w)));
        }
        rope.tables(spec)
            .unwrap()
            .with_rotation(|r| {
                let at = row % r.tokens * r.half;
                for i in 0..r.half {
                    let (c, s) = (f64::from(r.cos[at + i]), f64::from(r.sin[at + i]));
                    let (a, b) = match r.pairing {
                        crate::RopePairing::Halves => (i, i + r.half),
                        crate::RopePairing::Neighbours => (2 * i, 2 * i + 1),
                    };
                    (x[a], x[b]) = (x[a] * c - x[b] * s, x[b] * c + x[a] * s);
                }
            })
            .unwrap();
        x
    };
    let mut out = Vec::new();
    for row in 0..WINDOWS * TOKENS {
        let (position, start) = (row % TOKENS, row / TOKENS * TOKENS);
        let first = spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
        for h in 0..spec.heads {
            let q = turned(0, row, h, inputs.q_norm);
            let dot = |k: &[f64]| {
                let score = q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * f64::from(spec.scale);
                spec.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let keys = start + first..=row;
            let weights: Vec<f64> =
                keys.clone().map(|key| dot(&turned(1, key, h / group, inputs.k_norm)).exp()).collect();
            let sink = inputs.sinks.map_or(0.0, |sinks| f64::from(values(sinks)[h]).exp());
            let total: f64 = weights.iter().sum::<f64>() + sink;
            let mut sum = vec![0f64; dim];
            for (key, weight) in keys.zip(weights) {
                sum.iter_mut().zip(head(2, key, h / group)).for_each(|(s, v)| *s += weight / total * v);
            }
            out.extend(sum);
        }
    }
    out
}

const GPT_OSS: &str = r#", "num_local_experts": 2, "num_experts_per_tok": 1"#;

#[test]
fn tiles_and_composed_operations_agree_with_the_definition() {
    let device = Device::Cpu;
    for (arch, window, extra) in [
        ("GptOssForCausalLM", None, GPT_OSS),
        ("GptOssForCausalLM", Some(50), GPT_OSS),
        ("LlamaForCausalLM", None, ""),
        ("Qwen3ForCausalLM", Some(50), ""),
        ("InternLM2ForCausalLM", Some(1), ""),
        ("Phi3ForCausalLM", Some(TILE + 3), r#", "partial_rotary_factor": 0.5"#),
        ("Olmo2ForCausalLM", None, ""),
        ("GlmForCausalLM", None, ""),
        ("Gemma2ForCausalLM", Some(60), r#", "query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.5"#),
        ("Gemma3ForCausalLM", Some(40), r#", "query_pre_attn_scalar": 16"#),
    ] {
        let config = format!(
            r#"{{"architectures": ["{arch}"], "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 4{extra}}}"#
        );
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let spec = DecoderSpec::from_config(config.as_object().unwrap()).unwrap();
        let rope = Rope::new(&spec, TOKENS, &device).unwrap();
        let crate::AttnSpec::Gqa(attn) = &spec.blocks[0].attn else { panic!("latent attention") };
        let attn = GqaSpec { window, ..attn.clone() };
        let random = |columns| Tensor::randn(0f32, 1f32, (WINDOWS * TOKENS, columns), &device).unwrap();
        let projections: Vec<(Role, Tensor)> = match attn.qkv {
            QkvLayout::Separate => vec![(Role::Q, random(24)), (Role::K, random(8)), (Role::V, random(8))],
            QkvLayout::Stacked | QkvLayout::Grouped => vec![(Role::Qkv, random(40))],
        };
        let weights = attn.norm_widths().map(|width| Tensor::rand(0.5f32, 2.0, width, &device).unwrap());
        let norm = |i: usize, spec| Norm { spec, weight: &weights[i], bias: None };
        // Between scores that nobody sees and scores that hide all others.
        let sinks = Tensor::new(&[-3f32, 1.0, 4.0], &device).unwrap();
        let inputs = Inputs {
            projections: &projections,
            windows: WINDOWS,
            q_norm: attn.q_norm.as_ref().map(|spec| norm(0, spec)),
            k_norm: attn.k_norm.as_ref().map(|spec| norm(1, spec)),
            sinks: attn.sinks.as_ref().map(|_| &sinks),
            kv: None,
        };
        let wanted = definition(&inputs, &attn, &rope);
        for found in [on_cpu(&inputs, &attn, &rope).unwrap(), composed(&inputs, &attn, &rope).unwrap()] {
            let found = values(&found);
            assert_eq!(found.len(), wanted.len());
            let worst = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(worst < 2e-5, "{arch}: {worst}");
        }
        // Values doubled by the cache double the outputs; doubled keys are a doubled scale of the scores.
        let doubled = Inputs { kv: Some(&Scaled { keys: 1.0, values: 2.0 }), ..inputs };
        let doubled_keys = Inputs { kv: Some(&Scaled { keys: 2.0, values: 1.0 }), ..inputs };
        let sharper = GqaSpec { scale: 2.0 * attn.scale, ..attn.clone() };
        assert_eq!(attn.local_rope, arch == "Gemma3ForCausalLM");
        let wanted_keys = values(&on_cpu(&inputs, &sharper, &rope).unwrap());
        for run in [on_cpu, composed] {
            let found = values(&run(&doubled, &attn, &rope).unwrap());
            let worst = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - 2.0 * b).abs()).fold(0.0, f64::max);
            assert!(worst < 4e-5, "{arch}, values: {worst}");
            let found = values(&run(&doubled_keys, &attn, &rope).unwrap());
            let worst = found.iter().zip(&wanted_keys).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 4e-5, "{arch}, keys: {worst}");
        }
    }
}
