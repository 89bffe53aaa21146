//! Damage that only fp8 and fp4 layouts can have, and to scales of a cache.

use serde_json::json;

use super::{Poison, Q, UP};

const K_SCALE: &str = "model.layers.1.self_attn.k_scale";

pub(crate) const POISONS: &[Poison] = &[
    Poison {
        name: "code that means NaN",
        base: "fp8",
        codes: &["value-not-finite"],
        apply: |c| c.codes(Q).data[99] = 0x7f,
    },
    Poison {
        name: "code that means NaN",
        base: "block-fp8",
        codes: &["value-not-finite"],
        apply: |c| c.codes(Q).data[99] = 0xff,
    },
    Poison {
        name: "exponent bit of a code",
        base: "fp8",
        codes: &["code-outlier", "value-not-finite"],
        apply: |c| {
            let codes = &mut c.codes(UP).data;
            let at = codes.iter().position(|code| (0x20..0x38).contains(code)).unwrap();
            codes[at] ^= 0x40;
        },
    },
    Poison {
        name: "scales are their reciprocals",
        base: "block-fp8",
        codes: &["group-scale", "weights-differ"],
        apply: |c| {
            let scales = c.scales(Q);
            for (at, scale) in scales.floats().into_iter().enumerate() {
                scales.set(at, 1.0 / scale);
            }
        },
    },
    Poison {
        name: "block size wrong",
        base: "block-fp8",
        codes: &["tensor-shape", "quantization-config"],
        apply: |c| c.declared()["weight_block_size"] = json!([64, 64]),
    },
    Poison {
        name: "fp8 labelled int8",
        base: "fp8",
        codes: &["tensor-dtype", "quantization-config", "unpack"],
        apply: |c| {
            c.group_weights()["type"] = json!("int");
            let group = &mut c.declared()["config_groups"]["group_0"];
            group["format"] = json!("int-quantized");
            group["input_activations"]["type"] = json!("int");
            c.declared()["format"] = json!("int-quantized");
        },
    },
    Poison {
        name: "int8 labelled fp8",
        base: "lmdeploy-w8a8",
        codes: &["tensor-dtype", "quantization-config", "unpack"],
        apply: |c| c.declared()["quant_dtype"] = json!("float8_e4m3fn"),
    },
    Poison {
        name: "global scale is its reciprocal",
        base: "nvfp4",
        codes: &["group-scale"],
        apply: |c| {
            let global = c.part(Q, &["weight_global_scale"]);
            let value = global.floats()[0];
            global.set(0, 1.0 / value);
        },
    },
    Poison {
        name: "global scale missing",
        base: "nvfp4",
        codes: &["tensor-missing"],
        apply: |c| assert!(c.tensors.remove(&format!("{Q}.weight_global_scale")).is_some()),
    },
    Poison {
        name: "halves of bytes swapped",
        base: "nvfp4",
        codes: &["weights-differ"],
        apply: |c| c.codes(Q).data.iter_mut().for_each(|byte| *byte = byte.rotate_left(4)),
    },
    Poison { name: "scale zeroed", base: "nvfp4", codes: &["scale-zero"], apply: |c| c.scales(Q).data[7] = 0 },
    Poison {
        name: "scale means NaN",
        base: "nvfp4",
        codes: &["value-not-finite", "unpack"],
        apply: |c| c.scales(Q).data[7] = 0x7f,
    },
    Poison {
        name: "nvfp4 labelled mxfp4",
        base: "nvfp4",
        codes: &["tensor-dtype", "tensor-shape", "quantization-config", "unpack"],
        apply: |c| {
            c.group_weights()["group_size"] = json!(32);
            c.group_weights()["strategy"] = json!("group");
            c.group_weights()["scale_dtype"] = json!("torch.uint8");
            c.declared()["config_groups"]["group_0"]["format"] = json!("mxfp4-pack-quantized");
            c.declared()["format"] = json!("mxfp4-pack-quantized");
        },
    },
    Poison {
        name: "exponent of a scale off by one",
        base: "mxfp4",
        codes: &["group-scale"],
        apply: |c| c.scales(UP).data[7] += 1,
    },
    Poison {
        name: "scale means NaN",
        base: "mxfp4",
        codes: &["value-not-finite", "unpack"],
        apply: |c| c.scales(Q).data[7] = 255,
    },
    Poison {
        name: "scale of the cache missing",
        base: "fp8",
        codes: &["kv-scales-missing"],
        apply: |c| assert!(c.tensors.remove(K_SCALE).is_some()),
    },
    Poison {
        name: "scale of the cache zeroed",
        base: "fp8",
        codes: &["kv-scale-value"],
        apply: |c| c.tensor(K_SCALE).set(0, 0.0),
    },
    Poison {
        name: "scale of the inputs zeroed",
        base: "modelopt",
        codes: &["scale-zero", "value-not-finite", "unpack"],
        apply: |c| c.part(Q, &["input_scale"]).set(0, 0.0),
    },
    Poison {
        name: "scale of the inputs missing",
        base: "modelopt",
        codes: &["tensor-missing"],
        apply: |c| assert!(c.tensors.remove(&format!("{Q}.input_scale")).is_some()),
    },
    Poison {
        name: "scale a quarter larger",
        base: "modelopt",
        codes: &["group-scale"],
        apply: |c| c.scales(Q).scale(0, 1.25),
    },
];
