//! lite's own files: trees, defaults, matrices, `--set`, and what is refused.

use std::path::{Path, PathBuf};

use lite_job::{DeviceChoice, ErrorKind, Method, Rounding, SmoothScales};
use lite_quant::Range;
use lite_recipe::{Loaded, RecipeError, load, to_yaml};
use lite_runtime::eval::Gate;
use proptest::prelude::*;

fn with(text: &str, sets: &[&str]) -> Result<Loaded, RecipeError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.yaml");
    std::fs::write(&path, text).unwrap();
    load(&[path], &sets.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>(), None)
}

fn jobs(text: &str) -> Vec<lite_recipe::Entry> {
    with(text, &[]).unwrap_or_else(|e| panic!("{text}\n{e}")).jobs
}

/// Message after the folder, and kind.
fn refused(text: &str) -> (String, ErrorKind) {
    let error = with(text, &[]).map(|_| ()).expect_err(text);
    let message = error.to_string();
    (message.split_once("r.yaml").map_or(message.clone(), |(_, rest)| rest.to_owned()), error.kind())
}

#[test]
fn defaults_are_those_of_the_verbs() {
    let awq = jobs("model: m\nstages: [awq: {}]\n").remove(0);
    assert_eq!(format!("{:?}", awq.recipe), format!("{:?}", lite_job::Recipe::new("m".to_owned())));
    assert_eq!(awq.name, "r");

    let gptq = jobs("model: m\nstages: [gptq: {}]\n").remove(0).recipe;
    assert_eq!((gptq.method, gptq.symmetric, gptq.layout.as_deref()), (Method::Plain, true, Some("gptq")));
    assert_eq!((gptq.solver.rounding, gptq.solver.error_aware, gptq.solver.tune), (Rounding::Refine, true, false));

    let rtn = jobs("model: m\nscheme: fp8_dynamic\nstages: [rtn: ]\n").remove(0).recipe;
    assert!(rtn.calib.if_needed && rtn.eval.limit.is_some() && rtn.layout.is_none());
    assert_eq!(rtn.range, Range::MinMax);

    let smooth = jobs("model: m\nstages: [smoothquant: {}]\n").remove(0).recipe;
    assert_eq!(smooth.method, Method::SmoothQuant { scales: SmoothScales::Alpha(0.5) });
    assert_eq!(smooth.layout.as_deref(), Some("lmdeploy-w8a8"));
    let cached = jobs("model: m\nkv_cache: fp8\nstages: [smoothquant: {alpha: auto}, gptq: {}]\n").remove(0).recipe;
    assert_eq!((cached.layout.as_deref(), cached.range), (Some("compressed-tensors"), Range::Search));
    assert!(!cached.solver.error_aware);
}

#[test]
fn every_key_is_carried_over() {
    let text = "
name: n
model: 12345678          # a name, though it looks like a number
revision: 1e5
download_dir: d
stages: [awq: {search_scale: false}, gptq: {rounding: gptq, error_aware: false, act_order: false, damp_percent: 0.1, fallback: false}]
scheme: {bits: 3, group_size: 64}
range: minmax
overrides: [{match: down_proj, bits: 8, group_size: -1, symmetric: true, scheme: W8A16}]
ignore: ['layers\\.0\\.']
layout: compressed-tensors
target: vllm
tensor_parallel: 2
dtype: bf16
kv_cache: fp8-head
calibration: {dataset: c4, samples: 3, seqlen: 99, seed: 7, batch_size: 5}
eval: {dataset: ptb, samples: 4, seqlen: 44, max_kl: 0.1, max_ppl_ratio: 1.5, min_top1: 90}
save: {path: 'o/{name}-{model}', plain: p, overwrite: true, max_shard_size: 500MB}
resources: {device: 'cuda:1', max_memory: 16GB, checkpoint_seconds: 9}
";
    let entry = jobs(text).remove(0);
    let r = &entry.recipe;
    assert_eq!((r.model.as_str(), r.revision.as_deref()), ("12345678", Some("1e5")));
    assert_eq!(r.work_dir, PathBuf::from("o/n-12345678"));
    assert_eq!((r.bits, r.group_size, r.symmetric, r.range), (3, 64, false, Range::MinMax));
    assert_eq!((r.tensor_parallel, r.batch_size, r.device), (2, Some(5), Some(DeviceChoice::Cuda(1))));
    assert_eq!((r.max_shard_bytes, r.max_memory), (500_000_000, Some(16_000_000_000)));
    assert_eq!(
        (r.calib.dataset.as_deref(), r.calib.samples, r.calib.seqlen, r.calib.seed),
        (Some("c4"), 3, Some(99), 7)
    );
    assert_eq!(
        (r.eval.dataset.as_deref(), r.eval.windows, r.eval.seqlen, r.eval.limit),
        (Some("ptb"), 4, Some(44), None)
    );
    assert_eq!((r.solver.damp, r.resume.checkpoint_seconds), (0.1f32, 9));
    assert!(!r.solver.fallback && !r.solver.act_order && r.overwrite);
    assert_eq!(r.overrides[0].group_size, Some(-1));
    assert_eq!(entry.gates, [Gate::MaxKl(0.1), Gate::MaxPerplexityRatio(1.5), Gate::MinTop1(90.0)]);
    assert_eq!(entry.plain.as_deref(), Some(Path::new("p")));
    // And back.
    let again = jobs(&entry.to_yaml()).remove(0);
    assert_eq!(format!("{again:?}"), format!("{entry:?}"));
}

