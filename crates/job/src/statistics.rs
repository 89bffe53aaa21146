//! Statistics on disk: what `lite calibrate` writes and `--stats` reads. The format is in `crates/stats/FORMAT.md`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use lite_calib::Windows;
use lite_decoder::{BlockSpec, DecoderSpec, InputId, Stream};
use lite_model::{Checkpoint, Dtype, ErrorKind, ModelError, OutputTensor, printable};
use lite_stats::{BlockStats, InputStats};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{JobError, Recipe, StatsSource};

/// What `config.json` says the folder is.
const FORMAT: &str = "lite-calibration";
/// The only version so far.
const VERSION: u64 = 1;
/// Leading bytes of every tensor that tell a model from its fine-tunes.
const SAMPLE: usize = 4096;

/// `config.json` of a folder of statistics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    format: String,
    version: u64,
    lite_version: String,
    architecture: String,
    model_header_digest: String,
    model_sample_digest: String,
    dataset: String,
    calibration: String,
    text_digest: String,
    samples: u64,
    seqlen: u64,
    seed: u64,
    tokens: u64,
}

impl Facts {
    /// Those of `model` on `windows`, which were cut with `seed`.
    pub(crate) fn new(model: &Checkpoint, arch: &str, windows: &Windows, seed: u64) -> Result<Self, JobError> {
        Ok(Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            lite_version: env!("CARGO_PKG_VERSION").to_owned(),
            architecture: arch.to_owned(),
            model_header_digest: model.header_digest().to_owned(),
            model_sample_digest: sample_digest(model)?,
            dataset: windows.source.name.clone(),
            calibration: windows.source.description.clone(),
            text_digest: windows.digest.clone(),
            samples: windows.tokens.len() as u64,
            seqlen: windows.seqlen() as u64,
            seed,
            tokens: windows.total_tokens(),
        })
    }

    /// The text of `config.json`.
    pub(crate) fn text(&self) -> Result<String, JobError> {
        let text = serde_json::to_string_pretty(self);
        Ok(text.map_err(|e| JobError::Input(format!("the facts of the statistics cannot be written: {e}")))? + "\n")
    }
}

/// A folder of statistics, opened and checked as far as its headers go.
#[derive(Debug)]
pub struct Statistics {
    folder: PathBuf,
    checkpoint: Checkpoint,
    facts: Facts,
}

impl Statistics {
    /// Opens `folder`. No statistics are read yet.
    ///
    /// # Errors
    /// [`JobError::Input`] for a folder that holds no statistics, or damaged ones; [`JobError::Unsupported`] for a later
    /// version of the format; I/O errors.
    pub(crate) fn open(folder: &Path) -> Result<Self, JobError> {
        let bad = |what: String| {
            JobError::Input(format!(
                "--stats `{}`: {what}; statistics are made by `lite calibrate MODEL --work-dir DIR`",
                folder.display()
            ))
        };
        let checkpoint = Checkpoint::open(folder).map_err(|error| match error.kind() {
            ErrorKind::Input | ErrorKind::Unsupported => bad(with_causes(&error)),
            _ => error.into(),
        })?;
        let config = checkpoint.config();
        if config.get("format").and_then(|v| v.as_str()) != Some(FORMAT) {
            return Err(bad(format!(
                "its config.json has no \"format\": \"{FORMAT}\", so it is not a folder of statistics"
            )));
        }
        match config.get("version").and_then(serde_json::Value::as_u64) {
            Some(VERSION) => {}
            Some(version) => {
                return Err(JobError::Unsupported(format!(
                    "--stats `{}`: found version {version} of the format, this program reads version {VERSION}: make the statistics again with `lite calibrate`",
                    folder.display()
                )));
            }
            None => return Err(bad("its config.json has no `version`".to_owned())),
        }
        let facts: Facts = serde_json::from_value(serde_json::Value::Object(config.clone()))
            .map_err(|e| bad(format!("its config.json is damaged: {}", printable(&e.to_string()))))?;
        if facts.tokens == 0 || facts.samples.checked_mul(facts.seqlen) != Some(facts.tokens) {
            return Err(bad(format!(
                "its config.json counts {} tokens in {} windows of {}",
                facts.tokens, facts.samples, facts.seqlen
            )));
        }
        Ok(Self { folder: folder.to_owned(), checkpoint, facts })
    }

    /// Whether they are `model`'s and cover every input of `spec`.
    ///
    /// # Errors
    /// [`JobError::State`] for another model, [`JobError::Input`] for missing, unknown or misshapen tensors.
    pub(crate) fn check_model(&self, model: &Checkpoint, arch: &str) -> Result<(), JobError> {
        let other = |what: &str, found: &str, wanted: &str| {
            JobError::State(format!(
                "--stats `{}` belongs to another model ({}): its {what} is {}, `{}` has {}; make statistics of this model with `lite calibrate`",
                self.folder.display(),
                printable(&self.facts.architecture),
                short(found),
                model.root().display(),
                short(wanted)
            ))
        };
        if self.facts.architecture != arch {
            return Err(other("architecture", &self.facts.architecture, arch));
        }
        if self.facts.model_header_digest != model.header_digest() {
            return Err(other(
                "digest of config.json and tensor headers",
                &self.facts.model_header_digest,
                model.header_digest(),
            ));
        }
        let sample = sample_digest(model)?;
        if self.facts.model_sample_digest != sample {
            return Err(other("digest of sampled weights", &self.facts.model_sample_digest, &sample));
        }
        Ok(())
    }

