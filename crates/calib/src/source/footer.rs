//! The nesting depth of a parquet schema, from the raw footer.
//!
//! The `parquet` crate builds the schema tree by recursion without a limit, so a crafted footer could
//! overflow the stack, which no handler can catch. The footer is Thrift's compact protocol; the schema is the second
//! field of `FileMetaData`, a flat list of elements whose `num_children` is field 5 (parquet.thrift).

/// Bytes after the footer: its length and `PAR1`.
pub(super) const FOOTER_TAIL: u64 = 8;

/// Deeper than any table of texts or conversations.
pub(super) const MAX_SCHEMA_DEPTH: usize = 64;

const STOP: u8 = 0;
const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// Deepest nesting in the schema of a footer (a flat table has 2); `None` if it is not a footer.
pub(super) fn schema_depth(footer: &[u8]) -> Option<usize> {
    let mut bytes = Cursor(footer);
    let mut field = 0i16;
    loop {
        let kind = bytes.field(&mut field)?;
        match (field, kind) {
            (_, STOP) => return None,
            (2, LIST) => break,
            _ => bytes.skip(kind, 16)?,
        }
    }
    let (count, kind) = bytes.list()?;
    if kind != STRUCT {
        return None;
    }
    // Children still to come, for each open group.
    let mut open: Vec<u64> = Vec::new();
    let mut deepest = 0;
    for _ in 0..count {
        let children = bytes.children()?;
        if let Some(left) = open.last_mut() {
            *left = left.checked_sub(1)?;
        }
        deepest = deepest.max(open.len() + 1);
        if deepest > MAX_SCHEMA_DEPTH {
            return Some(deepest);
        }
        if children > 0 {
            open.push(children);
        }
        while open.last() == Some(&0) {
            open.pop();
        }
    }
    Some(deepest)
}

struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn zigzag(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn advance(&mut self, count: u64) -> Option<()> {
        self.0 = self.0.get(usize::try_from(count).ok()?..)?;
        Some(())
    }

    /// The kind of the next field; its number goes to `field`.
    fn field(&mut self, field: &mut i16) -> Option<u8> {
        let header = self.byte()?;
        let (delta, kind) = (header >> 4, header & 0xf);
        if kind != STOP {
            *field = match delta {
                0 => i16::try_from(self.zigzag()?).ok()?,
                _ => field.checked_add(i16::from(delta))?,
            };
        }
        Some(kind)
    }

    /// Length and element kind of a list.
    fn list(&mut self) -> Option<(u64, u8)> {
        let header = self.byte()?;
        let count = if header >> 4 == 15 { self.varint()? } else { u64::from(header >> 4) };
        Some((count, header & 0xf))
    }

    /// Reads one schema element; its number of children.
    fn children(&mut self) -> Option<u64> {
        let (mut field, mut children) = (0, 0);
        loop {
            match (self.field(&mut field)?, field) {
                (STOP, _) => return Some(children),
                (I32, 5) => children = u64::try_from(self.zigzag()?).ok()?,
                (kind, _) => self.skip(kind, 16)?,
            }
        }
    }

    fn skip(&mut self, kind: u8, depth: u8) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            1 | 2 => Some(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            9 | 10 => {
                let (count, element) = self.list()?;
                for _ in 0..count {
                    // Booleans take a byte in a list, and none as a field.
                    if element <= 2 { self.advance(1)? } else { self.skip(element, depth)? }
                }
                Some(())
            }
            STRUCT => {
                let mut field = 0;
                loop {
                    match self.field(&mut field)? {
                        STOP => return Some(()),
                        kind => self.skip(kind, depth)?,
                    }
                }
            }
            // Maps do not occur before the schema.
            _ => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A footer with `version = 1` and a chain of `depth` nested groups, each with one child.
    pub(in crate::source) fn nested(depth: usize) -> Vec<u8> {
        let mut bytes = vec![0x15, 2, 0x19, 0xfc];
        let mut left = depth as u64;
        while left >= 0x80 {
            bytes.push((left as u8 & 0x7f) | 0x80);
            left >>= 7;
        }
        bytes.push(left as u8);
        for level in 0..depth {
            // name = "a" (field 4), num_children (field 5)
            bytes.extend([0x48, 1, b'a', 0x15, if level + 1 < depth { 2 } else { 0 }, 0]);
        }
        bytes.push(0);
        bytes
    }

    #[test]
    fn depth_is_counted() {
        assert_eq!(schema_depth(&nested(2)), Some(2));
        assert_eq!(schema_depth(&nested(40)), Some(40));
        assert_eq!(schema_depth(&nested(1_000_000)), Some(MAX_SCHEMA_DEPTH + 1));
        assert_eq!(schema_depth(b""), None);
        assert_eq!(schema_depth(&[0]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = schema_depth(&bytes);
        }
    }
}
