//! Files of LLMC and of llm-compressor.

use lite_job::{ErrorKind, Method, Rounding, SmoothScales};
use lite_pack::{KvCacheScheme, preset};
use lite_quant::{LinearScheme, Range, ScaleDtype, Scheme};
use lite_recipe::{Loaded, RecipeError, load};

fn with(text: &str, sets: &[&str]) -> Result<Loaded, RecipeError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.yaml");
    std::fs::write(&path, text).unwrap();
    load(&[path], &sets.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>(), None)
}

fn ok(text: &str, sets: &[&str]) -> Loaded {
    with(text, sets).unwrap_or_else(|e| panic!("{text}\n{e}"))
}

/// An LLMC config with this `quant` and `save`.
fn llmc(quant: &str, save: &str) -> String {
    format!(
        "base:\n    seed: &seed 42\nmodel:\n    type: Llama\n    path: /models/m\n    torch_dtype: auto\ncalib:\n    name: pileval\n    download: True\n    n_samples: 128\n    bs: -1\n    seq_len: 512\n    preproc: txt_general_preproc\n    seed: *seed\neval:\n    eval_pos: [pretrain, fake_quant]\n    name: wikitext2\n    download: True\n    bs: 1\n    seq_len: 2048\nquant:\n{quant}save:\n{save}    save_path: /save/\n"
    )
}

const INT4: &str = "    weight:\n        bit: 4\n        symmetric: True\n        granularity: per_group\n        group_size: 128\n        need_pack: True\n";
const INT8: &str = "    weight:\n        bit: 8\n        symmetric: True\n        granularity: per_channel\n        group_size: -1\n    act:\n        bit: 8\n        symmetric: True\n        granularity: per_token\n";
const VLLM: &str = "    save_vllm: True\n";

fn named(name: &str) -> LinearScheme {
    preset(name, ScaleDtype::F32).unwrap()
}

#[test]
fn the_methods_of_llmc_are_mapped() {
    let awq = format!(
        "    method: Awq\n{INT4}    special:\n        trans: True\n        trans_version: v2\n        weight_clip: True\n    quant_out: True\n"
    );
    let loaded = ok(&llmc(&awq, VLLM), &[]);
    let r = &loaded.jobs[0].recipe;
    assert_eq!(
        (r.method, r.solver.rounding, r.range),
        (Method::Awq { search_scale: true }, Rounding::Nearest, Range::Search)
    );
    assert_eq!(r.scheme, Some(named("W4A16")));
    assert_eq!((r.model.as_str(), r.work_dir.to_str()), ("/models/m", Some("/save/vllm_quant_model")));
    assert_eq!((r.layout.as_deref(), r.target.unwrap().name()), (Some("compressed-tensors"), "vllm"));
    assert_eq!(
        (r.calib.dataset.as_deref(), r.calib.samples, r.calib.seqlen, r.calib.seed),
        (Some("pileval"), 128, Some(512), 42)
    );
    assert_eq!((r.eval.dataset.as_deref(), r.eval.seqlen, r.batch_size), (Some("wikitext2"), Some(2048), None));
    assert_eq!(loaded.warnings.len(), 1, "{:?}", loaded.warnings);
    assert!(
        loaded.warnings[0].contains("model.type (line 4), calib.preproc (line 13)")
            || loaded.warnings[0].contains("model.type (line 4)")
    );

    let gptq = format!(
        "    method: GPTQ\n{INT4}        int_range: [-8, 7]\n        pack_mode: vllm_pack\n    special:\n        actorder: True\n        static_groups: True\n        percdamp: 0.02\n        blocksize: 128\n        true_sequential: True\n    quant_out: True\n"
    );
    let r = ok(&llmc(&gptq, VLLM), &[]).jobs.remove(0).recipe;
    assert_eq!((r.method, r.solver.rounding, r.range), (Method::Plain, Rounding::Gptq, Range::MinMax));
    assert_eq!((r.solver.act_order, r.solver.error_aware, r.solver.damp), (true, true, 0.02));

    let r = ok(&llmc(&format!("    method: SmoothQuant\n{INT8}    special:\n        alpha: 0.8\n"), VLLM), &[])
        .jobs
        .remove(0)
        .recipe;
    assert_eq!((r.method, r.scheme), (Method::SmoothQuant { scales: SmoothScales::Alpha(0.8) }, Some(named("W8A8"))));

    let r = ok(&llmc(&format!("    method: Awq\n{INT8}"), VLLM), &[]).jobs.remove(0).recipe;
    assert_eq!((r.method, r.scheme), (Method::SmoothQuant { scales: SmoothScales::Awq }, Some(named("W8A8"))));

    let r = ok(&llmc(&format!("    method: RTN\n{INT4}"), "    save_autoawq: True\n"), &[]).jobs.remove(0).recipe;
    assert_eq!((r.method, r.calib.if_needed, r.layout.as_deref()), (Method::Plain, true, Some("awq")));
    assert_eq!(r.work_dir.to_str(), Some("/save/autoawq_quant_model"));
}

