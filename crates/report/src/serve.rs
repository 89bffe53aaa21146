//! How to serve a checkpoint, engine by engine. `DIR` stands for its folder or its id on the hub.

use lite_pack::KvCacheScheme;
use lite_pack::targets::Target;

/// What decides the command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'a> {
    /// `quant_method` of the layout.
    pub(crate) quant_method: &'a str,
    /// Name of the layout.
    pub(crate) layout: &'a str,
    /// The cache's scheme.
    pub(crate) kv_cache: Option<KvCacheScheme>,
}

/// The engine's name for a reader.
pub(crate) fn title(target: Target) -> &'static str {
    match target {
        Target::Vllm => "vLLM",
        Target::TurboMind => "LMDeploy (TurboMind)",
        Target::LmdeployPytorch => "LMDeploy (PyTorch)",
        Target::Transformers => "transformers",
        Target::TrtLlm => "TensorRT-LLM",
    }
}

/// The language of [`command`].
pub(crate) fn language(target: Target) -> &'static str {
    if target == Target::Transformers { "python" } else { "sh" }
}

/// The command.
pub(crate) fn command(target: Target, facts: Facts<'_>) -> String {
    match target {
        Target::Vllm => {
            // Calibrated scales are used only where the cache is fp8.
            let cache = if facts.kv_cache.is_some() { " --kv-cache-dtype fp8" } else { "" };
            format!("vllm serve DIR{cache}")
        }
        // Its converter compares the format with `quant_method`.
        Target::TurboMind => {
            format!("lmdeploy serve api_server DIR --backend turbomind --model-format {}", facts.quant_method)
        }
        Target::LmdeployPytorch => "lmdeploy serve api_server DIR --backend pytorch".to_owned(),
        Target::TrtLlm => "trtllm-serve DIR".to_owned(),
        Target::Transformers => transformers(facts.layout),
    }
}

fn transformers(layout: &str) -> String {
    let packages = match layout {
        "awq" => "transformers accelerate gptqmodel",
        "gptq" => "transformers accelerate optimum gptqmodel",
        "compressed-tensors" => "transformers accelerate compressed-tensors",
        _ => "transformers accelerate",
    };
    format!(
        "# pip install {packages}\n\
         from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         tokenizer = AutoTokenizer.from_pretrained(\"DIR\")\n\
         model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\", device_map=\"auto\")\n\
         inputs = tokenizer(\"The capital of France is\", return_tensors=\"pt\").to(model.device)\n\
         print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_follow_the_layout() {
        let awq = Facts { quant_method: "awq", layout: "awq", kv_cache: None };
        assert_eq!(command(Target::Vllm, awq), "vllm serve DIR");
        assert!(command(Target::TurboMind, awq).ends_with("--backend turbomind --model-format awq"));
        assert!(command(Target::Transformers, awq).contains("gptqmodel"));
        let cached = Facts { quant_method: "compressed-tensors", layout: "compressed-tensors", ..awq };
        let cached = Facts { kv_cache: Some(KvCacheScheme::Fp8Tensor), ..cached };
        assert_eq!(command(Target::Vllm, cached), "vllm serve DIR --kv-cache-dtype fp8");
        assert!(command(Target::TurboMind, cached).ends_with("--model-format compressed-tensors"));
    }
}
