//! Every family with experts, and those with latent attention, through the whole run.

use std::collections::BTreeSet;
use std::path::Path;

use super::families::{EIGHT_BITS, families, has_experts, ok, quantize};
use super::resume::{finished, killed, result, same, stderr};
use super::support::*;

/// So many that every expert sees more tokens than it has inputs.
pub(super) const CALIBRATION: [&str; 6] =
    ["--calib-dataset", "random", "--calib-samples", "32", "--calib-seqlen", "32"];

fn mixtures() -> Vec<(String, tempfile::TempDir)> {
    let found: Vec<_> = families().into_iter().filter(|(_, copy)| has_experts(copy.path())).collect();
    assert!(found.len() >= 8, "only {} families with experts were found", found.len());
    found
}

fn has_latents(model: &Path) -> bool {
    config(model).get("kv_lora_rank").is_some()
}

/// A command that must be refused as unsupported; returns its message.
fn refused(command: &mut std::process::Command) -> String {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{command:?}: {message}");
    message
}

/// Eight bits change next to nothing, but where two experts score nearly the same a token may take the other: hence
/// bounds that a wrong fold or a mixed-up expert exceeds by far, and that rounding alone does not need.
#[test]
fn every_mixture_runs_end_to_end() {
    for (name, copy) in mixtures() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let flags = [&CALIBRATION[..], &EIGHT_BITS].concat();
        let kl = quantize("auto_awq", copy.path(), &at("awq"), &flags);
        assert!((0.0..0.03).contains(&kl), "{name}, auto_awq: {kl}");
        let kl = quantize("auto_gptq", copy.path(), &at("gptq"), &flags);
        assert!((0.0..0.03).contains(&kl), "{name}, auto_gptq: {kl}");
        // Activations in eight bits too.
        let kl = quantize("smooth_quant", copy.path(), &at("smooth"), &CALIBRATION);
        assert!((0.0..0.15).contains(&kl), "{name}, smooth_quant: {kl}");
        passed_through(&name, copy.path(), &at("awq"));
    }
}

/// Layers of multi-token prediction are copied, and declared plain.
fn passed_through(name: &str, model: &Path, out: &Path) {
    let (source, written) = (tensors(model), tensors(out));
    let layers = config(model)["num_hidden_layers"].as_u64().unwrap();
    let prefix = format!("model.layers.{layers}.");
    let behind: Vec<&String> = source.keys().filter(|tensor| tensor.starts_with(&prefix)).collect();
    assert_eq!(behind.len() > 20, ["deepseek-v3", "glm4-moe-mtp"].contains(&name), "{name}");
    let config = config(out);
    let ignored = config["quantization_config"]["ignore"].as_array().unwrap();
    let ignored: BTreeSet<&str> = ignored.iter().map(|module| module.as_str().unwrap()).collect();
    for tensor in behind {
        let old = &source[tensor];
        assert!(*old == written[tensor], "{name}: {tensor}");
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        assert!(old.shape.len() != 2 || ignored.contains(module), "{name}: `{module}` is not in the ignore list");
    }
    // Routers are never quantized.
    let is_router = |tensor: &&String| tensor.ends_with(".gate.weight") || tensor.ends_with(".router.weight");
    let routers: Vec<&String> = source.keys().filter(is_router).collect();
    assert!(!routers.is_empty());
    for router in routers {
        assert_eq!(written[router].shape, source[router].shape, "{name}: {router}");
        assert!(ignored.contains(router.strip_suffix(".weight").unwrap()), "{name}: {router}");
    }
}

#[test]
fn interrupted_runs_with_latents_go_on_to_the_same_bytes() {
    let (_, copy) = mixtures().into_iter().find(|(name, _)| name == "deepseek-v2-lite").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let command = |out: &Path| {
        let mut command = lite();
        command.arg("auto_gptq").arg(copy.path()).arg("--work-dir").arg(out).args(CALIBRATION).args(EIGHT_BITS);
        command
    };
    let whole = dir.path().join("whole");
    assert!(command(&whole).output().unwrap().status.success());
    let mut resumed = 0;
    for block in 1..=2 {
        let out = dir.path().join(format!("killed-{block}"));
        killed(command(&out), || finished(&out) >= block);
        let output = command(&out).output().unwrap();
        let over = stderr(&output).contains("already holds a checkpoint");
        assert!(output.status.success() || over, "{}", stderr(&output));
        resumed += usize::from(stderr(&output).contains("resuming after block"));
        same(&result(&out), &result(&whole), &format!("killed after {block} blocks"));
    }
    assert!(resumed >= 1, "every run ended before it was killed");
}

#[test]
fn what_latent_attention_does_not_take_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut tested = 0;
    for (name, copy) in mixtures().into_iter().filter(|(_, copy)| has_latents(copy.path())) {
        let model = copy.path();
        tested += 1;
        let message = refused(lite().arg("generate").arg(model).args(["--prompt", "the"]));
        assert!(message.contains("latent attention") && message.contains("`lite eval`"), "{name}: {message}");
        for (verb, flags, what) in
            [("auto_gptq", ["--effort", "best"], "--effort default"), ("auto_awq", ["--kv-cache", "fp8"], "--kv-cache")]
        {
            let out = dir.path().join(format!("{name}-{verb}"));
            let mut command = lite();
            command.arg(verb).arg(model).arg("--work-dir").arg(&out).args(CALIBRATION).args(EIGHT_BITS).args(flags);
            let message = refused(&mut command);
            assert!(message.contains("latent attention") && message.contains(what), "{name}: {message}");
            assert!(!out.join("config.json").exists());
        }
    }
    assert!(tested >= 3);
}

/// Biases of every linear and of the router, and sinks: in other layouts, at four bits.
#[test]
fn gpt_oss_keeps_its_biases_and_sinks() {
    let (_, copy) = mixtures().into_iter().find(|(name, _)| name == "gpt-oss").unwrap();
    let (dir, source) = (tempfile::tempdir().unwrap(), tensors(copy.path()));
    for (verb, layout) in [("auto_awq", "awq"), ("auto_gptq", "gptq")] {
        let out = dir.path().join(verb);
        let flags = [&CALIBRATION[..], &["--w-bits", "4", "--w-group-size", "16", "--layout", layout]].concat();
        let kl = quantize(verb, copy.path(), &out, &flags);
        assert!((0.0..1.0).contains(&kl), "{verb}: {kl}");
        let written = tensors(&out);
        // What v adds is divided by the scales that its rows are.
        let kept = |name: &str| name.ends_with(".sinks") || (name.ends_with(".bias") && !name.ends_with("v_proj.bias"));
        let kept: Vec<&String> = source.keys().filter(|name| kept(name)).collect();
        assert_eq!(kept.len(), 2 * (1 + 3 + 1 + 6 * 3));
        for name in kept {
            assert!(source[name] == written[name], "{verb}: {name}");
        }
        let found = ok(lite().arg("generate").arg(&out).args(["--prompt", "the ", "--max-new-tokens", "8"]));
        assert!(!found.is_empty(), "{verb}");
    }
    let mut command = lite();
    command.arg("auto_awq").arg(copy.path()).arg("--work-dir").arg(dir.path().join("no")).args(CALIBRATION);
    let message = refused(command.args(["--w-group-size", "16", "--target", "vllm"]));
    assert!(message.contains("GptOssForCausalLM") && message.contains("experts.0.gate_proj"), "{message}");
}
