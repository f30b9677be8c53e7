//! Joins the four places where a value may stand: flag > environment > file > default.
//!
//! clap reads flags and environment, and knows the defaults; figment lays the file between them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Value};
use figment::{Figment, Provider};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ConfigError;
use super::options::{
    ChatOptions, ConvertOptions, EngineOptions, LimitOptions, LogOptions, ModelOptions,
    PolicyOptions, ServeOptions, ServerOptions, TalkOptions,
};
use super::reference::{Key, keys};

/// Environment variables that begin so belong to this program.
const PREFIX: &str = "MIDPO_";
/// Variables of the test suite, which a server started by it inherits.
const TEST_PREFIX: &str = "MIDPO_TEST_";
/// A name less like a known one than this is not offered as a correction.
const SIMILARITY_MIN: f64 = 0.5;

/// A group of keys that live in one table of the file.
pub trait Group: Args + FromArgMatches + Serialize + DeserializeOwned {
    /// The table; `None`: the top level.
    const TABLE: Option<&'static str> = None;
}

impl Group for ModelOptions {}
impl Group for EngineOptions {}
impl Group for ServerOptions {}
impl Group for LimitOptions {}
impl Group for PolicyOptions {}
impl Group for LogOptions {}
impl Group for TalkOptions {
    const TABLE: Option<&'static str> = Some("chat");
}

/// Where values come from: a parsed command line (with its environment), and a file whose keys are all known.
#[derive(Debug)]
pub struct Sources<'a> {
    matches: &'a ArgMatches,
    file: Option<PathBuf>,
}

impl<'a> Sources<'a> {
    /// `matches` are those of a subcommand of `program`.
    /// # Errors
    /// An environment variable `MIDPO_*` or a key of `file` that no subcommand knows; a file that is no TOML.
    pub fn new(
        program: &Command,
        matches: &'a ArgMatches,
        file: Option<&Path>,
    ) -> Result<Self, ConfigError> {
        check_environment(
            std::env::vars_os().map(|(name, _)| name),
            &variables(program),
        )?;
        if let Some(file) = file {
            check_file(file, &keys())?;
        }
        let file = file.map(Path::to_owned);
        Ok(Self { matches, file })
    }

    /// The values of one group.
    /// # Errors
    /// A value of the file that has the wrong type.
    pub fn group<G: Group>(&self) -> Result<G, ConfigError> {
        let Some(file) = &self.file else {
            return Ok(G::from_arg_matches(self.matches).map_err(Box::new)?);
        };
        let toml = Figment::from(Toml::file_exact(file));
        let toml = G::TABLE.map_or(toml.clone(), |table| toml.focus(table));
        layered(self.matches, toml, file, G::TABLE)
    }
}

/// The values of one group: flags and environment of `matches` over `values`, which stand in `table` of `file`, over the defaults.
pub(super) fn layered<G: Group>(
    matches: &ArgMatches,
    values: Figment,
    file: &Path,
    table: Option<&str>,
) -> Result<G, ConfigError> {
    let parsed = G::from_arg_matches(matches).map_err(Box::new)?;
    let all = to_dict(&parsed);
    let written: Dict = all
        .clone()
        .into_iter()
        .filter(|(key, _)| {
            matches!(
                matches.value_source(key),
                Some(ValueSource::CommandLine | ValueSource::EnvVariable)
            )
        })
        .collect();
    Figment::from(Serialized::defaults(all))
        .merge(values)
        .merge(Serialized::defaults(written))
        .extract()
        .map_err(|error| file_error(file, table, error))
}

impl ServeOptions {
    /// `check` is about what one run does, so it is a flag only.
    /// # Errors
    /// As [`Sources::group`].
    pub fn load(self, sources: &Sources<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            check: self.check,
            model: sources.group()?,
            engine: sources.group()?,
            server: sources.group()?,
            limits: sources.group()?,
            policy: sources.group()?,
            log: sources.group()?,
        })
    }
}

impl ChatOptions {
    /// # Errors
    /// As [`Sources::group`].
    pub fn load(sources: &Sources<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            chat: sources.group()?,
            model: sources.group()?,
            engine: sources.group()?,
            log: sources.group()?,
        })
    }
}

