//! Tied embeddings, in every form met in the wild.

use super::support::*;

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

#[test]
fn every_form_of_tied_embeddings_gives_the_same_result() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    auto_awq_ok(&model(), &plain, &QUICK);
    let wanted = tensors(&plain);

    let mut only_head = tensors(&model());
    let embed = only_head.remove(EMBED).unwrap();
    only_head.insert(HEAD.to_owned(), embed.clone());
    let mut both = tensors(&model());
    both.insert(HEAD.to_owned(), embed);
    let forms: [(&str, _, &[(&str, &str)]); 3] = [
        ("alias", &only_head, &[("format", "pt"), (EMBED, HEAD)]),
        ("head", &only_head, &[("format", "pt")]),
        ("both", &both, &[]),
    ];
    for (form, tensors_in, metadata) in forms {
        let copy = copy_of(&model());
        write_tensors(copy.path(), tensors_in, metadata);
        let out = dir.path().join(form);
        auto_awq_ok(copy.path(), &out, &QUICK);
        assert_eq!(tensors(&out), wanted, "{form}");
    }
}

#[test]
fn an_untied_head_stays_plain_and_is_listed() {
    let copy = copy_of(&model());
    let mut all = tensors(&model());
    let mut head = all[EMBED].clone();
    head.data.rotate_left(2);
    all.insert(HEAD.to_owned(), head.clone());
    write_tensors(copy.path(), &all, &[]);
    let path = copy.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    auto_awq_ok(copy.path(), &out, &[&QUICK[..], &["--layout", "compressed-tensors"]].concat());
    assert_eq!(tensors(&out)[HEAD], head);
    let ignore = config(&out)["quantization_config"]["ignore"].clone();
    assert_eq!(ignore, serde_json::json!(["lm_head"]));
}