    /// Whether the headers announce every input of `spec`, and nothing else.
    ///
    /// # Errors
    /// [`JobError::Input`] for missing, unknown or misshapen tensors.
    pub(crate) fn check_tensors(&self, spec: &DecoderSpec) -> Result<(), JobError> {
        let wanted = tensors(spec);
        for tensor in &wanted {
            let found = match self.checkpoint.info(&tensor.name) {
                None => "is missing".to_owned(),
                Some(info) if info.dtype == tensor.dtype && info.shape == tensor.shape => continue,
                Some(info) => format!("is {}{:?}, wanted {}{:?}", info.dtype, info.shape, tensor.dtype, tensor.shape),
            };
            return Err(self.damaged(&tensor.name, &found));
        }
        let names: std::collections::BTreeSet<&str> = wanted.iter().map(|t| t.name.as_str()).collect();
        match self.checkpoint.names().find(|name| !names.contains(name)) {
            Some(name) => Err(self.damaged(name, "belongs to no input of the model")),
            None => Ok(()),
        }
    }

    /// Whether they are what the user said of the text. A path is compared later, by its text.
    ///
    /// # Errors
    /// [`JobError::State`], naming the first difference.
    pub(crate) fn check_wanted(&self, wanted: &StatsSource) -> Result<(), JobError> {
        let facts = &self.facts;
        let numbers = [
            ("--calib-samples", wanted.samples.map(i128::from), facts.samples),
            ("--calib-seqlen", wanted.seqlen.map(i128::from), facts.seqlen),
            ("--seed", wanted.seed.map(i128::from), facts.seed),
        ];
        for (flag, asked, recorded) in numbers {
            if let Some(asked) = asked.filter(|asked| *asked != i128::from(recorded)) {
                return Err(self.differs(&format!("{flag} {asked}"), &format!("{flag} {recorded}")));
            }
        }
        match &wanted.dataset {
            Some(name) if *name != facts.dataset && !Path::new(name).exists() => {
                Err(self.differs(&format!("--calib-dataset {name}"), &format!("--calib-dataset {}", facts.dataset)))
            }
            _ => Ok(()),
        }
    }

    /// Whether they were gathered on these windows, cut from what the user named.
    ///
    /// # Errors
    /// [`JobError::State`] if not.
    pub(crate) fn check_text(&self, windows: &Windows) -> Result<(), JobError> {
        if windows.digest == self.facts.text_digest {
            return Ok(());
        }
        Err(self.differs(
            &format!("--calib-dataset {}, whose windows have digest {}", windows.source.name, short(&windows.digest)),
            &format!("--calib-dataset {}, digest {}", self.facts.dataset, short(&self.facts.text_digest)),
        ))
    }

    /// `recipe` with the windows' shape of these statistics and without what needs forward passes; and what to say.
    pub(crate) fn adapt(&self, recipe: &Recipe) -> (Recipe, Vec<String>) {
        let mut adapted = recipe.clone();
        // A crafted number that does not fit is refused as too long for the model.
        adapted.calib.samples = i64::try_from(self.facts.samples).unwrap_or(i64::MAX);
        adapted.calib.seqlen = Some(i64::try_from(self.facts.seqlen).unwrap_or(i64::MAX));
        adapted.calib.seed = self.facts.seed;
        let mut notes = vec![format!(
            "statistics in `{}` stand for the calibration windows ({}); {FLOAT}",
            self.folder.display(),
            printable(&self.facts.calibration)
        )];
        leave_out(&mut adapted, &mut notes);
        (adapted, notes)
    }

    /// Where the statistics come from, in words.
    pub(crate) fn description(&self) -> String {
        format!("{} (statistics in `{}`)", printable(&self.facts.calibration), self.folder.display())
    }

    /// Where the text they were gathered on comes from.
    pub fn calibration(&self) -> &str {
        &self.facts.calibration
    }

    /// SHA-256 over that text's token ids.
    pub fn text_digest(&self) -> &str {
        &self.facts.text_digest
    }

    /// The seed the windows were drawn with.
    pub(crate) fn seed(&self) -> u64 {
        self.facts.seed
    }

    /// The statistics of one block.
    ///
    /// # Errors
    /// [`JobError::Input`] for values that no activations can have.
    pub(crate) fn block(&self, block: &BlockSpec) -> Result<BlockStats, JobError> {
        let mut stats = BTreeMap::new();
        for (input, k) in inputs(block) {
            let [gram, mean, max] = names(input);
            let read = |name: &str| self.checkpoint.tensor_f32(name);
            let parts = InputStats::from_parts(k, self.facts.tokens, read(&gram)?, &read(&mean)?, read(&max)?);
            stats.insert(input, parts.map_err(|error| self.damaged(&prefix(input), &error.to_string()))?);
            self.checkpoint.release([gram.as_str(), &mean, &max]);
        }
        Ok(BlockStats::from_inputs(stats))
    }

