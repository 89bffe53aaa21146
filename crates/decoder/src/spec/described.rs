//! Families that files describe: a known family, and what is different. Each becomes a row like those of
//! [`super::families::FAMILIES`] and is looked up beside them; nothing else in the program knows where a row came from.

mod set;
mod usual;
mod words;

use std::sync::{PoisonError, RwLock};

pub use words::Architecture;
use words::{HeadDimRule, KvHeadsRule, MtpRule, QkNormRule, ScalesRule, Wanted};

use self::set::{
    FACTORS, LONGEST, POSITIONS, WIDTHS, bias, bounded, config_key, leak, leak_list, optional_key, refuse_unread,
    set_mla, set_moe, set_names, set_rope, window, wrong,
};
use super::families::{FAMILIES, FamilyInfo, INNER_FAMILIES, Positions, QkNorm, Scales, by_architecture};
use super::must::Must;
use super::wrapper::WRAPPERS;
use crate::error::clean;

/// Most families that one process takes from files.
const MOST: usize = 64;
/// Most entries of a list or map in a file.
const MOST_ENTRIES: usize = 64;

/// The families of files, in the order of their registration.
static DESCRIBED: RwLock<Vec<&'static FamilyInfo>> = RwLock::new(Vec::new());

/// What is wrong with a described architecture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` {reason}")]
pub struct ArchitectureError {
    /// The key of the file, dotted: `names.block`.
    pub key: String,
    /// What was found, what was wanted.
    pub reason: String,
}

/// The families of files.
pub(super) fn described() -> Vec<&'static FamilyInfo> {
    DESCRIBED.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The SHA-256 (lower-case hex) of the file that describes `architecture`, if one does.
pub fn definition(architecture: &str) -> Option<&'static str> {
    by_architecture(architecture)?.definition
}

impl Architecture {
    /// The architecture that this one extends.
    pub fn extends(&self) -> &str {
        &self.extends
    }

    /// Makes the architecture known to this process, for good: its row lives as long as the process, a few KiB. `digest` is
    /// the SHA-256 of the file, lower-case hex; the same file again changes nothing.
    ///
    /// # Errors
    /// An architecture that is known already, by itself or from another file; a family to extend that is not known; names
    /// without their placeholder; numbers out of range; more than 64 architectures.
    pub fn register(self, digest: &str) -> Result<(), ArchitectureError> {
        let mut all = DESCRIBED.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.iter().find(|known| known.architecture == self.architecture) {
            if known.definition == Some(digest) {
                return Ok(());
            }
            return Err(wrong("architecture", "is described by another file of this run already".to_owned()));
        }
        if all.len() >= MOST {
            return Err(wrong("architecture", format!("is one more than the {MOST} that one run may describe")));
        }
        let family = self.family(digest)?;
        all.push(Box::leak(Box::new(family)));
        Ok(())
    }

