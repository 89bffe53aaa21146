use super::*;
use crate::ErrorKind;
use crate::testing::{bare_tokenizer, shared, testdata, tokenizer};
use serde::Deserialize;

#[test]
fn padding_and_truncation_are_off() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("the river runs over seven quiet fields", true).expect("encodes");
    assert!(ids.len() > 7, "{ids:?}");
    assert_eq!(ids[0], 0);
    assert_eq!(tokenizer.encode("a", false).expect("encodes").len(), 1);
    assert_eq!(tokenizer.special_ids(), [0, 1]);
    assert_eq!(tokenizer.plain_ids(), (2..tokenizer.tokenizer.get_vocab_size(true) as u32).collect::<Vec<_>>());
}

#[test]
fn batches_equal_single_texts() {
    let tokenizer = tokenizer();
    let texts = ["the river", "", "é <s> 12\n\n"];
    let batch = tokenizer.encode_batch(&texts, true).expect("encodes");
    let single: Vec<_> = texts.iter().map(|t| tokenizer.encode(t, true).expect("encodes")).collect();
    assert_eq!(batch, single);
}

#[test]
fn prompts_render_and_decode() {
    let tokenizer = tokenizer();
    let turns = [Message::new("user", "the river")];
    assert_eq!(tokenizer.render(&turns, false).expect("renders"), "<s>[USER] the river\n");
    let ids = tokenizer.encode("<s>the é river", false).expect("encodes");
    assert_eq!(tokenizer.decode(&ids, true).expect("decodes"), "the é river");
    assert_eq!(tokenizer.decode(&ids, false).expect("decodes"), "<s>the é river");
    let error = bare_tokenizer().render(&turns, false).expect_err("no template");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// A text of 1.3 MB in one go, against `tokenizers` 0.23.3 from Python.
#[test]
fn long_texts_equal_the_reference() {
    use sha2::{Digest, Sha256};
    let Some(text) = shared("data/text/wikitext-2/wiki.test.raw") else { return };
    let text = std::fs::read_to_string(text).expect("readable");
    let (model, count) = ("qwen2.5-7b-instruct", 299_078);
    let Some(config) = shared(&format!("data/configs/{model}/tokenizer.json")) else { return };
    let tokenizer = ModelTokenizer::from_dir(config.parent().expect("a folder"), 1 << 20).expect("loads");
    let ids = tokenizer.encode(&text, true).expect("encodes");
    assert_eq!(ids.len(), count);
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let digest = crate::source::hex(&Sha256::digest(bytes));
    assert_eq!(digest, "8557ef42be22a592e5f1704026fedbedc937b484e52f517add9f478adc0de20f");
}

#[test]
fn ids_beyond_the_embedding_are_named() {
    let tokenizer = ModelTokenizer::from_dir(&testdata(), 100).expect("loads");
    let error = tokenizer.encode("river", false).expect_err("ids above 100");
    assert!(
        matches!(&error, CalibError::TokenOutOfVocab { id, vocab_size: 100, token } if *id >= 100 && !token.is_empty())
    );
    assert_eq!(error.kind(), ErrorKind::Input);
    assert!(tokenizer.warnings().is_empty());
    let tokenizer = ModelTokenizer::from_dir(&testdata(), 1).expect("loads");
    assert!(tokenizer.warnings()[0].contains("first: `</s>`, id 1"), "{:?}", tokenizer.warnings());
}

#[test]
fn missing_and_damaged_files_are_explained() {
    let dir = tempfile::tempdir().expect("temp dir");
    let load = || ModelTokenizer::from_dir(dir.path(), 10).expect_err("bad").to_string();
    assert!(load().contains("there is no tokenizer.json; copy it"));
    std::fs::write(dir.path().join("tokenizer.model"), b"x").expect("write");
    assert!(load().contains("only tokenizer.model") && load().contains("save_pretrained"));
    for bytes in [
        &b""[..],
        b"{}",
        b"not json",
        b"{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[\"a\"]}}",
    ] {
        std::fs::write(dir.path().join("tokenizer.json"), bytes).expect("write");
        assert!(load().contains("cannot be loaded"), "{}", load());
    }
    let huge = std::fs::File::create(dir.path().join("tokenizer.json")).expect("create");
    huge.set_len(MAX_TOKENIZER_BYTES + 1).expect("sparse");
    assert!(load().contains("limit 512 MiB"));
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
    let remove = |name: &str| std::fs::remove_file(dir.path().join(name)).expect("remove");
    std::fs::copy(testdata().join("tokenizer.json"), dir.path().join("tokenizer.json")).expect("copy");
    let turns = [Message::new("user", "x")];
    let render = || {
        let tokenizer = ModelTokenizer::from_dir(dir.path(), 400).expect("loads");
        tokenizer.render_row(&turns, "set").map_err(|e| e.to_string())
    };
    assert!(
        render()
            .is_err_and(|e| e.contains("`set` is made of conversations") && e.contains("the model folder has none"))
    );
    write("chat_template.json", r#"{"chat_template": "json"}"#);
    assert_eq!(render().as_deref(), Ok("json"));
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name":"tools","template":"t"},{"name":"default","template":"{{ eos_token }}"}]}"#,
    );
    assert_eq!(render().as_deref(), Ok(""));
    write("special_tokens_map.json", r#"{"eos_token": {"content": "</s>"}}"#);
    assert_eq!(render().as_deref(), Ok("</s>"));
    write("chat_template.jinja", "jinja\n");
    assert_eq!(render().as_deref(), Ok("jinja"));
    remove("chat_template.jinja");
    write("tokenizer_config.json", r#"{"chat_template": [{"name":"tools","template":"t"}]}"#);
    assert!(render().is_err_and(|e| e.contains("none called `default`")));
    write("tokenizer_config.json", "{");
    remove("chat_template.json");
    assert!(!ModelTokenizer::from_dir(dir.path(), 400).expect("loads").warnings().is_empty());
    assert!(render().is_err());
    assert!(!bare_tokenizer().has_chat_template());
}

#[derive(Deserialize)]
struct Vector {
    text: String,
    ids: Vec<u32>,
}

/// Vectors made by llama.cpp with HF tokenizers, and by sentencepiece.
#[test]
fn ids_equal_the_reference_tokenizers() {
    for (vectors, model) in [
        ("llama.cpp/llama-bpe", "llama-3.1-8b-instruct"),
        ("llama.cpp/llama-spm", "llama-2-7b"),
        ("llama.cpp/phi-3", "phi-3.5-mini-instruct"),
        ("llama.cpp/qwen2", "qwen2.5-7b-instruct"),
        ("llama.cpp/qwen2", "qwen3-8b"),
        ("llama-2-7b", "llama-2-7b"),
        ("mistral-7b-instruct-v0.3", "mistral-7b-instruct-v0.3"),
    ] {
        let Some(file) = shared(&format!("data/golden/tokenization/{vectors}.jsonl")) else { continue };
        let Some(config) = shared(&format!("data/configs/{model}/tokenizer.json")) else { continue };
        let dir = config.parent().expect("a file has a folder");
        let tokenizer = ModelTokenizer::from_dir(dir, 1 << 20).expect("loads");
        let lines = std::fs::read_to_string(file).expect("readable");
        assert!(lines.lines().count() > 20, "{vectors}");
        for line in lines.lines() {
            let vector: Vector = serde_json::from_str(line).expect("a vector");
            assert_eq!(
                tokenizer.encode(&vector.text, false).expect("encodes"),
                vector.ids,
                "{model}: {:?}",
                vector.text
            );
        }
    }
}
