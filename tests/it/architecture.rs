//! Holds `src/` to the lists in `src/lib.rs`: which module may use which, where each crate is at home, where `unsafe` may be.
//!
//! It reads text, not syntax: code is what stands before a file's test module, without comment lines.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest function that needs no excuse, in lines.
const FUNCTION_LINES: usize = 60;
/// Functions in a hundred that may be longer: STYLE's measure of the code we admire.
const LONG_FUNCTIONS_PERCENT: usize = 4;

/// A source file, by its path in `src/`.
struct Source {
    path: String,
    /// Without tests and comment lines.
    code: String,
}

impl Source {
    /// The top-level module it belongs to.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.trim_end_matches(".rs")
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    collect(&root().join("src"), "", &mut sources);
    assert!(sources.len() > 10, "src/ was not found");
    sources
}

fn collect(folder: &Path, prefix: &str, sources: &mut Vec<Source>) {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{path}/"), sources);
        } else if path.ends_with(".rs") {
            let text = fs::read_to_string(entry.path()).unwrap();
            let code = code(&text);
            sources.push(Source { path, code });
        }
    }
}

fn code(text: &str) -> String {
    let before_tests = text.split("\n#[cfg(test)]\nmod ").next().unwrap();
    before_tests
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .fold(String::new(), |code, line| code + line + "\n")
}

/// The rows of a Markdown table of lib.rs under `# heading`, as cells without backquotes and brackets.
fn table(heading: &str) -> Vec<Vec<String>> {
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let section = lib.split(&format!("//! # {heading}\n")).nth(1).unwrap();
    let section = section.split("//! # ").next().unwrap();
    let rows = section
        .lines()
        .filter_map(|line| line.strip_prefix("//! |"));
    rows.skip(2)
        .map(|row| {
            let row = row.replace(['`', '[', ']'], "");
            let cells = row.trim_end().trim_end_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

fn words(text: &str) -> BTreeSet<String> {
    let words = text.split([' ', ',']).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

/// Names that follow `crate::` in `code`, also in a list in braces.
fn modules_used(code: &str) -> BTreeSet<String> {
    let identifier = |text: &str| -> String {
        let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_'));
        text[..end.unwrap_or(text.len())].to_owned()
    };
    let mut used = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        if let Some(list) = rest.strip_prefix('{') {
            let list = list.split(';').next().unwrap();
            let mut depth = 0;
            let mut item = String::new();
            for c in list.chars() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        used.insert(identifier(item.trim()));
                        item.clear();
                    }
                    c if depth == 0 => item.push(c),
                    _ => {}
                }
            }
            used.insert(identifier(item.trim()));
        } else {
            used.insert(identifier(rest));
        }
    }
    used.retain(|name| name.chars().next().is_some_and(char::is_lowercase));
    used
}

/// Whether `code` names a path that begins with `crate_name`.
fn uses_crate(code: &str, crate_name: &str) -> bool {
    let pattern = format!("{crate_name}::");
    code.match_indices(&pattern).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        before.is_none_or(|c| !(c.is_alphanumeric() || c == '_' || c == ':'))
    })
}

#[test]
fn modules_use_only_what_the_table_of_layers_allows() {
    let rows = table("Layers");
    let layers: BTreeMap<_, usize> = rows
        .iter()
        .map(|row| (row[1].clone(), row[0].parse().unwrap()))
        .collect();
    let allowed: BTreeMap<_, _> = rows
        .iter()
        .map(|row| (row[1].clone(), words(&row[2])))
        .collect();
    for (module, may_use) in &allowed {
        for used in may_use.iter().filter(|used| *used != "all") {
            assert!(
                layers[used] <= layers[module],
                "the table lets {module} use {used} above it"
            );
        }
    }
    for source in sources() {
        let module = source.module();
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let may_use = allowed.get(module);
        let may_use = may_use.unwrap_or_else(|| panic!("src/{module} is not in lib.rs' table"));
        for used in modules_used(&source.code) {
            let legal = used == module || may_use.contains("all") || may_use.contains(&used);
            assert!(
                legal,
                "src/{}: `{module}` may not use `{used}`",
                source.path
            );
        }
    }
    let found: BTreeSet<_> = sources()
        .iter()
        .map(|source| source.module().to_owned())
        .collect();
    for module in layers.keys() {
        assert!(
            found.contains(module),
            "lib.rs' table lists {module}, which is not there"
        );
    }
}

#[test]
fn crates_stay_at_home() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let sources = sources();
    for row in table("Homes of crates") {
        for name in words(&row[0]) {
            let key = format!("\n{} = ", name.replace('_', "-"));
            let key_as_is = format!("\n{name} = ");
            let listed = manifest.contains(&key) || manifest.contains(&key_as_is);
            assert!(
                listed,
                "lib.rs names the home of {name}, which Cargo.toml does not have"
            );
            let homes = words(&row[1]);
            for source in sources
                .iter()
                .filter(|source| uses_crate(&source.code, &name))
            {
                let path = &source.path;
                assert!(
                    homes.contains(source.module()),
                    "src/{path}: {name} is at home in {homes:?}"
                );
            }
        }
    }
}

#[test]
fn unsafe_is_allowed_only_where_lib_rs_says() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let list = lib.split("//! `unsafe` is allowed in ").nth(1).unwrap();
    let list = list.lines().next().unwrap();
    let places: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
    assert!(!places.is_empty());
    for source in sources() {
        let listed = places.iter().any(|place| source.path.starts_with(place));
        let allows = source.code.contains("allow(unsafe_code)");
        assert!(
            listed || !allows,
            "src/{}: unsafe code is not allowed here",
            source.path
        );
    }
}

#[test]
fn only_config_reads_the_environment() {
    for source in sources() {
        let reads = source.code.contains("env::var");
        let legal = !reads || source.module() == "config";
        assert!(
            legal,
            "src/{}: the environment is read in config only",
            source.path
        );
    }
}

#[test]
fn functions_are_short_and_the_few_long_ones_are_few() {
    let mut functions = 0;
    let mut long = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.code.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let body = line.trim_start();
            let is_function = body.starts_with("fn ")
                || (body.contains(" fn ")
                    && ["pub", "async", "const", "unsafe"]
                        .iter()
                        .any(|word| body.starts_with(word)));
            if !is_function {
                continue;
            }
            functions += 1;
            // rustfmt closes a function with a brace under its first letter.
            let close = format!("{}}}", &line[..line.len() - body.len()]);
            let length = lines[at..]
                .iter()
                .position(|line| *line == close)
                .unwrap_or(0)
                + 1;
            if length > FUNCTION_LINES && !line.ends_with(';') {
                long.push(format!("src/{}: {} lines: {body}", source.path, length));
            }
        }
    }
    let percent = long.len() * 100 / functions.max(1);
    let list = long.join("\n");
    assert!(
        percent <= LONG_FUNCTIONS_PERCENT,
        "{} of {functions} functions are long:\n{list}",
        long.len()
    );
}

#[test]
fn the_reader_of_this_test_sees_lists_braces_and_paths() {
    let code = code(
        "use crate::{a::{X, y}, b};\nlet x = crate::c::D;\n// crate::d\n\n#[cfg(test)]\nmod tests { crate::e }",
    );
    let used: Vec<_> = modules_used(&code).into_iter().collect();
    assert_eq!(used, ["a", "b", "c"]);
    assert!(uses_crate("use clap::Args;", "clap"));
    assert!(!uses_crate("use my_clap::Args; crate::clap::x", "clap"));
}
