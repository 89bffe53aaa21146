//! llm-compressor's `recipe.yaml`: modifiers, alone or in stages.
//!
//! Such a file names neither a model nor a folder; they come from the command line.

use crate::batch::Draft;
use crate::error::{Fault, Place, Problem, nearest};
use crate::fields::{Fields, Ignored, sentence};
use crate::llmc::escape;
use crate::node::{Key, Node, Value};

mod scheme;

type Warnings = Vec<(Place, String)>;

/// Modifiers that are not here.
const ELSEWHERE: [&str; 16] = [
    "SparseGPTModifier",
    "WandaPruningModifier",
    "MagnitudePruningModifier",
    "ConstantPruningModifier",
    "SpinQuantModifier",
    "QuIPModifier",
    "AutoRoundModifier",
    "REAPModifier",
    "LogarithmicEqualizationModifier",
    "OutputDistillationModifier",
    "IMatrixGatherer",
    "AutoSmoothQuantModifier",
    "CompressionModifier",
    "DistillationModifier",
    "PruningModifier",
    "TransformModifier",
];

const HERE: [&str; 4] = ["GPTQModifier", "AWQModifier", "SmoothQuantModifier", "QuantizationModifier"];

/// The one job of a recipe.
///
/// # Errors
/// Modifiers and schemes that are not here, values that cannot be.
pub(crate) fn jobs(root: &Node, warnings: &mut Warnings) -> Result<Vec<Draft>, Fault> {
    let mut ignored = Ignored::new();
    let mut found = Found { keys: Node::map(root.at), ..Found::default_at(root.at) };
    for (name, at, settings) in modifiers(root, &mut ignored)? {
        found.modifier(name, at, settings, &mut ignored, warnings)?;
    }
    if found.stages.is_empty() {
        return Err(Fault::value(root.at, format!("no modifier; here are {}", HERE.join(", "))));
    }
    let mut tree = found.keys;
    // Scales alone quantize nothing there; a quantizer follows them.
    if found.scheme.is_none() {
        let message = "no modifier says how to quantize: give one of them a `scheme`, such as W4A16";
        return Err(Fault::value(root.at, message));
    }
    tree = tree.with("stages", Node::list(root.at, found.stages));
    if let Some(scheme) = found.scheme {
        tree = tree.with("scheme", scheme);
    }
    if let Some(range) = found.range {
        tree = tree.with("range", range);
    }
    if !found.overrides.is_empty() {
        tree = tree.with("overrides", Node::list(root.at, found.overrides));
    }
    if !found.ignore.is_empty() {
        tree = tree.with("ignore", Node::list(root.at, found.ignore));
    }
    tree = tree.with("layout", Node::text(root.at, "compressed-tensors"));
    warnings.extend(sentence(&ignored));
    Ok(vec![Draft::of(tree)])
}

/// Every modifier, in order, of all stages.
fn modifiers<'n>(root: &'n Node, ignored: &mut Ignored) -> Result<Vec<Modifier<'n>>, Fault> {
    let mut found = Vec::new();
    collect(root.entries(), 0, &mut found, ignored)?;
    Ok(found)
}

/// Name, place and settings of a modifier.
type Modifier<'n> = (&'n str, Place, &'n Node);

/// Stages hold groups of modifiers: two levels, never many more.
fn collect<'n>(
    entries: &'n [(Key, Node)],
    level: usize,
    found: &mut Vec<Modifier<'n>>,
    ignored: &mut Ignored,
) -> Result<(), Fault> {
    let known = || HERE.iter().chain(&ELSEWHERE).copied();
    for (key, value) in entries {
        let name = key.name.as_str();
        if (name.ends_with("_stage") || name.ends_with("_modifiers")) && level < 3 {
            if !matches!(value.value, Value::Map(_)) {
                let name = lite_model::printable(name);
                return Err(Fault::value(key.at, format!("`{name}` is {}, wanted a map of modifiers", value.words())));
            }
            collect(value.entries(), level + 1, found, ignored)?;
        } else if name.ends_with("Modifier") || known().any(|known| known == name) {
            found.push((name, key.at, value));
        } else if nearest(name, known()).is_some() {
            let known = known().map(str::to_owned).collect();
            return Err(Fault { at: key.at, problem: Problem::UnknownKey { key: name.to_owned(), known } });
        } else {
            ignored.push((key.at, lite_model::printable(name)));
        }
    }
    Ok(())
}

/// What the modifiers said so far, in lite's keys.
struct Found {
    keys: Node,
    stages: Vec<Node>,
    scheme: Option<Node>,
    range: Option<Node>,
    overrides: Vec<Node>,
    ignore: Vec<Node>,
}

impl Found {
    fn default_at(at: Place) -> Self {
        Self {
            keys: Node::map(at),
            stages: Vec::new(),
            scheme: None,
            range: None,
            overrides: Vec::new(),
            ignore: Vec::new(),
        }
    }

