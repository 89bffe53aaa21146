//! What there is of CUDA. Libraries are looked for by name where the loader would look; none is loaded to find out.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The driver.
const DRIVER: [&str; 1] = ["libcuda.so.1"];

/// What a build with CUDA support needs besides, each by its names in order of preference.
const LIBRARIES: [(&str, &[&str]); 3] = [
    ("cublas", &["libcublas.so.13", "libcublas.so.12"]),
    ("cublasLt", &["libcublasLt.so.13", "libcublasLt.so.12"]),
    ("curand", &["libcurand.so.10"]),
];

/// Folders that loaders search without being told.
const FOLDERS: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/local/cuda/lib64",
    "/usr/lib/wsl/lib",
];

pub(super) fn facts() -> Value {
    let places = Places::here();
    let library = |(name, files): &(&str, &[&str])| json!({ "name": name, "path": places.find(files) });
    let mut facts = json!({
        "compiled_in": cfg!(feature = "cuda"),
        "driver": places.find(&DRIVER),
        "libraries": LIBRARIES.iter().map(library).collect::<Vec<_>>(),
        "devices": [],
    });
    if !cfg!(feature = "cuda") {
        return facts;
    }
    match lite_decoder::gpus() {
        Ok(gpus) => {
            let gpu = |gpu: &lite_decoder::Gpu| {
                json!({
                    "index": gpu.index,
                    "name": gpu.name,
                    "capability": format!("{}.{}", gpu.capability.0, gpu.capability.1),
                    "total_bytes": gpu.total_bytes,
                    "free_bytes": gpu.free_bytes,
                })
            };
            facts["devices"] = gpus.iter().map(gpu).collect();
        }
        Err(error) => facts["error"] = error.to_string().into(),
    }
    facts
}

/// Where libraries are looked for.
struct Places {
    folders: Vec<PathBuf>,
    /// The loader's cache: paths between zero bytes.
    cache: Vec<u8>,
}

impl Places {
    fn here() -> Self {
        let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let named = std::env::split_paths(&named).filter(|path| !path.as_os_str().is_empty());
        Self {
            folders: named.chain(FOLDERS.map(PathBuf::from)).collect(),
            cache: std::fs::read("/etc/ld.so.cache").unwrap_or_default(),
        }
    }

    /// The path of the first of `files` that is there.
    fn find(&self, files: &[&str]) -> Option<String> {
        files.iter().find_map(|file| {
            let in_folder = self.folders.iter().map(|folder| folder.join(file)).find(|path| path.exists());
            let path = in_folder.or_else(|| cached(&self.cache, file).filter(|path| path.exists()))?;
            Some(path.display().to_string())
        })
    }
}

/// The path of `file` in the loader's cache.
fn cached(cache: &[u8], file: &str) -> Option<PathBuf> {
    let strings = cache.split(|byte| *byte == 0).filter_map(|bytes| std::str::from_utf8(bytes).ok());
    let mut paths = strings.filter(|text| text.starts_with('/')).map(Path::new);
    paths.find(|path| path.file_name().is_some_and(|name| name == file)).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_folders_and_in_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libcublas.so.12"), "").unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let driver = elsewhere.path().join("libcuda.so.1");
        std::fs::write(&driver, "").unwrap();
        let cache = format!("glibc-ld.so.cache1.1\u{1}\0libcuda.so.1\0{}\0/gone/libcurand.so.10\0", driver.display());
        let places = Places { folders: vec![dir.path().to_owned()], cache: cache.into_bytes() };
        assert_eq!(
            places.find(&["libcublas.so.13", "libcublas.so.12"]).unwrap(),
            dir.path().join("libcublas.so.12").display().to_string()
        );
        assert_eq!(places.find(&DRIVER).unwrap(), driver.display().to_string());
        assert_eq!(places.find(&["libcurand.so.10"]), None, "only what exists");
    }
}
