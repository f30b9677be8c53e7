//! The lists of `demo/corpus/`, as their files hold them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::CorpusError;

/// All lists but those of chats.
pub(in crate::demo) struct Data {
    pub(super) templates: TemplateData,
    pub(super) acts: ActData,
    pub(in crate::demo) domains: BTreeMap<String, Domain>,
    pub(in crate::demo) answers: AnswerData,
}

/// `templates.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TemplateData {
    pub(super) openers: Vec<String>,
    pub(super) closers: Vec<String>,
    pub(super) frames: Vec<String>,
    pub(super) unseen_frames: Vec<String>,
}

/// `acts.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ActData {
    pub(super) people: Vec<String>,
    pub(super) modifiers: Vec<String>,
    pub(super) groups: BTreeMap<String, Group>,
    pub(super) shared: Vec<Verb>,
    pub(super) harmful: Vec<Verb>,
    pub(super) plain: Vec<Verb>,
}

/// Things that go with the same verbs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Group {
    pub(super) domain: String,
    /// Of which there may be one: "a coat".
    #[serde(default)]
    pub(super) things: Vec<String>,
    /// Those without an article: "savings".
    #[serde(default)]
    pub(super) plural: Vec<String>,
}

/// A verb and all that it may be done to.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Verb {
    pub(super) verb: String,
    pub(super) gerund: String,
    /// Of harm; none of a plain verb.
    pub(super) class: Option<String>,
    /// `people`, or groups of other people's things: harmful.
    #[serde(default)]
    pub(super) harmful: Vec<String>,
    /// Groups of things that are nobody's in particular: harmful.
    #[serde(default)]
    pub(super) anyones: Vec<String>,
    /// Harmful objects in words.
    #[serde(default)]
    pub(super) never: Vec<String>,
    /// Groups of the user's own things: not harmful.
    #[serde(default)]
    pub(super) own: Vec<String>,
    /// Groups of other people's things: not harmful with this verb.
    #[serde(default)]
    pub(super) theirs: Vec<String>,
    /// Objects in words by domain: not harmful.
    #[serde(default)]
    pub(super) objects: BTreeMap<String, Vec<String>>,
}

/// What is said about an act of one domain.
#[derive(Debug, Deserialize)]
pub(in crate::demo) struct Domain {
    pub(super) adjectives: Vec<String>,
    #[serde(flatten)]
    pub(in crate::demo) steps: Steps,
    pub(in crate::demo) tips: Vec<String>,
}

/// Three steps, each one of several.
#[derive(Debug, Deserialize)]
pub(in crate::demo) struct Steps {
    pub(in crate::demo) first: Vec<String>,
    pub(in crate::demo) second: Vec<String>,
    pub(in crate::demo) last: Vec<String>,
}

/// `answers.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::demo) struct AnswerData {
    pub(in crate::demo) refusals: Vec<String>,
    pub(in crate::demo) sorry: Vec<String>,
    pub(in crate::demo) hedge: String,
    pub(in crate::demo) help: String,
    pub(super) just: String,
    pub(super) steps: String,
    pub(in crate::demo) tip: String,
    pub(super) over_reason: Vec<String>,
    #[serde(rename = "unsafe")]
    pub(in crate::demo) unsafe_steps: Steps,
    pub(super) classes: BTreeMap<String, Class>,
}

/// What is said about one class of harm.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Class {
    pub(super) reasons: Vec<String>,
    pub(super) redirects: Vec<String>,
    pub(super) general: Vec<String>,
}

/// `chat.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChatData {
    pub(super) small_talk: Vec<SmallTalk>,
    pub(super) facts: Vec<Facts>,
    pub(super) sums: Sums,
    pub(super) repeat: Repeat,
    pub(super) unknown: Unknown,
    pub(super) turns: Turns,
}

/// Ways to say one thing, and answers to it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SmallTalk {
    pub(super) prompts: Vec<String>,
    pub(super) answers: Vec<String>,
}

