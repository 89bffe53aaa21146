//! What is run, in order.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lite_calib::{CalibError, EvalText, ModelTokenizer, Task, TaskName, Windows, eval_text, load_task};
use lite_decoder::{BATCH_TOKENS, Compute, KvTransform};
use lite_job::{CalibSettings, Event, HubFetcher, JobError, Observer, Recipe};
use lite_runtime::eval::{
    Canary, EvalModel, EvalSource, Request, ScoredItem, canaries, flips, log_likelihoods, perplexity, score_items,
};
use lite_runtime::generate::{KvPrecision, MemoryNeed};
use lite_runtime::{Engine, RuntimeError, Subject, check_alike, compare_subjects};

use super::report::{Protocol, Report, TaskReport};
use super::{EvalArgs, failure, note};
use crate::memory::available;
use crate::output::size;
use crate::progress::Progress;

/// Hidden states of tasks held at a time, where no budget is given.
const TASK_HIDDEN: u64 = 4 << 30;

/// Prompts continued greedily where nobody says how many.
const USUAL_CANARIES: usize = 3;
/// Tokens of such a prompt.
const CANARY_PROMPT: usize = 32;
/// Tokens it is continued by.
const CANARY_TOKENS: usize = 256;

/// A text that tokenizers of different families cut differently.
const PROBE: &str = "The 1st quick-brown fox's café cost $12.50, didn't it?\n\n  fn main() { return 0; } 你好 <s>";

/// Models and settings of one evaluation.
pub(super) struct Session<'a> {
    pub(super) args: &'a EvalArgs,
    pub(super) dir: &'a Path,
    pub(super) against: Option<&'a Path>,
    pub(super) model: EvalModel,
    pub(super) original: Option<EvalModel>,
    pub(super) compute: Compute,
    pub(super) progress: Progress,
    pub(super) cancel: Arc<AtomicBool>,
}

