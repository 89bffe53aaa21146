//! `lite env`.

use super::support::lite;

#[test]
fn facts_of_this_machine_are_printed_and_no_secret_is() {
    let secret = "hf_thisisnotforanyone";
    let run = |format: &str| {
        let output = lite()
            .args(["env", "--format", format, "--threads", "2"])
            .env("HF_TOKEN", secret)
            .env("HF_ENDPOINT", "https://mirror.example")
            .env("RAYON_NUM_THREADS", "7")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(!out.contains(secret) && !err.contains(secret));
        out
    };
    let facts: serde_json::Value = serde_json::from_str(run("json").trim()).unwrap();
    assert_eq!(facts["event"], "environment");
    assert_eq!(facts["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(facts["cpu"]["threads"], 2, "--threads wins");
    assert_eq!(facts["variables"]["RAYON_NUM_THREADS"], "7");
    assert_eq!(facts["hub"]["token"], true);
    assert_eq!(facts["hub"]["offline"], true);
    assert_eq!(facts["hub"]["endpoint"], "https://mirror.example");
    assert_eq!(facts["hub"]["cache"], "/nonexistent/hub/hub");
    assert_eq!(facts["cuda"]["compiled_in"], cfg!(feature = "cuda"));
    assert_eq!(facts["cuda"]["devices"].as_array().unwrap().is_empty(), lite_decoder_gpus() == 0);
    assert!(facts["disk"]["current"]["free_bytes"].as_u64().unwrap() > 0);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = memory.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024;
    assert_eq!(facts["memory"]["total_bytes"], total);

    let text = run("human");
    for wanted in ["  cpu  ", "  memory  ", "  disk here  ", "  cuda  ", "token: yes", "https://mirror.example"] {
        assert!(text.contains(wanted), "`{wanted}` is not in\n{text}");
    }
    assert_eq!(run("quiet").trim(), env!("CARGO_PKG_VERSION"));
}

fn lite_decoder_gpus() -> usize {
    lite_decoder::gpus().map_or(0, |gpus| gpus.len())
}

/// A GPU that is not there is an error that says what to do, or a fallback that is told.
#[test]
fn a_device_is_taken_refused_or_done_without() {
    use super::support::model;
    let run = |verb: &[&str], device: &str| lite().args(verb).arg(model()).args(["--device", device]).output().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("out").display().to_string();
    let original = model().display().to_string();
    let eval = ["eval", "--dataset", "builtin", "--seqlen", "64", "--windows", "2"];
    let verbs: [&[&str]; 5] = [
        &["verify", "--against", &original],
        &eval,
        &["plan", "--work-dir", &work],
        &["calibrate", "--work-dir", &work],
        &["auto_awq", "--work-dir", &work],
    ];
    for verb in verbs {
        let output = run(verb, "cuda:99");
        assert_eq!(output.status.code(), Some(5), "{verb:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--device cpu"), "{verb:?}: {output:?}");
        assert_eq!(run(verb, "gpu").status.code(), Some(2), "{verb:?}");
    }
    let auto = run(&eval, "auto");
    assert!(auto.status.success(), "{auto:?}");
    let told = String::from_utf8_lossy(&auto.stderr).into_owned();
    assert!(told.contains("blocks run on "), "{told}");
    if lite_decoder_gpus() == 0 {
        let cpu = run(&eval, "cpu");
        assert!(!String::from_utf8_lossy(&cpu.stderr).contains("blocks run on "));
        let figure = |output: &std::process::Output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().find(|line| line.contains("perplexity")).map(str::to_owned)
        };
        assert!(figure(&cpu).is_some());
        assert_eq!(figure(&auto), figure(&cpu));
    }
}
