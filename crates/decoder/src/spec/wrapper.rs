//! Models that hold a decoder beside other parts: vision-language models. Their decoder is that of a known family, described
//! in a section of config.json, under names of their own; everything else of them is nobody's business here.

use serde_json::{Map, Value};

use super::config::Section;
use super::families::{FamilyInfo, by_architecture, family};
use crate::DecoderError;

/// A model around a decoder.
#[derive(Debug)]
pub struct WrapperInfo {
    /// The entry of `architectures`.
    pub architecture: &'static str,
    /// `model_type`.
    pub model_type: &'static str,
    /// Which models this covers, for people.
    pub title: &'static str,
    /// The section that describes the decoder.
    section: &'static str,
    /// Whether older files have no such section, and the decoder's keys at the top.
    flat: bool,
    /// The decoder's family; `None`: as the section says.
    family: Option<&'static str>,
    tie: Tie,
    /// How the decoder's tensors may be called, the way they are published first.
    styles: &'static [Style],
}

impl WrapperInfo {
    /// The model around a decoder that config.json describes, if it is a known one.
    pub fn of(config: &Map<String, Value>) -> Option<&'static Self> {
        let name = config.get("architectures").and_then(|names| names.get(0)?.as_str());
        WRAPPERS.iter().find(|wrapper| Some(wrapper.architecture) == name)
    }

    /// What transformers 5 calls `module` of the checkpoint in memory, where that is another name.
    pub fn in_memory(&self, module: &str) -> Option<String> {
        if !self.styles.contains(&Style::Inside) || module.starts_with("model.language_model.") {
            return None;
        }
        match module.strip_prefix("language_model.").unwrap_or(module) {
            "lm_head" => (module != "lm_head").then(|| "lm_head".to_owned()),
            own => match own.strip_prefix("model.") {
                Some(visual) if visual.starts_with("visual.") => None,
                Some(rest) => Some(format!("model.language_model.{rest}")),
                None => Some(format!("model.{own}")),
            },
        }
    }
}

/// Which `tie_word_embeddings` counts, and what it is if absent: as the model's own configuration class has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tie {
    /// That of the whole file; this where it is absent. The section's says nothing.
    Whole(bool),
    /// That of the whole file, or else the section's (its class's default where it is absent) where that is true.
    Either,
    /// The section's, whatever the whole file says.
    Section,
}

/// How the names of a decoder differ from those it has alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// Not at all.
    Alone,
    /// `language_model.model.layers…`, `language_model.lm_head`.
    Outside,
    /// `model.language_model.layers…`, `lm_head`.
    Inside,
}

impl Style {
    /// A decoder's own name in this style.
    pub(super) fn name(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Self::Alone, _) | (Self::Inside, None) => name.to_owned(),
            (Self::Outside, _) => format!("language_model.{name}"),
            (Self::Inside, Some(rest)) => format!("model.language_model.{rest}"),
        }
    }
}

