//! The model's tokenizer: `tokenizer.json` through the `tokenizers` crate, and its chat template.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::document::Message;
use crate::error::{CalibError, guard};
use crate::template::ChatTemplate;

/// The largest `tokenizer.json` that is read; the largest in the wild have 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;
/// The largest side file (`tokenizer_config.json` and the like) that is read.
const MAX_SIDE_BYTES: u64 = 64 << 20;

/// A tokenizer that belongs to a model with a known number of embedding rows.
#[derive(Debug)]
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
    vocab_size: usize,
    special: Vec<u32>,
    /// The template, or why there is none.
    template: Result<ChatTemplate, String>,
    warnings: Vec<String>,
}

impl ModelTokenizer {
    /// Loads the tokenizer of a model folder whose embedding has `vocab_size` rows.
    ///
    /// Reads `tokenizer.json`; truncation and padding it may prescribe are switched off. Special tokens are added
    /// as its post-processor says, which is what transformers' fast tokenizers do; `add_bos_token` in
    /// `tokenizer_config.json` changes nothing here. The chat template comes from, in this order, `chat_template.jinja`,
    /// `tokenizer_config.json` and `chat_template.json`; a missing or broken template is no error until one is needed.
    ///
    /// # Errors
    /// `tokenizer.json` is missing, larger than 512 MiB or damaged.
    pub fn from_dir(dir: &Path, vocab_size: usize) -> Result<Self, CalibError> {
        let path = dir.join("tokenizer.json");
        let meta = match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => meta,
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(CalibError::io(&path, e)),
            _ => return Err(CalibError::tokenizer(dir, missing_tokenizer(dir))),
        };
        if meta.len() > MAX_TOKENIZER_BYTES {
            let detail = format!("{} MiB; no tokenizer is that large (limit 512 MiB)", meta.len() >> 20);
            return Err(CalibError::tokenizer(&path, detail));
        }
        let bytes = std::fs::read(&path).map_err(|e| CalibError::io(&path, e))?;
        let damaged = |e: String| {
            CalibError::tokenizer(
                &path,
                format!("cannot be loaded ({e}); fetch the file again from where the model came from"),
            )
        };
        let mut tokenizer =
            guard(|| Tokenizer::from_bytes(&bytes)).map_err(damaged)?.map_err(|e| damaged(e.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| damaged(e.to_string()))?;

        let mut special: Vec<u32> = Vec::new();
        let mut beyond: BTreeMap<u32, String> = BTreeMap::new();
        let mut added: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        for (id, token) in added {
            if token.special {
                special.push(id);
            }
            if id as usize >= vocab_size {
                beyond.insert(id, token.content);
            }
        }
        let mut warnings = Vec::new();
        if let Some((id, token)) = beyond.first_key_value() {
            warnings.push(format!(
                "{} added tokens of the tokenizer have ids beyond the embedding's {vocab_size} rows (first: `{token}`, id {id}); \
                 text that uses them will be refused",
                beyond.len()
            ));
        }
        let template = load_template(dir, &mut warnings);
        Ok(Self { tokenizer, path, vocab_size, special, template, warnings })
    }

