//! Numbers for a reader.

/// A size with the unit that fits, decimal units.
pub(crate) fn size(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

/// Three significant digits; powers of ten for the very small and the very large.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs();
    if !value.is_finite() {
        "n/a".to_owned()
    } else if !(1e-4..1e6).contains(&magnitude) {
        format!("{value:.2e}")
    } else {
        let digits = (2 - magnitude.log10().floor() as i32).max(0) as usize;
        format!("{value:.digits$}")
    }
}

/// `1234567` as `1,234,567`.
pub(crate) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A signed percentage of `ratio − 1`; ratios of three and more as a factor.
pub(crate) fn change(ratio: f64) -> String {
    if !ratio.is_finite() {
        "n/a".to_owned()
    } else if ratio < 3.0 {
        format!("{:+.2} %", (ratio - 1.0) * 100.0)
    } else {
        format!("×{ratio:.1}")
    }
}

/// The value with its standard error to two significant digits: `8.31 ± 0.042`; without one where there is none.
pub(crate) fn measured(value: f64, error: f64) -> String {
    if !(error.is_finite() && error > 0.0 && value.is_finite()) {
        return number(value);
    }
    if error < 1e-7 {
        return format!("{value:.3e} ± {error:.1e}");
    }
    let digits = (1 - error.log10().floor() as i32).clamp(0, 8) as usize;
    format!("{value:.digits$} ± {error:.digits$}")
}

/// Seconds.
pub(crate) fn seconds(value: f64) -> String {
    if value < 60.0 { format!("{value:.1} s") } else { format!("{:.1} min", value / 60.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        for (value, text) in [
            (0.123456, "0.123"),
            (12.3456, "12.3"),
            (1234.5, "1234"),
            (0.00123, "0.00123"),
            (1.5e-7, "1.50e-7"),
            (f64::NAN, "n/a"),
            (0.0, "0"),
            (-0.05, "-0.0500"),
        ] {
            assert_eq!(number(value), text);
        }
        assert_eq!(measured(8.31234, 0.0421), "8.312 ± 0.042");
        assert_eq!(measured(8.3, f64::NAN), "8.30");
        assert_eq!(measured(131.0, 12.0), "131 ± 12");
        assert_eq!((count(7), count(1234), count(1_234_567)), ("7".into(), "1,234".into(), "1,234,567".into()));
        assert_eq!((change(1.0123), change(0.99), change(12.0)), ("+1.23 %".into(), "-1.00 %".into(), "×12.0".into()));
        assert_eq!((size(999), size(1500), size(2_500_000_000)), ("999 B".into(), "1.5 kB".into(), "2.50 GB".into()));
    }
}
