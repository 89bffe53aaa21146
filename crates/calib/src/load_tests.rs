use std::io::Write;

use super::*;
use crate::ErrorKind;
use crate::testing::{FakeHub, bare_tokenizer, testdata, tokenizer};

fn request(dataset: &str, samples: usize, seqlen: usize) -> CalibRequest {
    CalibRequest { dataset: dataset.to_owned(), samples, seqlen, seed: 0, explicit: true }
}

const OFFLINE: FakeHub = FakeHub(None);

#[test]
fn the_builtin_corpus_gives_windows() {
    for tokenizer in [tokenizer(), bare_tokenizer()] {
        let windows = load(&request("builtin", 6, 64), &tokenizer, &OFFLINE).expect("built in");
        assert_eq!((windows.tokens.len(), windows.seqlen()), (6, 64));
        assert_eq!(windows.source.files.len(), 4);
        assert_eq!(windows.tokens[0][0], 0, "the first window begins with <s>");
        let again = load(&request("Built-In", 6, 64), &tokenizer, &OFFLINE).expect("built in");
        assert_eq!(windows.digest, again.digest);
    }
    let all = load(&request("builtin", 100_000, 512), &tokenizer(), &OFFLINE).expect("never an error");
    assert!(all.tokens.len() > 50 && all.tokens.len() < 100_000);
    let note = format!(
        "all the built-in corpus gives: {} windows of 512 tokens, {} were asked for",
        all.tokens.len(),
        100_000
    );
    assert!(all.notes.contains(&note), "{:?}", all.notes);
}

#[test]
fn a_default_set_falls_back_and_a_named_one_does_not() {
    let mut wanted = request("wikitext2", 2, 32);
    wanted.explicit = false;
    let windows = load(&wanted, &tokenizer(), &OFFLINE).expect("falls back");
    assert_eq!(windows.source.name, "builtin");
    assert!(windows.notes[0].contains("`wikitext2` cannot be fetched") && windows.notes[0].contains("built-in"));
    wanted.explicit = true;
    let error = load(&wanted, &tokenizer(), &OFFLINE).expect_err("named");
    assert_eq!(error.kind(), ErrorKind::Io);
    let text = error.to_string();
    for part in [
        "download --repo-type dataset Salesforce/wikitext wikitext-2-raw-v1/train",
        "HF_HOME",
        "HF_ENDPOINT",
        "--calib-dataset builtin",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let text = load(&request("ptb", 2, 32), &tokenizer(), &OFFLINE).expect_err("named").to_string();
    assert!(text.contains("ptb_text_only --revision refs/convert/parquet penn_treebank/train/0000.parquet"), "{text}");
}

/// The registry's file names are parquet: the embedded corpora have the same columns as the hub's.
#[test]
fn hub_sets_are_read_through_the_fetcher() {
    let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../calib_data/builtin");
    for (set, file) in [("wikitext2", "wikitext"), ("ptb", "ptb"), ("openwebtext", "c4"), ("ultrachat", "chat")] {
        let hub = FakeHub(Some(builtin.join(file).with_extension("parquet")));
        let windows = load(&request(set, 5, 32), &tokenizer(), &hub).expect(set);
        assert_eq!((windows.tokens.len(), windows.seqlen(), windows.source.name.as_str()), (5, 32, set));
        assert_eq!(windows.source.files[0].sha256.len(), 64);
        assert!(windows.source.documents > 5 && windows.source.tokens_available >= 5 * 32);
    }
    let hub = FakeHub(Some(builtin.join("wikitext.parquet")));
    let eval = eval_windows("wikitext2", &tokenizer(), 3, 64, &hub).expect("test split");
    assert_eq!((eval.tokens.len(), eval.tokens[0][0]), (3, 0));
    let chat = FakeHub(Some(builtin.join("chat.parquet")));
    let error = load(&request("ultrachat", 2, 32), &bare_tokenizer(), &chat).expect_err("no template");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("wikitext2, c4 or builtin"));
    assert_eq!(eval_windows("gsm8k", &tokenizer(), 3, 64, &chat).expect_err("none").kind(), ErrorKind::Unsupported);
}

#[test]
fn compressed_hub_files_are_read() {
    let dir = tempfile::tempdir().expect("temp dir");
    let rows = std::fs::read(testdata().join("rows.jsonl")).expect("readable");
    // A cache may name its files by hash: the registry's name decides the format.
    let path = dir.path().join("blob");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&rows).expect("memory");
    std::fs::write(&path, encoder.finish().expect("memory")).expect("write");
    let hub = FakeHub(Some(path.clone()));
    assert_eq!(load(&request("c4", 5, 32), &tokenizer(), &hub).expect("c4").source.documents, 90);
    let eval = eval_windows("c4", &tokenizer(), 2, 32, &hub).expect("validation");
    assert_eq!(eval.tokens.len(), 2);
    std::fs::write(&path, zstd::encode_all(&rows[..], 1).expect("memory")).expect("write");
    assert_eq!(load(&request("pile", 5, 32), &tokenizer(), &hub).expect("pileval").tokens.len(), 5);
}