#[test]
fn a_matrix_is_every_combination_in_order() {
    let text = "
defaults: {calibration: {samples: 9, seed: 3}, save: {path: 'o/{model}/{scheme}/{variant}'}}
jobs: [{name: first, model: x, stages: [awq: {}], calibration: {seed: 4}, save: {path: f}}]
matrix:
  models: [a/m1, a/m2]
  schemes: [W4A16, {bits: 4, group_size: 32}]
  variants: [{name: v, stages: [awq: {}]}, {name: w, stages: [gptq: {}], save: {overwrite: true}}]
";
    let jobs = jobs(text);
    let names: Vec<&str> = jobs.iter().map(|job| job.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "first",
            "m1-W4A16-v",
            "m1-W4A16-w",
            "m1-w4-g32-v",
            "m1-w4-g32-w",
            "m2-W4A16-v",
            "m2-W4A16-w",
            "m2-w4-g32-v",
            "m2-w4-g32-w"
        ]
    );
    assert_eq!((jobs[0].recipe.calib.samples, jobs[0].recipe.calib.seed), (9, 4), "maps are merged key by key");
    assert_eq!(jobs[4].recipe.work_dir, PathBuf::from("o/m1/w4-g32/w"));
    assert_eq!((jobs[4].recipe.group_size, jobs[4].recipe.overwrite, jobs[3].recipe.overwrite), (32, true, false));
}

#[test]
fn sets_reach_every_job_and_find_stages_by_name() {
    let text =
        "defaults: {stages: [awq: {}, gptq: {damp_percent: 0.5}]}\njobs: [{name: a, model: x}, {name: b, model: y}]\n";
    let sets = [
        "stages.gptq.damp_percent=0.25",
        "calibration.samples=3",
        "eval={max_kl: 1}",
        "stages.0.awq.search_scale=false",
    ];
    let jobs = with(text, &sets).unwrap().jobs;
    assert_eq!(jobs.len(), 2);
    for job in &jobs {
        assert_eq!((job.recipe.solver.damp, job.recipe.calib.samples), (0.25, 3));
        assert_eq!(job.recipe.method, Method::Awq { search_scale: false });
        assert_eq!(job.gates, [Gate::MaxKl(1.0)]);
    }
    for (set, wanted) in [
        ("stages.gptqq.tune=true", "`gptqq` is no entry of the list"),
        ("stages.7.tune=true", "`7` is beyond the 2 entries"),
        ("calibration.sample=3", "`sample` is no key here; did you mean `samples`?"),
        ("calibration", "no `=`"),
        ("model.x=1", "`x` is below `x`, which has no parts"),
        (".a=1", "an empty name"),
        ("eval={max_kl: [", "not YAML"),
    ] {
        let error = with(text, &[set]).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with(&format!("--set {set}: ")) && message.contains(wanted), "{message}");
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}

