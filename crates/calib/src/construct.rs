//! How windows are cut from the documents of a registered dataset.
//!
//! The same windows as LMDeploy's `lite` cuts (its `calib_dataloader`), for the same seed; see `calib_data/README.md`.

use std::collections::BTreeSet;

use crate::document::Document;
use crate::error::CalibError;
use crate::registry::DatasetSpec;
use crate::rng::PythonRandom;
use crate::shuffle::permutation;
use crate::stream::{JOIN, rendered, text_of};
use crate::tokenizer::ModelTokenizer;
use crate::windows::too_little;

/// Documents tokenised at a time.
const BATCH: usize = 256;
/// Random documents that may be too short in a row before the search is given up.
const MAX_REJECTED: u64 = 50_000;

/// Windows, and the tokens they were cut from.
pub(crate) type Cut = (Vec<Vec<u32>>, u64);

/// What every construction needs.
pub(crate) struct Cutter<'a> {
    pub(crate) spec: &'a DatasetSpec,
    pub(crate) tokenizer: &'a ModelTokenizer,
    pub(crate) samples: usize,
    pub(crate) seqlen: usize,
    pub(crate) seed: u64,
}

impl Cutter<'_> {
    /// All rows joined and tokenised once; windows at random starts, which may overlap.
    pub(crate) fn random_windows(&self, documents: &[Document]) -> Result<Cut, CalibError> {
        let text = documents.iter().map(text_of).collect::<Vec<_>>().join(JOIN);
        let ids = self.tokenizer.encode(&text, self.spec.special_tokens)?;
        let Some(last) = ids.len().checked_sub(self.seqlen) else {
            return Err(too_little(&self.spec.name, ids.len() as u64, self.samples, self.seqlen));
        };
        let starts = u32::try_from(last + 1)
            .map_err(|_| CalibError::Unsupported(format!("`{}` has more than 2^32 tokens", self.spec.name)))?;
        let mut random = PythonRandom::new(self.seed);
        let window = |_| {
            let start = random.below(starts) as usize;
            ids[start..start + self.seqlen].to_vec()
        };
        Ok(((0..self.samples).map(window).collect(), ids.len() as u64))
    }

    /// Random rows until one is long enough, then a random window of it.
    pub(crate) fn random_documents(&self, documents: &[Document]) -> Result<Cut, CalibError> {
        let order = self.order(documents.len())?;
        let count = order.len() as u32;
        let mut random = PythonRandom::new(self.seed);
        // Rows found too short; long ones are tokenised again if they come up again.
        let mut short: BTreeSet<u32> = BTreeSet::new();
        let (mut windows, mut tokens, mut longest) = (Vec::with_capacity(self.samples), 0u64, 0);
        while windows.len() < self.samples {
            let mut rejected = 0;
            let ids = loop {
                if rejected >= MAX_REJECTED || short.len() >= order.len() {
                    return Err(CalibError::NoLongDocument {
                        name: self.spec.name.clone(),
                        tried: short.len(),
                        longest,
                        seqlen: self.seqlen,
                    });
                }
                let drawn = random.below(count);
                if !short.contains(&drawn) {
                    let ids = self.tokens(&documents[order[drawn as usize] as usize])?;
                    longest = longest.max(ids.len());
                    if ids.len() >= self.seqlen {
                        break ids;
                    }
                    short.insert(drawn);
                }
                rejected += 1;
            };
            tokens = tokens.saturating_add(ids.len() as u64);
            let starts = (ids.len() - self.seqlen).saturating_add(1).min(u32::MAX as usize) as u32;
            let start = random.below(starts) as usize;
            windows.push(ids[start..start + self.seqlen].to_vec());
        }
        Ok((windows, tokens))
    }

    /// Rows tokenised one by one and concatenated; consecutive windows.
    pub(crate) fn concatenate(&self, documents: &[Document]) -> Result<Cut, CalibError> {
        let order = self.order(documents.len())?;
        let needed = self.samples.saturating_mul(self.seqlen);
        let mut ids: Vec<u32> = Vec::new();
        for batch in order.chunks(BATCH) {
            let texts: Vec<String> =
                batch.iter().map(|row| self.text(&documents[*row as usize])).collect::<Result<_, _>>()?;
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            for mut row in self.tokenizer.encode_batch(&texts, self.spec.special_tokens)? {
                if self.spec.drop_longer_than.is_some_and(|most| row.len() > most) {
                    continue;
                }
                if self.spec.truncate_to_seqlen {
                    row.truncate(self.seqlen);
                }
                ids.extend(row);
            }
            if ids.len() >= needed {
                break;
            }
        }
        if ids.len() < needed {
            return Err(too_little(&self.spec.name, ids.len() as u64, self.samples, self.seqlen));
        }
        Ok((crate::windows::consecutive(&ids, self.samples, self.seqlen), ids.len() as u64))
    }

    /// Uniformly random ids that stand for ordinary text.
    pub(crate) fn random_tokens(&self) -> Result<Cut, CalibError> {
        let vocabulary = self.tokenizer.plain_ids();
        let count = vocabulary.len() as u32;
        if count == 0 {
            return Err(CalibError::bad("the tokenizer", "it has no token that is not special"));
        }
        let mut random = PythonRandom::new(self.seed);
        let mut window = || (0..self.seqlen).map(|_| vocabulary[random.below(count) as usize]).collect();
        Ok(((0..self.samples).map(|_| window()).collect(), self.samples.saturating_mul(self.seqlen) as u64))
    }

    /// The order of rows: shuffled if the set says so. Never empty.
    fn order(&self, count: usize) -> Result<Vec<u32>, CalibError> {
        let name = &self.spec.name;
        match u32::try_from(count) {
            Ok(0) => Err(too_little(name, 0, self.samples, self.seqlen)),
            Ok(count) if self.spec.shuffle => Ok(permutation(self.seed, count)),
            Ok(count) => Ok((0..count).collect()),
            Err(_) => Err(CalibError::Unsupported(format!("`{name}` has more than 2^32 rows"))),
        }
    }

    fn text(&self, document: &Document) -> Result<String, CalibError> {
        let text = rendered(document, self.tokenizer, &self.spec.name)?;
        // Python's str.strip() also removes the information separators U+001C to U+001F.
        let blank = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
        Ok(if self.spec.strip { text.trim_matches(blank).to_owned() } else { text })
    }

    fn tokens(&self, document: &Document) -> Result<Vec<u32>, CalibError> {
        let mut ids = self.tokenizer.encode(&self.text(document)?, self.spec.special_tokens)?;
        if self.spec.truncate_to_seqlen {
            ids.truncate(self.seqlen);
        }
        Ok(ids)
    }
}

#[cfg(test)]
#[path = "construct_tests.rs"]
mod tests;
