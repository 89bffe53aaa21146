//! The scheme of a layout that is nearest to another, for conversions that may round.

use lite_pack::Layout;
use lite_quant::floats::{FloatFormat, FloatRange, FloatScheme, Grain, ScaleKind, quantize_float};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, QuantError, Range, RangeContext,
    ScaleDtype, Scheme, WeightScheme, Weights, quantize_nearest,
};

/// The scheme of `layout` that changes least in `found`, by this order: bits of the codes, what engines compute with
/// (activations), integers or floats, who shares a scale, zero points, the type of scales. `None` if the layout holds
/// nothing for a weight `[n, k]`.
///
/// Activation scales that calibration finds are kept where the source has them (`with_input`) and never made up.
pub(crate) fn nearest(
    layout: &dyn Layout,
    found: &LinearScheme,
    with_input: bool,
    n: usize,
    k: usize,
) -> Option<LinearScheme> {
    let mut best: Option<(u32, LinearScheme)> = None;
    for activations in activations(found, with_input) {
        for weights in ints(found).chain(floats()) {
            let scheme = LinearScheme { weights, activations };
            let distance = distance(found, &scheme);
            if best.as_ref().is_none_or(|(least, _)| distance < *least) && layout.check(&scheme, n, k).is_ok() {
                best = Some((distance, scheme));
            }
        }
    }
    best.map(|(_, scheme)| scheme)
}

/// Rounds `values` `[n, k]` to the nearest codes of `scheme`.
///
/// # Errors
/// Values that are NaN or infinite, a K that is no whole number of groups.
pub(crate) fn round(values: &[f32], n: usize, k: usize, scheme: &WeightScheme) -> Result<Weights, QuantError> {
    match scheme {
        WeightScheme::Int(scheme) => {
            let context = RangeContext { weight: values, out_features: n, in_features: k, gram: None };
            quantize_nearest(&context, scheme, Range::Search).map(Weights::Int)
        }
        WeightScheme::Float(scheme) => {
            quantize_float(values, n, k, scheme, FloatRange::MinMax, None).map(Weights::Float)
        }
    }
}

const SCALE_DTYPES: [ScaleDtype; 3] = [ScaleDtype::F32, ScaleDtype::BF16, ScaleDtype::F16];

fn ints(found: &LinearScheme) -> impl Iterator<Item = WeightScheme> {
    let own = found.weights.int().map(|scheme| scheme.group_size);
    let groups = [128, 64, 32, 16, 256].map(GroupSize::Channels);
    let groups: Vec<GroupSize> = own.into_iter().chain(groups).chain([GroupSize::Channel]).collect();
    (2..=8u8).flat_map(move |bits| {
        groups.clone().into_iter().flat_map(move |group_size| {
            [true, false].into_iter().flat_map(move |symmetric| {
                SCALE_DTYPES
                    .into_iter()
                    .map(move |scale_dtype| WeightScheme::Int(Scheme { bits, group_size, symmetric, scale_dtype }))
            })
        })
    })
}

fn floats() -> impl Iterator<Item = WeightScheme> {
    let usual = SCALE_DTYPES.map(ScaleKind::Float);
    let square = Grain::Block { rows: 128, columns: 128 };
    let fp8 = [FloatFormat::E4M3, FloatFormat::E5M2].into_iter().flat_map(move |format| {
        [square, Grain::Group(128), Grain::Channel, Grain::Tensor]
            .into_iter()
            .flat_map(move |grain| usual.map(|scale| FloatScheme { format, grain, scale }))
            .chain([FloatScheme { format, grain: Grain::Group(32), scale: ScaleKind::E8M0 }])
    });
    // Not NVFP4: linears that an engine fuses would have to share their global scale.
    let fp4 = FloatScheme { format: FloatFormat::E2M1, grain: Grain::Group(32), scale: ScaleKind::E8M0 };
    fp8.chain([fp4]).map(WeightScheme::Float)
}

fn activations(found: &LinearScheme, with_input: bool) -> Vec<Option<ActivationScheme>> {
    let needs_input =
        |scale: ActivationScale| matches!(scale, ActivationScale::StaticTensor | ActivationScale::StaticTensorLocal(_));
    let own = found.activations.filter(|own| with_input || !needs_input(own.scale));
    let int8 = ActivationFormat::Int { bits: 8, symmetric: true };
    let (e4m3, e5m2) = (ActivationFormat::Float(FloatFormat::E4M3), ActivationFormat::Float(FloatFormat::E5M2));
    let engines = [
        (int8, ActivationScale::DynamicToken),
        (e4m3, ActivationScale::DynamicToken),
        (e4m3, ActivationScale::DynamicGroup(128)),
        (e5m2, ActivationScale::DynamicToken),
        (e5m2, ActivationScale::DynamicGroup(128)),
        (e4m3, ActivationScale::DynamicMx(32)),
        (ActivationFormat::Float(FloatFormat::E2M1), ActivationScale::DynamicMx(32)),
    ];
    let mut all = vec![own, None];
    all.extend(engines.map(|(format, scale)| Some(ActivationScheme { format, scale })));
    all
}

