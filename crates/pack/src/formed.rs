//! Layouts whose linears all have one [`Form`] and one scheme: what they share, written once.

use lite_quant::{ActivationScheme, InputQuantization, LinearScheme, Weights};
use serde_json::{Map, Value};

use crate::form::Form;
use crate::layout::{Layout, PackedTensor, TensorRef, TensorSpec, Unpacked};
use crate::{ConfigFacts, PackError, ParsedConfig};

/// What is a layout's own; errors are those of the [`Layout`] functions that call it.
pub(crate) trait Formed: Sync {
    /// [`Layout::name`].
    const NAME: &'static str;
    /// [`Layout::quant_method`].
    const QUANT_METHOD: &'static str;
    /// [`Layout::suffixes`].
    const SUFFIXES: &'static [&'static str];
    /// Why a checkpoint holds one scheme only.
    const ONE_SCHEME: &'static str;

    /// The tensors of a weight `[n, k]`, if the layout can hold it.
    fn form(scheme: &LinearScheme, n: usize, k: usize) -> Result<Form, PackError>;

    /// A tensor that makes the others mean something else: its suffix, and why it is refused.
    const MEANING_CHANGER: Option<(&'static str, &'static str)> = None;

    /// [`Layout::quantization_config`].
    fn config(&self, facts: &ConfigFacts) -> Result<Value, PackError>;

    /// [`Layout::side_files`].
    fn files(&self, facts: &ConfigFacts) -> Result<Vec<(&'static str, Value)>, PackError> {
        let _ = facts;
        Ok(Vec::new())
    }

    /// [`Layout::parse_config`].
    fn parse(config: &Map<String, Value>) -> Result<ParsedConfig, PackError>;
}

impl<T: Formed> Layout for T {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn quant_method(&self) -> &'static str {
        T::QUANT_METHOD
    }

    fn suffixes(&self) -> &'static [&'static str] {
        T::SUFFIXES
    }

    fn check(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<(), PackError> {
        T::form(scheme, n, k).map(|_| ())
    }

    fn describe(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<Vec<TensorSpec>, PackError> {
        Ok(T::form(scheme, n, k)?.describe(scheme))
    }

    fn pack(
        &self,
        weights: &Weights,
        activations: Option<&ActivationScheme>,
        input: Option<&InputQuantization>,
    ) -> Result<Vec<PackedTensor>, PackError> {
        let scheme = LinearScheme { weights: weights.scheme(), activations: activations.copied() };
        let (n, k) = weights.shape();
        T::form(&scheme, n, k)?.pack(weights, activations, input)
    }

    fn unpack<'a>(
        &self,
        scheme: &LinearScheme,
        n: usize,
        k: usize,
        get: &dyn Fn(&str) -> Option<TensorRef<'a>>,
    ) -> Result<Unpacked, PackError> {
        let form = T::form(scheme, n, k)?;
        match T::MEANING_CHANGER.filter(|(suffix, _)| get(suffix).is_some()) {
            Some((suffix, why)) => Err(PackError::Unexpected { layout: T::NAME, suffix, why }),
            None => form.unpack(scheme, get),
        }
    }

    fn mixes(&self, _common: &LinearScheme, _other: &LinearScheme) -> Result<(), &'static str> {
        Err(T::ONE_SCHEME)
    }

    fn quantization_config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        self.config(facts)
    }

    fn side_files(&self, facts: &ConfigFacts) -> Result<Vec<(&'static str, Value)>, PackError> {
        self.files(facts)
    }

    fn parse_config(&self, config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        T::parse(config)
    }
}