/// The known models around decoders.
pub static WRAPPERS: &[WrapperInfo] = &[
    WrapperInfo {
        architecture: "Qwen2VLForConditionalGeneration",
        model_type: "qwen2_vl",
        title: "Qwen2-VL",
        section: "text_config",
        flat: true,
        family: Some("Qwen2VLTextModel"),
        tie: Tie::Either,
        styles: &[Style::Alone, Style::Inside],
    },
    WrapperInfo {
        architecture: "Qwen2_5_VLForConditionalGeneration",
        model_type: "qwen2_5_vl",
        title: "Qwen2.5-VL",
        section: "text_config",
        flat: true,
        family: Some("Qwen2_5_VLTextModel"),
        tie: Tie::Either,
        styles: &[Style::Alone, Style::Inside],
    },
    WrapperInfo {
        architecture: "Qwen3VLForConditionalGeneration",
        model_type: "qwen3_vl",
        title: "Qwen3-VL (dense)",
        section: "text_config",
        flat: false,
        family: Some("Qwen3VLTextModel"),
        tie: Tie::Whole(false),
        styles: &[Style::Inside],
    },
    WrapperInfo {
        architecture: "Qwen3VLMoeForConditionalGeneration",
        model_type: "qwen3_vl_moe",
        title: "Qwen3-VL MoE (30B-A3B, 235B-A22B)",
        section: "text_config",
        flat: false,
        family: Some("Qwen3VLMoeTextModel"),
        tie: Tie::Whole(false),
        styles: &[Style::Inside],
    },
    WrapperInfo {
        architecture: "Gemma3ForConditionalGeneration",
        model_type: "gemma3",
        title: "Gemma 3 (with vision)",
        section: "text_config",
        flat: false,
        family: Some("Gemma3ForCausalLM"),
        tie: Tie::Whole(true),
        styles: &[Style::Outside, Style::Inside],
    },
    WrapperInfo {
        architecture: "InternVLChatModel",
        model_type: "internvl_chat",
        title: "InternVL2, 2.5 and 3",
        section: "llm_config",
        flat: false,
        family: None,
        tie: Tie::Section,
        styles: &[Style::Outside],
    },
    WrapperInfo {
        architecture: "InternVLForConditionalGeneration",
        model_type: "internvl",
        title: "InternVL3 (`-hf` checkpoints)",
        section: "text_config",
        flat: false,
        family: None,
        tie: Tie::Whole(true),
        styles: &[Style::Outside, Style::Inside],
    },
    WrapperInfo {
        architecture: "LlavaForConditionalGeneration",
        model_type: "llava",
        title: "LLaVA 1.5 and what has its shape",
        section: "text_config",
        flat: false,
        family: None,
        tie: Tie::Either,
        styles: &[Style::Outside, Style::Inside],
    },
];

/// Sizes that a section may leave out, because the family's configuration class has them as defaults.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) vocab: usize,
}

/// The defaults of transformers 5.17 by architecture.
fn default_sizes(architecture: &str) -> Option<Sizes> {
    let [hidden, intermediate, layers, heads, vocab] = match architecture {
        "LlamaForCausalLM" => [4096, 11_008, 32, 32, 32_000],
        "MistralForCausalLM" => [4096, 14_336, 32, 32, 32_000],
        "Qwen2VLTextModel" | "Qwen2_5_VLTextModel" => [8192, 29_568, 80, 64, 152_064],
        "Qwen2ForCausalLM" | "Qwen3ForCausalLM" | "Qwen3VLTextModel" => [4096, 22_016, 32, 32, 151_936],
        "Qwen3VLMoeTextModel" => [2048, 5632, 24, 16, 151_936],
        "Gemma3ForCausalLM" => [2304, 9216, 26, 8, 262_208],
        _ => return None,
    };
    Some(Sizes { hidden, intermediate, layers, heads, vocab })
}

/// Where a config.json describes its decoder.
pub(super) struct Place<'a> {
    pub(super) family: &'static FamilyInfo,
    /// What describes the decoder.
    pub(super) config: Section<'a>,
    /// The whole file, if that is more.
    pub(super) outer: Option<Section<'a>>,
    pub(super) sizes: Option<Sizes>,
    tie: Tie,
    /// How its tensors may be called; never empty.
    pub(super) styles: &'static [Style],
}

