//! The two ends of a decoder: embedding and head.

/// Token embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbedSpec {
    /// Tensor `[vocab, hidden]`.
    pub weight: String,
    /// Rows are multiplied by this.
    pub scale: f32,
}

/// Hidden states to logits: `softcap(scale · (W x + b))`.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpec {
    /// Module name of the head, also if it is tied: `lm_head` or `output`.
    pub module: String,
    /// Tensor `[vocab, hidden]` to read: the embedding's if tied.
    pub weight: String,
    /// Whether head and embedding are one matrix (`tie_word_embeddings`).
    pub tied: bool,
    /// Tensor `[vocab]`, if there is one.
    pub bias: Option<String>,
    /// Whether the rows of the weight are divided by their Euclidean length before use (Baichuan2's `NormHead`).
    pub normalised: bool,
    /// Logits are multiplied by this.
    pub scale: f32,
    /// `cap · tanh(logits / cap)`, if there is a cap.
    pub softcap: Option<f32>,
}

/// Shortest length a row is divided by, as in torch's `normalize`.
const SHORTEST: f32 = 1e-12;

impl HeadSpec {
    /// Makes stored rows `[rows, hidden]` of the weight what they are in the product.
    pub fn prepare(&self, rows: &mut [f32], hidden: usize) {
        if self.normalised {
            for row in rows.chunks_exact_mut(hidden.max(1)) {
                let length = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
                let factor = 1.0 / length.max(SHORTEST);
                row.iter_mut().for_each(|v| *v *= factor);
            }
        }
    }

    /// Makes logits of what the product gave, bias included.
    pub fn finish(&self, logits: &mut [f32]) {
        if self.scale != 1.0 {
            logits.iter_mut().for_each(|v| *v *= self.scale);
        }
        if let Some(cap) = self.softcap {
            logits.iter_mut().for_each(|v| *v = cap * (*v / cap).tanh());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_normalised_and_logits_finished() {
        let plain = HeadSpec {
            module: String::new(),
            weight: String::new(),
            tied: false,
            bias: None,
            normalised: false,
            scale: 1.0,
            softcap: None,
        };
        let mut rows = [3.0, 4.0, 0.0, 0.0];
        plain.prepare(&mut rows, 2);
        assert_eq!(rows, [3.0, 4.0, 0.0, 0.0]);
        let head = HeadSpec { normalised: true, scale: 0.5, softcap: Some(2.0), ..plain.clone() };
        head.prepare(&mut rows, 2);
        assert_eq!(rows, [0.6, 0.8, 0.0, 0.0]);
        let mut logits = [2.0, -400.0];
        plain.finish(&mut logits);
        assert_eq!(logits, [2.0, -400.0]);
        head.finish(&mut logits);
        assert!((logits[0] - 2.0 * 0.5f32.tanh()).abs() < 1e-6 && logits[1] == -2.0, "{logits:?}");
    }
}
