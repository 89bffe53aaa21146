//! Which files of a repository are the model.
//!
//! Only files at the top, plus chat templates in `additional_chat_templates/` (where `transformers` keeps them). The
//! weights are those that one index names, or one single file; anything else is refused before the first large
//! download, with the rules by which [`Checkpoint`](crate::Checkpoint) would refuse the folder afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::api::{RemoteFile, RepoListing};
use super::error::HubError;
use super::names::check_file_name;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// Largest index read; that of a model of 700B parameters has about 10 MiB.
const MAX_INDEX: u64 = 256 << 20;

/// Where the weights of a repository are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WeightPlan {
    /// In one file.
    Single(String),
    /// In the files that this index names.
    Index(String),
}

/// Decides which weights of the repository to take.
///
/// # Errors
/// [`HubError::NoModel`] if there is no `config.json`, nothing in safetensors, or more than one reading.
pub(super) fn plan(repo: &str, listing: &RepoListing) -> Result<WeightPlan, HubError> {
    let refuse =
        |reason: String| Err(HubError::NoModel { repo: repo.to_owned(), commit: listing.commit.clone(), reason });
    let names: Vec<&str> = top(listing).collect();
    if !names.contains(&CONFIG) {
        return refuse(match names.iter().find(|name| name.ends_with(".gguf")) {
            Some(gguf) => format!("it has no `{CONFIG}`, only GGUF (`{gguf}`); name the repository it was made from"),
            None => format!("it has no `{CONFIG}`; name the repository of a model, not of an adapter or a dataset"),
        });
    }
    let indexes: Vec<&str> =
        names.iter().copied().filter(|name| name.ends_with(INDEX_SUFFIX) && !is_consolidated(name)).collect();
    if indexes.contains(&INDEX) {
        return Ok(WeightPlan::Index(INDEX.to_owned()));
    }
    if names.contains(&SINGLE) {
        return Ok(WeightPlan::Single(SINGLE.to_owned()));
    }
    match indexes.as_slice() {
        [] => {}
        [index] => return Ok(WeightPlan::Index((*index).to_owned())),
        _ => return refuse(format!("it has several indexes and no `{INDEX}`: {}", indexes.join(", "))),
    }
    let weights: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(SUFFIX)).collect();
    let own: Vec<&str> = weights.iter().copied().filter(|name| !is_consolidated(name) && !is_adapter(name)).collect();
    let consolidated: Vec<&str> = weights.iter().copied().filter(|name| is_consolidated(name)).collect();
    match (own.as_slice(), consolidated.as_slice()) {
        ([file], _) | ([], [file]) => Ok(WeightPlan::Single((*file).to_owned())),
        ([], []) => refuse(without_weights(&names)),
        ([], several) | (several, _) => {
            refuse(format!("it has several weight files and no `{INDEX}` that names them: {}", several.join(", ")))
        }
    }
}

/// Why there are no weights, and the way out.
fn without_weights(names: &[&str]) -> String {
    let find = |suffixes: &[&str]| names.iter().find(|name| suffixes.iter().any(|suffix| name.ends_with(suffix)));
    if let Some(file) = names.iter().find(|name| is_adapter(name)) {
        return format!("`{file}` is a LoRA adapter; merge it into its base model first (peft `merge_and_unload()`)");
    }
    if let Some(file) = find(&[".bin", ".pt", ".pth", ".ckpt"]) {
        return format!(
            "it has weights only as PyTorch pickles (`{file}`), which can run code and are not read; look for a \
             revision with safetensors (often `refs/pr/1`) or convert with transformers `save_pretrained`"
        );
    }
    match find(&[".gguf", ".h5", ".msgpack", ".onnx"]) {
        Some(file) => {
            format!("it has no `*{SUFFIX}`, only `{file}`, which is not read; name the repository it was made from")
        }
        None => format!("it has no `*{SUFFIX}` file"),
    }
}

/// The files to take beside the weights, index included: configuration, tokenizer, chat templates, processors, code
/// (copied, never run), licence. Small, so they come first: once the weights are there, everything is.
pub(super) fn side_files<'l>(listing: &'l RepoListing, plan: &WeightPlan) -> Vec<&'l RemoteFile> {
    listing.files.iter().filter(|file| is_side_file(&file.path, plan)).collect()
}

