//! The texts of a run, as windows of tokens.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use lite_calib::{CalibError, CalibRequest, ModelTokenizer, Windows};

use crate::{CalibSettings, Event, HubFetcher, JobError, Observer, Plan, Recipe};

/// Texts that were cut to windows, for several runs of one process: jobs of one model that ask for the same text share
/// it, and only the first reads the tokenizer and the text. A file that changes meanwhile is taken as it was first.
///
/// A run that is given a cache of its own shares nothing.
#[derive(Debug, Default)]
pub struct TextCache(Mutex<HashMap<String, Windows>>);

impl TextCache {
    fn get(&self, key: &str) -> Option<Windows> {
        // Whoever panicked while holding the lock had inserted all or nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn put(&self, key: String, windows: &Windows) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, windows.clone());
    }
}

/// Token windows for calibration and for the check.
pub(crate) struct Texts {
    pub(crate) calibration: Option<Windows>,
    pub(crate) eval: Option<Windows>,
}

impl Texts {
    pub(crate) fn load(
        recipe: &Recipe,
        plan: &Plan,
        cache: &TextCache,
        observer: &dyn Observer,
        cancel: &AtomicBool,
    ) -> Result<Self, JobError> {
        let Some(spec) = &plan.spec else { return Ok(Self { calibration: None, eval: None }) };
        if plan.windows == 0 && plan.eval_windows == 0 {
            return Ok(Self { calibration: None, eval: None });
        }
        let (calib, eval) = (&recipe.calib, &recipe.eval);
        // What the windows follow from; the folder stands for its tokenizer.
        let of = |what: &str| format!("{what} {:?} {} {:?}", plan.model, spec.vocab, recipe.download_dir);
        let calibration_key =
            format!("{} {:?} {} {} {}", of("calibration"), calib.dataset, calib.seed, plan.windows, plan.seqlen);
        let eval_key = format!("{} {:?} {} {}", of("check"), eval.dataset, plan.eval_windows, plan.eval_seqlen);
        // Statistics are compared with their text each time.
        let known = if plan.statistics.is_none() { cache.get(&calibration_key) } else { None };
        let known_eval = cache.get(&eval_key);
        let wants_text = plan.windows > 0 && known.is_none();
        if !wants_text && (plan.eval_windows == 0 || known_eval.is_some()) {
            return Ok(Self { calibration: known, eval: known_eval }.told(plan, observer));
        }
        // The tokenizer's tables are large; they live only as long as the text is cut.
        let tokenizer = ModelTokenizer::from_dir(&plan.model, spec.vocab)?;
        let fetcher = HubFetcher::new(recipe, observer, cancel)?;
        let calibration = match (&plan.statistics, &recipe.stats) {
            _ if plan.windows == 0 => None,
            _ if known.is_some() => known,
            (Some(statistics), wanted) => {
                let dataset = wanted.as_ref().and_then(|wanted| wanted.dataset.clone());
                if dataset.as_ref().is_some_and(|name| Path::new(name).exists()) {
                    // A path says little of the text in it.
                    let calib = CalibSettings { dataset, seed: statistics.seed(), ..recipe.calib.clone() };
                    statistics.check_text(&calibration_windows(
                        &calib,
                        plan.windows,
                        plan.seqlen,
                        &tokenizer,
                        &fetcher,
                    )?)?;
                }
                None
            }
            (None, _) => Some(calibration_windows(&recipe.calib, plan.windows, plan.seqlen, &tokenizer, &fetcher)?),
        };
        if let (Some(windows), None) = (&calibration, &plan.statistics) {
            cache.put(calibration_key, windows);
        }
        let eval = match (plan.eval_windows, &recipe.eval.dataset) {
            (0, _) => None,
            _ if known_eval.is_some() => known_eval,
            (windows, None) => Some(lite_calib::held_out(&tokenizer, windows, plan.eval_seqlen)?),
            (windows, Some(name)) => {
                Some(lite_calib::eval_windows(name, &tokenizer, windows, plan.eval_seqlen, &fetcher)?)
            }
        };
        if let Some(windows) = &eval {
            cache.put(eval_key, windows);
        }
        Ok(Self { calibration, eval }.told(plan, observer))
    }

    /// Says what there is to say of the texts.
    fn told(self, plan: &Plan, observer: &dyn Observer) -> Self {
        for windows in self.calibration.iter().chain(&self.eval) {
            for note in &windows.notes {
                observer.event(Event::Note(note));
            }
        }
        if let Some(windows) = &self.calibration {
            observer.event(Event::Calibration {
                windows: windows.tokens.len(),
                seqlen: plan.seqlen,
                source: &windows.source.description,
                digest: &windows.digest,
            });
        }
        self
    }
}

/// The windows that `calib` names.
pub(crate) fn calibration_windows(
    calib: &CalibSettings,
    samples: usize,
    seqlen: usize,
    tokenizer: &ModelTokenizer,
    fetcher: &HubFetcher<'_>,
) -> Result<Windows, CalibError> {
    let request = CalibRequest {
        dataset: calib.dataset.clone().unwrap_or_else(|| "wikitext2".to_owned()),
        samples,
        seqlen,
        seed: calib.seed,
        explicit: calib.dataset.is_some(),
    };
    lite_calib::load(&request, tokenizer, fetcher)
}