#[test]
fn small_floats_of_llmc_are_mapped() {
    let fp8 = |weight: &str, act: &str| {
        format!(
            "    method: RTN\n    quant_type: float-quant\n    weight:\n        bit: e4m3\n        symmetric: True\n        granularity: {weight}\n        use_qtorch: True\n    act:\n        bit: e4m3\n        symmetric: True\n        granularity: {act}\n"
        )
    };
    for (text, wanted) in [
        (fp8("per_channel", "per_token"), "FP8_DYNAMIC"),
        (fp8("per_tensor", "per_tensor\n        static: True"), "FP8"),
        (fp8("per_block", "per_group\n        group_size: 128"), "FP8_BLOCK"),
    ] {
        assert_eq!(ok(&llmc(&text, VLLM), &[]).jobs[0].recipe.scheme, Some(named(wanted)), "{text}");
    }
    let cached = format!(
        "{}    kvcache:\n        method: Naive\n        quant_type: float-quant\n        bit: e4m3\n        granularity: per_tensor\n        static: True\n",
        fp8("per_channel", "per_token")
    );
    assert_eq!(ok(&llmc(&cached, VLLM), &[]).jobs[0].recipe.kv_cache, Some(KvCacheScheme::Fp8Tensor));
}

#[test]
fn what_llmc_saves_becomes_jobs() {
    let rtn = format!("    method: RTN\n{INT4}");
    let several = ok(
        &llmc(
            &rtn,
            "    save_vllm: True\n    save_sgl: True\n    save_trtllm: True\n    trtllm_cfg:\n        tp_size: 4\n        pp_size: 1\n    save_fake: True\n    save_trans: True\n",
        ),
        &[],
    );
    let names: Vec<&str> = several.jobs.iter().map(|job| job.name.as_str()).collect();
    assert_eq!(names, ["vllm_quant_model", "sgl_quant_model", "trtllm_quant_model"]);
    assert_eq!(several.jobs[2].recipe.tensor_parallel, 4);
    assert_eq!(several.jobs[0].plain.as_deref().and_then(|p| p.to_str()), Some("/save/fake_quant_model"));
    assert!(several.jobs[1].plain.is_none());
    assert!(several.warnings.iter().any(|w| w.contains("save_trans")), "{:?}", several.warnings);
    let fake = ok(&llmc(&rtn, "    save_fake: True\n"), &[]).jobs.remove(0);
    assert_eq!(fake.recipe.work_dir.to_str(), Some("/save/quant_model"));
    assert!(fake.plain.is_some());
    // Limits of lite's own can be added.
    assert_eq!(ok(&llmc(&rtn, VLLM), &["eval.max_kl=0.1"]).jobs[0].gates.len(), 1);
}

#[test]
fn ignored_layers_become_patterns() {
    let text = llmc(
        &format!(
            "    method: RTN\n{INT4}ignored_layers:\n    block_ids: [0, 2-3]\n    layer_names: [mlp.down_proj]\n    speical_names: [model.layers.5.mlp.up_proj]\n"
        ),
        VLLM,
    );
    let ignore = ok(&text, &[]).jobs.remove(0).recipe.ignore;
    assert_eq!(ignore, [r"\.(0|2|3)\.(mlp\.down_proj)$", r"^model\.layers\.5\.mlp\.up_proj$"]);
}

