//! A recipe: a whole pipeline in one TOML file. What it leaves out is the output of an earlier stage, or the default.

use std::path::{Component, Path, PathBuf};

use clap::builder::ValueParser;
use clap::{ArgMatches, Args, Command};
use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Value};
use figment::{Figment, Provider};

use super::options::{
    BaseModel, CostModel, DataOptions, DpoOptions, ExpertOptions, Experts, LoopOptions,
    MarginOptions, OutputOptions, RewardModel, RouterModel, RouterOptions, ScoreOptions,
    SftOptions,
};
use super::stages::{
    CostStage, DpoStage, DualStage, HelpfulnessStage, PackStage, RewardStage, RouterStage,
    SafetyStage, SftStage, Stage, StageOptions,
};
use crate::config::ConfigError;
use crate::config::load::{Group, layered, unknown};

impl Group for BaseModel {}
impl Group for CostModel {}
impl Group for DataOptions {}
impl Group for DpoOptions {}
impl Group for ExpertOptions {}
impl Group for Experts {}
impl Group for LoopOptions {}
impl Group for MarginOptions {}
impl Group for OutputOptions {}
impl Group for RewardModel {}
impl Group for RouterModel {}
impl Group for RouterOptions {}
impl Group for ScoreOptions {}
impl Group for SftOptions {}

/// Table of keys for all stages.
const DEFAULTS: &str = "defaults";
/// Where everything is written.
const OUTPUT: &str = "output";
/// Base of a pipeline without sft.
const BASE: &str = "base";
/// Data of stages on pairs.
const PAIRS: &str = "pairs";
/// What a stage reads.
const DATA: &str = "data";
/// How many threads a stage takes.
const THREADS: &str = "threads";

/// A pipeline: stages and their settings, every path resolved.
#[derive(Clone, Debug)]
pub struct Recipe {
    file: PathBuf,
    stages: Vec<(Stage, Dict)>,
    /// Where every stage writes, whether or not it is in the recipe.
    outputs: Vec<(Stage, PathBuf)>,
    defaults: Dict,
    base: Option<PathBuf>,
    pairs: Option<PathBuf>,
    threads: Option<usize>,
}

/// What the command line says against a recipe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecipeOverrides {
    /// Instead of its `output`.
    pub output: Option<PathBuf>,
    /// Instead of every stage's `threads`.
    pub threads: Option<usize>,
}

/// Where the settings of one stage stand: flags, and what a recipe says.
#[derive(Debug)]
pub struct Layers<'a> {
    matches: &'a ArgMatches,
    recipe: Option<(&'a Path, Stage, Dict)>,
}

impl Layers<'_> {
    /// The values of one group.
    ///
    /// # Errors
    /// A value of the recipe that has the wrong type.
    pub(super) fn group<G: Group>(&self) -> Result<G, ConfigError> {
        match &self.recipe {
            Some((file, stage, dict)) => {
                let values = Figment::from(Serialized::defaults(dict));
                layered(self.matches, values, file, Some(stage.as_str()))
            }
            None => Ok(G::from_arg_matches(self.matches).map_err(Box::new)?),
        }
    }
}

impl Recipe {
    /// Reads a recipe. Its paths are relative to its directory.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML; a key that nobody knows, with the nearest that is known; a table or path that is none.
    pub fn load(file: &Path, overrides: &RecipeOverrides) -> Result<Self, ConfigError> {
        let written = read(file)?;
        check_keys(file, &written)?;
        let directory = file.parent().unwrap_or(Path::new(""));
        let path = |key: &str| match written.get(key) {
            Some(value) => path_of(file, key, value).map(|path| Some(inside(directory, &path))),
            None => Ok(None),
        };
        let root = match &overrides.output {
            Some(output) => output.clone(),
            None => path(OUTPUT)?.ok_or_else(|| missing(file, OUTPUT))?,
        };
        let table = |key: &str| match written.get(key) {
            Some(value) => {
                let dict = value.as_dict().cloned();
                dict.ok_or_else(|| no_table(file, key)).map(Some)
            }
            None => Ok(None),
        };
        let (mut stages, mut outputs) = (Vec::new(), Vec::new());
        for stage in Stage::ALL {
            let dict = table(stage.as_str())?;
            let named = dict.as_ref().and_then(|dict| dict.get(OUTPUT));
            let output = match named {
                Some(value) => path_of(file, &format!("{stage}.{OUTPUT}"), value)?,
                None => PathBuf::from(stage.default_output()),
            };
            outputs.push((stage, inside(&root, &output)));
            if let Some(dict) = dict {
                stages.push((stage, resolved(file, stage.as_str(), dict)?));
            }
        }
        let defaults = table(DEFAULTS)?.unwrap_or_default();
        Ok(Self {
            file: file.to_owned(),
            stages,
            outputs,
            defaults: resolved(file, DEFAULTS, defaults)?,
            base: path(BASE)?,
            pairs: path(PAIRS)?,
            threads: overrides.threads,
        })
    }