#[test]
fn what_is_wrong_has_a_place_and_the_nearest_key() {
    for (text, wanted) in [
        ("model: m\nstages: [awq: {}]\nquantise: 1\n", ":3:1: `quantise` is no key here; known are name, model"),
        ("model: m\nstages: [awq: {}]\neval: {maxkl: 1}\n", ":3:8: `maxkl` is no key here; did you mean `max_kl`?"),
        (
            "model: m\nstages: [awq: {}]\neval:\n  max_kl: 1\n  max_kl: 2\n",
            ":5:3: `max_kl` is here twice, first in line 4",
        ),
        ("model: m\nstages: [awq: {alpha: 1}]\n", ":2:16: `alpha` is no key here; known are search_scale"),
        ("model: m\nstages: [awq: {}, rtn: {}, gptq: {}]\n", ":2:9: found stages in an order"),
        ("model: m\nstages: awq\n", ":2:9: found `awq`, wanted a sequence"),
        ("model: m\nstages: [{awq: {}, gptq: {}}]\n", ":2:10: found a map, wanted a map of one key"),
        ("model: [m]\nstages: [awq: {}]\n", ":1:8: found a list, wanted a string"),
        ("model: m\nstages: [awq: {}]\ntarget: vlm\n", ":3:9: `vlm` is no engine; did you mean `vllm`?"),
        ("model: m\nstages: [awq: {}]\nlayout: autoawq\n", ":3:9: `autoawq` is no layout"),
        ("model: m\nstages: [awq: {}]\ndtype: fp32\n", ":3:8: `fp32` is none of the choices here"),
        ("model: m\nstages: [awq: {}]\nscheme: {bits: 9}\n", ":3:9: "),
        (
            "model: m\nstages: [smoothquant: {alpha: 2}]\n",
            ":2:31: found floating point `2.0`, wanted a number from 0 to 1",
        ),
        ("model: m\nstages: [gptq: {damp_percent: 0}]\n", ":2:9: `damp_percent` is 0"),
        ("model: m\nstages: [awq: {}]\ncalibration: {samples: -1}\n", ":3:24: wanted a number of windows"),
        ("model: m\nstages: [awq: {}]\ntensor_parallel: 0\n", ":3:18: found 0"),
        ("model: m\nstages: [awq: {}]\neval: {samples: 0, max_kl: 1}\n", ":3:28: a limit needs the comparison"),
        ("model: m\nstages: [awq: {}]\neval: {max_kl: .nan}\n", ":3:16: found NaN"),
        ("model: m\nstages: [awq: {}]\nsave: {path: a, plain: a}\n", ":3:24: is the folder of the quantized"),
        ("model: m\nstages: [awq: {}]\nname: a/b\n", ":3:7: `a/b` is no name"),
        ("model: m\ndefaults: {}\n", ":2:1: `defaults` without `jobs`"),
        ("jobs: []\n", ":1:1: no job"),
        ("jobs: [{model: m}]\ndefault: {}\n", ":2:1: `default` is no key here; did you mean `defaults`?"),
        ("matrix: {models: [a], variants: [{stages: [awq: {}]}]}\n", ":1:34: a variant needs a `name`"),
        ("matrix: {models: []}\n", ":1:18: `models` is empty"),
        (
            "jobs: [{name: a, model: m, stages: [awq: {}]}, {name: a, model: m, stages: [awq: {}]}]\n",
            ":1:55: the job `a` has the name",
        ),
        (
            "defaults: {save: {path: x}, stages: [awq: {}]}\njobs: [{name: a, model: m}, {name: b, model: m}]\n",
            ":1:25: `b` writes `x`, and so does `a`",
        ),
        ("- a\n", ":1:1: found a list, wanted a map"),
        ("model: m\n---\nmodel: m\n", ":2:1: a second document"),
        ("model: !x m\n", ":1:"),
        ("base: &b {model: m}\n<<: *b\n", ":2:1: merge keys"),
        ("", ":1:1: an empty recipe"),
        ("model: m\n stages: x\n", ": not YAML"),
    ] {
        let (message, kind) = refused(text);
        assert!(message.contains(wanted), "{text}{message}\nwanted {wanted}");
        assert_eq!(kind, ErrorKind::Usage, "{message}");
    }
}