#[test]
fn what_llmc_does_and_lite_does_not_is_told_by_name() {
    for method in ["OmniQuant", "Quarot", "HQQ", "TesseraQ", "OsPlus", "SpQR"] {
        let error = with(&llmc(&format!("    method: {method}\n{INT4}"), VLLM), &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(method), "{error}");
    }
    let rtn = format!("    method: RTN\n{INT4}");
    for (text, kind, wanted) in [
        (llmc(&rtn, "    save_lightllm: True\n"), ErrorKind::Unsupported, "LightLLM"),
        (llmc(&rtn, "    save_trans: True\n"), ErrorKind::Unsupported, "`save.save_trans` alone"),
        (llmc(&rtn.replace("bit: 4", "bit: e3m2"), VLLM), ErrorKind::Unsupported, "e3m2"),
        (llmc(&rtn.replace("per_group", "per_head"), VLLM), ErrorKind::Unsupported, "per_head"),
        (llmc(&format!("{rtn}        int_range: [-7, 7]\n"), VLLM), ErrorKind::Unsupported, "int_range"),
        (llmc(&format!("{rtn}        calib_algo: hqq\n"), VLLM), ErrorKind::Unsupported, "calib_algo: hqq"),
        (
            llmc(&format!("{rtn}    kvcache:\n        method: Kivi\n        bit: 2\n"), VLLM),
            ErrorKind::Unsupported,
            "Kivi",
        ),
        (
            llmc(&INT8.replace("per_token", "per_tensor").replace("    weight", "    method: RTN\n    weight"), VLLM),
            ErrorKind::Unsupported,
            "dynamic scales `per_tensor`",
        ),
        (
            llmc(&rtn, VLLM).replace("quant:\n", "sparse:\n    method: Wanda\nquant:\n"),
            ErrorKind::Unsupported,
            "sparsification",
        ),
        (llmc("    method: RNT\n", VLLM), ErrorKind::Usage, "`quant.weight` is missing"),
        (llmc(&rtn.replace("RTN", "GPTQQ"), VLLM), ErrorKind::Usage, "did you mean `GPTQ`?"),
        (
            llmc(&rtn.replace("symmetric", "symetric"), VLLM),
            ErrorKind::Usage,
            "`symetric` is no key here; did you mean `symmetric`?",
        ),
        (llmc(&rtn.replace("True", "yes"), VLLM), ErrorKind::Usage, "is `yes`, wanted true or false"),
    ] {
        let error = with(&text, &[]).map(|_| ()).expect_err(&text);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(wanted), "{error}\nwanted {wanted}");
    }
}

const MODEL: [&str; 2] = ["model=m", "save.path=out"];

#[test]
fn the_modifiers_of_llm_compressor_are_mapped() {
    let r = ok(
        "GPTQModifier:\n  targets: Linear\n  scheme: W4A16\n  ignore: [lm_head, 're:.*down_proj$']\n  dampening_frac: 0.1\n",
        &MODEL,
    );
    assert_eq!(r.warnings.len(), 1, "{:?}", r.warnings);
    let r = &r.jobs[0].recipe;
    assert_eq!(
        (r.method, r.solver.rounding, r.solver.damp, r.solver.act_order),
        (Method::Plain, Rounding::Gptq, 0.1, true)
    );
    assert_eq!((r.scheme, r.layout.as_deref()), (Some(named("W4A16")), Some("compressed-tensors")));
    assert_eq!(r.ignore, ["^(?:.*down_proj$)"]);

    let staged = "quant_stage:\n  quant_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n    GPTQModifier: {scheme: W8A8, targets: [Linear], actorder: null}\n";
    let r = ok(staged, &MODEL).jobs.remove(0).recipe;
    assert_eq!(r.method, Method::SmoothQuant { scales: SmoothScales::Alpha(0.8) });
    assert_eq!((r.solver.rounding, r.solver.act_order, r.scheme), (Rounding::Gptq, false, Some(named("W8A8"))));

    let r =
        ok("AWQModifier: {duo_scaling: both}\nQuantizationModifier: {scheme: W4A16_ASYM, targets: [Linear]}\n", &MODEL)
            .jobs
            .remove(0)
            .recipe;
    assert_eq!((r.method, r.scheme), (Method::Awq { search_scale: true }, Some(named("W4A16_ASYM"))));

    let r = ok("QuantizationModifier:\n  scheme: FP8_DYNAMIC\n  kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true}\n", &MODEL).jobs.remove(0).recipe;
    assert_eq!((r.kv_cache, r.scheme), (Some(KvCacheScheme::Fp8Tensor), Some(named("FP8_DYNAMIC"))));
}