    /// The row that the file describes.
    fn family(self, digest: &str) -> Result<FamilyInfo, ArchitectureError> {
        let word = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        for (key, name) in [("architecture", &self.architecture), ("model_type", &self.model_type)] {
            if name.is_empty() || name.len() > LONGEST || !name.chars().all(word) {
                return Err(wrong(key, format!("is `{}`, wanted letters, digits, `_`, `-`, `.`", clean(name))));
            }
        }
        let rows = FAMILIES.iter().chain(INNER_FAMILIES).map(|f| f.architecture);
        let mut built_in = rows.chain(WRAPPERS.iter().map(|w| w.architecture));
        if let Some(known) = built_in.find(|known| *known == self.architecture) {
            let reason = format!("is `{known}`, which is known without a file; give the new family a name of its own");
            return Err(wrong("architecture", reason));
        }
        let Some(base) = FAMILIES.iter().find(|f| f.architecture == self.extends) else {
            let known: Vec<&str> = FAMILIES.iter().map(|f| f.architecture).collect();
            let reason = format!("is `{}`, wanted a known architecture: {}", clean(&self.extends), known.join(", "));
            return Err(wrong("extends", reason));
        };
        let mut family = base.clone();
        family.title = leak(self.title.unwrap_or_else(|| format!("{} (from a file)", self.architecture)));
        family.architecture = leak(self.architecture);
        family.model_type = leak(self.model_type);
        family.definition = Some(leak(digest.to_owned()));
        if let Some(names) = self.names {
            if family.mla.is_some() {
                refuse_unread(&names, base.architecture)?;
            }
            set_names(&mut family.names, names)?;
        }
        if let Some(rules) = self.bias {
            for (slot, rule, key) in [
                (&mut family.qkv_bias, rules.qkv, "bias.qkv"),
                (&mut family.o_bias, rules.o, "bias.o"),
                (&mut family.mlp_bias, rules.mlp, "bias.mlp"),
            ] {
                *slot = rule.map_or(Ok(*slot), |rule| bias(rule, key))?;
            }
        }
        match self.qk_norm {
            None => {}
            Some(QkNormRule::None) => family.qk_norm = QkNorm::None,
            Some(QkNormRule::EachHead) => family.qk_norm = QkNorm::EachHead,
            Some(QkNormRule::EachHeadIf(key)) => family.qk_norm = QkNorm::EachHeadIf(config_key("qk_norm", key)?),
            Some(QkNormRule::AllHeads) => family.qk_norm = QkNorm::AllHeads,
        }
        if let Some(norm) = self.norm {
            family.norm.kind = norm.kind.map_or(family.norm.kind, Into::into);
            family.norm.eps = bounded("norm.eps", norm.eps, 0.0..=1.0)?.unwrap_or(family.norm.eps);
            family.norm.eps_key = optional_key("norm.eps_key", norm.eps_key)?.unwrap_or(family.norm.eps_key);
        }
        if let Some(activation) = self.activation {
            let (key, default) = &mut family.activation;
            *key = optional_key("activation.key", activation.key)?.unwrap_or(*key);
            *default = activation.default.map_or(*default, Into::into);
        }
        match self.head_dim {
            None => {}
            Some(HeadDimRule::HiddenOverHeads) => family.head_dim = None,
            Some(HeadDimRule::Default(width)) => family.head_dim = bounded("head_dim", Some(width), WIDTHS)?,
        }
        match self.kv_heads {
            None => {}
            Some(KvHeadsRule::AsHeads) => family.kv_heads = None,
            Some(KvHeadsRule::Default(heads)) => family.kv_heads = bounded("kv_heads", Some(heads), WIDTHS)?,
        }
        family.grouped_if = optional_key("grouped_if", self.grouped_if)?.or(family.grouped_if);
        family.tied = self.tied.unwrap_or(family.tied);
        family.normalised_head = self.normalised_head.unwrap_or(family.normalised_head);
        match self.scales {
            None => {}
            Some(ScalesRule::Plain) => family.scales = Scales::Plain,
            Some(ScalesRule::Granite) => family.scales = Scales::Granite,
            Some(ScalesRule::Gemma(caps)) => {
                family.scales = Scales::Gemma {
                    attn_cap: bounded("scales.gemma.attn_cap", caps.attn_cap, FACTORS)?,
                    logits_cap: bounded("scales.gemma.logits_cap", caps.logits_cap, FACTORS)?,
                };
            }
        }
        if let Some(found) = bounded("max_positions", self.max_positions, POSITIONS)? {
            family.max_positions = Positions::Default(found);
        }
        if let Some(rule) = self.window {
            family.window = window(rule)?;
        }
        if let Some(rule) = self.rope {
            set_rope(&mut family.rope, rule)?;
        }
        if let Some(rule) = self.moe {
            let Some(moe) = &mut family.moe else {
                return Err(wrong(
                    "moe",
                    format!("is here, and {} has no experts: extend a family that has", base.architecture),
                ));
            };
            set_moe(moe, rule)?;
        }
        if let Some(rule) = self.mla {
            let Some(mla) = &mut family.mla else {
                return Err(wrong(
                    "mla",
                    format!("is here, and {} has no latent attention: extend a family that has", base.architecture),
                ));
            };
            set_mla(mla, rule)?;
        }
        match self.mtp {
            None => {}
            Some(MtpRule::None) => family.mtp = None,
            Some(MtpRule::Default(layers)) => family.mtp = bounded("mtp", Some(layers), 0..=64)?,
        }
        if let Some(keys) = self.keys {
            let mut all: Vec<(&'static str, &'static str)> = family.keys.to_vec();
            for (usual, own) in keys {
                let usual = usual.name();
                all.retain(|(known, _)| *known != usual);
                all.push((usual, config_key("keys", own)?));
            }
            family.keys = leak_list(all);
        }
        if let Some(musts) = self.must {
            if musts.len() > MOST_ENTRIES {
                return Err(wrong("must", format!("has {} keys, wanted at most {MOST_ENTRIES}", musts.len())));
            }
            let mut all = family.must.to_vec();
            for (key, wanted) in musts {
                let key = config_key("must", key)?;
                all.retain(|(known, _)| *known != key);
                let must = match wanted {
                    Wanted::Flag(flag) => Must::Be(flag),
                    Wanted::Number(number) => Must::Equal(number),
                    Wanted::Null(()) => Must::Absent,
                };
                all.push((key, must));
            }
            family.must = leak_list(all);
        }
        Ok(family)
    }
}
