//! The files of a model, opened and mapped.

use std::io;
use std::path::{Path, PathBuf};

use crate::discover;
use crate::error::ModelError;
use crate::header::{self, Header};
use crate::index;
use crate::map::ShardMap;
use crate::open_file::open_regular;
use crate::text::printable;

/// A header and the file it describes.
pub(crate) type OpenShard = (Header, ShardMap);

/// Opens every shard that an index names, and checks that they agree.
pub(crate) fn open_sharded(
    dir: &Path,
    path: &Path,
    warnings: &mut Vec<String>,
) -> Result<(Vec<PathBuf>, Vec<OpenShard>), ModelError> {
    let index = index::read(path)?;
    let names = index.shards();
    discover::unlisted(dir, &names, warnings)?;
    let mut paths = Vec::with_capacity(names.len());
    let mut opened = Vec::with_capacity(names.len());
    for name in &names {
        let shard = dir.join(name);
        let missing = std::fs::symlink_metadata(&shard).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        if missing {
            let name = printable(name);
            let reason = format!("the index names shard `{name}`, which is not in the folder: download it");
            return Err(ModelError::index(path, reason));
        }
        opened.push(open_shard(&shard)?);
        paths.push(shard);
    }
    let held: Vec<_> = names
        .iter()
        .zip(&opened)
        .map(|(name, (header, _))| (name.as_str(), header.entries.iter().map(|e| e.name.as_str()).collect()))
        .collect();
    index.agree(path, &held)?;
    let found: u64 = opened.iter().flat_map(|(header, _)| &header.entries).map(|e| e.end - e.begin).sum();
    if let Some(said) = index.total_size.filter(|said| *said != found) {
        warnings.push(format!("the index gives a total size of {said} bytes, the shards hold {found}"));
    }
    Ok((paths, opened))
}

/// Opens one shard.
pub(crate) fn open_shard(path: &Path) -> Result<OpenShard, ModelError> {
    let (file, size) = open_regular(path)?;
    let header = header::read(path, &file, size)?;
    let map = ShardMap::new(file).map_err(|e| match e.kind() {
        io::ErrorKind::OutOfMemory => too_large(path),
        _ => ModelError::io("map", path)(e),
    })?;
    if map.bytes().len() as u64 != size {
        return Err(ModelError::Changed { path: path.to_path_buf() });
    }
    Ok((header, map))
}

/// For a file that does not fit the address space.
pub(crate) fn too_large(path: &Path) -> ModelError {
    let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    ModelError::OutOfMemory { what: path.display().to_string(), bytes }
}
