//! Same input, same bytes.

use super::support::*;

#[test]
fn threads_spool_and_shards_do_not_change_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        auto_awq_ok(&model(), &out, &[&QUICK[..], flags].concat());
        out
    };
    let first = files(&run("first", &["--threads", "2"]));
    assert_eq!(files(&run("again", &["--threads", "2"])), first);
    assert_eq!(files(&run("one", &["--threads", "1"])), first);
    assert_eq!(files(&run("three", &["--threads", "3"])), first);
    let sharded = run("sharded", &["--max-shard-size", "1MB"]);
    assert!(sharded.join("model.safetensors.index.json").exists());
    assert_eq!(tensors(&sharded), tensors(&dir.path().join("first")));
}

/// Hidden states in a file give the bytes of hidden states in memory.
#[test]
fn the_spool_file_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--calib-dataset", "random", "--calib-samples", "200", "--calib-seqlen", "64", "--eval-samples", "1"];
    let (memory, spooled) = (dir.path().join("memory"), dir.path().join("spooled"));
    auto_awq_ok(&model(), &memory, &flags);
    let plan = |flags: &[&str]| -> serde_json::Value {
        let mut command = lite();
        command.arg("plan").arg(model()).arg("--work-dir").arg(dir.path().join("none")).args(flags);
        let output = command.args(["--format", "json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // Any budget changes what the allocator keeps; a run has to leave 15 % of it.
    let roomy = plan(&[&flags[..], &["--max-memory", "1TB"]].concat());
    assert_eq!(roomy["memory"]["spooled"], false);
    let part = |name: &str| roomy["memory"][name].as_u64().unwrap();
    let limit = ((part("peak") - part("hidden") / 2) / 100 * 115).to_string();
    let flags = [&flags[..], &["--max-memory", &limit]].concat();
    assert_eq!(plan(&flags)["memory"]["spooled"], true);
    auto_awq_ok(&model(), &spooled, &flags);
    assert_eq!(files(&memory), files(&spooled));
}
