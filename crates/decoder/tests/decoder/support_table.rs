//! The README's table of families follows from [`FAMILIES`] and the fixtures they are tested with.

use std::collections::BTreeMap;
use std::fmt::Write;

use lite_decoder::FAMILIES;

use crate::fixture::{object, root};

const MARKS: [&str; 2] = ["<!-- families: begin -->\n", "<!-- families: end -->"];

/// Fixtures by the architecture of their config.json.
fn fixtures() -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(root().join("tests/fixtures/families")).unwrap() {
        let path = entry.unwrap().path();
        if path.join("config.json").is_file() {
            let architecture = object(&path.join("config.json"))["architectures"][0].as_str().unwrap().to_owned();
            found.entry(architecture).or_default().push(path.file_name().unwrap().to_str().unwrap().to_owned());
        }
    }
    found.values_mut().for_each(|names| names.sort());
    found
}

#[test]
fn the_readme_lists_every_family_with_its_fixtures() {
    let fixtures = fixtures();
    let mut table = String::from("| models | `architectures` | tested as |\n|---|---|---|\n");
    for family in FAMILIES {
        let names =
            fixtures.get(family.architecture).unwrap_or_else(|| panic!("no fixture of {}", family.architecture));
        let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        writeln!(table, "| {} | `{}` | {} |", family.title, family.architecture, names.join(", ")).unwrap();
    }
    let path = root().join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let begin = readme.find(MARKS[0]).expect("the README has no table of families") + MARKS[0].len();
    let end = begin + readme[begin..].find(MARKS[1]).expect("the README's table of families has no end");
    if std::env::var_os("LITE_WRITE_TABLE").is_some() {
        std::fs::write(&path, format!("{}{table}{}", &readme[..begin], &readme[end..])).unwrap();
        return;
    }
    assert!(
        readme[begin..end] == table,
        "run this test with LITE_WRITE_TABLE=1, or put this into the README:\n{table}"
    );
}