#[test]
fn config_groups_are_schemes_and_overrides() {
    let text = "
QuantizationModifier:
  config_groups:
    group_0:
      targets: [Linear]
      weights: {num_bits: 8, type: float, strategy: block, block_structure: [128, 128], symmetric: true, dynamic: false}
      input_activations: {num_bits: 8, type: float, strategy: group, group_size: 128, dynamic: true}
    group_1:
      targets: ['re:.*down_proj', model.layers.0.mlp.up_proj]
      weights: {num_bits: 8, strategy: channel, observer: mse}
      input_activations: {num_bits: 8, strategy: token, dynamic: true}
";
    let r = ok(text, &MODEL).jobs.remove(0).recipe;
    assert_eq!((r.scheme, r.range), (Some(named("FP8_BLOCK")), Range::Search));
    let rules: Vec<(&str, Option<LinearScheme>)> = r.overrides.iter().map(|o| (o.pattern.as_str(), o.scheme)).collect();
    assert_eq!(
        rules,
        [("^(?:.*down_proj)", Some(named("W8A8"))), (r"^model\.layers\.0\.mlp\.up_proj$", Some(named("W8A8")))]
    );
    for (args, wanted) in [
        ("{num_bits: 4, type: float, strategy: tensor_group, group_size: 16}", "NVFP4A16"),
        ("{num_bits: 4, type: float, strategy: group, group_size: 32, scale_dtype: torch.uint8}", "MXFP4A16"),
        ("{num_bits: 4, group_size: 128}", "W4A16"),
    ] {
        let text = format!(
            "QuantizationModifier:\n  config_groups:\n    g:\n      targets: [Linear]\n      weights: {args}\n"
        );
        assert_eq!(ok(&text, &MODEL).jobs[0].recipe.scheme, Some(named(wanted)), "{args}");
    }
    let asymmetric = "QuantizationModifier: {config_groups: {g: {targets: [Linear], weights: {num_bits: 4, symmetric: false, group_size: 64}}}}\n";
    let int = Scheme::new(4, 64, false, ScaleDtype::F32).unwrap();
    assert_eq!(
        ok(asymmetric, &MODEL).jobs[0].recipe.scheme,
        Some(LinearScheme { weights: int.into(), activations: None })
    );
}

#[test]
fn what_llm_compressor_does_and_lite_does_not_is_told_by_name() {
    for (text, kind, wanted) in [
        ("SpinQuantModifier: {rotations: [R1]}\n", ErrorKind::Unsupported, "`SpinQuantModifier` is not (yet) here"),
        (
            "GPTQModifer: {scheme: W4A16}\nGPTQModifier: {scheme: W4A16}\n",
            ErrorKind::Usage,
            "`GPTQModifer` is no key here; did you mean `GPTQModifier`?",
        ),
        ("GPTQModifier: {scheme: W4A61}\n", ErrorKind::Usage, "`W4A61` is no scheme"),
        ("GPTQModifier: {scheme: W4A16, actorder: group}\n", ErrorKind::Unsupported, "actorder: group"),
        (
            "GPTQModifier: {scheme: W4A16, targets: ['re:.*mlp.*']}\n",
            ErrorKind::Unsupported,
            "targets that are not all of `Linear`",
        ),
        ("GPTQModifier: {schema: W4A16}\n", ErrorKind::Usage, "`schema` is no key here; did you mean `scheme`?"),
        ("SmoothQuantModifier: {}\n", ErrorKind::Usage, "no modifier says how to quantize"),
        (
            "QuantizationModifier: {scheme: FP8, kv_cache_scheme: {num_bits: 8, type: int}}\n",
            ErrorKind::Unsupported,
            "kv_cache_scheme",
        ),
        (
            "QuantizationModifier: {scheme: W8A8}\nGPTQModifier: {scheme: W8A8}\n",
            ErrorKind::Unsupported,
            "a second modifier",
        ),
    ] {
        let result = with(text, &MODEL);
        let error = result.map(|_| ()).expect_err(text);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(wanted), "{error}\nwanted {wanted}");
    }
}
