use crate::QuantError;

/// How many consecutive input channels share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupSize {
    /// One scale for a whole output row (`-1` on the command line).
    Channel,
    /// One scale per this many input channels.
    Channels(usize),
}

impl GroupSize {
    /// Reads the command line's number: −1, 16, 32, 64, 128 or 256.
    ///
    /// # Errors
    /// [`QuantError::GroupSize`] for any other number.
    pub fn from_flag(value: i64) -> Result<Self, QuantError> {
        match value {
            -1 => Ok(Self::Channel),
            16 | 32 | 64 | 128 | 256 => Ok(Self::Channels(value as usize)),
            found => Err(QuantError::GroupSize { found }),
        }
    }

    /// The number that configs use: the width, or −1 for a whole row.
    pub fn to_flag(self) -> i64 {
        match self {
            Self::Channel => -1,
            Self::Channels(width) => width as i64,
        }
    }

    /// Channels per group in a row of `in_features`.
    ///
    /// # Errors
    /// [`QuantError::NotDivisible`] if the row is not a whole number of groups.
    pub fn width(self, in_features: usize) -> Result<usize, QuantError> {
        match self {
            Self::Channel => Ok(in_features),
            Self::Channels(width) if width != 0 && in_features != 0 && in_features.is_multiple_of(width) => Ok(width),
            Self::Channels(width) => Err(QuantError::NotDivisible { in_features, group_size: width }),
        }
    }
}

/// The type scales have in the file. They are rounded to it **before** codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleDtype {
    /// IEEE half: 11 significant bits, normal down to 6.1e-5, largest 65504.
    F16,
    /// bfloat16: 8 significant bits, the range of f32.
    BF16,
    /// IEEE single.
    F32,
}

impl ScaleDtype {
    /// `value` rounded to this type (ties to even), as f32.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F16 => half::f16::from_f32(value).to_f32(),
            Self::BF16 => half::bf16::from_f32(value).to_f32(),
            Self::F32 => value,
        }
    }

    /// The smallest positive scale that is ever written: the smallest normal number, so that
    /// engines that flush subnormals never see a zero scale.
    pub fn smallest_scale(self) -> f32 {
        match self {
            Self::F16 => half::f16::MIN_POSITIVE.to_f32(),
            Self::BF16 | Self::F32 => f32::MIN_POSITIVE,
        }
    }

    /// The largest finite value.
    pub fn largest(self) -> f32 {
        match self {
            Self::F16 => half::f16::MAX.to_f32(),
            Self::BF16 => half::bf16::MAX.to_f32(),
            Self::F32 => f32::MAX,
        }
    }

    /// Bytes of one scale.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }
}

/// An integer weight scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// Bits per code, 2..=8.
    pub bits: u8,
    /// Channels per scale.
    pub group_size: GroupSize,
    /// Whether the zero point is fixed at the middle code.
    pub symmetric: bool,
    /// The type of the scales in the file.
    pub scale_dtype: ScaleDtype,
}

impl Scheme {
    /// A scheme from the command line's numbers.
    ///
    /// # Errors
    /// [`QuantError::Bits`] or [`QuantError::GroupSize`].
    pub fn new(bits: i64, group_size: i64, symmetric: bool, scale_dtype: ScaleDtype) -> Result<Self, QuantError> {
        if !(2..=8).contains(&bits) {
            return Err(QuantError::Bits { found: bits });
        }
        Ok(Self { bits: bits as u8, group_size: GroupSize::from_flag(group_size)?, symmetric, scale_dtype })
    }

    /// The largest code, `2^bits − 1`.
    pub fn max_code(&self) -> u8 {
        ((1u16 << self.bits) - 1) as u8
    }

    /// The zero point of a symmetric scheme, `2^(bits−1)`.
    pub fn middle_code(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Groups in a row of `in_features`.
    ///
    /// # Errors
    /// [`QuantError::NotDivisible`].
    pub fn groups(&self, in_features: usize) -> Result<usize, QuantError> {
        Ok(in_features / self.group_size.width(in_features)?.max(1))
    }

    /// Average bits per weight with scales and zero points, for a row of `in_features`.
    ///
    /// # Errors
    /// [`QuantError::NotDivisible`].
    pub fn bits_per_weight(&self, in_features: usize) -> Result<f64, QuantError> {
        let width = self.group_size.width(in_features)? as f64;
        let zero = if self.symmetric { 0.0 } else { f64::from(self.bits) };
        Ok(f64::from(self.bits) + (8.0 * self.scale_dtype.size_bytes() as f64 + zero) / width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_and_refused() {
        for good in [-1, 16, 32, 64, 128, 256] {
            assert_eq!(GroupSize::from_flag(good).unwrap().to_flag(), good);
        }
        for bad in [0, 1, 7, -2, 127, 512, i64::MAX] {
            assert!(GroupSize::from_flag(bad).is_err(), "{bad}");
        }
        for bad in [-4, 0, 1, 9, 99] {
            assert_eq!(Scheme::new(bad, 128, false, ScaleDtype::F16), Err(QuantError::Bits { found: bad }));
        }
        assert!(GroupSize::Channels(128).width(192).is_err());
        assert!(GroupSize::Channels(128).width(0).is_err());
        assert_eq!(GroupSize::Channel.width(192), Ok(192));
    }

    #[test]
    fn a_four_bit_scheme_costs_four_and_an_eighth_bits() {
        let scheme = Scheme::new(4, 128, true, ScaleDtype::F16).unwrap();
        assert_eq!(scheme.bits_per_weight(4096).unwrap(), 4.125);
        assert_eq!((scheme.max_code(), scheme.middle_code()), (15, 8));
        assert_eq!(Scheme::new(8, -1, true, ScaleDtype::F16).unwrap().max_code(), 255);
    }
}
