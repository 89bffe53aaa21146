//! Damage to codes, scales and whole weights that every layout can have.

use super::{Checkpoint, K, Poison, Q, UP, V};

pub(crate) const POISONS: &[Poison] = &[
    Poison { name: "scale zeroed", base: "awq", codes: &["scale-zero"], apply: |c| c.scales(Q).set(5, 0.0) },
    Poison { name: "scale zeroed", base: "int8", codes: &["scale-zero"], apply: |c| c.scales(Q).set(5, 0.0) },
    Poison { name: "scale zeroed", base: "fp8-block", codes: &["scale-zero"], apply: |c| c.scales(Q).set(1, 0.0) },
    Poison { name: "scale NaN", base: "awq", codes: &["value-not-finite"], apply: |c| c.scales(Q).set(5, f32::NAN) },
    Poison {
        name: "scale Inf",
        base: "ct-8",
        codes: &["value-not-finite"],
        apply: |c| c.scales(UP).set(5, f32::INFINITY),
    },
    Poison { name: "scale negative", base: "gptq", codes: &["scale-negative"], apply: |c| c.scales(Q).scale(9, -1.0) },
    Poison { name: "scale negative", base: "fp8", codes: &["scale-negative"], apply: |c| c.scales(Q).scale(9, -1.0) },
    Poison {
        name: "scale subnormal in fp16",
        base: "awq",
        codes: &["scale-subnormal"],
        apply: |c| c.scales(Q).set(5, 1e-6),
    },
    Poison {
        name: "exponent bit of a scale",
        base: "ct-asym",
        codes: &["scale-outlier", "group-scale"],
        apply: |c| c.scales(Q).data[2 * 77 + 1] ^= 0x40,
    },
    Poison {
        name: "mantissa bit of a scale",
        base: "awq",
        codes: &["group-scale"],
        apply: |c| c.scales(Q).data[2 * 77 + 1] ^= 0x02,
    },
    Poison {
        name: "scale a quarter larger",
        base: "gptq",
        codes: &["group-scale"],
        apply: |c| c.scales(UP).scale(100, 1.25),
    },
    Poison {
        name: "scale an eighth larger",
        base: "ct-8",
        codes: &["group-scale"],
        apply: |c| c.scales(UP).scale(100, 1.125),
    },
    Poison {
        name: "scale a quarter larger",
        base: "fp8-block",
        codes: &["group-scale"],
        apply: |c| c.scales(UP).scale(2, 1.25),
    },
    Poison {
        name: "scale of a row that a fold divides",
        base: "lmdeploy-w8a8",
        codes: &["fold-inconsistent", "group-scale"],
        apply: |c| c.scales(UP).scale(100, 1.5),
    },
    Poison {
        name: "scale of a row",
        base: "int8",
        codes: &["fold-inconsistent", "group-scale"],
        apply: |c| c.scales(V).scale(31, 0.5),
    },
    Poison {
        name: "fp16 scales labelled bf16",
        base: "awq",
        codes: &["group-scale", "weights-differ", "scale-outlier", "scale-subnormal"],
        apply: |c| c.scales(Q).dtype = safetensors::Dtype::BF16,
    },
    Poison {
        name: "scales of type I16",
        base: "gptq",
        codes: &["tensor-dtype"],
        apply: |c| c.scales(Q).dtype = safetensors::Dtype::I16,
    },
    Poison {
        name: "scales of another shape",
        base: "ct-asym",
        codes: &["tensor-shape"],
        apply: |c| c.scales(Q).shape.reverse(),
    },
    Poison { name: "scales missing", base: "awq", codes: &["tensor-missing"], apply: |c| remove(c, "scales") },
    Poison { name: "scales missing", base: "int8", codes: &["tensor-missing"], apply: |c| remove(c, "weight_scale") },
    Poison { name: "scales missing", base: "lmdeploy-w8a8", codes: &["tensor-missing"], apply: |c| remove(c, "scale") },
    Poison {
        name: "scales missing",
        base: "block-fp8",
        codes: &["tensor-missing"],
        apply: |c| remove(c, "weight_scale_inv"),
    },
    Poison { name: "keys and values swapped", base: "awq", codes: &["weights-differ"], apply: |c| swap(c, K, V) },
    Poison { name: "keys and values swapped", base: "gptq", codes: &["weights-differ"], apply: |c| swap(c, K, V) },
    Poison { name: "keys and values swapped", base: "fp8-block", codes: &["weights-differ"], apply: |c| swap(c, K, V) },
    Poison { name: "queries and keys swapped", base: "ct-asym", codes: &["tensor-shape"], apply: |c| swap(c, Q, K) },
    Poison {
        name: "gate and up swapped",
        base: "nvfp4",
        codes: &["weights-differ"],
        apply: |c| swap(c, UP, "model.layers.1.mlp.gate_proj"),
    },
    Poison {
        name: "another layer's weights",
        base: "awq",
        codes: &["weights-differ"],
        apply: |c| swap(c, Q, "model.layers.0.self_attn.q_proj"),
    },
    Poison {
        name: "another layer's weights",
        base: "mxfp4",
        codes: &["weights-differ"],
        apply: |c| swap(c, Q, "model.layers.0.self_attn.q_proj"),
    },
    Poison { name: "codes lost", base: "ct-asym", codes: &["codes-constant"], apply: |c| c.codes(Q).data.fill(0) },
    Poison { name: "codes lost", base: "fp8", codes: &["codes-constant"], apply: |c| c.codes(Q).data.fill(0) },
    Poison {
        name: "codes saturated",
        base: "ct-sym",
        codes: &["codes-saturated"],
        apply: |c| {
            c.codes(Q)
                .each_word(|word| (0..8).fold(0, |w, i| w | if word >> (4 * i) & 8 == 0 { 0 } else { 15 << (4 * i) }))
        },
    },
    Poison {
        name: "rows rolled by one",
        base: "int8",
        codes: &["weights-differ"],
        apply: |c| c.codes(Q).data.rotate_left(256),
    },
];

fn remove(c: &mut Checkpoint, suffix: &str) {
    assert!(c.tensors.remove(&format!("{Q}.{suffix}")).is_some());
}

/// All tensors of two linears change places.
fn swap(c: &mut Checkpoint, a: &str, b: &str) {
    let (first, second) = (c.take(a), c.take(b));
    c.put(a, second);
    c.put(b, first);
}
