//! Keys of config.json of which only one value is implemented.

use super::config::Section;
use super::families::FamilyInfo;
use crate::DecoderError;

/// The one value of a key that is implemented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Must {
    Be(bool),
    Equal(i64),
    /// Not there, or null.
    Absent,
}

/// Refuses a config that asks for what the family's function does not have.
pub(super) fn check_musts(config: &Section, family: &FamilyInfo) -> Result<(), DecoderError> {
    for (key, must) in family.must {
        let Some(found) = config.get(key) else { continue };
        let wanted = match must {
            Must::Be(flag) if found.as_bool() == Some(*flag) => continue,
            Must::Equal(number) if found.as_i64() == Some(*number) => continue,
            Must::Be(flag) => flag.to_string(),
            Must::Equal(number) => number.to_string(),
            Must::Absent => "null".to_owned(),
        };
        return Err(config.unsupported(key, &format!("{wanted} in this family")));
    }
    Ok(())
}
