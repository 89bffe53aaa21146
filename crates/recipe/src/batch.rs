//! One tree for each job: environment, defaults, lists, matrix.

use crate::de::read;
use crate::error::{Fault, Place, Problem};
use crate::file::{Batch, Job};
use crate::node::{Key, Node, Value};
use crate::scheme::SchemeChoice;

/// Most jobs of one file.
const MOST_JOBS: usize = 1000;

/// A job before it is read.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) tree: Node,
    /// The parts of a matrix that made it: scheme, variant.
    pub(crate) scheme: Option<String>,
    pub(crate) variant: Option<String>,
}

impl Draft {
    pub(crate) fn of(tree: Node) -> Self {
        Self { tree, scheme: None, variant: None }
    }
}

/// The jobs of one of lite's own files.
///
/// # Errors
/// Unknown keys and values that cannot be, in any part; jobs that nobody wrote.
pub(crate) fn expand(mut root: Node) -> Result<Vec<Draft>, Fault> {
    if !matches!(root.value, Value::Map(_)) {
        return Err(Fault::value(root.at, format!("found {}, wanted a map with `model`, `stages`, …", root.words())));
    }
    environment(&mut root)?;
    if root.get("jobs").is_none() && root.get("matrix").is_none() {
        if let Some((key, _)) = root.entries().iter().find(|(key, _)| key.name == "defaults") {
            return Err(Fault::value(
                key.at,
                "`defaults` without `jobs` or `matrix`: write the keys of the one job beside each other",
            ));
        }
        return Ok(vec![Draft::of(root)]);
    }
    read::<Batch>(&root)?;
    let defaults = root.get("defaults").filter(|node| !node.is_null()).cloned();
    let base = |at: Place| match &defaults {
        Some(defaults) => Node { at, value: defaults.value.clone() },
        None => Node::map(at),
    };
    let mut drafts = Vec::new();
    for job in root.get("jobs").map(Node::items).unwrap_or_default() {
        let mut tree = base(job.at);
        tree.merge(job);
        drafts.push(Draft::of(tree));
    }
    if let Some(matrix) = root.get("matrix") {
        drafts.extend(combinations(matrix, &base)?);
    }
    match drafts.len() {
        0 => Err(Fault::value(root.at, "no job: `jobs` and `matrix` are empty")),
        count if count > MOST_JOBS => {
            Err(Fault { at: root.at, problem: Problem::Budget(format!("{count} jobs, {MOST_JOBS} at most")) })
        }
        _ => Ok(drafts),
    }
}

/// Every combination of the lists that are there.
fn combinations(matrix: &Node, base: &dyn Fn(Place) -> Node) -> Result<Vec<Draft>, Fault> {
    let axis = |key: &str| -> Result<Vec<Option<Node>>, Fault> {
        match matrix.get(key) {
            None => Ok(vec![None]),
            Some(list) if list.items().is_empty() => {
                Err(Fault::value(list.at, format!("`{key}` is empty: no combination is left; leave it out")))
            }
            Some(list) => Ok(list.items().iter().cloned().map(Some).collect()),
        }
    };
    let (models, schemes, variants) = (axis("models")?, axis("schemes")?, axis("variants")?);
    let count = models.len().saturating_mul(schemes.len()).saturating_mul(variants.len());
    if count > MOST_JOBS {
        let what = format!("a matrix of {count} jobs, {MOST_JOBS} at most");
        return Err(Fault { at: matrix.at, problem: Problem::Budget(what) });
    }
    let mut drafts = Vec::new();
    for model in &models {
        for scheme in &schemes {
            for variant in &variants {
                let mut tree = base(matrix.at);
                let mut label = (None, None);
                if let Some(model) = model {
                    tree.put(Key { at: model.at, name: "model".to_owned() }, model.clone());
                }
                if let Some(scheme) = scheme {
                    label.0 = Some(read::<SchemeChoice>(scheme)?.label());
                    tree.put(Key { at: scheme.at, name: "scheme".to_owned() }, scheme.clone());
                }
                if let Some(variant) = variant {
                    let Some(name) = read::<Job>(variant)?.name else {
                        return Err(Fault::value(
                            variant.at,
                            "a variant needs a `name`, which tells its jobs from the others",
                        ));
                    };
                    let mut part = variant.clone();
                    part.remove("name");
                    tree.merge(&part);
                    label.1 = Some(name);
                }
                drafts.push(Draft { tree, scheme: label.0, variant: label.1 });
            }
        }
    }
    Ok(drafts)
}

/// Takes `env` out of the tree and puts the variables' values into its texts.
fn environment(root: &mut Node) -> Result<(), Fault> {
    let mut variables: Vec<(String, String)> = Vec::new();
    if let Some((key, declared)) = root.remove("env") {
        if !matches!(declared.value, Value::Map(_)) {
            return Err(Fault::value(
                key.at,
                format!("found {}, wanted a map of names and defaults", declared.words()),
            ));
        }
        for (name, default) in declared.entries() {
            let value = match (std::env::var(&name.name), &default.value) {
                (Ok(value), _) => value,
                (Err(std::env::VarError::NotPresent), Value::Scalar { text, .. }) if !default.is_null() => text.clone(),
                (Err(std::env::VarError::NotPresent), _) => {
                    let message =
                        format!("the environment variable `{}` is not set and has no default here", name.name);
                    return Err(Fault::value(name.at, message));
                }
                (Err(std::env::VarError::NotUnicode(_)), _) => {
                    return Err(Fault::value(name.at, format!("the environment variable `{}` is no UTF-8", name.name)));
                }
            };
            variables.push((name.name.clone(), value));
        }
    }
    root.rewrite(&|at, text| substitute(at, text, &variables))
}

fn substitute(at: Place, text: &str, variables: &[(String, String)]) -> Result<Option<String>, Fault> {
    if !text.contains("${") {
        return Ok(None);
    }
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, tail)) = after.split_once('}') else {
            return Err(Fault::value(at, "`${` without `}`: write a variable like ${NAME}"));
        };
        let Some((_, value)) = variables.iter().find(|(known, _)| known == name) else {
            let name = lite_model::printable(name);
            let message =
                format!("the variable `{name}` is not declared: add it under `env`, with a default or nothing");
            return Err(Fault::value(at, message));
        };
        out.push_str(before);
        out.push_str(value);
        rest = tail;
    }
    out.push_str(rest);
    Ok(Some(out))
}
