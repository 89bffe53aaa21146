//! Dense little-endian bit streams: element `i` of a row has the bits `[i·b, (i+1)·b)`, the first
//! element in the least significant ones, and a row ends at a whole 32-bit word filled with zeros.
//! Widths that do not divide 32 straddle words. (compressed-tensors, `pack_to_int32`.)

/// 32-bit words for `count` elements of `bits` bits, `None` on overflow.
pub(crate) fn words(count: usize, bits: u8) -> Option<usize> {
    Some(count.checked_mul(usize::from(bits))?.div_ceil(32))
}

/// Packs `codes` (each below `2^bits`) into `out`, which is all zeros and `4 · words` bytes long.
pub(crate) fn pack_row(codes: &[u8], bits: u8, out: &mut [u8]) {
    match bits {
        8 => out.iter_mut().zip(codes).for_each(|(byte, &code)| *byte = code),
        4 => {
            let pairs = codes.chunks_exact(2);
            if let Some((&last, byte)) = pairs.remainder().first().zip(out.get_mut(codes.len() / 2)) {
                *byte = last;
            }
            out.iter_mut().zip(pairs).for_each(|(byte, pair)| *byte = pair[0] | pair[1] << 4);
        }
        _ => {
            let (mut pending, mut filled) = (0u32, 0u32);
            let mut bytes = out.iter_mut();
            for &code in codes {
                // At most 7 + 8 bits are pending.
                pending |= u32::from(code) << filled;
                filled += u32::from(bits);
                if filled >= 8 {
                    if let Some(byte) = bytes.next() {
                        *byte = pending as u8;
                    }
                    pending >>= 8;
                    filled -= 8;
                }
            }
            if let (true, Some(byte)) = (filled > 0, bytes.next()) {
                *byte = pending as u8;
            }
        }
    }
}

/// Unpacks `codes.len()` elements of `bits` bits from `bytes`, which hold at least that many.
pub(crate) fn unpack_row(bytes: &[u8], bits: u8, codes: &mut [u8]) {
    match bits {
        8 => codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = byte),
        4 => {
            for (pair, &byte) in codes.chunks_mut(2).zip(bytes) {
                pair[0] = byte & 15;
                if let Some(high) = pair.get_mut(1) {
                    *high = byte >> 4;
                }
            }
        }
        _ => {
            let mask = (1u32 << bits) - 1;
            let (mut pending, mut filled) = (0u32, 0u32);
            let mut bytes = bytes.iter();
            for code in codes {
                if filled < u32::from(bits) {
                    pending |= u32::from(bytes.next().copied().unwrap_or(0)) << filled;
                    filled += 8;
                }
                *code = (pending & mask) as u8;
                pending >>= bits;
                filled -= u32::from(bits);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(codes: &[u8], bits: u8) -> Vec<u32> {
        let mut out = vec![0; words(codes.len(), bits).unwrap() * 4];
        pack_row(codes, bits, &mut out);
        out.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// Vectors made by `pack_to_int32` of compressed-tensors 0.20 from signed values; codes here are
    /// those values plus `2^(bits−1)`.
    #[test]
    fn golden_vectors_of_compressed_tensors() {
        let int4: Vec<u8> = (0..16).collect();
        assert_eq!(packed(&int4, 4), [0x7654_3210, 0xfedc_ba98]);
        assert_eq!(packed(&[0, 127, 128, 255], 8), [0xff80_7f00]);
        let int3: Vec<u8> = (0..8).cycle().take(32).collect();
        assert_eq!(packed(&int3, 3), [0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]);
    }

    #[test]
    fn every_width_and_length_comes_back() {
        for bits in 1..=8u8 {
            for len in 0..70usize {
                let codes: Vec<u8> = (0..len).map(|i| ((i * 37 + 11) % (1 << bits)) as u8).collect();
                let mut out = vec![0; words(len, bits).unwrap() * 4];
                pack_row(&codes, bits, &mut out);
                let mut back = vec![0xAA; len];
                unpack_row(&out, bits, &mut back);
                assert_eq!(back, codes, "{bits} bits, {len} codes");
                // The stream as one big number, written bit by bit.
                for (i, &code) in codes.iter().enumerate() {
                    for bit in 0..usize::from(bits) {
                        let at = i * usize::from(bits) + bit;
                        assert_eq!(out[at / 8] >> (at % 8) & 1, code >> bit & 1);
                    }
                }
                let used = len * usize::from(bits);
                assert!((used..out.len() * 8).all(|at| out[at / 8] >> (at % 8) & 1 == 0), "padding is zero");
            }
        }
        assert_eq!(words(usize::MAX, 3), None);
    }
}
