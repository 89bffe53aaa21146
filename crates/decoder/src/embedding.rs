use candle_core::{Device, Tensor};

use crate::{DecoderError, DecoderSpec, WeightSource};

/// Token embedding: the whole table, or just the rows that some windows need.
#[derive(Debug, Clone)]
pub struct Embedding {
    hidden: usize,
    vocab: usize,
    scale: f32,
    device: Device,
    rows: Rows,
}

#[derive(Debug, Clone)]
enum Rows {
    /// `[vocab, hidden]`
    All(Vec<f32>),
    /// Sorted token ids, and one row of `table` for each.
    Some { ids: Vec<u32>, table: Vec<f32> },
}

impl Embedding {
    /// Reads the whole table.
    ///
    /// # Errors
    /// If the table cannot be read or has another shape than `[vocab, hidden]`.
    pub fn load(spec: &DecoderSpec, source: &dyn WeightSource, device: &Device) -> Result<Self, DecoderError> {
        let (shape, table) = source.load(&spec.embed.weight)?;
        Self::check(spec, shape == [spec.vocab, spec.hidden], || format!("has shape {shape:?}"))?;
        Ok(Self::new(spec, Rows::All(table), device))
    }

    /// Reads only the rows of the tokens in `windows`, so that memory grows with the text's vocabulary and
    /// not with the model's.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the rows cannot be read.
    pub fn load_rows(
        spec: &DecoderSpec,
        source: &dyn WeightSource,
        windows: &[Vec<u32>],
        device: &Device,
    ) -> Result<Self, DecoderError> {
        let mut ids: Vec<u32> = windows.iter().flatten().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        if let Some(&id) = ids.last().filter(|id| **id as usize >= spec.vocab) {
            return Err(outside(id, spec.vocab));
        }
        let table = source.rows(&spec.embed.weight, &ids)?;
        let wanted = ids.len() * spec.hidden;
        Self::check(spec, table.len() == wanted, || format!("gave {} values for {} rows", table.len(), ids.len()))?;
        Ok(Self::new(spec, Rows::Some { ids, table }, device))
    }

    fn new(spec: &DecoderSpec, rows: Rows, device: &Device) -> Self {
        Self { hidden: spec.hidden, vocab: spec.vocab, scale: spec.embed.scale, device: device.clone(), rows }
    }

    fn check(spec: &DecoderSpec, fits: bool, found: impl FnOnce() -> String) -> Result<(), DecoderError> {
        if fits {
            return Ok(());
        }
        let wanted = format!("{}, wanted [{}, {}]", found(), spec.vocab, spec.hidden);
        Err(DecoderError::tensor(&spec.embed.weight, wanted))
    }

    /// Windows of token ids, all of one length, to hidden states `(windows, tokens, hidden)`.
    ///
    /// # Errors
    /// If there is nothing to embed, windows differ in length, or a token is not in the vocabulary (or not among
    /// those given to [`Embedding::load_rows`]).
    pub fn embed(&self, windows: &[Vec<u32>]) -> Result<Tensor, DecoderError> {
        let tokens = windows.first().map_or(0, Vec::len);
        if tokens == 0 {
            return Err(DecoderError::input("no tokens to embed"));
        }
        if let Some(other) = windows.iter().find(|window| window.len() != tokens) {
            let other = other.len();
            return Err(DecoderError::input(format!(
                "windows of {tokens} and of {other} tokens in one batch; run windows of one length together"
            )));
        }
        let mut out = Vec::with_capacity(windows.len() * tokens * self.hidden);
        for &id in windows.iter().flatten() {
            out.extend(self.row(id)?.iter().map(|v| v * self.scale));
        }
        Ok(Tensor::from_vec(out, (windows.len(), tokens, self.hidden), &self.device)?)
    }

    fn row(&self, id: u32) -> Result<&[f32], DecoderError> {
        if id as usize >= self.vocab {
            return Err(outside(id, self.vocab));
        }
        let (index, table) = match &self.rows {
            Rows::All(table) => (id as usize, table),
            Rows::Some { ids, table } => {
                let found = ids.binary_search(&id);
                (found.map_err(|_| DecoderError::input(format!("the embedding of token {id} was not loaded")))?, table)
            }
        };
        Ok(&table[index * self.hidden..][..self.hidden])
    }
}

fn outside(id: u32, vocab: usize) -> DecoderError {
    DecoderError::input(format!(
        "token {id} is outside of the vocabulary of {vocab}; does the tokenizer belong to this model?"
    ))
}
