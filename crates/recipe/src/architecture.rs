//! Files that describe an architecture, read with the places of everything in them.

use std::path::Path;

use lite_decoder::{Architecture, FAMILIES};
use sha2::{Digest, Sha256};

use crate::de::read;
use crate::error::{Fault, RecipeError, Sources, nearest};
use crate::load::read_bounded;
use crate::yaml;

/// Longest file, bytes.
const LONGEST: u64 = 64 << 10;

/// Makes the architecture in `path` known to this process; see [`Architecture::register`].
///
/// # Errors
/// A file that cannot be read or is longer than 64 KiB; text that is no YAML; keys and values that make no
/// sense, with their line and column; an architecture that is known already.
pub fn register_architecture(path: &Path) -> Result<(), RecipeError> {
    let text = read_bounded(path, LONGEST)?;
    let sources = Sources { file: lite_model::printable_path(path), sets: Vec::new() };
    register(&text).map_err(|fault| sources.error(fault))
}

fn register(text: &str) -> Result<(), Fault> {
    let tree = yaml::parse(text, 0)?;
    let architecture: Architecture = read(&tree)?;
    let digest: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
    let wanted = architecture.extends().to_owned();
    architecture.register(&digest).map_err(|error| {
        let near = match error.key.as_str() {
            "extends" => nearest(&wanted, FAMILIES.iter().map(|family| family.architecture)),
            _ => None,
        };
        match near {
            Some(near) => {
                let found = lite_model::printable(&wanted);
                Fault::value(tree.place("extends"), format!("`extends` is `{found}`; did you mean `{near}`?"))
            }
            None => Fault::value(tree.place(&error.key), error.to_string()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("arch.yaml");
        std::fs::write(&path, text).unwrap();
        let message = register_architecture(&path).unwrap_err().to_string();
        message.replace(&dir.path().display().to_string(), "")
    }

    const HEAD: &str = "architecture: ToldForCausalLM\nmodel_type: told\nextends: Qwen2ForCausalLM\n";

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (text, wanted) in [
            ("", "an empty recipe"),
            ("architecture: A\nmodel_type: a\n", "`extends` is missing"),
            (&format!("{HEAD}nmaes: {{}}\n"), "/arch.yaml:4:1: `nmaes` is no key here; did you mean `names`?"),
            (&format!("{HEAD}names:\n  embd: x\n"), "/arch.yaml:5:3: `embd` is no key here; did you mean `embed`?"),
            (
                &format!("{HEAD}names: {{block: model.layers}}\n"),
                "/arch.yaml:4:16: `names.block` is `model.layers`, wanted",
            ),
            (&format!("{HEAD}names: {{o: o_proj.weight}}\n"), "without `.weight`"),
            (&format!("{HEAD}names: {{o: 'a/b'}}\n"), "letters, digits"),
            (&format!("{HEAD}names: {{qkv: {{separate: [a, b]}}}}\n"), ":4:25: "),
            (&format!("{HEAD}names: {{qkv: {{stackd: a}}}}\n"), "did you mean `stacked`?"),
            (&format!("{HEAD}keys: {{num_hidden_layer: n}}\n"), "did you mean `num_hidden_layers`?"),
            (&format!("{HEAD}must: {{rmsnorm: [1]}}\n"), "wanted true, false, a whole number or null"),
            (&format!("{HEAD}bias: {{qkv: sometimes}}\n"), "known are never, always, key, any_of"),
            (&format!("{HEAD}head_dim: {{default: 0}}\n"), "`head_dim` is 0, wanted 1 to 1048576"),
            (&format!("{HEAD}rope: {{theta: .nan}}\n"), "`rope.theta` is NaN"),
            (&format!("{HEAD}rope: {{types: [yarm]}}\n"), "did you mean `yarn`?"),
            (&format!("{HEAD}moe: {{layers: all}}\n"), "Qwen2ForCausalLM has no experts"),
            (&format!("{HEAD}mla: {{interleave: always}}\n"), "no latent attention"),
            (
                &HEAD.replace("Qwen2ForCausalLM", "Qwen2ForCausalLN"),
                ":3:10: `extends` is `Qwen2ForCausalLN`; did you mean",
            ),
            (&HEAD.replace("Qwen2ForCausalLM", "T5"), "wanted a known architecture: LlamaForCausalLM, "),
            (
                &HEAD.replace("ToldForCausalLM", "LlamaForCausalLM"),
                ":1:15: `architecture` is `LlamaForCausalLM`, which is known",
            ),
            (&HEAD.replace("ToldForCausalLM", "LlavaForConditionalGeneration"), "known without a file"),
            (&HEAD.replace("ToldForCausalLM", "Qwen3VLMoeTextModel"), ":1:15: `architecture` is `Qwen3VLMoeTextModel`"),
            (&HEAD.replace("ToldForCausalLM", "Qwen2VLTextModel"), "known without a file"),
            (
                &format!("{HEAD}names: {{attn_norm: ln_1, mlp_norm: ln_1}}\n"),
                ":4:36: `names.mlp_norm` gives the norm `ln_1`, which is that of `names.attn_norm` too",
            ),
            (
                &format!("{HEAD}names:\n  attn_norm: post_attention_layernorm\n"),
                ":5:14: `names.attn_norm` gives the norm `post_attention_layernorm`, which is that of `names.mlp_norm`",
            ),
            (&format!("{HEAD}names: {{q_norm: n, k_norm: n}}\n"), "gives the norm `self_attn.n`"),
            (
                &format!("{}names: {{o: out}}\n", HEAD.replace("Qwen2ForCausalLM", "DeepseekV3ForCausalLM")),
                ":4:12: `names.o` is here, and DeepseekV3ForCausalLM has latent attention",
            ),
            (
                &format!(
                    "{}names: {{qkv: {{stacked: qkv}}}}\n",
                    HEAD.replace("Qwen2ForCausalLM", "DeepseekV2ForCausalLM")
                ),
                "`names.qkv` is here, and DeepseekV2ForCausalLM has latent attention",
            ),
            (&HEAD.replace("ToldForCausalLM", "'a b'"), "wanted letters, digits"),
            (&format!("{HEAD}# {}\n", "x".repeat(64 << 10)), "65536 at most"),
            (
                &format!("{}moe: {{gate: gate_proj}}\n", HEAD.replace("Qwen2ForCausalLM", "Qwen3MoeForCausalLM")),
                "`moe.gate` is `gate_proj`, wanted",
            ),
        ] {
            let message = told(text);
            assert!(message.contains(wanted), "no `{wanted}` in `{message}`");
        }
    }

    #[test]
    fn only_so_much_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("long.yaml");
        std::fs::write(&long, "x".repeat(LONGEST as usize + 1)).unwrap();
        assert!(matches!(register_architecture(&long), Err(RecipeError::Budget { .. })));
        std::fs::write(&long, "x".repeat(LONGEST as usize)).unwrap();
        assert!(!matches!(register_architecture(&long), Err(RecipeError::Budget { .. } | RecipeError::Io { .. })));
        std::fs::write(&long, [0xff, 0xfe]).unwrap();
        assert!(matches!(register_architecture(&long), Err(RecipeError::Io { .. })));
        // Says that it is empty, and never ends.
        let endless = Path::new("/dev/zero");
        assert!(matches!(register_architecture(endless), Err(RecipeError::Budget { .. })));
        assert!(matches!(crate::load(&[endless.to_owned()], &[], None), Err(RecipeError::Budget { .. })));
        assert!(matches!(register_architecture(dir.path()), Err(RecipeError::Io { .. })));
    }

    #[test]
    fn one_architecture_has_one_description() {
        let text = HEAD.replace("Told", "Once");
        register(&text).unwrap();
        register(&text).unwrap();
        let fault = register(&format!("{text}tied: true\n")).unwrap_err();
        assert!(format!("{fault:?}").contains("another file"), "{fault:?}");
        let digest = lite_decoder::definition("OnceForCausalLM").unwrap();
        assert!(digest.len() == 64 && lite_decoder::definition("LlamaForCausalLM").is_none());
    }
}