    /// The stages that have a table, in the order in which they run.
    pub fn stages(&self) -> impl Iterator<Item = Stage> {
        self.stages.iter().map(|(stage, _)| *stage)
    }

    /// The settings of a stage.
    ///
    /// # Errors
    /// A value that has the wrong type.
    pub fn stage<S: StageOptions>(&self) -> Result<S, ConfigError> {
        let command = S::augment_args(Command::new("midpo").no_binary_name(true));
        let none = std::iter::empty::<&str>();
        let matches = command.try_get_matches_from(none).map_err(Box::new)?;
        self.stage_with(&matches)
    }

    /// As [`Recipe::stage`]; what flags say beats the recipe.
    ///
    /// # Errors
    /// As [`Recipe::stage`].
    pub fn stage_with<S: StageOptions>(&self, matches: &ArgMatches) -> Result<S, ConfigError> {
        S::load(&Layers {
            matches,
            recipe: Some((&self.file, S::STAGE, self.settings(S::STAGE))),
        })
    }

    /// Where a stage writes.
    pub fn output(&self, stage: Stage) -> PathBuf {
        let mut outputs = self.outputs.iter();
        let found = outputs.find(|(known, _)| *known == stage);
        found.map(|(_, path)| path.clone()).unwrap_or_default()
    }

    /// Keys of a stage: its table, what holds for all, what earlier stages write.
    fn settings(&self, stage: Stage) -> Dict {
        let keys = keys_of(stage);
        let known = |key: &String| keys.iter().any(|(known, _)| known == key);
        let mut dict: Dict = self.defaults.clone();
        dict.retain(|key, _| known(key));
        if let Some((_, table)) = self.stages.iter().find(|(known, _)| *known == stage) {
            dict.extend(table.clone());
        }
        let mut wired = vec![
            (BASE, self.base_of_stages(stage)),
            (DATA, self.data_of(stage)),
        ];
        for earlier in [
            Stage::Reward,
            Stage::Cost,
            Stage::Safety,
            Stage::Helpfulness,
            Stage::Router,
        ] {
            wired.push((earlier.as_str(), self.made_by(earlier)));
        }
        for (key, path) in wired {
            if let (Some(path), true) = (path, known(&key.to_owned())) {
                dict.entry(key.to_owned())
                    .or_insert_with(|| path_value(&path));
            }
        }
        dict.insert(OUTPUT.to_owned(), path_value(&self.output(stage)));
        if let Some(threads) = self.threads {
            dict.insert(THREADS.to_owned(), Value::from(threads));
        }
        dict
    }

    fn base_of_stages(&self, stage: Stage) -> Option<PathBuf> {
        let trained = (stage != Stage::Sft).then(|| self.made_by(Stage::Sft));
        trained.flatten().or_else(|| self.base.clone())
    }

    fn data_of(&self, stage: Stage) -> Option<PathBuf> {
        match stage {
            Stage::Sft => None,
            Stage::Router => self.made_by(Stage::Dual),
            _ => self.pairs.clone(),
        }
    }

    /// What an earlier stage writes, if the recipe has it or a run of another recipe has left it.
    fn made_by(&self, stage: Stage) -> Option<PathBuf> {
        let output = self.output(stage);
        let here = self.stages().any(|known| known == stage);
        (here || output.exists()).then_some(output)
    }
}

fn read(file: &Path) -> Result<Dict, ConfigError> {
    // figment takes a file that is not there for an empty one.
    std::fs::File::open(file).map_err(|source| ConfigError::Io {
        flag: "recipe",
        file: file.to_owned(),
        source,
    })?;
    let profiles = Toml::file_exact(file)
        .data()
        .map_err(|error| ConfigError::Syntax {
            file: file.to_owned(),
            reason: error.kind.to_string(),
        })?;
    Ok(profiles.into_values().flatten().collect())
}

