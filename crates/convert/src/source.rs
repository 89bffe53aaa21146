//! The checkpoint to convert.

use std::path::Path;

use lite_model::{Checkpoint, printable};
use lite_pack::{Unpacked, detect};
use lite_quant::{ActivationScheme, Weights};
use lite_runtime::{FloatSource, QuantizedCheckpoint, RuntimeError, StoredLinear, stored_linears};

use crate::ConvertError;

/// A quantized checkpoint and its linears.
pub(crate) struct Source {
    files: Files,
    /// Every quantized linear, in the order of the files.
    pub(crate) linears: Vec<StoredLinear>,
}

enum Files {
    /// Of a layout that is read in full.
    Layout(QuantizedCheckpoint),
    /// fp8 or MXFP4 codes under a config that is not understood: their values are known, how inputs are quantized is not.
    Floats(Checkpoint, String),
}

impl Source {
    /// Opens a folder.
    ///
    /// # Errors
    /// Broken files, a checkpoint without quantized linears, a quantization that is not read.
    pub(crate) fn open(dir: &Path) -> Result<Self, ConvertError> {
        let checkpoint = Checkpoint::open(dir)?;
        let (linears, unknown) = stored_linears(&checkpoint);
        if let Some(name) = unknown.first() {
            return Err(ConvertError::Input(format!(
                "`{}` holds codes whose scales are missing or of another shape than any tool writes",
                printable(name)
            )));
        }
        if linears.is_empty() {
            return Err(ConvertError::Unsupported(
                "the checkpoint holds no quantized linear, so there is nothing to convert; quantize it first"
                    .to_owned(),
            ));
        }
        if let Some(linear) = linears.iter().find(|linear| linear.twin) {
            return Err(ConvertError::Input(format!(
                "`{}` has both codes and a float weight, and readers differ in which they use; remove the stale one",
                printable(&linear.module)
            )));
        }
        let codes = FloatSource::new(&checkpoint);
        let floats = linears.iter().all(|linear| codes.is_coded(&format!("{}.weight", linear.module)));
        let files = match detect(checkpoint.config()) {
            Ok(Some((layout, _))) => {
                check_parts(&linears, layout.suffixes())?;
                Files::Layout(QuantizedCheckpoint::open(dir).map_err(ConvertError::Source)?)
            }
            Ok(None) if floats => Files::Floats(checkpoint, "config.json has no `quantization_config`".to_owned()),
            Ok(None) => return Err(ConvertError::Source(RuntimeError::NotQuantized)),
            Err(error) if floats => Files::Floats(checkpoint, error.to_string()),
            Err(error) => return Err(ConvertError::Config(error)),
        };
        Ok(Self { files, linears })
    }

    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        match &self.files {
            Files::Layout(quantized) => quantized.checkpoint(),
            Files::Floats(checkpoint, _) => checkpoint,
        }
    }

    /// The files and what their config says, if that is understood.
    pub(crate) fn quantized(&self) -> Option<&QuantizedCheckpoint> {
        match &self.files {
            Files::Layout(quantized) => Some(quantized),
            Files::Floats(..) => None,
        }
    }

    /// Why the config is not understood, if it is not.
    pub(crate) fn only_values(&self) -> Option<&str> {
        match &self.files {
            Files::Layout(_) => None,
            Files::Floats(_, why) => Some(why),
        }
    }

    /// How the inputs of a linear are quantized.
    pub(crate) fn activations(&self, module: &str) -> Option<ActivationScheme> {
        self.quantized().and_then(|quantized| quantized.config().scheme_of(module).activations)
    }

    /// Codes and scales of one linear.
    pub(crate) fn unpack(&self, linear: &StoredLinear) -> Result<Unpacked, ConvertError> {
        let found = match &self.files {
            Files::Layout(quantized) => quantized.linear(&linear.module, linear.out_features, linear.in_features),
            Files::Floats(checkpoint, _) => FloatSource::new(checkpoint)
                .codes(&format!("{}.weight", linear.module))
                .map(|codes| Unpacked { weights: Weights::Float(codes), input: None }),
        };
        found.map_err(ConvertError::Source)
    }

    /// Lets go of the memory behind a linear's tensors.
    pub(crate) fn release(&self, linear: &StoredLinear) {
        self.checkpoint().release(linear.tensors.iter().map(String::as_str));
    }
}

/// Refuses tensors beside the codes that the source's layout does not know: they may change what the others mean.
fn check_parts(linears: &[StoredLinear], known: &[&str]) -> Result<(), ConvertError> {
    for linear in linears {
        for name in &linear.tensors {
            let part = name.rsplit_once('.').map_or(name.as_str(), |(_, part)| part);
            if !known.contains(&part) {
                return Err(ConvertError::Unsupported(format!(
                    "`{}` is no part of the checkpoint's layout, and may change what the codes mean",
                    printable(name)
                )));
            }
        }
    }
    Ok(())
}
