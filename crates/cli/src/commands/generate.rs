//! `lite generate`: continue a prompt with a checkpoint, quantized or not.

mod text;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use lite_calib::{Message, ModelTokenizer};
use lite_job::{JobError, Recipe, locate_model};
use lite_runtime::eval::EvalModel;
use lite_runtime::generate::{
    FinishReason, GenerateSettings, Generation, KvPrecision, MemoryNeed, ResidentModel, Sampler, SamplerSettings,
    generate,
};
use lite_runtime::{Engine, RuntimeError};
use serde_json::{Value, json};

use self::text::TextStream;
use super::eval::KvBits;
use crate::args::{Format, bytes};
use crate::memory::available;
use crate::output::{duration, size};
use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The checkpoint to run, quantized or not: a folder or a hub id; all of it is held in memory
    #[arg(value_name = "DIR")]
    pub(crate) model: String,

    /// Text to continue; repeatable, each is continued by itself
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file", conflicts_with = "prompt_file")]
    pub(crate) prompt: Vec<String>,

    /// File whose whole text is continued
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,

    /// Take the prompt for a user's turn, and let the model's chat template frame it
    #[arg(long)]
    pub(crate) chat: bool,

    /// System turn before the user's
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,

    /// The most tokens to make
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) max_new_tokens: usize,

    /// 0 takes the most likely token; above, tokens are drawn, and higher is bolder
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "T")]
    pub(crate) temperature: f32,

    /// Draw among this many of the most likely tokens only; 0: all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub(crate) top_k: usize,

    /// Draw among the most likely tokens that together have this probability only
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_name = "P")]
    pub(crate) top_p: f32,

    /// Make tokens that are there already less likely; 1: do not
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_name = "FACTOR")]
    pub(crate) repetition_penalty: f32,

    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,

    /// Precision of the key/value cache, as LMDeploy's engines round it online; 16 is what the checkpoint says
    #[arg(long, value_enum, default_value_t = KvBits::B16, value_name = "BITS")]
    pub(crate) kv_bits: KvBits,

    /// Leave activations and cache in f32, also where the checkpoint tells engines to round them: what is lost by the
    /// weights alone
    #[arg(long)]
    pub(crate) float_activations: bool,

    /// Go on past the model's end token
    #[arg(long)]
    pub(crate) ignore_eos: bool,

    /// Memory budget, such as 16GB; more than that is refused before the model is read [default: what is free]
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_memory: Option<u64>,

    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Where hub files are kept [default: the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,
}

impl GenerateArgs {
    fn settings(&self) -> GenerateSettings {
        GenerateSettings {
            max_new_tokens: self.max_new_tokens,
            sampler: SamplerSettings {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
            },
            kv: match self.kv_bits {
                KvBits::B16 => KvPrecision::Float,
                KvBits::B8 => KvPrecision::Int8,
                KvBits::B4 => KvPrecision::Int4,
                KvBits::Fp8 => KvPrecision::Fp8,
            },
            ignore_eos: self.ignore_eos,
        }
    }

    fn prompts(&self) -> Result<Vec<String>, JobError> {
        let Some(path) = &self.prompt_file else { return Ok(self.prompt.clone()) };
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(vec![text]),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                Err(JobError::Input(format!("`{}` is not UTF-8 text, wanted a prompt", path.display())))
            }
            Err(source) => Err(JobError::Io { what: "read", path: path.clone(), source }),
        }
    }

    /// Refuses a model that would not fit, with a prompt of at most `prompt` tokens.
    fn check_memory(&self, files: &EvalModel, prompt: usize) -> Result<(), JobError> {
        let Some(budget) = self.max_memory.or_else(available) else { return Ok(()) };
        // What the model takes at most; a longer prompt is refused for that.
        let total = prompt.saturating_add(self.max_new_tokens).min(files.spec().max_positions.max(prompt));
        let need = MemoryNeed::of(files, prompt, total);
        if need.peak() <= budget {
            return Ok(());
        }
        let allowed = match self.max_memory {
            Some(_) => format!("--max-memory allows {}", size(budget)),
            None => format!("{} are free", size(budget)),
        };
        // More tokens than these would fit are no use without the weights.
        let advice = if MemoryNeed::of(files, prompt, prompt + 1).peak() <= budget {
            "lower --max-new-tokens"
        } else {
            "use a machine with more memory or a checkpoint of fewer bits; `lite eval` and `lite verify` hold one block at a \
             time and judge it here"
        };
        Err(JobError::Resources(format!(
            "this model needs about {} of memory, {} of it for weights and {} for keys and values of {total} tokens; \
             {allowed}: {advice}",
            size(need.peak()),
            size(need.weights),
            size(need.cache),
        )))
    }

    /// The tokens of a prompt.
    fn encode(&self, prompt: &str, tokenizer: &ModelTokenizer) -> Result<Vec<u32>, JobError> {
        if !self.chat {
            return Ok(tokenizer.encode(prompt, true)?);
        }
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
        // The template writes the special tokens itself.
        Ok(tokenizer.encode(&tokenizer.render(&messages, true)?, false)?)
    }
}

