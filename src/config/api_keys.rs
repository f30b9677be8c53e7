//! The operator's keys and policies: from flags and from a file of keys, laid over a safe default.

use std::collections::HashSet;
use std::path::Path;

use figment::Figment;
use figment::providers::{Format, Toml};
use serde::Deserialize;

use super::error::ConfigError;
use super::load::{file_error, unknown};
use super::options::{PolicyOptions, ServerOptions};
use super::values::{Secret, VariantName};
use super::{ApiKey, Policy};

/// Most keys of one file: each request is compared with all of them.
const KEYS_MAX: usize = 10_000;
/// Largest file of keys, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A file of keys as TOML.
#[derive(Deserialize)]
struct KeyFile {
    key: Vec<KeyEntry>,
}

/// One `[[key]]`. What it leaves out comes from the policy flags.
#[derive(Deserialize)]
struct KeyEntry {
    name: String,
    secret: Secret,
    allow_variants: Option<Vec<VariantName>>,
    min_safety_bias: Option<f32>,
    min_safety_floor: Option<f32>,
    allow_helpfulness_bias: Option<bool>,
}

const ENTRY_KEYS: [&str; 6] = [
    "name",
    "secret",
    "allow_variants",
    "min_safety_bias",
    "min_safety_floor",
    "allow_helpfulness_bias",
];

/// Keys of flags and file together, each with its policy.
pub(super) fn api_keys(
    server: &ServerOptions,
    policy: &PolicyOptions,
) -> Result<Vec<ApiKey>, ConfigError> {
    let guarded = overlay(Policy::guarded(), policy)?;
    let named = |index: usize, secret: &Secret| ApiKey {
        name: format!("key-{}", index + 1),
        secret: secret.0.clone(),
        policy: guarded.clone(),
    };
    let flags = server.api_key.iter().enumerate();
    let mut keys: Vec<ApiKey> = flags.map(|(index, key)| named(index, key)).collect();
    if let Some(file) = &server.api_key_file {
        let text = read(file)?;
        let is_toml = file
            .extension()
            .is_some_and(|extension| extension == "toml");
        keys.extend(if is_toml {
            from_toml(file, &text, &guarded)?
        } else {
            from_lines(file, &text, &guarded)?
        });
        check_unique(file, &keys)?;
    }
    Ok(keys)
}

/// The policy of those who need no key.
pub(super) fn open_policy(policy: &PolicyOptions) -> Result<Policy, ConfigError> {
    overlay(Policy::open(), policy)
}

fn overlay(base: Policy, options: &PolicyOptions) -> Result<Policy, ConfigError> {
    let variants = (!options.allow_variants.is_empty()).then_some(&options.allow_variants);
    let policy = Policy {
        allow_variants: variants.map_or(base.allow_variants, |names| {
            names.iter().map(|name| name.0).collect()
        }),
        min_safety_bias: options.min_safety_bias.unwrap_or(base.min_safety_bias),
        min_safety_floor: options.min_safety_floor.unwrap_or(base.min_safety_floor),
        allow_helpfulness_bias: options
            .allow_helpfulness_bias
            .unwrap_or(base.allow_helpfulness_bias),
    };
    if policy.min_safety_bias.is_nan() {
        return Err(ConfigError::flag("min_safety_bias", "a number", "NaN"));
    }
    if !(0.0..=1.0).contains(&policy.min_safety_floor) {
        let found = policy.min_safety_floor;
        return Err(ConfigError::flag("min_safety_floor", "0 to 1", found));
    }
    Ok(policy)
}

fn read(file: &Path) -> Result<String, ConfigError> {
    let io = |source| ConfigError::Io {
        flag: "api-key-file",
        file: file.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(file).map_err(io)?.len();
    if bytes > FILE_BYTES_MAX {
        let expected = format!("a file of at most {FILE_BYTES_MAX} bytes");
        return Err(ConfigError::flag("api_key_file", expected, bytes));
    }
    std::fs::read_to_string(file).map_err(io)
}

fn from_lines(file: &Path, text: &str, policy: &Policy) -> Result<Vec<ApiKey>, ConfigError> {
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let secret: Secret = line.parse().map_err(|reason| ConfigError::Invalid {
            origin: file.display().to_string(),
            key: format!("line {}", index + 1),
            reason,
        })?;
        keys.push(ApiKey {
            name: format!("line-{}", index + 1),
            secret: secret.0,
            policy: policy.clone(),
        });
    }
    Ok(keys)
}