#[test]
fn bombs_do_not_go_off() {
    // A billion laughs: nine levels of ten aliases.
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..10 {
        let before = vec![format!("*a{}", i - 1); 10].join(", ");
        laughs.push_str(&format!("a{i}: &a{i} [{before}]\n"));
    }
    let deep = format!("model: {}{}\n", "[".repeat(200), "]".repeat(200));
    let long = format!("model: {}\n", "m".repeat(2 << 20));
    let many =
        format!("matrix: {{models: [{}], schemes: [{}]}}\n", vec!["a"; 200].join(","), vec!["W4A16"; 200].join(","));
    // Levels within levels by aliases.
    let mut nested = "a0: &a0 [x]\n".to_owned();
    for i in 1..60 {
        nested.push_str(&format!("a{i}: &a{i} [*a{}]\n", i - 1));
    }
    for text in [&laughs, &deep, &long, &many, &nested] {
        let error = with(text, &[]).unwrap_err();
        assert!(matches!(error, RecipeError::Budget { .. } | RecipeError::Syntax { .. }), "{error}");
        assert!(error.to_string().len() < 500, "{error}");
    }
    let itself = with("model: &a [*a]\n", &[]).unwrap_err();
    assert!(itself.to_string().contains("an alias within what it stands for"), "{itself}");
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[a-z:{}\\[\\]&*!|>'\" \n\\-#${}0-9.]{0,200}") {
        let _ = with(&text, &[]);
    }

    #[test]
    fn no_set_makes_it_panic(set in "[a-z.=0-9\\[\\]{}: ]{0,60}") {
        let _ = with("model: m\nstages: [awq: {}]\n", &[&set]);
    }

    #[test]
    fn any_recipe_reads_back(
        method in 0..6u8, rounding in 0..3u8, bits in 2..9i64, symmetric: bool, search: bool, aware: bool, tune: bool, order: bool,
        damp in 0.001f32..1.0, samples in 0..500i64, seed: u64, seqlen in proptest::option::of(8..4096i64), windows in 0..64usize,
        shard in 1..u64::MAX / 4, memory in proptest::option::of(1..u64::MAX / 4), dir in "[ -~]{1,12}", model in "[!-~]{1,12}",
    ) {
        let mut recipe = lite_job::Recipe::new(model.replace("${", "").replace('{', ""));
        prop_assume!(!recipe.model.is_empty());
        recipe.method = match method {
            0 => Method::Plain,
            1 => Method::Awq { search_scale: search },
            2 => Method::SmoothQuant { scales: SmoothScales::Alpha(f64::from(damp)) },
            3 => Method::SmoothQuant { scales: SmoothScales::SearchedAlpha },
            4 => Method::SmoothQuant { scales: SmoothScales::LogEqualization },
            _ => Method::SmoothQuant { scales: SmoothScales::Awq },
        };
        recipe.layout = Some("compressed-tensors".to_owned());
        recipe.solver.rounding = [Rounding::Nearest, Rounding::Gptq, Rounding::Refine][usize::from(rounding)];
        (recipe.solver.error_aware, recipe.solver.tune, recipe.solver.act_order) = (aware, tune, order);
        recipe.solver.damp = damp;
        (recipe.bits, recipe.symmetric) = (bits, symmetric);
        recipe.range = if search { Range::Search } else { Range::MinMax };
        (recipe.calib.samples, recipe.calib.seed, recipe.calib.seqlen) = (samples, seed.min(i64::MAX as u64), seqlen);
        (recipe.eval.windows, recipe.max_shard_bytes, recipe.max_memory) = (windows, shard, memory);
        recipe.work_dir = PathBuf::from(dir.replace('{', "").replace('$', "x"));
        prop_assume!(!recipe.work_dir.as_os_str().is_empty());
        let text = to_yaml(&recipe, &[]);
        let back = with(&text, &[]);
        prop_assert!(back.is_ok(), "{}\n{:?}", text, back);
        let back = back.unwrap().jobs.remove(0).recipe;
        prop_assert_eq!(format!("{back:?}"), format!("{recipe:?}"), "{}", text);
    }
}