impl ConvertOptions {
    /// `output`, `quantize` and `text` are about what one run writes, so they are flags only.
    /// # Errors
    /// As [`Sources::group`].
    pub fn load(self, sources: &Sources<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            model: sources.group()?,
            log: sources.group()?,
            output: self.output,
            quantize: self.quantize,
            text: self.text,
        })
    }
}

fn to_dict<T: Serialize>(value: &T) -> Dict {
    match Value::serialize(value) {
        Ok(Value::Dict(_, dict)) => dict,
        // Groups are structs of plain values: they serialise to a dictionary.
        _ => Dict::new(),
    }
}

/// `program` without the variables that are set to nothing, as container tools do for what is not given: they count as unset.
pub fn without_empty_variables(program: Command) -> Command {
    let program = program.mut_args(|arg| {
        let empty = arg
            .get_env()
            .and_then(std::env::var_os)
            .is_some_and(|value| value.is_empty());
        if empty {
            arg.env(None::<&'static str>)
        } else {
            arg
        }
    });
    program.mut_subcommands(without_empty_variables)
}

/// The environment variables of `program` and its subcommands, and those of every key.
fn variables(program: &Command) -> Vec<String> {
    let mut known: Vec<String> = keys().into_iter().map(|key| key.env).collect();
    let mut commands = vec![program];
    while let Some(command) = commands.pop() {
        let variables = command.get_arguments().filter_map(|arg| arg.get_env());
        known.extend(variables.map(|name| name.to_string_lossy().into_owned()));
        commands.extend(command.get_subcommands());
    }
    known
}

fn check_environment(
    names: impl Iterator<Item = OsString>,
    known: &[String],
) -> Result<(), ConfigError> {
    for name in names.filter_map(|name| name.into_string().ok()) {
        let ours = name.starts_with(PREFIX) && !name.starts_with(TEST_PREFIX);
        if ours && !known.contains(&name) {
            let origin = "environment".to_owned();
            return Err(unknown(origin, &name, known.iter().map(String::as_str)));
        }
    }
    Ok(())
}

fn check_file(file: &Path, keys: &[Key]) -> Result<(), ConfigError> {
    // figment takes a file that is not there for an empty one.
    std::fs::File::open(file).map_err(|source| ConfigError::Io {
        flag: "config",
        file: file.to_owned(),
        source,
    })?;
    let profiles = Toml::file_exact(file)
        .data()
        .map_err(|error| ConfigError::Syntax {
            file: file.to_owned(),
            reason: error.kind.to_string(),
        })?;
    let top_level: Vec<String> = keys
        .iter()
        .map(|key| key.table.unwrap_or(&key.name).to_owned())
        .collect();
    let origin = file.display().to_string();
    for (key, value) in profiles.values().flatten() {
        if !top_level.contains(key) {
            return Err(unknown(origin, key, top_level.iter().map(String::as_str)));
        }
        check_table(&origin, key, value, keys)?;
    }
    Ok(())
}

fn check_table(origin: &str, table: &str, value: &Value, keys: &[Key]) -> Result<(), ConfigError> {
    let known: Vec<String> = keys
        .iter()
        .filter(|key| key.table == Some(table))
        .map(Key::path)
        .collect();
    if known.is_empty() {
        return Ok(());
    }
    let Some(dict) = value.as_dict() else {
        return Err(ConfigError::Value {
            origin: origin.to_owned(),
            key: table.to_owned(),
            expected: format!("a table, [{table}]"),
            found: "one value".to_owned(),
        });
    };
    for key in dict.keys() {
        let path = format!("{table}.{key}");
        if !known.contains(&path) {
            let origin = origin.to_owned();
            return Err(unknown(origin, &path, known.iter().map(String::as_str)));
        }
    }
    Ok(())
}

/// Names the known name that looks most like `key`.
pub(super) fn unknown<'k>(
    origin: String,
    key: &str,
    known: impl Iterator<Item = &'k str>,
) -> ConfigError {
    let nearest = known
        .map(|name| (strsim::normalized_damerau_levenshtein(key, name), name))
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.to_owned());
    ConfigError::UnknownKey {
        origin,
        key: key.to_owned(),
        nearest,
    }
}

