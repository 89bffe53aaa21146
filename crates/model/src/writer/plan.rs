//! Where each tensor of an output checkpoint goes.

use std::collections::HashMap;
use std::path::Path;

use serde_json::json;

use super::OutputTensor;
use crate::error::ModelError;
use crate::header::{LENGTH_FIELD, MAX_HEADER, MAX_NAME, MAX_RANK, METADATA, bit_count};
use crate::text::printable;

/// Alignment of the data in a file: the widest dtype.
const ALIGNMENT: usize = 8;

/// All shards and the place of every tensor.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shards: Vec<PlannedShard>,
    pub(super) tensors: Vec<PlannedTensor>,
    /// Name to position in `tensors`.
    pub(super) by_name: HashMap<String, usize>,
    /// Data of all tensors.
    pub(super) total_bytes: u64,
}

/// One file.
#[derive(Debug)]
pub(super) struct PlannedShard {
    pub(super) name: String,
    /// Length field, JSON and padding.
    pub(super) header: Vec<u8>,
    pub(super) file_len: u64,
}

/// One tensor, in the order given.
#[derive(Debug)]
pub(super) struct PlannedTensor {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) shard: usize,
    /// Offset in the file.
    pub(super) offset: u64,
}

impl Plan {
    /// Splits `tensors` into shards and lays each out; `dir` is only named in errors.
    pub(super) fn new(dir: &Path, tensors: Vec<OutputTensor>, max_shard_bytes: u64) -> Result<Self, ModelError> {
        let mut groups: Vec<Vec<usize>> = vec![Vec::new()];
        let mut planned = Vec::with_capacity(tensors.len());
        let mut by_name = HashMap::with_capacity(tensors.len());
        let (mut in_shard, mut total_bytes) = (0_u64, 0_u64);
        for (position, tensor) in tensors.iter().enumerate() {
            let wrong =
                |what: &str| Err(ModelError::output(dir, format!("tensor `{}` {what}", printable(&tensor.name))));
            if tensor.name.is_empty() || tensor.name.len() > MAX_NAME || tensor.name == METADATA {
                return wrong("has a name that safetensors does not take: 1 to 4096 bytes, not `__metadata__`");
            }
            if by_name.insert(tensor.name.clone(), position).is_some() {
                return wrong("was announced twice");
            }
            let Some(bytes) = byte_count(tensor) else {
                return wrong(
                    "has a shape that is no whole number of bytes, 2^64 bits or more, or more than 32 dimensions",
                );
            };
            let Some(sum) = total_bytes.checked_add(bytes) else { return wrong("brings the size above 2^64 bytes") };
            total_bytes = sum;
            // `in_shard` is part of `total_bytes`, so the sum does not overflow.
            if in_shard + bytes > max_shard_bytes && groups.last().is_some_and(|g| !g.is_empty()) {
                groups.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes;
            let shard = groups.len() - 1;
            groups[shard].push(position);
            planned.push(PlannedTensor { name: tensor.name.clone(), bytes, shard, offset: 0 });
        }
        let count = groups.len();
        let mut shards = Vec::with_capacity(count);
        for (number, mut group) in groups.into_iter().enumerate() {
            // Stable: widest dtype first, then the order given. Every offset is then a multiple of its element size.
            group.sort_by_key(|position| std::cmp::Reverse(tensors[*position].dtype.bitsize()));
            shards.push(lay_out(dir, shard_name(number, count), &group, &tensors, &mut planned)?);
        }
        Ok(Self { shards, tensors: planned, by_name, total_bytes })
    }
}

/// Gives the tensors of one shard their offsets and makes its header.
fn lay_out(
    dir: &Path,
    name: String,
    group: &[usize],
    tensors: &[OutputTensor],
    planned: &mut [PlannedTensor],
) -> Result<PlannedShard, ModelError> {
    let mut text = format!("{{\"{METADATA}\":{{\"format\":\"pt\"}}");
    let mut end = 0_u64;
    for position in group {
        let (tensor, place) = (&tensors[*position], &mut planned[*position]);
        let begin = end;
        end += place.bytes;
        place.offset = begin;
        let entry = json!({"dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [begin, end]});
        text.push_str(&format!(",{}:{entry}", serde_json::Value::from(tensor.name.as_str())));
    }
    text.push('}');
    let padded = text.len().next_multiple_of(ALIGNMENT);
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    let wrong = |what: String| ModelError::output(dir, format!("shard `{name}` {what}: choose smaller shards"));
    let length = text.len() as u64;
    if length > MAX_HEADER {
        return Err(wrong(format!("needs a header of {length} bytes, the limit is {MAX_HEADER}")));
    }
    let data_start = LENGTH_FIELD + length;
    let file_len = data_start.checked_add(end).filter(|len| i64::try_from(*len).is_ok());
    let file_len = file_len.ok_or_else(|| wrong(format!("holds {end} bytes, more than a file can")))?;
    for position in group {
        planned[*position].offset += data_start;
    }
    let mut header = length.to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    Ok(PlannedShard { name, header, file_len })
}

/// Bytes of a tensor; `None` where they overflow, are no whole number, or the rank is above the limit.
fn byte_count(tensor: &OutputTensor) -> Option<u64> {
    let shape: Vec<u64> = tensor.shape.iter().map(|d| *d as u64).collect();
    let bits = bit_count(&shape, tensor.dtype).filter(|bits| bits % 8 == 0)?;
    (shape.len() <= MAX_RANK).then_some(bits / 8)
}

/// The name that `transformers` gives the shard.
fn shard_name(number: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", number + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> OutputTensor {
        OutputTensor { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn plan(tensors: Vec<OutputTensor>, max: u64) -> Result<Plan, ModelError> {
        Plan::new(Path::new("out"), tensors, max)
    }

    #[test]
    fn rolls_before_the_limit_is_passed() {
        let sizes = [4, 4, 2, 20, 1, 9, 1];
        let tensors = sizes.iter().enumerate().map(|(i, n)| tensor(&format!("t{i}"), Dtype::U8, &[*n])).collect();
        let plan = plan(tensors, 10).unwrap();
        assert_eq!(plan.tensors.iter().map(|t| t.shard).collect::<Vec<_>>(), [0, 0, 0, 1, 2, 2, 3]);
        assert_eq!(plan.shards[1].name, "model-00002-of-00004.safetensors");
        assert_eq!(plan.total_bytes, 41);
    }

    #[test]
    fn header_bytes_are_fixed() {
        let plan = plan(vec![tensor("b", Dtype::U8, &[3]), tensor("a\"", Dtype::F32, &[1, 2])], 100).unwrap();
        let text = r#"{"__metadata__":{"format":"pt"},"a\"":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}"#;
        let header = &plan.shards[0].header;
        assert_eq!(header.len() % 8, 0);
        assert_eq!(u64::from_le_bytes(header[..8].try_into().unwrap()) as usize, header.len() - 8);
        assert_eq!(std::str::from_utf8(&header[8..]).unwrap().trim_end(), text);
        assert_eq!(plan.tensors[0].offset, header.len() as u64 + 8);
        assert_eq!(plan.shards[0].file_len, header.len() as u64 + 11);
    }

    #[test]
    fn refuses_what_no_reader_would_take() {
        for (tensors, words) in [
            (vec![tensor("", Dtype::U8, &[1])], "name"),
            (vec![tensor(METADATA, Dtype::U8, &[1])], "name"),
            (vec![tensor(&"n".repeat(5000), Dtype::U8, &[1])], "name"),
            (vec![tensor("a", Dtype::U8, &[1]), tensor("a", Dtype::F32, &[1])], "twice"),
            (vec![tensor("a", Dtype::F4, &[3])], "whole number"),
            (vec![tensor("a", Dtype::U8, &[1; 33])], "dimensions"),
            (vec![tensor("a", Dtype::U8, &[usize::MAX, 2])], "2^64 bits"),
            ((0..5).map(|i| tensor(&format!("t{i}"), Dtype::U8, &[usize::MAX / 8])).collect(), "more than a file can"),
            ((0..9).map(|i| tensor(&format!("t{i}"), Dtype::U8, &[usize::MAX / 8])).collect(), "above 2^64"),
        ] {
            let message = plan(tensors, u64::MAX).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
