//! Rotary position embedding: parameters from config.json, and frequencies from parameters.

use std::f64::consts::PI;

use serde_json::Value;

use super::config::Section;
use super::dims::MAX_POSITIONS;
use super::families::RopeRules;
use crate::DecoderError;

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pair `i` of a head's dimensions ([`RopePairing`]) is
/// rotated by `position · θ^(−2i/rotary_dim)`, rescaled by [`RopeScaling`].
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// θ.
    pub theta: f64,
    /// How many leading dimensions of a head are rotated; even.
    pub rotary_dim: usize,
    /// Which dimensions are rotated together.
    pub pairing: RopePairing,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// Rescaling for long sequences.
    pub scaling: RopeScaling,
}

/// Which dimensions of a head make pair `i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// `i` and `i + rotary_dim/2`.
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
}

/// Rescaling of rotary frequencies, as transformers computes it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor` (kaiokendev's position interpolation).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// θ grows with the sequence once it is longer than `max_position_embeddings` (NTK-aware scaling).
    Dynamic {
        /// Growth.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp in between.
    Llama3 {
        /// Divisor.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// `original_max_position_embeddings`.
        original: usize,
    },
    /// YaRN (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// Divisor of the interpolated frequencies.
        factor: f64,
        /// Cosine and sine are multiplied by this.
        attention_factor: f64,
        /// Dimensions with more rotations than this over `original` are kept.
        beta_fast: f64,
        /// Dimensions with fewer rotations than this are interpolated.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole dimensions.
        truncate: bool,
        /// `original_max_position_embeddings`.
        original: usize,
    },
    /// LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor per frequency, another one beyond `original`.
    LongRope {
        /// Divisors of sequences up to `original`.
        short: Vec<f64>,
        /// Divisors of longer sequences.
        long: Vec<f64>,
        /// Cosine and sine are multiplied by this.
        attention_factor: f64,
        /// `original_max_position_embeddings`.
        original: usize,
    },
}

/// Where a set of rotary parameters is read.
#[derive(Clone, Copy)]
struct Place<'a> {
    config: &'a Section<'a>,
    rules: RopeRules,
    head_dim: usize,
    max_positions: usize,
}

impl Place<'_> {
    /// From `section`, with θ under `beside` in the config if it is not inside.
    fn read(&self, section: Option<Section>, beside: Option<&str>, theta: f64) -> Result<RopeSpec, DecoderError> {
        let Self { config, rules, head_dim, max_positions } = *self;
        let read = |key: &str, beside: Option<&str>, range: std::ops::RangeInclusive<f64>| match (&section, beside) {
            (Some(section), _) if section.get(key).is_some() => section.number(key, range),
            (_, Some(beside)) => config.number(beside, range),
            _ => Ok(None),
        };
        // θ = 1 would rotate nothing, and YaRN divides by its logarithm.
        let theta = read("rope_theta", beside, 1.0 + 1e-6..=1e15)?.unwrap_or(theta);
        let ratio = rules.ratio.map(|key| config.number(key, 1.0..=1e6)).transpose()?.flatten();
        if let (Some(key), Some(other)) = (rules.ratio, rules.ratio_of_positions)
            && ratio.is_some_and(|ratio| ratio != 1.0)
            && config
                .get("_name_or_path")
                .and_then(Value::as_str)
                .is_some_and(|name| name.to_lowercase().contains(other))
        {
            return Err(config.unsupported(
                key,
                &format!("1 where `_name_or_path` contains `{other}`, whose code divides positions by it (here θ is multiplied)"),
            ));
        }
        let theta = theta * ratio.unwrap_or(1.0);
        let key = "partial_rotary_factor";
        let partial = read(key, Some(key), 0.0..=1.0)?.or(rules.partial).unwrap_or(1.0);
        if partial != 1.0 && rules.partial.is_none() {
            let holder = section.filter(|section| section.get(key).is_some());
            return Err(holder.as_ref().unwrap_or(config).unsupported(key, "1 in this family"));
        }
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
            return Err(DecoderError::Contradiction {
                reason: format!(
                    "`head_dim` {head_dim} times `partial_rotary_factor` {partial} gives {rotary_dim} rotated dimensions, wanted an even number, at least 2"
                ),
            });
        }
        let scaling = rules.if_absent.cloned().unwrap_or(RopeScaling::Default);
        let mut spec = RopeSpec { theta, rotary_dim, pairing: rules.pairing, max_positions, scaling };
        if let Some(section) = section {
            spec.scaling = spec.read_scaling(config, &section, rules)?;
        }
        Ok(spec)
    }
}