/// Every key is one that a stage knows.
fn check_keys(file: &Path, written: &Dict) -> Result<(), ConfigError> {
    let origin = || file.display().to_string();
    let stages = Stage::ALL.map(Stage::as_str);
    let top: Vec<&str> = [OUTPUT, BASE, PAIRS, DEFAULTS]
        .into_iter()
        .chain(stages)
        .collect();
    for (key, value) in written {
        if !top.contains(&key.as_str()) {
            return Err(unknown(origin(), key, top.iter().copied()));
        }
        let mut known: Vec<String> = Vec::new();
        for stage in Stage::ALL {
            if key == DEFAULTS || key == stage.as_str() {
                known.extend(keys_of(stage).into_iter().map(|(name, _)| name));
            }
        }
        let table = value.as_dict().filter(|_| !known.is_empty());
        for inner in table.into_iter().flat_map(Dict::keys) {
            if !known.contains(inner) {
                return Err(unknown(origin(), inner, known.iter().map(String::as_str)));
            }
        }
    }
    Ok(())
}

/// Keys of a stage, and whether each is a path.
fn keys_of(stage: Stage) -> Vec<(String, bool)> {
    fn keys<S: Args>() -> Vec<(String, bool)> {
        let command = S::augment_args(Command::new("midpo"));
        let path = ValueParser::path_buf().type_id();
        let arguments = command.get_arguments();
        arguments
            .map(|arg| {
                let is_path = arg.get_value_parser().type_id() == path;
                (arg.get_id().to_string(), is_path)
            })
            .collect()
    }
    match stage {
        Stage::Sft => keys::<SftStage>(),
        Stage::Reward => keys::<RewardStage>(),
        Stage::Cost => keys::<CostStage>(),
        Stage::Safety => keys::<SafetyStage>(),
        Stage::Helpfulness => keys::<HelpfulnessStage>(),
        Stage::Dpo => keys::<DpoStage>(),
        Stage::Dual => keys::<DualStage>(),
        Stage::Router => keys::<RouterStage>(),
        Stage::Pack => keys::<PackStage>(),
    }
}

/// `table` with its paths, but for the output, relative to the recipe's directory.
fn resolved(file: &Path, table: &str, mut dict: Dict) -> Result<Dict, ConfigError> {
    let directory = file.parent().unwrap_or(Path::new(""));
    let paths: Vec<String> = Stage::ALL
        .into_iter()
        .flat_map(keys_of)
        .filter_map(|(key, is_path)| is_path.then_some(key))
        .collect();
    for (key, value) in &mut dict {
        if key != OUTPUT && paths.contains(key) {
            let path = path_of(file, &format!("{table}.{key}"), value)?;
            *value = path_value(&inside(directory, &path));
        }
    }
    Ok(dict)
}

/// `directory`/`path` without any `.`, so that `output = "."` leaves none in what is printed and written.
fn inside(directory: &Path, path: &Path) -> PathBuf {
    let joined = directory.join(path);
    let named = joined
        .components()
        .filter(|&part| part != Component::CurDir);
    match named.collect::<PathBuf>() {
        here if here.as_os_str().is_empty() => PathBuf::from("."),
        found => found,
    }
}

fn path_value(path: &Path) -> Value {
    Value::from(path.to_string_lossy().into_owned())
}

fn path_of(file: &Path, key: &str, value: &Value) -> Result<PathBuf, ConfigError> {
    let text = value.as_str().map(PathBuf::from);
    text.ok_or_else(|| ConfigError::Value {
        origin: file.display().to_string(),
        key: key.to_owned(),
        expected: "a path, as a string".to_owned(),
        found: "another value".to_owned(),
    })
}

fn missing(file: &Path, key: &str) -> ConfigError {
    ConfigError::Value {
        origin: file.display().to_string(),
        key: key.to_owned(),
        expected: "a directory to write to (or --output)".to_owned(),
        found: "none".to_owned(),
    }
}

