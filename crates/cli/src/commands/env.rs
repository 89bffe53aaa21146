//! `lite env`: what a run here has to work with, for bug reports and for whoever sets up a machine.

mod machine;
mod nvidia;

use std::io::{self, Write};

use clap::Args;
use lite_model::hub::HubOptions;
use serde_json::{Value, json};

use crate::args::Format;
use crate::output::size;

#[derive(Debug, Args)]
pub(crate) struct EnvArgs {}

/// Variables that change how a run goes; they hold no secrets.
const VARIABLES: [&str; 6] = [
    "RAYON_NUM_THREADS",
    "MIMALLOC_PURGE_DELAY",
    "MIMALLOC_ALLOW_LARGE_OS_PAGES",
    "MIMALLOC_VERBOSE",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
];

/// Prints the facts. Touches no network, and asks a GPU for nothing but its name and memory.
pub(crate) fn run(_: &EnvArgs, format: Format) -> anyhow::Result<()> {
    let facts = facts();
    let mut stdout = io::stdout().lock();
    match format {
        Format::Json => writeln!(stdout, "{facts}")?,
        Format::Quiet => writeln!(stdout, "{}", env!("CARGO_PKG_VERSION"))?,
        Format::Auto | Format::Human => print(&mut stdout, &facts)?,
    }
    Ok(())
}

fn facts() -> Value {
    let variable = |name: &&str| Some(((*name).to_owned(), Value::from(std::env::var_os(name)?.to_string_lossy())));
    let disk = |path: &std::path::Path| json!({ "path": path.display().to_string(), "free_bytes": lite_model::free_space(path) });
    let (hub, cache) = match HubOptions::from_env() {
        Ok(hub) => {
            let facts = json!({
                "endpoint": hub.endpoint,
                "cache": hub.cache_dir.display().to_string(),
                "offline": hub.offline,
                // Whether, never what.
                "token": hub.token.is_some(),
            });
            (facts, disk(&hub.cache_dir))
        }
        Err(error) => (json!({ "error": error.to_string() }), Value::Null),
    };
    let here = std::env::current_dir().unwrap_or_default();
    json!({
        "event": "environment",
        "schema": 1,
        "version": env!("CARGO_PKG_VERSION"),
        "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        "cpu": {
            "model": machine::cpu_model(),
            "features": machine::cpu_features(),
            "cores": std::thread::available_parallelism().ok().map(std::num::NonZero::get),
            "threads": rayon::current_num_threads(),
        },
        "memory": {
            "total_bytes": machine::total_memory(),
            "available_bytes": crate::memory::available(),
            "cgroup_limit_bytes": machine::cgroup_limit(),
        },
        "disk": { "current": disk(&here), "cache": cache },
        "cuda": nvidia::facts(),
        "hub": hub,
        "variables": VARIABLES.iter().filter_map(variable).collect::<serde_json::Map<_, _>>(),
    })
}

fn print(out: &mut impl Write, facts: &Value) -> io::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let bytes = |value: &Value| value.as_u64().map_or("unknown".to_owned(), size);
    let list = |value: &Value| {
        let words: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if words.is_empty() { "none".to_owned() } else { words.join(", ") }
    };
    let yes = |value: &Value| if value.as_bool() == Some(true) { "yes" } else { "no" };
    writeln!(out, "lite {} ({})", text(&facts["version"]), text(&facts["target"]))?;
    let cpu = &facts["cpu"];
    writeln!(out, "  cpu           {}; {} cores, {} threads", text(&cpu["model"]), cpu["cores"], cpu["threads"])?;
    writeln!(out, "                {}", list(&cpu["features"]))?;
    let memory = &facts["memory"];
    write!(
        out,
        "  memory        {} of {} available",
        bytes(&memory["available_bytes"]),
        bytes(&memory["total_bytes"])
    )?;
    match memory["cgroup_limit_bytes"].as_u64() {
        Some(limit) => writeln!(out, ", limited to {} (cgroup)", size(limit))?,
        None => writeln!(out)?,
    }
    for (name, label) in [("current", "disk here"), ("cache", "disk cache")] {
        let disk = &facts["disk"][name];
        if !disk.is_null() {
            writeln!(out, "  {label:<13} {} free, {}", bytes(&disk["free_bytes"]), text(&disk["path"]))?;
        }
    }
    let cuda = &facts["cuda"];
    let built = if cuda["compiled_in"] == json!(true) { "compiled in" } else { "not compiled in" };
    writeln!(out, "  cuda          {built}; driver library {}", cuda["driver"].as_str().unwrap_or("not found"))?;
    for library in cuda["libraries"].as_array().into_iter().flatten() {
        let found = library["path"].as_str().unwrap_or("not found");
        writeln!(out, "                {} {found}", text(&library["name"]))?;
    }
    if let Some(error) = cuda["error"].as_str() {
        writeln!(out, "                {error}")?;
    }
    for gpu in cuda["devices"].as_array().into_iter().flatten() {
        writeln!(
            out,
            "                cuda:{} {}, compute capability {}, {} of {} free",
            gpu["index"],
            text(&gpu["name"]),
            text(&gpu["capability"]),
            bytes(&gpu["free_bytes"]),
            bytes(&gpu["total_bytes"])
        )?;
    }
    let hub = &facts["hub"];
    match hub["error"].as_str() {
        Some(error) => writeln!(out, "  hub           {error}")?,
        None => {
            let (offline, token) = (yes(&hub["offline"]), yes(&hub["token"]));
            writeln!(out, "  hub           {}; offline: {offline}, token: {token}", text(&hub["endpoint"]))?;
            writeln!(out, "                cache {}", text(&hub["cache"]))?;
        }
    }
    for (name, value) in facts["variables"].as_object().into_iter().flatten() {
        writeln!(out, "  variable      {name}={}", lite_model::printable(&text(value)))?;
    }
    Ok(())
}