/// Bounds of what is believed about factors.
const FACTOR: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

impl RopeSpec {
    /// The embedding of a decoder, and the other one of its layers with a sliding window where the family has two.
    pub(super) fn read(
        config: &Section,
        rules: RopeRules,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<(Self, Option<Self>), DecoderError> {
        let scaling = Self::section(config)?;
        let by_layer = scaling.and_then(|section| Some((section, section.keys().find(|k| k.ends_with("_attention"))?)));
        let place = Place { config, rules, head_dim, max_positions };
        let Some(local_theta) = rules.local_theta else {
            return match by_layer {
                Some((section, key)) => Err(section.unsupported(key, "one set of rotary parameters for all layers")),
                None => Ok((place.read(scaling, Some("rope_theta"), rules.theta)?, None)),
            };
        };
        let (all, local) = match by_layer {
            Some((section, _)) => {
                let of = |key, path| section.section_at(key, path);
                let all = of("full_attention", "rope_parameters.full_attention")?;
                (all, of("sliding_attention", "rope_parameters.sliding_attention")?)
            }
            None => (scaling, None),
        };
        // Parameters by layer type hold every θ themselves.
        let beside = |key| by_layer.is_none().then_some(key);
        let all = place.read(all, beside("rope_theta"), rules.theta)?;
        let local_rules = RopeRules { types: &["default", "linear"], ..rules };
        let place = Place { rules: local_rules, ..place };
        Ok((all, Some(place.read(local, beside("rope_local_base_freq"), local_theta)?)))
    }

    /// Where rotary parameters are. As transformers: a non-empty `rope_scaling` wins; what is inside wins over what is
    /// beside.
    pub(super) fn section<'a>(config: &Section<'a>) -> Result<Option<Section<'a>>, DecoderError> {
        match config.section("rope_scaling")? {
            Some(section) => Ok(Some(section)),
            None => config.section("rope_parameters"),
        }
    }

    fn read_scaling(&self, config: &Section, section: &Section, rules: RopeRules) -> Result<RopeScaling, DecoderError> {
        let type_key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
        let written = section.text(type_key)?.unwrap_or("default");
        let kind = rules.aliases.iter().find(|(alias, _)| *alias == written).map_or(written, |(_, meant)| meant);
        if !rules.types.contains(&kind) {
            return Err(section.unsupported(type_key, &rules.types.join(", ")));
        }
        let original = || -> Result<usize, DecoderError> {
            let key = "original_max_position_embeddings";
            let beside = config.size(key, 2..=MAX_POSITIONS)?;
            let inside = section.size(key, 2..=MAX_POSITIONS)?;
            Ok(beside.or(inside).or(rules.original_positions).unwrap_or(self.max_positions))
        };
        let half = self.rotary_dim / 2;
        match kind {
            "linear" => Ok(RopeScaling::Linear { factor: section.required_number("factor", FACTOR)? }),
            "dynamic" if half < 2 => Err(section.unsupported(type_key, "`default` with 2 rotated dimensions")),
            "dynamic" => Ok(RopeScaling::Dynamic { factor: section.required_number("factor", FACTOR)? }),
            "llama3" => {
                let (low, high) = ("low_freq_factor", "high_freq_factor");
                let low_value = section.required_number(low, FACTOR)?;
                let high_value = section.required_number(high, FACTOR)?;
                if high_value <= low_value {
                    return Err(section.wrong(high, &format!("more than `{low}`, {low_value}")));
                }
                let factor = section.required_number("factor", FACTOR)?;
                Ok(RopeScaling::Llama3 { factor, low: low_value, high: high_value, original: original()? })
            }
            "yarn" => {
                let original = original()?;
                let implied = self.max_positions as f64 / original as f64;
                let factor = section.number("factor", FACTOR)?.unwrap_or(implied);
                let nonzero = |key| -> Result<Option<f64>, DecoderError> {
                    Ok(section.number(key, 0.0..=1e6)?.filter(|v| *v != 0.0))
                };
                let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let inferred = match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                    (Some(m), Some(all)) => mscale(m) / mscale(all),
                    _ => mscale(1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    attention_factor: section.number("attention_factor", FACTOR)?.unwrap_or(inferred),
                    beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                    beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                    truncate: section.flag("truncate")?.unwrap_or(true),
                    original,
                })
            }
            "longrope" => {
                let original = original()?;
                let implied = self.max_positions as f64 / original as f64;
                let factor = section.number("factor", FACTOR)?.unwrap_or(implied);
                let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
                Ok(RopeScaling::LongRope {
                    short: section.numbers("short_factor", half, FACTOR)?,
                    long: section.numbers("long_factor", half, FACTOR)?,
                    attention_factor: section.number("attention_factor", FACTOR)?.unwrap_or(inferred),
                    original,
                })
            }
            _ => Ok(RopeScaling::Default),
        }
    }

    /// The `rotary_dim/2` frequencies (radians per position) for sequences of `tokens`, and the factor on
    /// cosine and sine. Rounded to f32 where transformers does.
    pub fn frequencies(&self, tokens: usize) -> (Vec<f32>, f32) {
        let dim = self.rotary_dim as f64;
        let half = self.rotary_dim / 2;
        // θ^(2i/dim), in f32 like the reference.
        let powers = |theta: f64| (0..half).map(move |i| theta.powf(f64::from((2 * i) as f32 / dim as f32)) as f32);
        let plain = |theta: f64| powers(theta).map(|p| 1.0 / p).collect::<Vec<f32>>();
        match &self.scaling {
            RopeScaling::Default => (plain(self.theta), 1.0),
            RopeScaling::Linear { factor } => (plain(self.theta).iter().map(|f| f / *factor as f32).collect(), 1.0),
            RopeScaling::Dynamic { factor } => {
                let growth = tokens.max(self.max_positions) as f64 / self.max_positions as f64;
                (plain(self.theta * (factor * growth - (factor - 1.0)).powf(dim / (dim - 2.0))), 1.0)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let original = *original as f64;
                let scale = |f: f32| {
                    let wavelength = 2.0 * PI / f64::from(f);
                    if wavelength > original / low {
                        return f / *factor as f32;
                    }
                    if wavelength < original / high {
                        return f;
                    }
                    let kept = (original / wavelength - low) / (high - low);
                    ((1.0 - kept) * f64::from(f) / factor + kept * f64::from(f)) as f32
                };
                (plain(self.theta).into_iter().map(scale).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, truncate, original } => {
                // The dimension that makes `rotations` full turns over the original context.
                let dimension =
                    |rotations: f64| dim * (*original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |(i, power): (usize, f32)| {
                    let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    let kept = 1.0 - interpolated;
                    1.0 / (*factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
                };
                (powers(self.theta).enumerate().map(blend).collect(), *attention_factor as f32)
            }
            RopeScaling::LongRope { short, long, attention_factor, original } => {
                let factors = if tokens > *original { long } else { short };
                let frequencies = powers(self.theta).zip(factors).map(|(p, f)| 1.0 / (*f as f32 * p)).collect();
                (frequencies, *attention_factor as f32)
            }
        }
    }
}