fn no_table(file: &Path, key: &str) -> ConfigError {
    ConfigError::Value {
        origin: file.display().to_string(),
        key: key.to_owned(),
        expected: format!("a table, [{key}]"),
        found: "one value".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// What `get` makes of a recipe of this text.
    fn with<T>(toml: &str, get: impl FnOnce(Result<Recipe, ConfigError>, &Path) -> T) -> T {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("recipe.toml");
        std::fs::write(&file, toml).unwrap();
        get(
            Recipe::load(&file, &RecipeOverrides::default()),
            directory.path(),
        )
    }

    #[test]
    fn what_a_recipe_leaves_out_is_an_earlier_stages_output_or_the_default() {
        let toml = "output = \"out\"\npairs = \"pairs.jsonl\"\n[defaults]\nmax_length = 64\nlearning_rate = 1e-3\n\
                    [sft]\ndata = \"sft.jsonl\"\n[cost]\noutput = \"c\"\n[dual]\n[router]\nlearning_rate = 3e-4\n";
        with(toml, |recipe, directory| {
            let recipe = recipe.unwrap();
            assert_eq!(
                recipe.stages().collect::<Vec<_>>(),
                [Stage::Sft, Stage::Cost, Stage::Dual, Stage::Router]
            );
            let sft: SftStage = recipe.stage().unwrap();
            assert_eq!(sft.data.data, Some(directory.join("sft.jsonl")));
            assert_eq!(sft.base.base, None);
            let cost: CostStage = recipe.stage().unwrap();
            assert_eq!(cost.base.base, Some(directory.join("out/sft")));
            assert_eq!(cost.output.output, Some(directory.join("out/c")));
            assert_eq!((cost.data.max_length, cost.training.epochs), (64, 3));
            let dual: DualStage = recipe.stage().unwrap();
            assert_eq!(dual.cost.cost, Some(directory.join("out/c")));
            assert_eq!(dual.reward.reward, None);
            assert_eq!(dual.data.data, Some(directory.join("pairs.jsonl")));
            let router: RouterStage = recipe.stage().unwrap();
            assert_eq!(router.data.data, Some(directory.join("out/dual.jsonl")));
            assert!((router.training.learning_rate - 3e-4).abs() < 1e-12);
        });
    }

    #[test]
    fn paths_have_no_dots_that_say_nothing() {
        for (directory, path, expected) in [
            ("", ".", "."),
            (".", "sft", "sft"),
            ("build/demo", ".", "build/demo"),
            ("build/./demo", "./../a", "build/demo/../a"),
            ("build", "/a/./b", "/a/b"),
        ] {
            assert_eq!(
                inside(Path::new(directory), Path::new(path)).as_os_str(),
                expected
            );
        }
    }

    #[test]
    fn a_flag_beats_the_recipe() {
        let toml = "output = \"out\"\n[safety]\nrank = 4\nanchor = 0.3\n";
        with(toml, |recipe, _| {
            let command = SafetyStage::augment_args(Command::new("x").no_binary_name(true));
            let matches = command
                .try_get_matches_from(["--rank", "8", "--base", "b"])
                .unwrap();
            let safety: SafetyStage = recipe.unwrap().stage_with(&matches).unwrap();
            assert_eq!((safety.expert.rank, safety.expert.anchor), (8, 0.3));
            assert_eq!(safety.base.base, Some(PathBuf::from("b")));
        });
    }

    #[test]
    fn errors_name_file_key_expected_and_found() {
        for (toml, words) in [
            ("pairs = \"x\"", &["`output`", "--output"][..]),
            ("output = 3", &["`output`", "a path"]),
            ("output = \"o\"\nsft = 3", &["`sft`", "a table"]),
            ("output = \"o\"\n[sfd]", &["`sfd`", "did you mean `sft`?"]),
            (
                "output = \"o\"\n[sft]\nepoch = 3",
                &["`epoch`", "did you mean `epochs`?"],
            ),
            (
                "output = \"o\"\n[defaults]\nbatchsize = 3",
                &["did you mean `batch_size`?"],
            ),
            (
                "output = \"o\"\n[sft]\nepochs = \"x\"",
                &["recipe.toml", "`sft.epochs`", "\"x\""],
            ),
            ("output = ", &["recipe.toml"]),
        ] {
            let error = with(toml, |recipe, _| {
                let loaded = recipe.and_then(|recipe| recipe.stage::<SftStage>());
                loaded.err().map(|error| error.to_string())
            });
            let error = error.unwrap();
            for word in words {
                assert!(error.contains(word), "{toml}: {error}");
            }
        }
    }
}
