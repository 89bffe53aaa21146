//! Which rows of the two streams an expert works on.

/// Rows of one expert that are handled together.
pub(crate) const CHUNK: usize = 4096;

/// Rows and the weights of their outputs.
pub(crate) type Members = (Vec<u32>, Vec<f32>);

/// Rows of one expert in either stream.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Chunk {
    /// All of them, in order.
    pub(crate) rows: Vec<u32>,
    /// Places in `rows` of those that the float model's router sends, with their weights.
    pub(crate) float: Members,
    /// The same of the quantized model.
    pub(crate) coded: Members,
}

impl Chunk {
    pub(crate) fn rows_at(&self, places: &[u32]) -> Vec<u32> {
        places.iter().map(|place| self.rows[*place as usize]).collect()
    }
}

/// Both routers' rows of one expert, merged and cut.
pub(crate) fn chunks(float: &Members, coded: &Members) -> Vec<Chunk> {
    let (mut f, mut c) = (0, 0);
    let mut chunks = vec![Chunk::default()];
    while f < float.0.len() || c < coded.0.len() {
        let row = [float.0.get(f), coded.0.get(c)].into_iter().flatten().min().copied().unwrap_or_default();
        if chunks.last().is_none_or(|chunk| chunk.rows.len() == CHUNK) {
            chunks.push(Chunk::default());
        }
        let Some(chunk) = chunks.last_mut() else { break };
        let place = chunk.rows.len() as u32;
        chunk.rows.push(row);
        for (at, from, to) in [(&mut f, float, &mut chunk.float), (&mut c, coded, &mut chunk.coded)] {
            if from.0.get(*at) == Some(&row) {
                to.0.push(place);
                to.1.push(from.1[*at]);
                *at += 1;
            }
        }
    }
    chunks.retain(|chunk| !chunk.rows.is_empty());
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_routers_rows_are_merged() {
        let float = (vec![1, 4, 9], vec![0.1, 0.4, 0.9]);
        let coded = (vec![0, 4], vec![0.5, 0.6]);
        let found = chunks(&float, &coded);
        let wanted = Chunk {
            rows: vec![0, 1, 4, 9],
            float: (vec![1, 2, 3], vec![0.1, 0.4, 0.9]),
            coded: (vec![0, 2], vec![0.5, 0.6]),
        };
        assert_eq!(found, [wanted]);
        assert_eq!(found[0].rows_at(&found[0].coded.0), [0, 4]);
        let none = (vec![], vec![]);
        assert_eq!(chunks(&none, &none), []);
        let every: Members = ((0..CHUNK as u32 + 5).collect(), vec![1.0; CHUNK + 5]);
        let cut = chunks(&every, &none);
        assert_eq!(cut.iter().map(|c| (c.rows.len(), c.coded.0.len())).collect::<Vec<_>>(), [(CHUNK, 0), (5, 0)]);
    }
}
