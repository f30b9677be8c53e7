//! Holds what users read to what the program is: generated files are current, and whatever a dashboard, an alert or a command
//! of the README names exists.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use midpo::config::reference;
use midpo::config::train::{Recipe, RecipeOverrides, RouterStage, SafetyStage};
use midpo::metrics::{MetricKind, Metrics};

fn read(path: &str) -> String {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&file).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What stands in `text` between `<!-- begin name ... -->` and `<!-- end name -->`.
fn generated<'a>(text: &'a str, name: &str) -> &'a str {
    let begin = format!("<!-- begin {name}");
    let end = format!("<!-- end {name} -->");
    let rest = text
        .split(&begin)
        .nth(1)
        .unwrap_or_else(|| panic!("README has no `{begin}`"));
    let rest = rest.split_once("-->\n").unwrap().1;
    rest.split(&end).next().unwrap()
}

#[track_caller]
fn assert_current(what: &str, command: &str, found: &str, expected: &str) {
    let differs = found.lines().zip(expected.lines()).find(|(a, b)| a != b);
    assert!(
        found == expected,
        "{what} is not what `{command}` prints; first difference: {differs:?}"
    );
}

#[test]
fn the_generated_references_are_current() {
    assert_current(
        "config/midpo.toml",
        "midpo reference toml",
        &read("config/midpo.toml"),
        &reference::toml(),
    );
    let readme = read("README.md");
    assert_current(
        "README's table of settings",
        "midpo reference settings",
        generated(&readme, "settings").trim(),
        reference::markdown().trim(),
    );
    assert_current(
        "README's table of metrics",
        "midpo reference metrics",
        generated(&readme, "metrics").trim(),
        midpo::cli::reference::metrics().trim(),
    );
}

/// Every name of a series that the server exports.
fn series() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for info in Metrics::new("m").infos() {
        if info.kind == MetricKind::Histogram {
            for suffix in ["_bucket", "_sum", "_count"] {
                names.insert(format!("{}{suffix}", info.name));
            }
        } else {
            names.insert(info.name);
        }
    }
    names
}

/// The words of a PromQL expression that begin as our metrics do.
fn metrics_named(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| word.starts_with("midpo_") || word.starts_with("vllm:"))
        .map(str::to_owned)
        .collect()
}

#[track_caller]
fn assert_exported(place: &str, expression: &str) -> usize {
    let series = series();
    let named = metrics_named(expression);
    for name in &named {
        assert!(
            series.contains(name),
            "{place}: `{name}` is no metric of the server"
        );
    }
    named.len()
}

#[test]
fn the_dashboard_is_json_and_names_only_metrics_that_exist() {
    let dashboard = read("config/grafana/dashboards/midpo.json");
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut named = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(
            ids.insert(panel["id"].as_u64().unwrap()),
            "{title}: its id is taken"
        );
        let position = &panel["gridPos"];
        let right = position["x"].as_u64().unwrap() + position["w"].as_u64().unwrap();
        assert!(right <= 24, "{title}: wider than the page");
        if panel["type"] == "row" {
            continue;
        }
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            assert!(
                assert_exported(title, expression) > 0,
                "{title}: names no metric"
            );
            named.extend(metrics_named(expression));
        }
    }
    for subject in [
        "midpo_time_to_first_token_seconds_bucket",
        "midpo_inter_token_latency_seconds_bucket",
        "midpo_generated_tokens_total",
        "midpo_queue_time_seconds_bucket",
        "midpo_sequences_waiting",
        "midpo_kv_cache_usage_ratio",
        "midpo_prefix_cache_hit_tokens_total",
        "midpo_preemptions_total",
        "midpo_gate_ratio_sum",
        "midpo_http_requests_total",
    ] {
        assert!(
            named.contains(subject),
            "the dashboard does not show {subject}"
        );
    }
    let variable = dashboard["templating"]["list"][0]["definition"]
        .as_str()
        .unwrap();
    assert_exported("templating", variable);
}

#[test]
fn alerts_name_only_metrics_and_labels_that_exist() {
    let alerts = read("config/alerts.yml");
    assert!(assert_exported("config/alerts.yml", &alerts) > 5);
    let rules = alerts.matches("- alert: ").count();
    assert!(rules > 5);
    for part in ["expr:", "severity:", "summary:", "description:"] {
        assert_eq!(
            alerts.matches(part).count(),
            rules,
            "each alert has one `{part}`"
        );
    }
    let labels: BTreeSet<_> = Metrics::new("m")
        .infos()
        .into_iter()
        .flat_map(|info| info.labels)
        .collect();
    for selector in alerts
        .split('{')
        .skip(1)
        .filter_map(|rest| rest.split('}').next())
    {
        for matcher in selector
            .split(", ")
            .filter_map(|matcher| matcher.split_once('='))
        {
            let label = matcher.0.trim_end_matches(['!', '~']);
            assert!(
                label == "job" || labels.contains(label),
                "no metric has the label {label}"
            );
        }
    }
}

/// Every file under `folder` that ends in one of `endings`.
fn files(folder: &str, endings: &[&str]) -> Vec<String> {
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![base.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = path
                .strip_prefix(&base)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(name);
            }
        }
    }
    found
}