    fn modifier(
        &mut self,
        name: &str,
        at: Place,
        settings: &Node,
        ignored: &mut Ignored,
        warnings: &mut Warnings,
    ) -> Result<(), Fault> {
        let empty = Node::map(at);
        let fields = Fields::new(if settings.is_null() { &empty } else { settings }, name)?;
        match name {
            "SmoothQuantModifier" => {
                self.stages.push(smoothquant(at, &fields)?);
                fields.finish(&["mappings", "ignore", "num_calibration_steps", "calibration_function"], ignored)
            }
            "AWQModifier" => {
                self.stages.push(Node::single(at, "awq", Node::map(at)));
                self.quantizer(&fields, "search", warnings)?;
                fields.finish(
                    &["mappings", "duo_scaling", "n_grid", "offload_device", "max_chunk_memory", "sequential_targets"],
                    ignored,
                )
            }
            "GPTQModifier" => {
                self.stages.push(gptq(at, &fields)?);
                self.quantizer(&fields, "minmax", warnings)?;
                fields.finish(
                    &[
                        "block_size",
                        "offload_hessians",
                        "batched_quantization",
                        "sequential_targets",
                        "sequential_update",
                    ],
                    ignored,
                )
            }
            "QuantizationModifier" => {
                // After AWQ or SmoothQuant this is what rounds; alone it is RTN.
                if self.stages.is_empty() {
                    self.stages.push(Node::single(at, "rtn", Node::map(at)));
                }
                self.quantizer(&fields, "minmax", warnings)?;
                fields.finish(&["bypass_divisibility_checks", "observers"], ignored)
            }
            other if ELSEWHERE.contains(&other) => {
                Err(Fault::unsupported(at, format!("`{other}` is not (yet) here; here are {}", HERE.join(", "))))
            }
            other => {
                let known: Vec<&str> = HERE.iter().chain(&ELSEWHERE).copied().collect();
                Err(Fault::value(at, crate::words::unknown("modifier", other, &known)))
            }
        }
    }

    /// `scheme`, `config_groups`, `targets`, `ignore`, `kv_cache_scheme` of a modifier.
    fn quantizer(&mut self, fields: &Fields<'_>, range: &str, warnings: &mut Warnings) -> Result<(), Fault> {
        let found = scheme::read(fields)?;
        if let Some(at) = found.scheme.as_ref().or(found.overrides.first()).map(|node| node.at) {
            if self.scheme.is_some() {
                let message = "a second modifier with a scheme; put both into `config_groups` of one";
                return Err(Fault::unsupported(at, message));
            }
            let range = if found.mse { "search" } else { range };
            self.range = Some(Node::text(at, range));
        }
        self.scheme = found.scheme.or(self.scheme.take());
        self.overrides.extend(found.overrides);
        for (at, pattern) in fields.texts("ignore")? {
            if outside_blocks(pattern) {
                warnings
                    .push((at, format!("`ignore: {}` is never quantized here anyway", lite_model::printable(pattern))));
            } else {
                self.ignore.push(Node::text(at, regex(pattern)));
            }
        }
        if let Some(cache) = fields.get("kv_cache_scheme") {
            self.keys.put(
                Key { at: cache.at, name: "kv_cache".to_owned() },
                scheme::kv_cache(&Fields::new(cache, "kv_cache_scheme")?)?,
            );
        }
        Ok(())
    }
}

/// Names of what is no linear of a decoder block, so that a pattern for it matches nothing here.
fn outside_blocks(pattern: &str) -> bool {
    const OUTSIDE: [&str; 11] = [
        "lm_head",
        "embed",
        "vision",
        "visual",
        "projector",
        "audio",
        "mlp.gate",
        "mlp\\.gate",
        "router",
        "mtp",
        "shared_expert_gate",
    ];
    OUTSIDE.iter().any(|name| pattern.contains(name)) && !pattern.contains("gate_proj") && !pattern.contains("gate_up")
}

/// A target there as a regular expression here: `re:` is anchored at the start, a name is the whole name.
fn regex(target: &str) -> String {
    match target.strip_prefix("re:") {
        Some(pattern) => format!("^(?:{pattern})"),
        None => format!("^{}$", escape(target)),
    }
}

fn smoothquant(at: Place, fields: &Fields<'_>) -> Result<Node, Fault> {
    let mut node = Node::map(at);
    match fields.text("algorithm")? {
        None | Some("smoothquant") => {
            if let Some(alpha) = fields.float("smoothing_strength")? {
                node = node.with("alpha", Node::scalar(fields.place("smoothing_strength"), alpha));
            }
        }
        Some("log_equalization") => {
            fields.float("smoothing_strength")?;
            node = node.with("algorithm", Node::text(at, "log_equalization"));
        }
        Some(other) => {
            let known = ["smoothquant", "log_equalization"];
            return Err(Fault::value(fields.place("algorithm"), crate::words::unknown("algorithm", other, &known)));
        }
    }
    Ok(Node::single(at, "smoothquant", node))
}

fn gptq(at: Place, fields: &Fields<'_>) -> Result<Node, Fault> {
    let mut node = Node::single(at, "rounding", Node::text(at, "gptq"));
    if let Some(damp) = fields.float("dampening_frac")? {
        node = node.with("damp_percent", Node::scalar(fields.place("dampening_frac"), damp));
    }
    let place = fields.place("actorder");
    // Left out, it is `static`; null is no order at all.
    let order = match fields.text("actorder")? {
        None => place == fields.at(),
        Some("static" | "weight") => true,
        Some("false" | "False") => false,
        Some(other) => {
            let message = format!(
                "`actorder: {}` is not here: groups that follow the order cost engines time; use static, which loses nothing",
                lite_model::printable(other)
            );
            return Err(Fault::unsupported(place, message));
        }
    };
    Ok(Node::single(
        at,
        "gptq",
        node.with("act_order", Node::scalar(at, order)).with("error_aware", Node::scalar(at, false)),
    ))
}
