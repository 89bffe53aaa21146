//! Jobs in YAML: files to recipes and gates, and back.
//!
//! Three dialects are read: lite's own ([`json_schema`]), the configs of ModelTC/llmc, and llm-compressor's
//! `recipe.yaml`. All become trees in lite's own keys, then [`lite_job::Recipe`]s with the defaults of the command line's
//! verbs: the same plan follows from a file and from the flags that equal it ([`to_yaml`]).
//!
//! ```text
//! text ─► tree with positions ─► own │ llmc │ llm-compressor ─► one tree per job ─► --set ─► keys ─► Recipe, gates
//! ```
//!
//! Files are hostile: no tags, no key twice, at most 1 MiB, 20 000 values with aliases expanded and 32 levels; every error
//! says where it is. Environment variables are read only where a file declares them.
#![forbid(unsafe_code)]

mod architecture;
mod batch;
mod compressor;
mod de;
mod error;
mod fields;
mod file;
mod llmc;
mod load;
mod lower;
mod node;
mod print;
mod schema;
mod scheme;
mod words;
mod yaml;

pub use architecture::register_architecture;
pub use error::{Position, RecipeError};
pub use load::{Dialect, Entry, Loaded, load, load_text};
pub use lower::CHECK_LIMIT;
pub use print::to_yaml;
pub use schema::json_schema;