/// Continues the prompts, streaming the text to standard output.
pub(crate) fn run(args: &GenerateArgs, format: Format) -> anyhow::Result<()> {
    let settings = args.settings();
    let usage = |text: &str| JobError::Usage(text.to_owned());
    anyhow::ensure!(args.max_new_tokens > 0, usage("--max-new-tokens 0 would make nothing; give at least 1"));
    Sampler::new(settings.sampler).map_err(failure)?;
    let prompts = args.prompts()?;
    let cancel = super::cancel_flag()?;
    let recipe = Recipe {
        revision: args.revision.clone(),
        download_dir: args.download_dir.clone(),
        ..Recipe::new(args.model.clone())
    };
    let progress = Progress::new(format);
    let folder = locate_model(&recipe, &progress, &cancel)?;
    drop(progress);
    let start = Instant::now();
    let files = EvalModel::open(&folder).map_err(failure)?;
    let tokenizer = ModelTokenizer::from_dir(&folder, files.spec().vocab).map_err(JobError::from)?;
    for warning in tokenizer.warnings() {
        story(format, &format!("warning: {warning}"));
    }
    let encoded = prompts.iter().map(|prompt| args.encode(prompt, &tokenizer)).collect::<Result<Vec<_>, _>>()?;
    args.check_memory(&files, encoded.iter().map(Vec::len).max().unwrap_or(0))?;
    let mut model = ResidentModel::from_checkpoint(&files).map_err(failure)?;
    if args.float_activations {
        model = model.with_float_activations();
    }
    let bytes = size(model.decode_bytes() as u64);
    story(format, &format!("loaded in {}; a token reads {bytes} of weights", duration(start.elapsed().as_secs_f64())));
    if let Some(engine) = model.engine() {
        let what = match (engine.quantizes_activations(), engine.quantizes_cache()) {
            (true, true) => "activations and key/value cache are",
            (true, false) => "activations are",
            _ => "the key/value cache is",
        };
        story(format, &format!("{what} rounded as engines do for this checkpoint; --float-activations leaves them"));
        if engine.mixed() > 0 {
            let mixed = engine.mixed();
            story(
                format,
                &format!("warning: {mixed} inputs stay in f32: the linears that share them differ in scheme"),
            );
        }
    }
    for (prompt, ids) in prompts.iter().zip(&encoded) {
        one(&model, &tokenizer, prompt, ids, &settings, format, &folder, &cancel)?;
    }
    Ok(())
}

/// Continues one prompt.
fn one(
    model: &ResidentModel,
    tokenizer: &ModelTokenizer,
    prompt: &str,
    ids: &[u32],
    settings: &GenerateSettings,
    format: Format,
    folder: &Path,
    cancel: &AtomicBool,
) -> anyhow::Result<()> {
    let decode = |ids: &[u32]| tokenizer.decode(ids, true);
    let mut stream = TextStream::new(ids, &decode).map_err(JobError::from)?;
    let mut text = String::new();
    let mut stdout = io::stdout().lock();
    let mut show = |new: &str, text: &mut String| -> io::Result<()> {
        text.push_str(new);
        if format == Format::Json || new.is_empty() {
            return Ok(());
        }
        stdout.write_all(new.as_bytes())?;
        stdout.flush()
    };
    // What went wrong inside the callback, which can only stop.
    let mut failed: Option<anyhow::Error> = None;
    let result = generate(model, ids, settings, &mut |token| {
        let step = stream.push(token, &decode).map_err(|e| JobError::from(e).into());
        let step = step.and_then(|new| Ok::<(), anyhow::Error>(show(&new, &mut text)?));
        failed = step.err();
        failed.is_none() && !cancel.load(Ordering::Relaxed)
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let result = result.map_err(failure)?;
    show(&stream.finish(&decode).map_err(JobError::from)?, &mut text)?;
    if format == Format::Json {
        writeln!(stdout, "{}", report(model, prompt, &text, &result))?;
    } else {
        writeln!(stdout)?;
        story(format, &rates(&result));
    }
    if result.finish == FinishReason::Cancelled {
        return Err(JobError::Interrupted(folder.to_owned()).into());
    }
    Ok(())
}

fn report(model: &ResidentModel, prompt: &str, text: &str, result: &Generation) -> Value {
    json!({
        "event": "generation", "schema": 1, "prompt": prompt, "text": text, "tokens": result.tokens,
        "finish_reason": result.finish.name(), "prompt_tokens": result.prompt_tokens,
        "quantized_activations": model.engine().is_some_and(Engine::quantizes_activations),
        "prefill_tokens_per_second": result.prefill_rate(), "decode_tokens_per_second": result.decode_rate(),
    })
}

fn rates(result: &Generation) -> String {
    format!(
        "prompt: {} tokens, {:.1} tokens/s; answer: {} tokens, {:.1} tokens/s; ended by: {}",
        result.prompt_tokens,
        result.prefill_rate(),
        result.tokens.len(),
        result.decode_rate(),
        result.finish.name()
    )
}

/// A line on standard error, unless only the result is wanted.
fn story(format: Format, line: &str) {
    if format != Format::Quiet {
        // Nowhere to report a standard error that is closed.
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// A failure of generation, with the class it has here: the model and the prompt are the input.
fn failure(error: RuntimeError) -> JobError {
    match error {
        RuntimeError::Model(error) => error.into(),
        RuntimeError::Decoder(error) => error.into(),
        RuntimeError::Pack(error) => error.into(),
        RuntimeError::GenerateSetting { setting, found, wanted } => {
            JobError::Usage(format!("--{setting} {found}: wanted {wanted}"))
        }
        other => JobError::Input(other.to_string()),
    }
}