#[test]
fn yaml_files_are_indented_by_spaces_and_their_settings_exist() {
    let variables: BTreeSet<_> = reference::keys().into_iter().map(|key| key.env).collect();
    let mut checked = 0;
    for folder in ["config", "docker"] {
        for file in files(folder, &[".yaml", ".yml", "Dockerfile"]) {
            let text = read(&file);
            for (number, line) in text.lines().enumerate() {
                let place = format!("{file}:{}", number + 1);
                assert!(
                    !line.contains('\t') && line.trim_end() == line,
                    "{place}: a tab, or a space at the end"
                );
                let code = line.split('#').next().unwrap();
                for word in code.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
                    let ours = word.starts_with("MIDPO_");
                    assert!(
                        !ours || variables.contains(word),
                        "{place}: no setting is called {word}"
                    );
                    checked += usize::from(ours);
                }
            }
        }
    }
    assert!(checked > 5);
    let keys: BTreeSet<_> = reference::keys().iter().map(|key| key.path()).collect();
    let configmap = read("docker/kubernetes/configmap.yaml");
    let settings = configmap.split("midpo.toml: |\n").nth(1).unwrap();
    for line in settings.lines().filter(|line| line.contains(" = ")) {
        let key = line
            .trim()
            .trim_start_matches("# ")
            .split(' ')
            .next()
            .unwrap();
        assert!(
            keys.contains(key),
            "configmap.yaml: no setting is called {key}"
        );
    }
}

#[test]
fn compose_and_kustomization_name_files_that_exist() {
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let compose = read("docker/compose.yaml");
    let mounts = compose
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- ../"));
    for mount in mounts {
        let path = mount.split(':').next().unwrap();
        assert!(base.join(path).exists(), "compose.yaml mounts {path}");
    }
    let kustomization = read("docker/kubernetes/kustomization.yaml");
    let resources = kustomization.split("resources:\n").nth(1).unwrap();
    for file in resources
        .lines()
        .map(|line| line.trim_start_matches("  - "))
    {
        assert!(
            base.join("docker/kubernetes").join(file).exists(),
            "kustomization.yaml names {file}"
        );
    }
}

#[test]
fn the_image_is_built_with_every_target_of_the_manifest() {
    let dockerfile = read("docker/Dockerfile");
    let manifest = read("Cargo.toml");
    let targets = manifest
        .split("\n[[")
        .skip(1)
        .map(|target| target.split("\n[").next().unwrap());
    for target in targets.filter(|target| !target.starts_with("bin")) {
        let value = |key: &str| {
            let line = target.lines().find_map(|line| line.strip_prefix(key));
            line.map(|value| value.trim_matches([' ', '=', '"']).to_owned())
        };
        let path =
            value("path").unwrap_or_else(|| format!("benches/{}.rs", value("name").unwrap()));
        assert!(
            dockerfile.contains(&path),
            "the Dockerfile makes no {path}: cargo would stop"
        );
    }
}

/// The `midpo ...` commands in fenced blocks of the README, without comments and redirections.
fn readme_commands(readme: &str) -> Vec<Vec<String>> {
    let blocks = readme.split("```").skip(1).step_by(2);
    let lines = blocks.flat_map(|block| block.lines().map(str::to_owned).collect::<Vec<_>>());
    lines
        .map(|line| line.replace("cargo run --release -- ", "midpo "))
        .filter_map(|line| {
            let line = line.trim().strip_prefix("midpo ")?.to_owned();
            let line = line.split(['#', '>', '|']).next().unwrap().to_owned();
            Some(line.split_whitespace().map(str::to_owned).collect())
        })
        .collect()
}

#[test]
fn commands_of_the_readme_are_real() {
    let readme = read("README.md");
    let commands = readme_commands(&readme);
    assert!(commands.len() >= 5);
    for command in commands {
        let (subcommand, arguments) = command.split_first().unwrap();
        // A subcommand of a subcommand, or what `reference` prints.
        let words = arguments.iter().take_while(|word| !word.starts_with("--"));
        let help = Command::new(env!("CARGO_BIN_EXE_midpo"))
            .arg(subcommand)
            .args(words)
            .arg("--help")
            .output()
            .unwrap();
        assert!(
            help.status.success(),
            "README: `midpo {subcommand}` is no command"
        );
        let help = String::from_utf8(help.stdout).unwrap();
        let flags = arguments.iter().filter(|word| word.starts_with("--"));
        for flag in flags.map(|flag| flag.split('=').next().unwrap()) {
            let known = help.split(|c: char| c.is_whitespace() || ",[]=".contains(c));
            assert!(
                known.into_iter().any(|word| word == flag),
                "README: `midpo {subcommand}` has no {flag}"
            );
        }
    }
}

#[test]
fn the_recipe_of_the_readme_loads() {
    let readme = read("README.md");
    let blocks = readme.split("```toml\n# recipe.toml").nth(1).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("recipe.toml");
    fs::write(&file, format!("#{}", blocks.split("```").next().unwrap())).unwrap();
    let recipe = Recipe::load(&file, &RecipeOverrides::default()).unwrap();
    let safety: SafetyStage = recipe.stage().unwrap();
    assert_eq!(safety.expert.stop_delta, Some(8.0));
    assert!(safety.data.data.unwrap().ends_with("pairs.jsonl") && safety.cost.cost.is_some());
    let router: RouterStage = recipe.stage().unwrap();
    assert!(router.data.data.unwrap().ends_with("trained/dual.jsonl"));
    assert_eq!(recipe.stages().count(), 7);
}

#[test]
fn the_licence_is_the_one_that_the_manifest_names() {
    assert!(read("Cargo.toml").contains("license = \"Apache-2.0\""));
    let licence = read("LICENSE");
    assert!(licence.contains("Apache License") && licence.contains("Version 2.0, January 2004"));
}