    /// SHA-256 of a tensor's bytes.
    pub(crate) fn digest(&self, name: &str) -> Result<[u8; 32], JobError> {
        let digest = Sha256::digest(self.checkpoint.tensor(name)?.data).into();
        self.checkpoint.release([name]);
        Ok(digest)
    }

    fn damaged(&self, tensor: &str, what: &str) -> JobError {
        JobError::Input(format!("--stats `{}`: `{}` {what}", self.folder.display(), printable(tensor)))
    }

    fn differs(&self, asked: &str, recorded: &str) -> JobError {
        JobError::State(format!(
            "{} was asked for, the statistics in `{}` were made with {}; leave the flag out, or make statistics of that text with `lite calibrate`",
            printable(asked),
            self.folder.display(),
            printable(recorded)
        ))
    }
}

/// What statistics made once cannot know.
const FLOAT: &str = "they are the float model's, so later blocks do not see the errors of earlier ones";

/// [`Statistics::adapt`] before they are gathered.
pub(crate) fn to_be_gathered(recipe: &Recipe, folder: &Path) -> (Recipe, Vec<String>) {
    let mut adapted = recipe.clone();
    let mut notes = vec![format!(
        "statistics are gathered in `{}` first, once for all jobs that name it, and stand for the calibration windows; {FLOAT}",
        folder.display()
    )];
    leave_out(&mut adapted, &mut notes);
    (adapted, notes)
}

/// Takes what needs forward passes of the quantized model out of `recipe`, and says so.
fn leave_out(recipe: &mut Recipe, notes: &mut Vec<String>) {
    for (asked, name) in [
        (
            &mut recipe.solver.error_aware,
            "error-aware targets are off: they need forward passes of the quantized model",
        ),
        (&mut recipe.solver.tune, "block tuning is off: it needs forward passes of the quantized model"),
    ] {
        if std::mem::take(asked) {
            notes.push(format!("with --stats, {name}"));
        }
    }
}

/// What is written for `spec`, by block and input.
pub(crate) fn tensors(spec: &DecoderSpec) -> Vec<OutputTensor> {
    let of = |(input, k): (InputId, usize)| {
        names(input).into_iter().zip([vec![k, k], vec![k], vec![k]]).map(|(name, shape)| OutputTensor {
            name,
            dtype: Dtype::F32,
            shape,
        })
    };
    spec.blocks.iter().flat_map(inputs).flat_map(of).collect()
}

/// Hands the tensors of one input to `write`, by name: one at a time, for a Gram matrix may be gigabytes.
pub(crate) fn write_input(
    input: InputId,
    stats: &InputStats,
    mut write: impl FnMut(&str, &[u8]) -> Result<(), JobError>,
) -> Result<(), JobError> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let [gram, mean, max] = names(input);
    write(&gram, &bytes(stats.gram()))?;
    write(&mean, &bytes(&stats.abs_mean()))?;
    write(&max, &bytes(stats.abs_max()))
}

/// Each input of a block with its number of channels.
pub(crate) fn inputs(block: &BlockSpec) -> BTreeMap<InputId, usize> {
    block.inputs()
}

fn names(input: InputId) -> [String; 3] {
    ["gram", "abs_mean", "abs_max"].map(|part| format!("{}.{part}", prefix(input)))
}

fn prefix(input: InputId) -> String {
    let name = match input.stream {
        Stream::AttnIn => "attn_in".to_owned(),
        Stream::AttnOut => "attn_out".to_owned(),
        Stream::MlpIn => "mlp_in".to_owned(),
        Stream::MlpMid => "mlp_mid".to_owned(),
        Stream::QLatent => "q_latent".to_owned(),
        Stream::KvLatent => "kv_latent".to_owned(),
        Stream::SharedMid => "shared_mid".to_owned(),
        Stream::ExpertIn(e) => format!("experts.{e}.in"),
        Stream::ExpertMid(e) => format!("experts.{e}.mid"),
    };
    format!("blocks.{}.{name}", input.block)
}

/// SHA-256 over name and first bytes of every tensor, by name.
fn sample_digest(model: &Checkpoint) -> Result<String, JobError> {
    let mut names: Vec<&str> = model.names().collect();
    names.sort_unstable();
    let mut hash = Sha256::new();
    for name in names {
        let data = model.stretch(name)?;
        let sample = &data[..data.len().min(SAMPLE)];
        for part in [name.as_bytes(), sample] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        model.release([name]);
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string does not fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

/// The start of a digest, or a name, safe to print.
fn short(text: &str) -> String {
    let is_digest = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    format!("`{}`", if is_digest { format!("{}…", &text[..12]) } else { printable(text) })
}

fn with_causes(error: &ModelError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}