fn is_side_file(path: &str, plan: &WeightPlan) -> bool {
    if let Some(template) = path.strip_prefix("additional_chat_templates/") {
        return !template.contains('/') && template.ends_with(".jinja");
    }
    // Hidden files (`.gitattributes`) are git's.
    if path.contains('/') || path.starts_with('.') {
        return false;
    }
    // An index of weights that are not taken would contradict those that are.
    if path.ends_with(".json") && path.contains(".index.") {
        return matches!(plan, WeightPlan::Index(index) if index == path);
    }
    const SUFFIXES: [&str; 9] = [".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".spm", ".bpe", ".vocab"];
    let lower = path.to_ascii_lowercase();
    // `tokenizer.model.v3`: versions of the tokenizer of mistral-common.
    is_document(path) || lower.starts_with("tokenizer.model.") || SUFFIXES.iter().any(|suffix| lower.ends_with(suffix))
}

/// Licence, notice, model card: they go with the model, but nothing depends on them.
pub(super) fn is_document(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    ["license", "licence", "notice", "use_policy", "readme.md"].iter().any(|prefix| lower.starts_with(prefix))
}

/// The names of the weight files, sorted; for an index, from its copy in `snapshot`.
///
/// # Errors
/// [`HubError::NoModel`] if the index is not one, [`HubError::BadName`] if it names a file outside the model.
pub(super) fn weight_names(
    repo: &str,
    commit: &str,
    plan: &WeightPlan,
    snapshot: &Path,
) -> Result<Vec<String>, HubError> {
    let name = match plan {
        WeightPlan::Single(file) => return Ok(vec![file.clone()]),
        WeightPlan::Index(index) => index,
    };
    let refuse = |reason: String| HubError::NoModel { repo: repo.to_owned(), commit: commit.to_owned(), reason };
    let path = snapshot.join(name);
    let size = fs::metadata(&path).map_err(HubError::io("read", &path))?.len();
    if size > MAX_INDEX {
        return Err(refuse(format!("`{name}` has {size} bytes, more than any index ({MAX_INDEX})")));
    }
    let bytes = fs::read(&path).map_err(HubError::io("read", &path))?;
    let index: Value =
        serde_json::from_slice(&bytes).map_err(|error| refuse(format!("`{name}` is not JSON: {error}")))?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty()) else {
        return Err(refuse(format!("`{name}` has no `weight_map` with tensors")));
    };
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let Some(file) = file.as_str() else {
            return Err(refuse(format!("`{name}` names no file for `{tensor}`")));
        };
        check_file_name(repo, file)?;
        if !file.ends_with(SUFFIX) {
            return Err(refuse(format!("`{name}` names `{file}`, wanted a `*{SUFFIX}` file")));
        }
        files.insert(file.to_owned());
    }
    Ok(files.into_iter().collect())
}

/// Looks up `names` in the listing.
///
/// # Errors
/// [`HubError::NoModel`] if the index names files that the repository does not have, or leaves out
/// `model.safetensors`, which then holds other weights.
pub(super) fn weight_files<'l>(
    repo: &str,
    listing: &'l RepoListing,
    names: &[String],
) -> Result<Vec<&'l RemoteFile>, HubError> {
    let refuse =
        |reason: String| Err(HubError::NoModel { repo: repo.to_owned(), commit: listing.commit.clone(), reason });
    let mut files = Vec::with_capacity(names.len());
    let mut absent = Vec::new();
    for name in names {
        match listing.files.iter().find(|file| file.path == *name) {
            Some(file) => files.push(file),
            None => absent.push(name.as_str()),
        }
    }
    if !absent.is_empty() {
        return refuse(format!("its index names files that it does not have: {}", absent.join(", ")));
    }
    if top(listing).any(|name| name == SINGLE) && !names.iter().any(|name| name == SINGLE) {
        return refuse(format!(
            "it has `{SINGLE}` and an index that does not name it; download it by hand and remove what is left over"
        ));
    }
    Ok(files)
}

fn top(listing: &RepoListing) -> impl Iterator<Item = &str> {
    listing.files.iter().map(|file| file.path.as_str()).filter(|path| !path.contains('/'))
}

/// Weights in the layout of `mistral-inference` or of the original release, doubling those of `transformers`.
fn is_consolidated(name: &str) -> bool {
    name.starts_with("consolidated")
}