    /// Token ids of a text, with the special tokens of the post-processor if `add_special`.
    ///
    /// The whole text is encoded in one go: cutting it would change tokens at the cuts. Equal to
    /// `tokenizer(text, add_special_tokens=…).input_ids` of transformers' fast tokenizers; special tokens spelt out in the
    /// text become special tokens.
    ///
    /// # Errors
    /// The tokenizer fails on the text, or gives an id that has no embedding row.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, CalibError> {
        let encoding = guard(|| self.tokenizer.encode_fast(text, add_special))
            .map_err(|e| self.failed(&e))?
            .map_err(|e| self.failed(&e.to_string()))?;
        self.checked(encoding.get_ids())
    }

    /// [`encode`](Self::encode) of many texts, in parallel; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// As `encode`.
    pub(crate) fn encode_batch(&self, texts: &[&str], add_special: bool) -> Result<Vec<Vec<u32>>, CalibError> {
        let encodings = guard(|| self.tokenizer.encode_batch_fast(texts.to_vec(), add_special))
            .map_err(|e| self.failed(&e))?
            .map_err(|e| self.failed(&e.to_string()))?;
        encodings.iter().map(|e| self.checked(e.get_ids())).collect()
    }

    fn checked(&self, ids: &[u32]) -> Result<Vec<u32>, CalibError> {
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            None => Ok(ids.to_vec()),
            Some(&id) => Err(CalibError::TokenOutOfVocab {
                token: self.tokenizer.id_to_token(id).unwrap_or_default(),
                id,
                vocab_size: self.vocab_size,
            }),
        }
    }

    fn failed(&self, detail: &str) -> CalibError {
        CalibError::tokenizer(&self.path, format!("failed to encode text ({detail}); is it the file of this model?"))
    }

    /// Renders a conversation with the chat template, with or without the header of the assistant's next turn.
    ///
    /// # Errors
    /// There is no template (class `Unsupported`), or it fails or refuses the conversation.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, CalibError> {
        self.template_for("the prompt")?.render(messages, add_generation_prompt)
    }

    /// [`render`](Self::render) without a generation prompt; `name` is the dataset an error speaks of.
    pub(crate) fn render_row(&self, messages: &[Message], name: &str) -> Result<String, CalibError> {
        self.template_for(name)?.render(messages, false)
    }

    fn template_for(&self, name: &str) -> Result<&ChatTemplate, CalibError> {
        let missing = |reason: &String| CalibError::NoChatTemplate { name: name.to_owned(), reason: reason.clone() };
        self.template.as_ref().map_err(missing)
    }

    /// The text of token ids, special tokens left out if `skip_special`.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, CalibError> {
        let failed = |e: &str| CalibError::tokenizer(&self.path, format!("failed to decode ids ({e})"));
        guard(|| self.tokenizer.decode(ids, skip_special)).map_err(|e| failed(&e))?.map_err(|e| failed(&e.to_string()))
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_ok()
    }

    /// Ids of special tokens (those marked so in `tokenizer.json`), ascending.
    pub fn special_ids(&self) -> &[u32] {
        &self.special
    }

    /// Rows of the model's embedding: ids must be below.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What is odd about the tokenizer without being an error, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// All ids that stand for ordinary text: known to the tokenizer, not special, below `vocab_size`; ascending.
    pub(crate) fn plain_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.tokenizer.get_vocab(true).into_values().collect();
        ids.retain(|id| (*id as usize) < self.vocab_size && self.special.binary_search(id).is_err());
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// What to say when there is no `tokenizer.json`.
fn missing_tokenizer(dir: &Path) -> String {
    let found = ["tokenizer.model", "vocab.json", "tiktoken.model", "qwen.tiktoken", "vocab.txt"]
        .into_iter()
        .find(|name| dir.join(name).is_file());
    match found {
        Some(name) => format!(
            "there is no tokenizer.json, only {name}; make one with transformers: \
             python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{0}').save_pretrained('{0}')\"",
            dir.display()
        ),
        None => "there is no tokenizer.json; copy it from the model's repository, or quantize without calibration data"
            .into(),
    }
}

/// A side file as JSON: `None` if it is not there, `Err` if it cannot be read.
fn side_json(dir: &Path, name: &str) -> Result<Option<Value>, String> {
    match side_text(dir, name)? {
        Some(text) => serde_json::from_str(&text).map(Some).map_err(|e| format!("{name} is not valid JSON ({e})")),
        None => Ok(None),
    }
}

fn side_text(dir: &Path, name: &str) -> Result<Option<String>, String> {
    let path = dir.join(name);
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("{name} cannot be read ({e})")),
        Ok(meta) if !meta.is_file() => return Err(format!("{name} is not a file")),
        Ok(meta) if meta.len() > MAX_SIDE_BYTES => return Err(format!("{name} is larger than 64 MiB")),
        Ok(_) => {}
    }
    std::fs::read_to_string(&path).map(Some).map_err(|e| format!("{name} cannot be read ({e})"))
}

/// The chat template of a model folder, or why there is none.
fn load_template(dir: &Path, warnings: &mut Vec<String>) -> Result<ChatTemplate, String> {
    let mut side = |name: &str| match side_json(dir, name) {
        Ok(value) => value.unwrap_or_default(),
        Err(e) => {
            warnings.push(e);
            Value::Null
        }
    };
    let config = side("tokenizer_config.json");
    let map = side("special_tokens_map.json");
    let mut variables = BTreeMap::new();
    for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
        // A token is a string, or an object with its text in `content`; the first file that has it wins.
        let text = |file: &Value| {
            let token = file.get(name)?;
            token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
        };
        if let Some(token) = text(&config).or_else(|| text(&map)) {
            variables.insert(name.to_owned(), token);
        }
    }
    let source = match side_text(dir, "chat_template.jinja")? {
        Some(source) => source,
        None => match choose(config.get("chat_template"))? {
            Some(source) => source,
            None => choose(side_json(dir, "chat_template.json")?.unwrap_or_default().get("chat_template"))?.ok_or(
                "the model folder has none (chat_template.jinja, or `chat_template` in tokenizer_config.json)",
            )?,
        },
    };
    ChatTemplate::new(source, variables)
}

/// `chat_template`: a string, or a list of `{name, template}` of which the default is meant.
fn choose(value: Option<&Value>) -> Result<Option<String>, String> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            match default.and_then(|t| t.get("template")).and_then(Value::as_str) {
                Some(source) => Ok(Some(source.to_owned())),
                None => Err("the tokenizer's list of chat templates has none called `default`".to_owned()),
            }
        }
        Some(_) => Err("`chat_template` is neither a string nor a list".to_owned()),
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
