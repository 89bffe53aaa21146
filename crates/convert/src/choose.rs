//! In which scheme every linear is written.

use lite_pack::Layout;
use lite_quant::floats::Grain;
use lite_quant::{GroupSize, LinearScheme, WeightScheme};

use crate::adapt::{Zeros, exact, held};
use crate::nearest::nearest;
use crate::plan::{Chosen, Recipe, Survey};
use crate::source::Source;
use crate::{ConvertError, PLAIN};

/// A scheme for every linear, and the one that most of them have.
pub(crate) fn choose(
    recipe: &Recipe,
    source: &Source,
    surveys: &[Survey],
    layout: &'static dyn Layout,
) -> Result<(Vec<Chosen>, LinearScheme), ConvertError> {
    if let Some(why) = source.only_values().filter(|_| !recipe.requantize) {
        return Err(ConvertError::Unsupported(format!(
            "the source's config is not understood ({why}), only its {} values are: convert it to `--layout {PLAIN}`, \
             or add --requantize",
            lite_runtime::FloatSource::new(source.checkpoint()).kind_of_codes()
        )));
    }
    let ints = || surveys.iter().filter(|survey| survey.scheme.weights.int().is_some());
    let all_middle = ints().all(|survey| survey.facts.middle);
    let mut refused = None;
    for zeros in [if all_middle { Zeros::Symmetric } else { Zeros::AsDeclared }, Zeros::Stored] {
        let chosen = choose_each(recipe, source, surveys, layout, zeros)?;
        let Some(common) = most_frequent(chosen.iter().map(|chosen| chosen.scheme)) else { continue };
        let apart = |chosen: &Chosen| chosen.scheme != common && layout.mixes(&common, &chosen.scheme).is_err();
        let Some(at) = chosen.iter().position(apart) else { return Ok((chosen, common)) };
        if refused.is_none() {
            refused = Some((chosen, common, at));
        }
    }
    // Every way leaves some linear with a scheme that the layout cannot hold beside the others'.
    let Some((mut chosen, common, at)) = refused else {
        return Err(ConvertError::Unsupported("the checkpoint holds no quantized linear".to_owned()));
    };
    let why = |at: usize, chosen: &Chosen| ConvertError::CannotHold {
        module: source.linears[at].module.clone(),
        reason: format!(
            "layout `{}` cannot hold {} beside {}: {}",
            layout.name(),
            words(&chosen.scheme),
            words(&common),
            layout.mixes(&common, &chosen.scheme).err().unwrap_or("one scheme only")
        ),
    };
    if !recipe.requantize {
        return Err(why(at, &chosen[at]));
    }
    for (at, (chosen, linear)) in chosen.iter_mut().zip(&source.linears).enumerate() {
        if chosen.scheme != common && layout.mixes(&common, &chosen.scheme).is_err() {
            if layout.check(&common, linear.out_features, linear.in_features).is_err() {
                return Err(why(at, chosen));
            }
            *chosen = Chosen { scheme: common, rounded: true };
        }
    }
    Ok((chosen, common))
}

fn choose_each(
    recipe: &Recipe,
    source: &Source,
    surveys: &[Survey],
    layout: &'static dyn Layout,
    zeros: Zeros,
) -> Result<Vec<Chosen>, ConvertError> {
    let mut chosen = Vec::with_capacity(surveys.len());
    for (linear, survey) in source.linears.iter().zip(surveys) {
        let (n, k) = (linear.out_features, linear.in_features);
        if source.only_values().is_none()
            && let Some(scheme) = held(layout, &exact(&survey.scheme, &survey.facts, zeros, n, k), n, k)
        {
            chosen.push(Chosen { scheme, rounded: false });
            continue;
        }
        if !recipe.requantize {
            let reason = match layout.check(&survey.scheme, n, k) {
                Err(error) => error.to_string(),
                Ok(()) => "its zero points differ".to_owned(),
            };
            return Err(ConvertError::CannotHold { module: linear.module.clone(), reason });
        }
        let scheme = nearest(layout, &survey.scheme, survey.input, n, k).ok_or_else(|| ConvertError::NothingNear {
            module: linear.module.clone(),
            layout: layout.name(),
            found: words(&survey.scheme),
            n,
            k,
        })?;
        chosen.push(Chosen { scheme, rounded: true });
    }
    Ok(chosen)
}

/// The most frequent; of several the first.
pub(crate) fn most_frequent(schemes: impl Iterator<Item = LinearScheme>) -> Option<LinearScheme> {
    let mut counts: Vec<(LinearScheme, usize)> = Vec::new();
    for scheme in schemes {
        match counts.iter_mut().find(|(known, _)| *known == scheme) {
            Some((_, count)) => *count += 1,
            None => counts.push((scheme, 1)),
        }
    }
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(scheme, _)| scheme)
}

/// A scheme as a message shows it.
pub(crate) fn words(scheme: &LinearScheme) -> String {
    let weights = match scheme.weights {
        WeightScheme::Int(scheme) => {
            let group = match scheme.group_size {
                GroupSize::Channel => "per channel".to_owned(),
                GroupSize::Channels(width) => format!("in groups of {width}"),
            };
            let zeros = if scheme.symmetric { "symmetric" } else { "asymmetric" };
            format!("{zeros} int{} {group}", scheme.bits)
        }
        WeightScheme::Float(scheme) => {
            let grain = match scheme.grain {
                Grain::Tensor => "per tensor".to_owned(),
                Grain::Channel => "per channel".to_owned(),
                Grain::Group(width) => format!("in groups of {width}"),
                Grain::Block { rows, columns } => format!("in blocks of {rows}×{columns}"),
            };
            format!("{:?} {grain}", scheme.format)
        }
    };
    match scheme.activations {
        None => weights,
        Some(inputs) => format!("{weights}, inputs {:?} {:?}", inputs.format, inputs.scale),
    }
}