impl Session<'_> {
    /// Everything that was asked for, but for the verdicts.
    pub(super) fn measure(&self, names: &[TaskName]) -> Result<Report, JobError> {
        if let Some(original) = &self.original {
            check_alike(original.spec(), self.model.spec()).map_err(|e| self.failure(e))?;
        }
        let tokenizer = self.tokenizer()?;
        let mut report = Report::new(self);
        // All input is read before the first multiplication.
        let tasks = self.load_tasks(names)?;
        if self.args.wants_text() {
            let text = self.text(&tokenizer)?;
            self.check_tokenizers(&tokenizer)?;
            let seqlen = self.seqlen();
            let windows = text.windows(seqlen, self.args.windows)?;
            self.check_memory(&windows)?;
            for line in &text.notes {
                note(&self.progress, line);
            }
            report.protocol = Some(Protocol::new(&text, &windows));
            self.measure_text(&windows, &mut report)?;
            report.canaries = self.canaries(&text)?;
        }
        for task in &tasks {
            report.tasks.push(self.measure_task(task, &tokenizer)?);
        }
        Ok(report)
    }

    fn failure(&self, error: RuntimeError) -> JobError {
        failure(error, self.dir)
    }

    /// What the flag makes of keys and values; `None`: what the checkpoint says, also where that is fp8 with scales.
    fn kv(&self) -> Option<KvPrecision> {
        let scales = self.model.engine().is_some_and(Engine::quantizes_cache);
        super::kv_transform(self.args.kv_bits).filter(|kv| !(scales && *kv == KvPrecision::Fp8))
    }

    /// The checkpoint's own tokenizer; the original's if it has none.
    fn tokenizer(&self) -> Result<ModelTokenizer, JobError> {
        let vocab = self.model.spec().vocab;
        let own = self.dir.join("tokenizer.json");
        let dir = match self.against {
            Some(original) if !own.exists() => {
                note(&self.progress, "the checkpoint has no tokenizer.json: the original's is used");
                original
            }
            _ => self.dir,
        };
        let tokenizer = ModelTokenizer::from_dir(dir, vocab)?;
        for warning in tokenizer.warnings() {
            self.progress.event(Event::Warning(warning));
        }
        Ok(tokenizer)
    }

    /// Warns where the original reads text in other tokens.
    fn check_tokenizers(&self, tokenizer: &ModelTokenizer) -> Result<(), JobError> {
        let Some(original) = self.against else { return Ok(()) };
        let read = |dir: &Path| std::fs::read(dir.join("tokenizer.json")).ok();
        let (own, other) = (read(self.dir), read(original));
        if own.is_none() || other.is_none() || own == other {
            return Ok(());
        }
        // Files may differ in form alone: what counts is what they make of a text.
        let other = ModelTokenizer::from_dir(original, self.model.spec().vocab)?;
        if tokenizer.encode(PROBE, true).ok() != other.encode(PROBE, true).ok() {
            self.progress.event(Event::Warning(
                "the two models' tokenizers differ: both are run on the tokens of the checkpoint's",
            ));
        }
        Ok(())
    }

    /// `--seqlen`, lowered to the model's context.
    fn seqlen(&self) -> usize {
        let longest = self.original.iter().chain([&self.model]).map(|m| m.spec().max_positions).min();
        let (asked, longest) = (self.args.seqlen, longest.unwrap_or(usize::MAX));
        if asked > longest {
            note(&self.progress, &format!("windows of {longest} tokens instead of {asked}: the model takes no more"));
        }
        asked.min(longest)
    }

    fn text(&self, tokenizer: &ModelTokenizer) -> Result<EvalText, JobError> {
        let name = self.args.dataset.as_deref().unwrap_or("wikitext2");
        // A named set: no stand-in, and so no hurry.
        let calib =
            CalibSettings { dataset: Some(name.to_owned()), samples: 0, seqlen: None, seed: 0, if_needed: false };
        let recipe =
            Recipe { download_dir: self.args.download_dir.clone(), calib, ..Recipe::new(self.args.model.clone()) };
        let fetcher = HubFetcher::new(&recipe, &self.progress, &self.cancel)?;
        eval_text(name, tokenizer, &fetcher).map_err(|error| match error {
            CalibError::UnknownDataset { name, .. } => JobError::Input(format!(
                "unknown evaluation dataset `{name}`: it is neither a path that exists nor one of wikitext2, ptb, c4, builtin; \
                 pass one of these with --dataset, or the path of a .txt, .jsonl or .parquet file"
            )),
            CalibError::Fetch { name, repo, revision, file, reason } => JobError::Input(format!(
                "cannot get evaluation dataset `{name}` from the hub: {reason}; \
                 run `huggingface-cli download --repo-type dataset {repo}{revision} {file}` on a machine with network and copy the \
                 cache (HF_HOME names it), or pass the path of a local file with --dataset, or --dataset builtin"
            )),
            other => other.into(),
        })
    }

    fn subject<'s>(
        &self,
        name: &'static str,
        model: &'s EvalModel,
        source: &'s EvalSource<'s>,
        kv: Option<&'s dyn KvTransform>,
    ) -> Subject<'s> {
        Subject { name, spec: model.spec(), source, kv, engine: model.engine() }
    }

    /// Perplexity, and with an original all that is compared.
    fn measure_text(&self, windows: &Windows, report: &mut Report) -> Result<(), JobError> {
        let batch = (BATCH_TOKENS / windows.seqlen().max(1)).max(1);
        let go_on = |step: &'static str, done: usize, of: usize| self.go_on(step, done, of);
        let kv = self.kv();
        let source = self.model.source();
        let name = if self.model.layout().is_some() { "quantized" } else { "evaluated" };
        let subject = self.subject(name, &self.model, &source, kv.as_ref().map(|kv| kv as &dyn KvTransform));
        match &self.original {
            None => {
                let found =
                    perplexity(&subject, &windows.tokens, batch, &self.compute, &go_on).map_err(|e| self.failure(e))?;
                report.perplexity = Some(found);
            }
            Some(original) => {
                let original_source = original.source();
                let reference = self.subject("original", original, &original_source, None);
                let found = compare_subjects(&reference, &subject, &windows.tokens, batch, &self.compute, &go_on);
                report.comparison = Some(found.map_err(|e| self.failure(e))?);
            }
        }
        Ok(())
    }

    /// Greedy continuations of prompts spread over the text, by both models.
    fn canaries(&self, text: &EvalText) -> Result<Vec<Canary>, JobError> {
        let (Some(original), Some(against)) = (&self.original, self.against) else { return Ok(Vec::new()) };
        let count = match self.args.canary {
            Some(count) => count,
            None if self.fits(original) => USUAL_CANARIES,
            None => {
                note(&self.progress, "no greedy continuations: a whole model may not fit in memory; --canary 3 tries");
                0
            }
        };
        // Spread over the text; a short one gives fewer.
        let length = CANARY_PROMPT.min(text.ids.len());
        let step = (text.ids.len() / count.max(1)).max(length);
        let prompts: Vec<Vec<u32>> =
            text.ids.chunks(step).filter_map(|chunk| chunk.get(..length)).take(count).map(<[u32]>::to_vec).collect();
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let go_on = |done: usize, of: usize| self.go_on("greedy", done, of);
        let kv = self.kv().unwrap_or_default();
        canaries(against, self.dir, &prompts, CANARY_TOKENS, kv, &go_on).map_err(|e| self.failure(e))
    }

    /// Whether each of the two models fits by itself.
    fn fits(&self, original: &EvalModel) -> bool {
        let bytes = |model| MemoryNeed::of(model, CANARY_PROMPT, CANARY_PROMPT + CANARY_TOKENS).peak();
        let budget = self.args.max_memory.or_else(available);
        budget.is_some_and(|budget| bytes(original).max(bytes(&self.model)) <= budget)
    }

    fn go_on(&self, step: &'static str, done: usize, of: usize) -> bool {
        self.progress.event(Event::Checking { step, done, of });
        !self.cancel.load(Ordering::Relaxed)
    }

    /// Refuses what would not fit the budget.
    fn check_memory(&self, windows: &Windows) -> Result<(), JobError> {
        let Some(budget) = self.args.max_memory else { return Ok(()) };
        let spec = self.model.spec();
        let block = spec.blocks.iter().map(|b| b.sites.iter().map(|s| s.out_features * s.in_features).sum::<usize>());
        let widest = spec.sites().map(|s| s.out_features.max(s.in_features)).max().unwrap_or(0);
        let models = 1 + u64::from(self.original.is_some());
        let bytes = |values: usize| values as u64 * 4;
        // A block while it is dequantized, activations of a batch, a slice of the head and its logits.
        let fixed = models
            * (2 * bytes(block.max().unwrap_or(0))
                + bytes(6 * widest * BATCH_TOKENS.max(windows.seqlen()))
                + bytes(8192 * (spec.hidden + 512)));
        let per_window = models * bytes(windows.seqlen() * spec.hidden);
        let needed = fixed + per_window * windows.tokens.len() as u64;
        if needed <= budget {
            return Ok(());
        }
        let fit = budget.saturating_sub(fixed) / per_window.max(1);
        let advice =
            if fit > 0 { format!("use --windows {fit}, or a smaller --seqlen") } else { "raise it".to_owned() };
        Err(JobError::Resources(format!(
            "{} windows of {} tokens need about {} of memory, --max-memory allows {}; {advice}",
            windows.tokens.len(),
            windows.seqlen(),
            size(needed),
            size(budget)
        )))
    }

    fn load_tasks(&self, names: &[TaskName]) -> Result<Vec<Task>, JobError> {
        let Some(dir) = &self.args.task_data else { return Ok(Vec::new()) };
        let load = |name: &TaskName| Ok(load_task(*name, dir, self.args.limit, self.args.num_fewshot)?);
        names.iter().map(load).collect()
    }

    /// Accuracies of one task, of both models if there are two.
    fn measure_task(&self, task: &Task, tokenizer: &ModelTokenizer) -> Result<TaskReport, JobError> {
        let mut requests = Vec::new();
        for (context, continuation) in task.items.iter().flat_map(|item| &item.requests) {
            let (context, continuation) = tokenizer.encode_pair(context, continuation)?;
            requests.push(Request { context, continuation });
        }
        let go_on = |step: &'static str, done: usize, of: usize| self.go_on(step, done, of);
        let budget = usize::try_from(self.args.max_memory.map_or(TASK_HIDDEN, |b| b / 2)).unwrap_or(usize::MAX);
        let score = |subject: &Subject<'_>| -> Result<Vec<ScoredItem>, JobError> {
            let found =
                log_likelihoods(subject, &requests, budget, &self.compute, &go_on).map_err(|e| self.failure(e))?;
            let mut rest = found.as_slice();
            let items = task.items.iter().map(|item| {
                let (own, after) = rest.split_at(item.requests.len());
                rest = after;
                ScoredItem { log_likelihoods: own.to_vec(), lengths: item.lengths.clone(), gold: item.gold }
            });
            Ok(items.collect())
        };
        let kv = self.kv();
        let source = self.model.source();
        let items =
            score(&self.subject("evaluated", &self.model, &source, kv.as_ref().map(|kv| kv as &dyn KvTransform)))?;
        let original = match &self.original {
            None => None,
            Some(original) => {
                let source = original.source();
                Some(score(&self.subject("original", original, &source, None))?)
            }
        };
        Ok(TaskReport {
            task: task.name,
            files: task.files.clone(),
            score: score_items(&items),
            original: original.as_deref().map(|original| (score_items(original), flips(original, &items))),
            items,
        })
    }
}