impl<'a> Place<'a> {
    pub(super) fn find(config: Section<'a>) -> Result<Self, DecoderError> {
        let named = match config.texts("architectures")?.as_deref() {
            Some([one]) => WRAPPERS.iter().find(|w| w.architecture == *one),
            None | Some([]) => {
                config.text("model_type")?.and_then(|name| WRAPPERS.iter().find(|w| w.model_type == name))
            }
            Some(_) => None,
        };
        let Some(wrapper) = named else {
            let (styles, family) = (&[Style::Alone], family(&config)?);
            let config = config.renamed(family.keys)?;
            return Ok(Self { family, config, outer: None, sizes: None, tie: Tie::Section, styles });
        };
        let section = config.section(wrapper.section)?;
        if section.is_none() && !wrapper.flat {
            return Err(config.wrong(wrapper.section, "an object that describes the decoder"));
        }
        let (inner, outer) = match section {
            Some(section) => (section, Some(config)),
            None => (config, None),
        };
        let family = match wrapper.family.and_then(by_architecture) {
            Some(family) => family,
            None => family(&inner)?,
        };
        if let (Some(found), true) = (inner.text("model_type")?, wrapper.family.is_some() && outer.is_some())
            && found != family.model_type
            && found.strip_suffix("_text") != Some(wrapper.model_type)
        {
            return Err(
                inner.unsupported("model_type", &format!("`{}_text` in {}", wrapper.model_type, wrapper.architecture))
            );
        }
        let sizes = outer.and_then(|_| default_sizes(family.architecture));
        let (tie, styles) = (wrapper.tie, wrapper.styles);
        Ok(Self { family, config: inner.renamed(family.keys)?, outer, sizes, tie, styles })
    }

    /// Whether head and embedding are one matrix. `has_head` is whether the checkpoint holds a head: transformers then does
    /// not tie by a class's default (older files leave the key of the whole out, and say in the section that it is false).
    pub(super) fn tied(&self, has_head: bool) -> Result<bool, DecoderError> {
        let key = "tie_word_embeddings";
        let whole = self.outer.unwrap_or(self.config).flag(key)?;
        let own = self.config.flag(key)?.unwrap_or(self.family.tied);
        Ok(match self.tie {
            Tie::Whole(default) => whole.unwrap_or(default && !has_head),
            Tie::Either => whole.unwrap_or(false) || own,
            Tie::Section => own,
        })
    }

    /// `key` of the decoder, or else of the whole file: what concerns both ends of the model.
    pub(super) fn holder(&self, key: &str) -> Section<'a> {
        match self.outer {
            Some(outer) if self.config.get(key).is_none() => outer,
            _ => self.config,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_memory_are_those_of_transformers() {
        let of = |index: usize, module: &str| WRAPPERS[index].in_memory(module);
        let wanted = |name: &str| Some(name.to_owned());
        assert_eq!(of(1, "visual.blocks.0.attn.qkv"), wanted("model.visual.blocks.0.attn.qkv"));
        assert_eq!(of(1, "model.layers.1.mlp.up_proj"), wanted("model.language_model.layers.1.mlp.up_proj"));
        assert_eq!((of(1, "lm_head"), of(2, "model.visual.merger.linear_fc1")), (None, None));
        assert_eq!(
            of(4, "language_model.model.layers.0.mlp.up_proj"),
            wanted("model.language_model.layers.0.mlp.up_proj")
        );
        assert_eq!(of(4, "vision_tower.head.mlp.fc1"), wanted("model.vision_tower.head.mlp.fc1"));
        assert_eq!(of(7, "language_model.lm_head"), wanted("lm_head"));
        assert_eq!(of(5, "mlp1.1"), None, "transformers does not have this model");
    }

    #[test]
    fn names_follow_the_style() {
        let own = ["model.layers.0.mlp", "model.norm", "lm_head"];
        let all = |style: Style| own.map(|name| style.name(name));
        assert_eq!(all(Style::Alone), own);
        assert_eq!(
            all(Style::Outside),
            ["language_model.model.layers.0.mlp", "language_model.model.norm", "language_model.lm_head"]
        );
        assert_eq!(all(Style::Inside), ["model.language_model.layers.0.mlp", "model.language_model.norm", "lm_head"]);
        assert!(WRAPPERS.iter().all(|w| !w.styles.is_empty() && w.family.is_none_or(|f| by_architecture(f).is_some())));
    }
}
