use std::path::Path;

use super::*;
use crate::testing::tokenizer;

fn row(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).expect("JSON")
}

fn item(task: TaskName, text: &str) -> Result<TaskItem, String> {
    prompts::item(task, &row(text), "college_physics", "")
}

#[test]
fn brackets_and_titles_are_removed_as_the_harness_does() {
    // hellaswag/utils.py: preprocess
    for (text, wanted) in [
        (" How to bake [title] Mix. [step] Stir  well. ", "How to bake. Mix. Stir well."),
        ("a [b\nc] d", "a [b\nc] d"),
        ("[a] b [c [d] e]", " b e]"),
        ("open [ only", "open [ only"),
        ("a   b", "a  b"),
    ] {
        assert_eq!(prompts::preprocess(text), wanted, "{text:?}");
    }
}

#[test]
fn rows_that_do_not_fit_are_explained() {
    for (task, text, wanted) in [
        (TaskName::Piqa, r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}"#, "choice 2"),
        (TaskName::Piqa, r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}"#, "without labels"),
        (TaskName::Piqa, r#"{"goal": "g", "sol1": "", "sol2": "b", "label": 1}"#, "empty"),
        (TaskName::Piqa, r#"{"sol1": "a", "sol2": "b", "label": 1}"#, "no `goal`"),
        (TaskName::Winogrande, r#"{"sentence": "x", "option1": "a", "option2": "b", "answer": "1"}"#, "no `_`"),
        (TaskName::Winogrande, r#"{"sentence": "_ x", "option1": "a", "option2": "b", "answer": ""}"#, "`answer`"),
        (TaskName::Winogrande, r#"{"sentence": "_ x", "option1": "a", "option2": "b", "answer": "3"}"#, "1 or 2"),
        (TaskName::Mmlu, r#"{"question": "q", "choices": ["a"], "answer": 0}"#, "1 entries, wanted 4"),
        (TaskName::ArcEasy, r#"{"question": "q", "choices": ["a"], "answerKey": "A"}"#, "an object"),
        (
            TaskName::ArcEasy,
            r#"{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"}"#,
            "no label",
        ),
        (
            TaskName::Hellaswag,
            r#"{"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["d"], "label": ""}"#,
            "`label`",
        ),
    ] {
        let error = item(task, text).expect_err(text);
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn files_are_found_in_the_layouts_of_the_hub() {
    let dir = tempfile::tempdir().expect("temp dir");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        std::fs::write(path, text).expect("write");
    };
    let question = |subject: &str, q: &str, answer: usize| {
        format!(
            "{{\"subject\": \"{subject}\", \"question\": \" {q} \", \"choices\": [\"a\", \"b\", \"c\", \"d\"], \"answer\": {answer}}}\n"
        )
    };
    let error = load_task(TaskName::Mmlu, dir.path(), None, 0).expect_err("nothing there").to_string();
    assert!(error.contains("mmlu.jsonl") && error.contains("--task-data"), "{error}");
    write(
        "mmlu/all/test-00000.jsonl",
        &[question("x_y", "one", 1), question("x_y", "two", 2), question("z", "three", 3)].concat(),
    );
    write("mmlu/x_y/test-00000.jsonl", &question("x_y", "one", 1));
    write("mmlu/all/dev-00000.jsonl", &[question("x_y", "shot", 0), question("z", "shot z", 1)].concat());
    let task = load_task(TaskName::Mmlu, dir.path(), None, 0).expect("reads");
    assert_eq!(task.items.len(), 3, "`all` only");
    assert_eq!(
        task.items[0].requests[3],
        (
            "The following are multiple choice questions (with answers) about x y.\n\none\nA. a\nB. b\nC. c\nD. d\nAnswer:"
                .to_owned(),
            " D".to_owned()
        )
    );
    assert_eq!(load_task(TaskName::Mmlu, dir.path(), Some(1), 0).expect("reads").items.len(), 2, "one of each subject");
    let shots = load_task(TaskName::Mmlu, dir.path(), None, 1).expect("reads");
    let wanted = "about z.\n\nshot z\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\nthree\nA.";
    assert!(shots.items[2].requests[0].0.contains(wanted), "{}", shots.items[2].requests[0].0);
    assert!(load_task(TaskName::Mmlu, dir.path(), None, 2).is_err(), "the dev split has one of each");
    write("piqa.jsonl", "{\"goal\": \"g\", \"sol1\": \"aé\", \"sol2\": \"b\", \"label\": 1}\n{}\n");
    let piqa = load_task(TaskName::Piqa, dir.path(), Some(1), 0).expect("the second row is not read");
    assert_eq!((piqa.items[0].gold, piqa.items[0].lengths.as_slice()), (1, &[2, 1][..]));
    let error = load_task(TaskName::Piqa, dir.path(), None, 0).expect_err("a bad row").to_string();
    assert!(error.contains("piqa.jsonl:2"), "{error}");
    let error = load_task(TaskName::Piqa, dir.path(), None, 5).expect_err("no examples");
    assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
    assert!(load_task(TaskName::Hellaswag, Path::new("/nonexistent"), None, 0).is_err());
}

#[test]
fn spaces_at_the_end_of_a_context_move() {
    let tokenizer = tokenizer();
    let whole = tokenizer.encode("one two three", true).expect("encodes");
    let context = tokenizer.encode("one two", true).expect("encodes");
    let found = tokenizer.encode_pair("one two ", "three").expect("encodes");
    assert_eq!(found, (context.clone(), whole[context.len()..].to_vec()));
    assert_eq!(tokenizer.encode_pair("one two", " three").expect("encodes"), found);
}
