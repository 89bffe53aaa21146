use super::*;

fn usage(result: Result<(), JobError>) -> bool {
    matches!(result, Err(JobError::Usage(_)))
}

#[test]
fn folders_that_would_lose_something_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    assert!(usage(WorkDir::check(&model, Some(&model), true)), "the input itself");
    assert!(usage(WorkDir::check(&model.join("../model/out"), Some(&model), true)), "inside the input");
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(usage(WorkDir::check(&file, Some(&model), true)), "a file");
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.txt"), "x").unwrap();
    assert!(usage(WorkDir::check(&full, Some(&model), false)));
    assert!(usage(WorkDir::check(&full, Some(&model), true)), "--overwrite never takes a folder that is no checkpoint");
    fs::write(full.join("config.json"), "{}").unwrap();
    assert!(usage(WorkDir::check(&full, Some(&model), false)));
    WorkDir::check(&full, Some(&model), true).unwrap();
    WorkDir::check(&dir.path().join("new/deep"), Some(&model), false).unwrap();
}

#[test]
fn commit_publishes_and_abandon_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("out");
    let (work, remains) = WorkDir::open(&root, None, false).unwrap();
    assert!(!remains);
    assert!(matches!(WorkDir::open(&root, None, false), Err(JobError::State(_))), "locked");
    fs::write(work.staging().join("config.json"), "{}").unwrap();
    fs::write(work.log_file(), "{}\n").unwrap();
    work.abandon();
    assert!(!root.exists());

    fs::create_dir_all(root.join(JOB_FOLDER).join("out")).unwrap();
    fs::write(root.join(LOG_FILE), "of the run that died\n").unwrap();
    let (work, _) = WorkDir::open(&root, None, false).unwrap();
    work.abandon();
    assert_eq!(entries(&root).unwrap(), [LOG_FILE], "evidence of an earlier run is kept");

    fs::create_dir_all(root.join(JOB_FOLDER).join("out")).unwrap();
    let (work, remains) = WorkDir::open(&root, None, false).unwrap();
    assert!(remains, "a dead run's remains are noticed and cleared");
    fs::write(work.staging().join("config.json"), "{}").unwrap();
    fs::write(work.staging().join("model.safetensors"), "new").unwrap();
    work.commit().unwrap();
    assert_eq!(entries(&root).unwrap(), ["config.json", LOG_FILE, "model.safetensors"]);

    fs::write(root.join("model-00001-of-00002.safetensors"), "stale").unwrap();
    fs::write(root.join("notes.txt"), "mine").unwrap();
    for name in ["report.json", "report.html", "README.md"] {
        fs::write(root.join(name), "of the old one").unwrap();
    }
    let (work, _) = WorkDir::open(&root, None, true).unwrap();
    fs::write(work.staging().join("config.json"), "{\"a\":1}").unwrap();
    fs::write(work.staging().join("model.safetensors"), "newer").unwrap();
    work.commit().unwrap();
    assert_eq!(entries(&root).unwrap(), ["config.json", LOG_FILE, "model.safetensors", "notes.txt"]);
    assert_eq!(fs::read_to_string(root.join("model.safetensors")).unwrap(), "newer");
}

#[test]
fn an_old_checkpoint_that_was_half_removed_is_removed_by_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("out");
    let write = |name: &str, text: &str| fs::write(root.join(name), text).unwrap();
    // Its config.json is gone, and so is the first of its documents.
    fs::create_dir_all(root.join(JOB_FOLDER)).unwrap();
    write(".lite/publishing", "");
    for name in ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "report.json", "README.base.md"] {
        write(name, "of the old one");
    }
    write("notes.txt", "mine");
    let (work, remains) = WorkDir::open(&root, None, false).unwrap();
    assert!(remains);
    fs::write(work.staging().join("config.json"), "{}").unwrap();
    fs::write(work.staging().join("model.safetensors"), "new").unwrap();
    work.commit().unwrap();
    assert_eq!(entries(&root).unwrap(), ["config.json", "model.safetensors", "notes.txt"]);

    // Of a checkpoint without a report the README is its owner's.
    fs::remove_file(root.join("config.json")).unwrap();
    fs::create_dir_all(root.join(JOB_FOLDER)).unwrap();
    write(".lite/publishing", "");
    write("README.md", "mine");
    let (work, _) = WorkDir::open(&root, None, false).unwrap();
    fs::write(work.staging().join("config.json"), "{}").unwrap();
    work.commit().unwrap();
    assert_eq!(entries(&root).unwrap(), ["README.md", "config.json", "notes.txt"]);
}
