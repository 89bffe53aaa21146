/// A floating-point type of at most eight bits. None of them is given a code for infinity or NaN: what is too large
/// saturates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatFormat {
    /// `float8_e4m3fn`: largest 448, no infinity, NaN at `0x7f` and `0xff`.
    E4M3,
    /// `float8_e5m2`: largest 57344.
    E5M2,
    /// `float4_e2m1fn`: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives.
    E2M1,
}

impl FloatFormat {
    /// Bits of one code.
    pub fn bits(self) -> u8 {
        match self {
            Self::E4M3 | Self::E5M2 => 8,
            Self::E2M1 => 4,
        }
    }

    /// The largest finite value.
    pub fn largest(self) -> f32 {
        match self {
            Self::E4M3 => 448.0,
            Self::E5M2 => 57344.0,
            Self::E2M1 => 6.0,
        }
    }

    /// Bits of the exponent and of the mantissa, and the exponent's bias.
    fn fields(self) -> (u32, u32, i32) {
        match self {
            Self::E4M3 => (4, 3, 7),
            Self::E5M2 => (5, 2, 15),
            Self::E2M1 => (2, 1, 1),
        }
    }

    /// The code nearest to `x`, ties to the even mantissa, saturating; the sign of zero is kept. NaN becomes zero:
    /// weights are checked before they get here, and no code may stand for it.
    pub fn encode(self, x: f32) -> u8 {
        let (exponent_bits, mantissa_bits, bias) = self.fields();
        let sign = u8::from(x.is_sign_negative()) << (exponent_bits + mantissa_bits);
        if x.is_nan() {
            return 0;
        }
        let x = x.abs().min(self.largest());
        // The spacing of the grid around x: subnormals share the spacing of the smallest normal numbers.
        let exponent = ((x.to_bits() >> 23) as i32 - 127).max(1 - bias);
        let step = f32::from_bits(((exponent - mantissa_bits as i32 + 127) as u32) << 23);
        // Exact: division by a power of two, then at most mantissa + 2 bits before the point.
        let steps = (x / step).round_ties_even() as u32;
        let above = ((exponent + bias - 1) as u32) << mantissa_bits;
        // A subnormal has fewer than 2^mantissa steps and exponent 1 − bias; a carry moves to the next exponent.
        sign | (above + steps) as u8
    }

    /// The value of a code; NaN and infinities for the codes that mean them.
    pub fn decode(self, code: u8) -> f32 {
        let (exponent_bits, mantissa_bits, bias) = self.fields();
        let code = u32::from(code) & ((2 << (exponent_bits + mantissa_bits)) - 1);
        let negative = code >> (exponent_bits + mantissa_bits) != 0;
        let exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1);
        let mantissa = code & ((1 << mantissa_bits) - 1);
        let special = match self {
            Self::E4M3 => exponent == 15 && mantissa == 7,
            Self::E5M2 => exponent == 31,
            Self::E2M1 => false,
        };
        let magnitude = if special {
            if self == Self::E5M2 && mantissa == 0 { f32::INFINITY } else { f32::NAN }
        } else {
            let scale = f32::from_bits(((exponent.max(1) as i32 - bias - mantissa_bits as i32 + 127) as u32) << 23);
            (mantissa + if exponent > 0 { 1 << mantissa_bits } else { 0 }) as f32 * scale
        };
        if negative { -magnitude } else { magnitude }
    }

    /// `x` rounded to this type.
    pub fn round(self, x: f32) -> f32 {
        self.decode(self.encode(x))
    }
}

/// E8M0, the type of MX scales: `2^(code − 127)`; code 255 is NaN and is never written.
pub mod e8m0 {
    /// The value of a code; NaN for 255.
    pub fn decode(code: u8) -> f32 {
        match code {
            // 2^−127 is subnormal in f32.
            0 => f32::from_bits(1 << 22),
            255 => f32::NAN,
            code => f32::from_bits(u32::from(code) << 23),
        }
    }

    /// The code of a power of two between `2^−127` and `2^127`, `None` for any other value.
    pub fn encode(value: f32) -> Option<u8> {
        match value.to_bits() {
            0x0040_0000 => Some(0),
            bits if bits & 0x807f_ffff == 0 && bits != 0 && bits >> 23 < 255 => Some((bits >> 23) as u8),
            _ => None,
        }
    }
}