fn from_toml(file: &Path, text: &str, policy: &Policy) -> Result<Vec<ApiKey>, ConfigError> {
    let figment = Figment::from(Toml::string(text));
    let origin = || file.display().to_string();
    let tree: figment::value::Dict = figment
        .extract()
        .map_err(|error| file_error(file, None, error))?;
    if let Some(key) = tree.keys().find(|key| *key != "key") {
        return Err(unknown(origin(), key, ["key"].into_iter()));
    }
    let tables = tree.get("key").and_then(|keys| keys.as_array());
    for (index, table) in tables.unwrap_or_default().iter().enumerate() {
        for key in table.as_dict().into_iter().flat_map(|dict| dict.keys()) {
            if !ENTRY_KEYS.contains(&key.as_str()) {
                let origin = format!("{}: [[key]] {}", origin(), index + 1);
                return Err(unknown(origin, key, ENTRY_KEYS.into_iter()));
            }
        }
    }
    let entries: KeyFile = figment
        .extract()
        .map_err(|error| file_error(file, None, error))?;
    entries
        .key
        .into_iter()
        .map(|entry| {
            let options = PolicyOptions {
                allow_variants: entry.allow_variants.unwrap_or_default(),
                min_safety_bias: entry.min_safety_bias,
                min_safety_floor: entry.min_safety_floor,
                allow_helpfulness_bias: entry.allow_helpfulness_bias,
            };
            Ok(ApiKey {
                policy: overlay(policy.clone(), &options)?,
                name: entry.name,
                secret: entry.secret.0,
            })
        })
        .collect()
}

fn check_unique(file: &Path, keys: &[ApiKey]) -> Result<(), ConfigError> {
    let origin = file.display().to_string();
    let error = |key: String, expected: &str, found: String| ConfigError::Value {
        origin: origin.clone(),
        key,
        expected: expected.to_owned(),
        found,
    };
    if keys.is_empty() {
        // An operator who names a file of keys wants the API closed: an empty one must not open it.
        return Err(error("key".into(), "at least one key", "none".into()));
    }
    if keys.len() > KEYS_MAX {
        let expected = format!("at most {KEYS_MAX} keys");
        return Err(error("key".into(), &expected, keys.len().to_string()));
    }
    let mut names = HashSet::new();
    let mut secrets = HashSet::new();
    for key in keys {
        if !names.insert(&key.name) || !secrets.insert(&key.secret) {
            let found = "its name or its secret a second time".to_owned();
            return Err(error(key.name.clone(), "each key once", found));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::types::Variant;

    fn file() -> &'static Path {
        Path::new("keys.toml")
    }

    #[test]
    fn a_key_without_a_policy_may_only_raise_safety() {
        let text = "[[key]]\nname = \"app\"\nsecret = \"sk-1\"\n[[key]]\nname = \"lab\"\nsecret = \"sk-2\"\n\
                    allow_variants = [\"base\", \"both\"]\nmin_safety_bias = -4\nallow_helpfulness_bias = true";
        let keys = from_toml(file(), text, &Policy::guarded()).unwrap();
        assert_eq!(keys[0].policy, Policy::guarded());
        assert_eq!(
            keys[1].policy.allow_variants,
            [Variant::Base, Variant::Both]
        );
        assert_eq!(keys[1].policy.min_safety_bias, -4.0);
        assert!(keys[1].policy.allow_helpfulness_bias);
        assert!(!format!("{keys:?}").contains("sk-1"));
    }

    #[test]
    fn lines_are_keys_and_comments_are_not() {
        let keys = from_lines(file(), "# ours\nsk-1\n\n sk-2 \n", &Policy::guarded()).unwrap();
        let secrets: Vec<_> = keys.iter().map(|key| key.secret.as_str()).collect();
        assert_eq!(secrets, ["sk-1", "sk-2"]);
        assert!(from_lines(file(), "two words", &Policy::guarded()).is_err());
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        for (text, words) in [
            (
                "[[key]]\nnam = \"a\"\nsecret = \"b\"",
                &["keys.toml", "`nam`", "did you mean `name`?"][..],
            ),
            ("[[key]]\nname = \"a\"", &["keys.toml", "secret"]),
            ("keys = 1", &["`keys`", "did you mean `key`?"]),
            (
                "[[key]]\nname = \"a\"\nsecret = \"b\"\nmin_safety_floor = 2",
                &["min_safety_floor", "0 to 1", "2"],
            ),
            (
                "[[key]]\nname = \"a\"\nsecret = \"b\"\nallow_variants = [\"bass\"]",
                &["bass", "routed"],
            ),
        ] {
            let error = from_toml(file(), text, &Policy::guarded())
                .unwrap_err()
                .to_string();
            for word in words {
                assert!(error.contains(word), "{error}");
            }
        }
        let twice = from_lines(file(), "a\na", &Policy::guarded()).unwrap();
        assert!(check_unique(file(), &twice).is_err());
        assert!(check_unique(file(), &[]).is_err());
    }
}
