//! The texts of a run, as windows of tokens.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use lite_calib::{CalibError, CalibRequest, ModelTokenizer, Windows};

use crate::{CalibSettings, Event, HubFetcher, JobError, Observer, Plan, Recipe};

/// Token windows for calibration and for the check.
pub(crate) struct Texts {
    pub(crate) calibration: Option<Windows>,
    pub(crate) eval: Option<Windows>,
}

impl Texts {
    pub(crate) fn load(
        recipe: &Recipe,
        plan: &Plan,
        observer: &dyn Observer,
        cancel: &AtomicBool,
    ) -> Result<Self, JobError> {
        let Some(spec) = &plan.spec else { return Ok(Self { calibration: None, eval: None }) };
        if plan.windows == 0 && plan.eval_windows == 0 {
            return Ok(Self { calibration: None, eval: None });
        }
        // The tokenizer's tables are large; they live only as long as the text is cut.
        let tokenizer = ModelTokenizer::from_dir(&plan.model, spec.vocab)?;
        let fetcher = HubFetcher::new(recipe, observer, cancel)?;
        let calibration = match (&plan.statistics, &recipe.stats) {
            _ if plan.windows == 0 => None,
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
        let eval = match (plan.eval_windows, &recipe.eval.dataset) {
            (0, _) => None,
            (windows, None) => Some(lite_calib::held_out(&tokenizer, windows, plan.eval_seqlen)?),
            (windows, Some(name)) => {
                Some(lite_calib::eval_windows(name, &tokenizer, windows, plan.eval_seqlen, &fetcher)?)
            }
        };
        for windows in calibration.iter().chain(&eval) {
            for note in &windows.notes {
                observer.event(Event::Note(note));
            }
        }
        if let Some(windows) = &calibration {
            observer.event(Event::Calibration {
                windows: windows.tokens.len(),
                seqlen: plan.seqlen,
                source: &windows.source.description,
                digest: &windows.digest,
            });
        }
        Ok(Self { calibration, eval })
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