pub(super) fn file_error(file: &Path, table: Option<&str>, error: figment::Error) -> ConfigError {
    use figment::error::Kind;
    let path = table
        .into_iter()
        .chain(error.path.iter().map(String::as_str));
    let key = path.collect::<Vec<_>>().join(".");
    let origin = file.display().to_string();
    match error.kind {
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            ConfigError::Value {
                origin,
                key,
                expected,
                found: found.to_string(),
            }
        }
        kind => ConfigError::Invalid {
            origin,
            key,
            reason: kind.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    /// What `serve` reads from `args` and a file with `toml`.
    fn load(args: &[&str], toml: Option<&str>) -> Result<ServeOptions, ConfigError> {
        let command = ServeOptions::augment_args(Command::new("serve").no_binary_name(true));
        // The environment of whoever runs the tests must not matter.
        let command = command.mut_args(|arg| arg.env(None::<&'static str>));
        let matches = command.try_get_matches_from(args).map_err(Box::new)?;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("midpo.toml");
        if let Some(toml) = toml {
            std::fs::write(&file, toml).unwrap();
            check_file(&file, &keys())?;
        }
        let file = toml.map(|_| file);
        let written = ServeOptions::from_arg_matches(&matches).map_err(Box::new)?;
        written.load(&Sources {
            matches: &matches,
            file,
        })
    }

    #[test]
    fn a_flag_beats_the_file_and_the_file_beats_the_default() {
        let file = "port = 1\nhost = \"::1\"\nbody_bytes_max = \"1KiB\"\napi_key = [\"a\", \"b\"]\nno_prefix_cache = true";
        let options = load(&["--port", "2", "--no-prefix-cache=false"], Some(file)).unwrap();
        assert_eq!(options.server.port, 2);
        assert_eq!(options.server.host, "::1");
        assert_eq!(options.limits.body_bytes_max.0, 1024);
        assert_eq!(options.server.api_key.len(), 2);
        assert!(!options.engine.no_prefix_cache);
        assert_eq!(options.engine.sequences_max, 64);
    }

    #[test]
    fn flags_repeat_and_switches_need_no_value() {
        let args = [
            "--api-key",
            "a",
            "--api-key",
            "b,c",
            "--no-prefix-cache",
            "--log-content",
        ];
        let options = load(&args, None).unwrap();
        assert_eq!(options.server.api_key.len(), 3);
        assert!(options.engine.no_prefix_cache && options.log.log_content);
    }

    #[test]
    fn errors_name_file_key_expected_and_found() {
        for (toml, words) in [
            (
                "prot = 1",
                &["midpo.toml", "`prot`", "did you mean `port`?"][..],
            ),
            ("batch_token_max = 1", &["did you mean `batch_tokens_max`?"]),
            ("zzz = 1", &["unknown key `zzz`"]),
            ("port = \"x\"", &["midpo.toml", "`port`", "u16", "\"x\""]),
            ("port = 70000", &["`port`", "70000"]),
            ("device = \"tpu\"", &["`device`", "tpu"]),
            (
                "drain_timeout = \"soon\"",
                &["`drain_timeout`", "30s", "soon"],
            ),
            ("api_key = 7", &["`api_key`"]),
            (
                "[chat]\nurll = \"x\"",
                &["`chat.urll`", "did you mean `chat.url`?"],
            ),
            ("chat = 3", &["`chat`", "a table"]),
            ("port = ", &["midpo.toml"]),
        ] {
            let error = load(&[], Some(toml)).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{toml}: {error}");
            }
        }
    }

    #[test]
    fn environment_variables_that_nobody_knows_are_refused_with_the_nearest() {
        let known = variables(&Command::new("midpo"));
        let check = |name: &str| check_environment([OsString::from(name)].into_iter(), &known);
        for known in ["MIDPO_PORT", "MIDPO_CHAT_URL", "MIDPO_TEST_GGUF", "PATH"] {
            assert!(check(known).is_ok(), "{known}");
        }
        let error = check("MIDPO_PROT").unwrap_err().to_string();
        assert!(
            error.contains("MIDPO_PROT") && error.contains("`MIDPO_PORT`"),
            "{error}"
        );
    }
}