#[test]
fn local_files_give_consecutive_windows() {
    let dir = tempfile::tempdir().expect("temp dir");
    let tokenizer = tokenizer();
    let text = "the river counts over seven stones\n".repeat(40);
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("write");
        path.display().to_string()
    };
    let file = write("a.txt", &text);
    let ids = tokenizer.encode(&text, true).expect("encodes");
    let windows = load(&request(&file, 4, 16), &tokenizer, &OFFLINE).expect("enough");
    assert_eq!(windows.tokens.concat(), ids[..64]);
    let error = load(&request(&file, 100, 64), &tokenizer, &OFFLINE).expect_err("too little");
    let (found, most) = (ids.len(), ids.len() / 64);
    let wanted =
        format!("has {found} usable tokens, but 100 windows of 64 need 6400; use --calib-samples {most} or less");
    assert!(error.to_string().contains(&wanted), "{error}");
    let eval = eval_windows(&file, &tokenizer, 100, 64, &OFFLINE).expect("what there is");
    assert_eq!(eval.tokens.len(), most);
    assert!(eval.notes[0].contains(&format!("gives {most} windows")), "{:?}", eval.notes);

    // A folder: texts of all files joined, in the order of names; the rest named.
    write("b.jsonl", "{\"text\":\"one\"}\n{\"text\":\"two\"}\n");
    write("notes.md", "not read");
    let folder = dir.path().display().to_string();
    let windows = load(&request(&folder, 1, 16), &tokenizer, &OFFLINE).expect("enough");
    assert_eq!(windows.source.files.len(), 2);
    assert_eq!(windows.source.documents, 3);
    assert!(windows.notes[0].contains("`notes.md`"), "{:?}", windows.notes);
}

#[test]
fn test_rows_are_read_whole() {
    let path = testdata().join("rows.jsonl").display().to_string();
    let windows = load(&request(&path, 20, 32), &tokenizer(), &OFFLINE).expect("enough");
    assert_eq!(windows.source.documents, 90);
}

#[test]
fn bad_requests_are_classified() {
    let dir = tempfile::tempdir().expect("temp dir");
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("write");
        path.display().to_string()
    };
    let tokenizer = tokenizer();
    let cases = [
        (request("wikitxt", 1, 8), ErrorKind::Usage, "one of `wikitext2`, `ptb`"),
        (request("builtin", 0, 64), ErrorKind::Usage, "0 windows"),
        (request("builtin", 1, 7), ErrorKind::Usage, "too short"),
        (request("builtin", 1_000_001, 8), ErrorKind::Usage, "limit of 1000000"),
        (request("builtin", 1_000_000, usize::MAX), ErrorKind::Usage, "2^32"),
        (request("https://x.org/a.txt", 1, 8), ErrorKind::Unsupported, "download"),
        (request(&write("a.csv", b"a,b"), 1, 8), ErrorKind::Unsupported, "`.csv` files cannot be read"),
        (request(&write("empty.txt", b""), 1, 8), ErrorKind::Input, "usable tokens, but 1 windows of 8 need 8"),
        (request(&write("blank.jsonl", b"\n\n"), 1, 8), ErrorKind::Input, "0 usable tokens"),
        (request(&write("three.txt", b"a b c"), 1, 64), ErrorKind::Input, "more text"),
        (request(&write("bad.parquet", b"PAR1 no PAR1 no PAR1"), 1, 8), ErrorKind::Input, "damaged"),
        (request(&write("bad.txt", b"ok \xff"), 1, 8), ErrorKind::Input, "byte offset 3"),
    ];
    for (request, kind, wanted) in cases {
        let error = load(&request, &tokenizer, &OFFLINE).expect_err(&request.dataset);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn held_out_text_is_shortened_before_it_fails() {
    let tokenizer = tokenizer();
    let windows = held_out(&tokenizer, 4, 128).expect("built in");
    assert_eq!((windows.tokens.len(), windows.seqlen()), (4, 128));
    let long = held_out(&tokenizer, 4, 1 << 20).expect("built in");
    assert_eq!(long.tokens.len(), 1);
    assert!(long.seqlen() > 1000 && long.seqlen() < 1 << 20);
    assert_eq!(long.tokens[0][..128], windows.tokens[0][..]);
    assert_eq!(eval_windows("builtin", &tokenizer, 4, 128, &OFFLINE).expect("built in"), windows);
}
