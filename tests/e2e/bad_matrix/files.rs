//! Rows 1 to 18: containers and shard indexes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::{NOTHING, Row, row};

const WEIGHTS: &str = "model.safetensors";

/// The weights, their header replaced.
fn header(dir: &Path, change: impl FnOnce(String) -> Vec<u8>) {
    let path = dir.join(WEIGHTS);
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    let text = change(text.trim_end().to_owned());
    fs::write(path, [&(text.len() as u64).to_le_bytes(), text.as_slice(), &bytes[8 + length..]].concat()).unwrap();
}

/// The header with one more entry, before all others.
fn with(dir: &Path, entry: &str) {
    header(dir, |text| format!("{{{entry},{}", &text[1..]).into_bytes());
}

/// The header with the entry of the final norm replaced.
fn norm(dir: &Path, entry: &str) {
    header(dir, |text| {
        let start = text.find("\"model.norm.weight\":{").unwrap();
        let end = start + text[start..].find('}').unwrap() + 1;
        format!("{}\"model.norm.weight\":{entry}{}", &text[..start], &text[end..]).into_bytes()
    });
}

fn start(dir: &Path, bytes: &[u8]) {
    fs::write(dir.join(WEIGHTS), bytes).unwrap();
}

fn index(dir: &Path, shard: &str) {
    let shard = serde_json::Value::from(shard);
    fs::write(
        dir.join("model.safetensors.index.json"),
        format!("{{\"weight_map\":{{\"model.norm.weight\":{shard}}}}}"),
    )
    .unwrap();
    fs::rename(dir.join(WEIGHTS), dir.join("model-00001-of-00001.safetensors")).unwrap();
}

/// The weights as one shard, and an index of them.
fn sharded(dir: &Path, total: u64, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let names = super::super::support::tensors(dir).into_keys();
    let mut map = names.map(|name| (name, "model-00001-of-00001.safetensors".into())).collect();
    change(&mut map);
    let text = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map}).to_string();
    fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    fs::rename(dir.join(WEIGHTS), dir.join("model-00001-of-00001.safetensors")).unwrap();
}

fn gone(dir: &Path) {
    fs::remove_file(dir.join(WEIGHTS)).unwrap();
}

