//! The JSON schema of lite's own files, for editors.

use serde_json::{Value, json};

use crate::file::{Batch, Job};

/// JSON Schema (2020-12) of a recipe file: one job, or a batch.
///
/// Positions in lists, contradictions between keys, and regular expressions are checked by the program alone.
pub fn json_schema() -> Value {
    let mut generator = schemars::SchemaGenerator::default();
    let batch = generator.subschema_for::<Batch>();
    let job = generator.subschema_for::<Job>();
    let mut definitions = serde_json::Map::from_iter(generator.take_definitions(true));
    // A file of one job may declare variables as a batch may; a job within a batch may not.
    let env = definitions.get("Batch").and_then(|batch| batch.pointer("/properties/env")).cloned();
    if let Some(mut one) = definitions.get("Job").cloned() {
        if let (Some(properties), Some(env)) = (one.get_mut("properties").and_then(Value::as_object_mut), env) {
            properties.insert("env".to_owned(), env);
        }
        one["description"] = json!("A file of one job.");
        one["required"] = json!(["model", "stages"]);
        definitions.insert("OneJob".to_owned(), one);
    }
    let _ = job;
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lite recipe",
        "description": "What `lite run` reads: one job, or a batch with `jobs` or `matrix`.",
        "anyOf": [{"$ref": "#/$defs/OneJob"}, batch],
        "$defs": definitions
    })
}