/// Bits, and whether codes are floats.
fn kind(weights: &WeightScheme) -> (u32, bool) {
    match weights {
        WeightScheme::Int(scheme) => (u32::from(scheme.bits), false),
        WeightScheme::Float(scheme) => (u32::from(scheme.format.bits()), true),
    }
}

/// Weights that share a scale, roughly, for a usual linear.
fn cover(weights: &WeightScheme) -> u32 {
    match weights {
        WeightScheme::Int(Scheme { group_size: GroupSize::Channels(width), .. }) => saturating(*width),
        WeightScheme::Int(_) => 4096,
        WeightScheme::Float(scheme) => match scheme.grain {
            Grain::Tensor => 1 << 24,
            Grain::Channel => 4096,
            Grain::Group(width) => saturating(width),
            // Outliers of one row do not reach the rows of another: a block is as good as a wider group.
            Grain::Block { columns, .. } => saturating(columns).saturating_mul(4),
        },
    }
}

fn saturating(width: usize) -> u32 {
    u32::try_from(width).unwrap_or(u32::MAX)
}

fn distance(from: &LinearScheme, to: &LinearScheme) -> u32 {
    let ((bits, float), (new_bits, new_float)) = (kind(&from.weights), kind(&to.weights));
    // Fewer bits cost accuracy, more cost space.
    let width = if new_bits < bits { (bits - new_bits) * 1000 } else { (new_bits - bits) * 300 };
    let inputs = match (from.activations, to.activations) {
        (a, b) if a == b => 0,
        (None, None) => 0,
        (Some(_), None) => 200,
        (Some(a), Some(b)) if std::mem::discriminant(&a.format) == std::mem::discriminant(&b.format) => 150,
        (Some(_), Some(_)) => 220,
        (None, Some(_)) => 250,
    };
    let codes = if float == new_float { 0 } else { 100 };
    let format = match (from.weights, to.weights) {
        (WeightScheme::Float(a), WeightScheme::Float(b)) if a.format == b.format => 0,
        // e5m2 has a bit less for the same space.
        (_, WeightScheme::Float(b)) if b.format == FloatFormat::E5M2 => 90,
        _ => 0,
    };
    let (own, new) = (cover(&from.weights).max(1), cover(&to.weights).max(1));
    let steps = |large: u32, small: u32| (large / small).max(1).ilog2();
    // Coarser scales cost accuracy, finer ones space.
    let grain = if new > own { 4 * steps(new, own) } else { 3 * steps(own, new) };
    let zeros = match (from.weights.int(), to.weights.int()) {
        (Some(a), Some(b)) if a.symmetric == b.symmetric => 0,
        (Some(a), Some(_)) if a.symmetric => 2,
        (Some(_), Some(_)) => 20,
        // Integers that stand for floats: symmetric, as those are.
        (None, Some(b)) => u32::from(!b.symmetric) * 2,
        _ => 0,
    };
    let dtype = u32::from(scale_of(&from.weights) != scale_of(&to.weights));
    width + inputs + codes + format + grain + zeros + dtype
}

fn scale_of(weights: &WeightScheme) -> ScaleKind {
    match weights {
        WeightScheme::Int(scheme) => ScaleKind::Float(scheme.scale_dtype),
        WeightScheme::Float(scheme) => scheme.scale,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn int(bits: u8, group_size: GroupSize, symmetric: bool) -> LinearScheme {
        Scheme { bits, group_size, symmetric, scale_dtype: ScaleDtype::F16 }.into()
    }

    #[test]
    fn what_a_layout_holds_is_nearest_to_itself() {
        for layout in lite_pack::all() {
            for scheme in [int(4, GroupSize::Channels(128), true), int(8, GroupSize::Channel, true)] {
                if layout.check(&scheme, 256, 256).is_ok() {
                    assert_eq!(nearest(*layout, &scheme, false, 256, 256), Some(scheme), "{}", layout.name());
                }
            }
        }
    }

    #[test]
    fn bits_count_most_and_groups_stay() {
        let near = |layout: &str, scheme: &LinearScheme| {
            nearest(lite_pack::layout(layout).unwrap(), scheme, false, 256, 256).unwrap().weights
        };
        let awq = near("awq", &int(8, GroupSize::Channels(64), true));
        let awq = awq.int().unwrap();
        assert_eq!((awq.bits, awq.group_size, awq.symmetric), (4, GroupSize::Channels(64), true));
        // Five bits do not exist in gptq: eight keep the accuracy.
        let gptq = near("gptq", &int(5, GroupSize::Channels(128), false));
        let gptq = gptq.int().unwrap();
        assert_eq!((gptq.bits, gptq.group_size, gptq.symmetric), (8, GroupSize::Channels(128), false));
        // fp8 per channel becomes symmetric integers of 8 bits.
        let grain = Grain::Channel;
        let scale = ScaleKind::Float(ScaleDtype::F32);
        let fp8 = FloatScheme { format: FloatFormat::E4M3, grain, scale };
        let gptq = near("gptq", &fp8.into());
        let gptq = gptq.int().unwrap();
        assert_eq!((gptq.bits, gptq.group_size, gptq.symmetric), (8, GroupSize::Channel, true));
    }
}