pub(super) const ROWS: &[Row] = &[
    row("1a", "an empty file", |m, _| start(m, b""), "RTN", 3),
    row("1b", "a file of 7 bytes", |m, _| start(m, b"1234567"), "RTN", 3),
    row("2a", "a header of 2^63 bytes", |m, _| start(m, &(1u64 << 63).to_le_bytes()), "RTN", 3),
    row("2b", "a header of 2^64 - 1 bytes", |m, _| start(m, &u64::MAX.to_le_bytes()), "RTN", 3),
    row(
        "2c",
        "a header longer than the file",
        |m, _| start(m, &[&1000u64.to_le_bytes()[..], b"{}"].concat()),
        "RTN",
        3,
    ),
    row(
        "3a",
        "a header of 101 MB",
        |m, _| {
            start(m, &101_000_000u64.to_le_bytes());
            fs::File::options().write(true).open(m.join(WEIGHTS)).unwrap().set_len(102_000_000).unwrap();
        },
        "RTN",
        3,
    ),
    row(
        "3b",
        "a tensor name of 10 MB",
        |m, _| {
            with(
                m,
                &format!("\"{}\":{{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[0,0]}}", "n".repeat(10_000_000)),
            )
        },
        "RTN",
        3,
    ),
    row("4a", "a header that is no UTF-8", |m, _| header(m, |t| [t.as_bytes(), b"\xff"].concat()), "RTN", 3),
    row("4b", "a header that is no JSON", |m, _| header(m, |_| b"{\"a\":".to_vec()), "RTN", 3),
    row("4c", "a header that is a list", |m, _| header(m, |_| b"[]".to_vec()), "RTN", 3),
    row("4d", "a header 10 000 levels deep", |m, _| header(m, |_| "{\"a\":".repeat(10_000).into_bytes()), "RTN", 3),
    row(
        "5a",
        "a tensor twice",
        |m, _| with(m, "\"model.norm.weight\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]}"),
        "RTN",
        3,
    ),
    row(
        "5b",
        "a tensor twice, of two types",
        |m, _| with(m, "\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}"),
        "RTN",
        3,
    ),
    row(
        "6a",
        "offsets that overlap",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[256],\"data_offsets\":[0,512]}"),
        "RTN",
        3,
    ),
    row(
        "6b",
        "offsets in reverse",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[256],\"data_offsets\":[512,0]}"),
        "RTN",
        3,
    ),
    row(
        "6c",
        "negative offsets",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[256],\"data_offsets\":[-512,0]}"),
        "RTN",
        3,
    ),
    row(
        "6d",
        "offsets with a point",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[256],\"data_offsets\":[0.5,512]}"),
        "RTN",
        3,
    ),
    row(
        "6e",
        "offsets in words",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[256],\"data_offsets\":[\"0\",\"512\"]}"),
        "RTN",
        3,
    ),
    row(
        "7a",
        "a hole between tensors",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]}"),
        "RTN",
        3,
    ),
    row(
        "7b",
        "bytes after the last tensor",
        |m, _| {
            let path = m.join(WEIGHTS);
            fs::write(&path, [fs::read(&path).unwrap(), vec![0; 16]].concat()).unwrap();
        },
        "RTN",
        3,
    ),
    row(
        "8a",
        "a weight without elements",
        |m, _| with(m, "\"model.layers.0.extra.weight\":{\"dtype\":\"BF16\",\"shape\":[0,4],\"data_offsets\":[0,0]}"),
        "RTN",
        0,
    ),
    row(
        "8b",
        "100 dimensions",
        |m, _| {
            with(m, &format!("\"a\":{{\"dtype\":\"BF16\",\"shape\":[{}0],\"data_offsets\":[0,0]}}", "1,".repeat(99)))
        },
        "RTN",
        3,
    ),
    row(
        "9",
        "a shape whose product overflows to 2",
        |m, _| norm(m, "{\"dtype\":\"BF16\",\"shape\":[4194305,4194305,211106198978564],\"data_offsets\":[0,512]}"),
        "RTN",
        3,
    ),
    row(
        "10a",
        "an unknown type",
        |m, _| norm(m, "{\"dtype\":\"Q4_K\",\"shape\":[256],\"data_offsets\":[0,512]}"),
        "RTN",
        4,
    ),
    row(
        "10b",
        "half a byte",
        |m, _| with(m, "\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]}"),
        "RTN",
        4,
    ),
    row(
        "11a",
        "a file cut within a tensor",
        |m, _| {
            let file = fs::File::options().write(true).open(m.join(WEIGHTS)).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1000).unwrap();
        },
        "RTN",
        3,
    ),
    row(
        "12a",
        "metadata that is no text",
        |m, _| header(m, |t| t.replace("\"pt\"", "{\"a\":1}").into_bytes()),
        "RTN",
        3,
    ),
    row(
        "12b",
        "50 MB of metadata",
        |m, _| header(m, |t| t.replace("\"pt\"", &format!("\"{}\"", "x".repeat(50_000_000))).into_bytes()),
        "RTN",
        0,
    ),
    row(
        "12c",
        "control characters in a tensor name",
        |m, _| with(m, "\"\\u001b[31m\":{\"dtype\":\"NO\",\"shape\":[0],\"data_offsets\":[0,0]}"),
        "RTN",
        4,
    ),
    row("13a", "pickles alone", |m, _| fs::rename(m.join(WEIGHTS), m.join("pytorch_model.bin")).unwrap(), "RTN", 4),
    row("13b", "a pickle named safetensors", |m, _| start(m, b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01."), "RTN", 3),
    row("13c", "a zip named safetensors", |m, _| start(m, b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00"), "RTN", 3),
    row("13d", "a login page", |m, _| start(m, b"<!DOCTYPE html><html><body>Sign in</body></html>"), "RTN", 3),
    row(
        "14",
        "a pointer of Git LFS",
        |m, _| start(m, b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"),
        "RTN",
        3,
    ),
    row("15a", "a shard above the folder", |m, _| index(m, "../model.safetensors"), "RTN", 3),
    row("15b", "a shard with an absolute path", |m, _| index(m, "/etc/passwd"), "RTN", 3),
    row("15c", "a shard on a drive", |m, _| index(m, "C:\\model.safetensors"), "RTN", 3),
    row("15d", "a shard that is an address", |m, _| index(m, "file://model.safetensors"), "RTN", 3),
    row("15e", "a shard with a NUL", |m, _| index(m, "a\0.safetensors"), "RTN", 3),
    row("15f", "a shard with a trailing dot", |m, _| index(m, "model.safetensors."), "RTN", 3),
    row(
        "15g",
        "a shard name of 5 000 characters",
        |m, _| index(m, &format!("{}.safetensors", "n".repeat(5000))),
        "RTN",
        3,
    ),
    row(
        "16a",
        "weights that are a link out of the folder (people keep weights on another disk)",
        |m, d| {
            fs::rename(m.join(WEIGHTS), d.join("elsewhere")).unwrap();
            symlink(d.join("elsewhere"), m.join(WEIGHTS)).unwrap();
        },
        "RTN",
        0,
    ),
    row(
        "16b",
        "weights that are a pipe",
        |m, _| {
            gone(m);
            assert!(std::process::Command::new("mkfifo").arg(m.join(WEIGHTS)).status().unwrap().success());
        },
        "RTN",
        3,
    ),
    row(
        "16c",
        "weights that are a folder",
        |m, _| {
            gone(m);
            fs::create_dir(m.join(WEIGHTS)).unwrap();
        },
        "RTN",
        3,
    ),
    row(
        "16d",
        "weights that are a link to themselves",
        |m, _| {
            gone(m);
            symlink(m.join(WEIGHTS), m.join(WEIGHTS)).unwrap();
        },
        "RTN",
        3,
    ),
    row(
        "16e",
        "weights that are a device",
        |m, _| {
            gone(m);
            symlink("/dev/zero", m.join(WEIGHTS)).unwrap();
        },
        "RTN",
        3,
    ),
    row("17a", "a missing shard", |m, _| index(m, "model-00002-of-00002.safetensors"), "RTN", 3),
    row(
        "17b",
        "a tensor that the index lacks",
        |m, _| sharded(m, 11_542_016, |map| drop(map.remove("model.norm.weight"))),
        "RTN",
        3,
    ),
    row(
        "17c",
        "a tensor in two shards",
        |m, _| {
            sharded(m, 11_542_016, |_| ());
            let twice =
                [("model.norm.weight".to_owned(), super::super::support::tensors(m)["model.norm.weight"].clone())];
            let other = m.join("other");
            fs::create_dir(&other).unwrap();
            super::super::support::write_tensors(&other, &twice.into(), &[]);
            fs::rename(other.join(WEIGHTS), m.join("model-00002-of-00002.safetensors")).unwrap();
            fs::remove_dir(other).unwrap();
            let path = m.join("model.safetensors.index.json");
            let text = fs::read_to_string(&path).unwrap().replacen(
                "model-00001-of-00001.safetensors",
                "model-00002-of-00002.safetensors",
                1,
            );
            fs::write(path, text).unwrap();
        },
        "RTN",
        3,
    ),
    row("17d", "a wrong total size", |m, _| sharded(m, 1, |_| ()), "RTN", 0),
    row(
        "18a",
        "two index files",
        |m, _| {
            sharded(m, 11_542_016, |_| ());
            let from = m.join("model.safetensors.index.json");
            fs::copy(&from, m.join("other.safetensors.index.json")).unwrap();
        },
        "RTN",
        3,
    ),
    row(
        "18b",
        "an index beside a single file",
        |m, _| {
            fs::copy(m.join(WEIGHTS), m.join("kept")).unwrap();
            sharded(m, 11_542_016, |_| ());
            fs::rename(m.join("kept"), m.join(WEIGHTS)).unwrap();
        },
        "RTN",
        3,
    ),
    row("18c", "no model at all", NOTHING, "rtn DIR/none --scheme W4A16 --work-dir OUT", 3),
];
