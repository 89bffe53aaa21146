//! What a finished run leaves to read: `report.json`, `report.html`, and the model card `README.md`.
//!
//! Everything here is a pure function of a [`Record`]. Nothing in it tells the time or the machine, so that two equal
//! runs leave equal bytes; times are in a record only where they were asked for ([`Timing`]).
//!
//! Names of models, modules and files come from checkpoints and are hostile: every one of them passes through
//! [`escape`] on its way into a document.
#![forbid(unsafe_code)]

mod card;
mod collect;
mod conversion;
pub mod escape;
mod format;
mod html;
mod record;
mod serve;
mod settings;
mod source_card;
#[cfg(test)]
mod testing;

pub use card::model_card;
pub use collect::{Context, LayerTime, hub_id};
pub use conversion::{Conversion, conversion_card};
pub use html::page;
pub use record::{
    Comparison, EngineVerdict, Fallback, FileFact, Histogram, Layer, LayerExperts, Linear, Measured, ModelFacts,
    OtherScheme, Record, SCHEMA, Sizes, TextFact, Timing, Tool,
};
pub use source_card::SourceCard;

/// The text of `report.json`.
///
/// Numbers that are not finite become `null`; NaN is what a standard error of one value is.
pub fn json(record: &Record) -> String {
    // A record holds no map with keys that are not text, the only thing that could fail.
    let mut text = serde_json::to_string_pretty(record).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_versioned_and_holds_no_times_unless_asked() {
        let mut record = testing::record();
        let text = json(&record);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let wanted = "schema tool model settings calibration sizes linears_checked tensors_checked comparison layers linears \
                      fallbacks engines files notes";
        assert_eq!(keys.join(" "), wanted);
        assert_eq!(
            (value["schema"].as_u64(), value["comparison"]["kl_percentiles"][3][0].as_str()),
            (Some(1), Some("p99.9"))
        );
        assert!(!text.contains("seconds") && text.ends_with("}\n"));
        record.layers[0].timing = Some(Timing { seconds: 1.5, resident_bytes: None });
        assert!(json(&record).contains("\"seconds\": 1.5"));
    }

    #[test]
    fn json_of_anything_reads_back() {
        let mut record = testing::hostile();
        record.sizes.bits_per_weight = f64::NAN;
        let value: serde_json::Value = serde_json::from_str(&json(&record)).unwrap();
        assert!(value["sizes"]["bits_per_weight"].is_null());
        assert_eq!(value["model"]["name"], record.model.name);
    }
}
