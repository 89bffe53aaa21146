//! Damage that only integer layouts can have: zero points, orders of nibbles, labels.

use serde_json::json;

use super::{Checkpoint, Poison, Q, UP, reorder};
use crate::e2e::support::Raw;

/// AutoAWQ's order: nibble `i` of a word is moved to where its channel would be in plain order.
const INTERLEAVED: [u32; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

pub(crate) const POISONS: &[Poison] = &[
    Poison {
        name: "one zero point off by one",
        base: "awq",
        codes: &["zero-shift"],
        apply: |c| c.zeros(Q).word(3, |word| one_more(word, 4)),
    },
    Poison {
        name: "one zero point off by one",
        base: "gptq-v2",
        codes: &["zero-shift"],
        apply: |c| c.zeros(UP).word(3, |word| one_more(word, 4)),
    },
    Poison {
        name: "one zero point off by one",
        base: "ct-asym",
        codes: &["zero-shift"],
        apply: |c| c.zeros(Q).word(3, |word| one_more(word, 4)),
    },
    Poison {
        name: "all zero points off by one",
        base: "awq",
        codes: &["zero-offset"],
        apply: |c| c.zeros(Q).each_word(|word| (0..8).fold(0, |w, i| w | (((word >> (4 * i)) + 1) & 15) << (4 * i))),
    },
    Poison {
        name: "one zero point of a symmetric scheme",
        base: "gptq",
        codes: &["zero-points"],
        apply: |c| c.zeros(Q).word(3, |word| one_more(word, 4)),
    },
    Poison {
        name: "v2 zero points labelled v1",
        base: "gptq-v2",
        codes: &["zero-points", "zero-offset"],
        apply: |c| label(c, json!("gptq")),
    },
    Poison {
        name: "zero points without a label",
        base: "gptq-v2",
        codes: &["zero-points", "zero-offset"],
        apply: |c| {
            c.declared().as_object_mut().unwrap().remove("checkpoint_format");
            c.files.remove("quantize_config.json");
        },
    },
    Poison {
        name: "asymmetric labelled symmetric",
        base: "gptq-v2",
        codes: &["zero-points"],
        apply: |c| {
            c.declared()["sym"] = json!(true);
            c.files.remove("quantize_config.json");
        },
    },
    Poison {
        name: "asymmetric labelled symmetric",
        base: "awq",
        codes: &["zero-points"],
        apply: |c| c.declared()["zero_point"] = json!(false),
    },
    Poison {
        name: "asymmetric labelled symmetric",
        base: "ct-asym",
        codes: &["unpack"],
        apply: |c| c.group_weights()["symmetric"] = json!(true),
    },
    Poison {
        name: "symmetric labelled asymmetric",
        base: "ct-sym",
        codes: &["tensor-missing"],
        apply: |c| c.group_weights()["symmetric"] = json!(false),
    },
    Poison {
        name: "quantize_config.json says otherwise",
        base: "gptq",
        codes: &["side-config-differs"],
        apply: |c| {
            let text = String::from_utf8(c.files["quantize_config.json"].clone()).unwrap();
            let changed = text.replace("\"group_size\": 128", "\"group_size\": 64");
            assert_ne!(text, changed);
            c.files.insert("quantize_config.json".to_owned(), changed.into_bytes());
        },
    },
    Poison {
        name: "nibbles of codes in plain order",
        base: "awq",
        codes: &["pack-order"],
        apply: |c| c.codes(UP).each_word(|word| reorder(word, INTERLEAVED)),
    },
    Poison {
        name: "nibbles of codes and zero points in plain order",
        base: "awq",
        codes: &["pack-order"],
        apply: |c| {
            c.codes(UP).each_word(|word| reorder(word, INTERLEAVED));
            c.zeros(UP).each_word(|word| reorder(word, INTERLEAVED));
        },
    },
    Poison {
        name: "nibbles of codes interleaved",
        base: "gptq",
        codes: &["weights-differ"],
        apply: |c| c.codes(UP).each_word(|word| reorder(word, INTERLEAVED)),
    },
    Poison {
        name: "nibbles of codes reversed",
        base: "ct-asym",
        codes: &["weights-differ"],
        apply: |c| c.codes(UP).each_word(|word| reorder(word, [7, 6, 5, 4, 3, 2, 1, 0])),
    },
    Poison {
        name: "nibbles of zero points reversed",
        base: "ct-asym",
        codes: &["pack-order"],
        apply: |c| c.zeros(UP).each_word(|word| reorder(word, [7, 6, 5, 4, 3, 2, 1, 0])),
    },
    Poison {
        name: "transposed",
        base: "awq",
        codes: &["pack-order", "weights-differ"],
        apply: |c| transpose(c.codes(Q), 4),
    },
    Poison { name: "transposed", base: "int8", codes: &["weights-differ"], apply: |c| transpose(c.codes(Q), 8) },
    Poison {
        name: "high bit of a code",
        base: "awq",
        codes: &["code-outlier"],
        apply: |c| c.codes(Q).word(1000, |word| word ^ 8 << 12),
    },
    Poison {
        name: "high bit of a code",
        base: "gptq",
        codes: &["code-outlier"],
        apply: |c| c.codes(UP).word(1000, |word| word ^ 8 << 12),
    },
    Poison {
        name: "fifth bit of a code",
        base: "ct-8",
        codes: &["code-outlier"],
        apply: |c| c.codes(UP).word(1000, |word| word ^ 0x10 << 8),
    },
    Poison {
        name: "high bit of a code",
        base: "int8",
        codes: &["code-outlier"],
        apply: |c| c.codes(Q).data[777] ^= 0x80,
    },
    Poison {
        name: "signs lost",
        base: "int8",
        codes: &["codes-one-sided"],
        apply: |c| c.codes(Q).data.iter_mut().for_each(|code| *code = (*code as i8).unsigned_abs().min(127)),
    },
    Poison {
        name: "bits wrong",
        base: "awq",
        codes: &["quantization-config"],
        apply: |c| c.declared()["bits"] = json!(8),
    },
    Poison {
        name: "bits wrong",
        base: "gptq",
        codes: &["tensor-shape"],
        apply: |c| {
            c.declared()["bits"] = json!(8);
            c.files.remove("quantize_config.json");
        },
    },
    Poison {
        name: "bits wrong",
        base: "ct-8",
        codes: &["tensor-shape"],
        apply: |c| c.group_weights()["num_bits"] = json!(4),
    },
    Poison {
        name: "group size wrong",
        base: "awq",
        codes: &["tensor-shape"],
        apply: |c| c.declared()["group_size"] = json!(64),
    },
    Poison {
        name: "group size wrong",
        base: "ct-asym",
        codes: &["tensor-shape"],
        apply: |c| c.group_weights()["group_size"] = json!(32),
    },
    Poison {
        name: "columns in another order",
        base: "gptq",
        codes: &["unpack"],
        apply: |c| c.part(Q, &["g_idx"]).data.rotate_left(400),
    },
    Poison {
        name: "weight_shape wrong",
        base: "ct-asym",
        codes: &["tensor-shape"],
        apply: |c| c.part(Q, &["weight_shape"]).data[0] ^= 1,
    },
    Poison {
        name: "zero points missing",
        base: "ct-asym",
        codes: &["tensor-missing"],
        apply: |c| assert!(c.tensors.remove(&format!("{Q}.weight_zero_point")).is_some()),
    },
];

/// The lowest nibble one larger, or one smaller where it is the largest.
fn one_more(word: u32, bits: u32) -> u32 {
    let max = (1 << bits) - 1;
    if word & max == max { word - 1 } else { word + 1 }
}

fn label(c: &mut Checkpoint, label: serde_json::Value) {
    c.declared()["checkpoint_format"] = label;
    c.files.remove("quantize_config.json");
}

/// Transposes the square of codes that a square tensor of words or bytes holds; nibbles stay in their words, so for
/// those it is the words' blocks that are transposed.
fn transpose(raw: &mut Raw, bits: usize) {
    let side = 256;
    let code = |data: &[u8], row: usize, column: usize| match bits {
        8 => data[row * side + column],
        _ => data[(row * side + column) / 2] >> (4 * (column % 2)) & 15,
    };
    let old = raw.data.clone();
    raw.data.fill(0);
    for row in 0..side {
        for column in 0..side {
            let value = code(&old, column, row);
            match bits {
                8 => raw.data[row * side + column] = value,
                _ => raw.data[(row * side + column) / 2] |= value << (4 * (column % 2)),
            }
        }
    }
}