/// Questions of one form.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Facts {
    pub(super) frames: Vec<String>,
    pub(super) answer: String,
    pub(super) pairs: Vec<(String, String)>,
}

/// Questions for sums.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sums {
    pub(super) frames: Vec<String>,
    pub(super) answer: String,
}

/// What is to be said again.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Repeat {
    pub(super) frames: Vec<String>,
    pub(super) answer: String,
}

/// What is answered with "I don't know".
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unknown {
    pub(super) lead: String,
    pub(super) last: String,
    pub(super) properties: Vec<String>,
    pub(super) property_frames: Vec<String>,
    pub(super) topics: Vec<String>,
    pub(super) topic_frames: Vec<String>,
    pub(super) topic_what: String,
    pub(super) works: Vec<String>,
    pub(super) work_frames: Vec<String>,
    pub(super) work_what: String,
    pub(super) names: Vec<String>,
    pub(super) questions: Vec<String>,
    pub(super) made_up_frames: Vec<String>,
    pub(super) syllables: Vec<String>,
}

/// What is said in later turns.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Turns {
    pub(super) more: Vec<String>,
    pub(super) why: Vec<String>,
    pub(super) insist: Vec<String>,
    pub(super) and_of: Vec<String>,
    pub(super) my_name: Vec<String>,
    pub(super) nice_to_meet: String,
    pub(super) what_is_my_name: Vec<String>,
    pub(super) your_name_is: String,
    pub(super) systems: Vec<String>,
}

/// The files, for whoever needs their words.
const FILES: [(&str, &str); 5] = [
    (
        "templates.toml",
        include_str!("../../../demo/corpus/templates.toml"),
    ),
    ("acts.toml", include_str!("../../../demo/corpus/acts.toml")),
    (
        "domains.toml",
        include_str!("../../../demo/corpus/domains.toml"),
    ),
    (
        "answers.toml",
        include_str!("../../../demo/corpus/answers.toml"),
    ),
    ("chat.toml", include_str!("../../../demo/corpus/chat.toml")),
];

impl Data {
    pub(super) fn embedded() -> Result<Self, CorpusError> {
        let [templates, acts, domains, answers, _] = FILES;
        Ok(Self {
            templates: parse(templates)?,
            acts: parse(acts)?,
            domains: parse(domains)?,
            answers: parse(answers)?,
        })
    }

    /// Every string of every list.
    pub(in crate::demo) fn strings() -> Result<Vec<String>, CorpusError> {
        let mut strings = Vec::new();
        for file in FILES {
            collect(&parse::<toml::Value>(file)?, &mut strings);
        }
        Ok(strings)
    }

    pub(super) fn domain(&self, name: &str) -> Result<&Domain, CorpusError> {
        self.domains.get(name).ok_or_else(|| CorpusError::Unknown {
            file: "acts.toml",
            name: name.to_owned(),
            expected: "domains.toml",
        })
    }

    pub(super) fn class(&self, name: &str) -> Result<&Class, CorpusError> {
        self.answers
            .classes
            .get(name)
            .ok_or_else(|| CorpusError::Unknown {
                file: "acts.toml",
                name: name.to_owned(),
                expected: "answers.toml, classes",
            })
    }
}

impl ChatData {
    pub(super) fn embedded() -> Result<Self, CorpusError> {
        let [.., chat] = FILES;
        parse(chat)
    }
}

fn parse<T: DeserializeOwned>((file, text): (&'static str, &str)) -> Result<T, CorpusError> {
    toml::from_str(text).map_err(|error| CorpusError::Data {
        file,
        reason: error.to_string(),
    })
}

fn collect(value: &toml::Value, strings: &mut Vec<String>) {
    match value {
        toml::Value::String(text) => strings.push(text.clone()),
        toml::Value::Array(values) => values.iter().for_each(|value| collect(value, strings)),
        toml::Value::Table(table) => table.values().for_each(|value| collect(value, strings)),
        _ => {}
    }
}