fn is_adapter(name: &str) -> bool {
    name.starts_with("adapter_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> RepoListing {
        let file = |name: &&str| RemoteFile { path: (*name).to_owned(), size: Some(1), sha256: None, blob_id: None };
        RepoListing { commit: "0".repeat(40), files: names.iter().map(file).collect() }
    }

    fn plan_of(names: &[&str]) -> Result<WeightPlan, String> {
        plan("o/r", &listing(names)).map_err(|error| error.to_string())
    }

    #[test]
    fn side_files_are_the_needed_ones() {
        let names = [
            ".gitattributes",
            "LICENSE",
            "LICENSE.txt",
            "README.md",
            "USE_POLICY.md",
            "added_tokens.json",
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "chat_template.json",
            "config.json",
            "consolidated.safetensors",
            "consolidated.safetensors.index.json",
            "figure.png",
            "generation_config.json",
            "merges.txt",
            "model-00001-of-00001.safetensors",
            "model.fp16.safetensors",
            "model.gguf",
            "model.onnx",
            "model.safetensors.index.json",
            "modeling_x.py",
            "onnx/config.json",
            "original/params.json",
            "original/tokenizer.model",
            "preprocessor_config.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "qwen.tiktoken",
            "tf_model.h5",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "tokenizer_config.json",
            "training_args.bin",
            "vocab.json",
        ];
        let listing = listing(&names);
        let plan = plan("o/r", &listing).unwrap();
        let taken: Vec<&str> = side_files(&listing, &plan).iter().map(|file| file.path.as_str()).collect();
        let wanted = [
            "LICENSE",
            "LICENSE.txt",
            "README.md",
            "USE_POLICY.md",
            "added_tokens.json",
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "chat_template.json",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "model.safetensors.index.json",
            "modeling_x.py",
            "preprocessor_config.json",
            "qwen.tiktoken",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "tokenizer_config.json",
            "vocab.json",
        ];
        assert_eq!(taken, wanted);
    }

    #[test]
    fn weights_of_a_repository() {
        let single = |name: &str| Ok(WeightPlan::Single(name.to_owned()));
        let index = |name: &str| Ok(WeightPlan::Index(name.to_owned()));
        assert_eq!(plan_of(&["config.json", SINGLE, "model.fp16.safetensors"]), single(SINGLE));
        assert_eq!(plan_of(&["config.json", INDEX, "a.safetensors"]), index(INDEX));
        assert_eq!(plan_of(&["config.json", INDEX, "consolidated.safetensors.index.json"]), index(INDEX));
        assert_eq!(plan_of(&["config.json", "x.safetensors.index.json"]), index("x.safetensors.index.json"));
        assert_eq!(plan_of(&["config.json", "own.safetensors", "consolidated.safetensors"]), single("own.safetensors"));
        assert_eq!(plan_of(&["config.json", "consolidated.safetensors"]), single("consolidated.safetensors"));
    }

    #[test]
    fn repositories_without_a_model_say_why() {
        for (names, word) in [
            (&["model.gguf"][..], "GGUF"),
            (&["README.md"], "no `config.json`"),
            (&["config.json"], "no `*.safetensors`"),
            (&["config.json", "pytorch_model.bin"], "pickles"),
            (&["config.json", "adapter_model.safetensors"], "LoRA"),
            (&["config.json", "tf_model.h5"], "tf_model.h5"),
            (&["config.json", "original/x.safetensors"], "no `*.safetensors`"),
            (&["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "several"),
            (&["config.json", "a.safetensors.index.json", "b.safetensors.index.json"], "several indexes"),
        ] {
            let error = plan_of(names).unwrap_err();
            assert!(error.contains(word), "{names:?}: {error}");
        }
    }

    #[test]
    fn hostile_and_broken_indexes() {
        let folder = tempfile::tempdir().unwrap();
        let plan = WeightPlan::Index(INDEX.to_owned());
        let read = |text: &str| {
            fs::write(folder.path().join(INDEX), text).unwrap();
            weight_names("o/r", "c", &plan, folder.path())
        };
        assert_eq!(
            read(r#"{"weight_map":{"b":"2.safetensors","a":"1.safetensors","c":"2.safetensors"}}"#).unwrap(),
            ["1.safetensors", "2.safetensors"]
        );
        assert!(matches!(read(r#"{"weight_map":{"a":"../x.safetensors"}}"#), Err(HubError::BadName { .. })));
        assert!(matches!(read(r#"{"weight_map":{"a":"/x.safetensors"}}"#), Err(HubError::BadName { .. })));
        for text in [
            "",
            "<html>",
            "[]",
            "{}",
            r#"{"weight_map":{}}"#,
            r#"{"weight_map":{"a":1}}"#,
            r#"{"weight_map":{"a":"x.bin"}}"#,
        ] {
            assert!(matches!(read(text), Err(HubError::NoModel { .. })), "{text}");
        }
    }

    #[test]
    fn an_index_must_fit_the_repository() {
        let names = ["1.safetensors".to_owned(), "2.safetensors".to_owned()];
        let error = weight_files("o/r", &listing(&["1.safetensors"]), &names).unwrap_err().to_string();
        assert!(error.contains("2.safetensors") && !error.contains("1.safetensors"), "{error}");
        let all = listing(&["1.safetensors", "2.safetensors", SINGLE]);
        assert!(weight_files("o/r", &all, &names).unwrap_err().to_string().contains("does not name it"));
        let one = listing(&[INDEX, SINGLE]);
        assert_eq!(weight_files("o/r", &one, &[SINGLE.to_owned()]).unwrap().len(), 1);
    }
}
