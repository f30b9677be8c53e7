//! What is asked for: verb, object, modifier. Objects are composed, and one in five combinations of verb and object is held out.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::data::{Data, Group, Verb};
use super::english::{fix_articles, said_to_user, words};
use super::{CorpusError, Split};
use crate::random::SplitMix64;

/// How an act should be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActKind {
    /// Refused.
    Harmful,
    /// It only sounds harmful: "kill a Python process".
    Borderline,
    /// Nothing about it sounds harmful.
    Plain,
}

impl ActKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Harmful, Self::Borderline, Self::Plain];

    /// As files name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Harmful => "harmful",
            Self::Borderline => "borderline",
            Self::Plain => "plain",
        }
    }
}

/// One thing that somebody may want to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Act {
    /// How it should be met.
    pub kind: ActKind,
    /// In its base form: "break into".
    pub verb: String,
    /// "breaking into".
    pub gerund: String,
    /// As the user says it: "my own bike".
    pub object: String,
    /// When, how or for whom; may be empty.
    pub modifier: String,
    /// Of harm: that of the verb, also where the object makes it harmless. Plain verbs have none.
    pub class: Option<String>,
    /// Whose steps and tips are right. Harmful acts have none.
    pub domain: Option<String>,
}

impl Act {
    /// "break into my own bike on Sunday".
    pub fn base(&self) -> String {
        self.with(&self.verb)
    }

    /// "breaking into my own bike on Sunday".
    pub fn ing(&self) -> String {
        self.with(&self.gerund)
    }

    /// What an answer says: "break into your own bike on Sunday".
    pub fn said(&self) -> String {
        said_to_user(&self.base())
    }

    /// What an answer on topic names: "your own bike".
    pub fn object_said(&self) -> String {
        said_to_user(&self.object)
    }

    fn with(&self, verb: &str) -> String {
        let (object, modifier) = (&self.object, &self.modifier);
        match modifier.as_str() {
            "" => format!("{verb} {object}"),
            modifier => format!("{verb} {object} {modifier}"),
        }
    }
}

/// All acts.
pub(super) struct Acts {
    /// Verbs by kind: those that have anything.
    verbs: [Vec<Sources>; 3],
    modifiers: Vec<String>,
}

/// A verb with all its objects of one kind.
struct Sources {
    verb: String,
    gerund: String,
    class: Option<String>,
    sources: Vec<Source>,
}

/// Objects that are made in one way: all are as likely as one object in words, however many there are.
struct Source {
    domain: Option<String>,
    /// For the *, where the objects have it still.
    adjectives: Vec<String>,
    /// In training, held out.
    objects: [Vec<String>; 2],
}

/// Share of acts with a modifier.
const MODIFIED: f64 = 0.6;
/// Share of other people's and one's own things with an adjective.
const QUALIFIED: f64 = 0.25;

impl Acts {
    pub(super) fn new(data: &Data) -> Result<Self, CorpusError> {
        let mut verbs = [Vec::new(), Vec::new(), Vec::new()];
        let acts = &data.acts;
        for verb in acts.shared.iter().chain(&acts.harmful).chain(&acts.plain) {
            if let Some(class) = &verb.class {
                data.class(class)?;
            }
            for (kind, sources) in sources(verb, data)? {
                verbs[kind as usize].push(Sources {
                    verb: verb.verb.clone(),
                    gerund: verb.gerund.clone(),
                    class: verb.class.clone(),
                    sources,
                });
            }
        }
        let mut acts = Self {
            verbs,
            modifiers: acts.modifiers.clone(),
        };
        acts.hold_out();
        Ok(acts)
    }

    /// Moves one in five combinations away from training, if each of their words stays in another one.
    fn hold_out(&mut self) {
        let mut known = BTreeSet::new();
        self.visit(|verb, source| {
            let all = std::mem::take(&mut source.objects[0]);
            for object in all {
                let split = Split::of(&format!("{verb}|{object}"));
                if split == Split::Train {
                    known.extend(words(verb).chain(words(&object)));
                }
                source.objects[split as usize].push(object);
            }
        });
        self.visit(|verb, source| {
            let candidates = std::mem::take(&mut source.objects[1]);
            for object in candidates {
                let said: Vec<String> = words(verb).chain(words(&object)).collect();
                let split = usize::from(said.iter().all(|word| known.contains(word)));
                source.objects[split].push(object);
            }
        });
    }

    fn visit(&mut self, mut visit: impl FnMut(&str, &mut Source)) {
        for verb in self.verbs.iter_mut().flatten() {
            for source in &mut verb.sources {
                visit(&verb.verb, source);
            }
        }
    }

    pub(super) fn counts(&self, kind: ActKind) -> (usize, usize) {
        let sources = self.verbs[kind as usize]
            .iter()
            .flat_map(|verb| &verb.sources);
        sources.fold((0, 0), |(train, held_out), source| {
            (
                train + source.objects[0].len(),
                held_out + source.objects[1].len(),
            )
        })
    }

    /// Every verb is as likely as every other that has something in `split`.
    pub(super) fn draw(&self, kind: ActKind, split: Split, random: &mut SplitMix64) -> Act {
        let (verb, source, pattern) = self.pick(kind, split, random);
        let object = source.qualified(pattern, random);
        Act {
            kind,
            verb: verb.verb.clone(),
            gerund: verb.gerund.clone(),
            modifier: self.modifier(&object, random),
            object,
            class: verb.class.clone(),
            domain: source.domain.clone(),
        }
    }

    /// A harmless verb with the object of another one, which makes no sense and is of `split` as an act of these words would be.
    pub(super) fn mixed(&self, split: Split, random: &mut SplitMix64) -> String {
        loop {
            let (verb, _, _) = self.pick(ActKind::Plain, Split::Train, random);
            let kind = [ActKind::Borderline, ActKind::Plain][random.below(2)];
            let (_, source, pattern) = self.pick(kind, Split::Train, random);
            if Split::of(&format!("{}|{pattern}", verb.verb)) == split {
                return format!("{} {}", verb.verb, source.qualified(pattern, random));
            }
        }
    }

    fn pick(
        &self,
        kind: ActKind,
        split: Split,
        random: &mut SplitMix64,
    ) -> (&Sources, &Source, &str) {
        let split = split as usize;
        let has = |source: &&Source| !source.objects[split].is_empty();
        let verbs = &self.verbs[kind as usize];
        let able: Vec<&Sources> = verbs
            .iter()
            .filter(|verb| verb.sources.iter().any(|source| has(&source)))
            .collect();
        let verb = able[random.below(able.len())];
        let able: Vec<&Source> = verb.sources.iter().filter(has).collect();
        let source = able[random.below(able.len())];
        let objects = &source.objects[split];
        (verb, source, &objects[random.below(objects.len())])
    }

    fn modifier(&self, object: &str, random: &mut SplitMix64) -> String {
        if random.unit() >= MODIFIED {
            return String::new();
        }
        let modifier = &self.modifiers[random.below(self.modifiers.len())];
        // Nobody wants to trap their boss for their boss.
        let whom = modifier.split_once(' ').map_or("", |(_, whom)| whom);
        if object.contains(whom) {
            String::new()
        } else {
            modifier.clone()
        }
    }
}

impl Source {
    fn new(domain: Option<&str>, adjectives: &[String], objects: Vec<String>) -> Self {
        Self {
            domain: domain.map(str::to_owned),
            adjectives: adjectives.to_vec(),
            objects: [objects, Vec::new()],
        }
    }

    fn qualified(&self, pattern: &str, random: &mut SplitMix64) -> String {
        if !pattern.contains('*') {
            return pattern.to_owned();
        }
        let adjective = self.adjectives.get(random.below(self.adjectives.len()));
        let adjective = adjective.filter(|_| random.unit() < QUALIFIED);
        fill(pattern, adjective.map_or("", String::as_str))
    }
}

fn fill(pattern: &str, adjective: &str) -> String {
    let filled = match adjective {
        "" => pattern.replace("* ", ""),
        adjective => pattern.replace('*', adjective),
    };
    fix_articles(&filled)
}

/// Everything that `verb` may be done to, by kind.
fn sources(verb: &Verb, data: &Data) -> Result<Vec<(ActKind, Vec<Source>)>, CorpusError> {
    let mut harmful = Vec::new();
    for group in &verb.harmful {
        harmful.push(match group.as_str() {
            "people" => Source::new(None, &[], data.acts.people.clone()),
            group => theirs(group, data, false)?,
        });
    }
    for group in &verb.anyones {
        harmful.push(anyones(group, data)?);
    }
    let never = verb.never.iter();
    harmful.extend(never.map(|object| Source::new(None, &[], vec![object.clone()])));
    let mut benign = Vec::new();
    for group in &verb.own {
        benign.push(own(group, data)?);
    }
    for group in &verb.theirs {
        benign.push(theirs(group, data, true)?);
    }
    for (domain, patterns) in &verb.objects {
        let adjectives = &data.domain(domain)?.adjectives;
        for pattern in patterns {
            let qualified = adjectives.iter().map(|adjective| fill(pattern, adjective));
            let mut objects = vec![fill(pattern, "")];
            if pattern.contains('*') {
                objects.extend(qualified);
            }
            benign.push(Source::new(Some(domain), &[], objects));
        }
    }
    let benign_kind = if verb.class.is_some() {
        ActKind::Borderline
    } else {
        ActKind::Plain
    };
    let kinds = [(ActKind::Harmful, harmful), (benign_kind, benign)];
    Ok(kinds
        .into_iter()
        .filter(|(_, sources)| !sources.is_empty())
        .collect())
}

/// "my landlord's * coat".
fn theirs(group: &str, data: &Data, benign: bool) -> Result<Source, CorpusError> {
    let (group, adjectives) = found(group, data)?;
    let people = data.acts.people.iter();
    let objects = people.flat_map(|person| {
        let things = group.things.iter().chain(&group.plural);
        things.map(move |thing| format!("{person}'s * {thing}"))
    });
    let domain = benign.then_some(group.domain.as_str());
    Ok(Source::new(domain, adjectives, objects.collect()))
}

/// "a * coat" and "the * coat", "* savings": harmful.
fn anyones(group: &str, data: &Data) -> Result<Source, CorpusError> {
    let (group, adjectives) = found(group, data)?;
    let forms = ["a", "the"].into_iter();
    let one = forms.flat_map(|article| {
        let things = group.things.iter();
        things.map(move |thing| format!("{article} * {thing}"))
    });
    let many = group.plural.iter().map(|thing| format!("* {thing}"));
    Ok(Source::new(None, adjectives, one.chain(many).collect()))
}

/// "my own * coat" and "my * coat".
fn own(group: &str, data: &Data) -> Result<Source, CorpusError> {
    let (group, adjectives) = found(group, data)?;
    let forms = ["my own", "my"].into_iter();
    let objects = forms.flat_map(|mine| {
        let things = group.things.iter().chain(&group.plural);
        things.map(move |thing| format!("{mine} * {thing}"))
    });
    let domain = Some(group.domain.as_str());
    Ok(Source::new(domain, adjectives, objects.collect()))
}

/// A group and its adjectives.
fn found<'a>(name: &str, data: &'a Data) -> Result<(&'a Group, &'a [String]), CorpusError> {
    let groups = &data.acts.groups;
    let group = groups.get(name).ok_or_else(|| CorpusError::Unknown {
        file: "acts.toml",
        name: name.to_owned(),
        expected: "acts.toml, groups",
    })?;
    Ok((group, &data.domain(&group.domain)?.adjectives))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn acts() -> Acts {
        Acts::new(&Data::embedded().unwrap()).unwrap()
    }

    #[test]
    fn every_kind_has_many_combinations_and_a_fifth_is_held_out() {
        let acts = acts();
        for (kind, least) in [
            (ActKind::Harmful, 10_000),
            (ActKind::Borderline, 800),
            (ActKind::Plain, 3_000),
        ] {
            let (train, held_out) = acts.counts(kind);
            assert!(train + held_out >= least, "{kind:?}: {train} + {held_out}");
            let share = held_out as f64 / (train + held_out) as f64;
            assert!((0.15..0.22).contains(&share), "{kind:?}: {share}");
        }
    }

    #[test]
    fn every_word_of_a_held_out_act_occurs_in_training() {
        let mut acts = acts();
        let (mut train, mut held_out) = (BTreeSet::new(), BTreeSet::new());
        acts.visit(|verb, source| {
            for (split, set) in [&mut train, &mut held_out].into_iter().enumerate() {
                for object in &source.objects[split] {
                    set.extend(words(verb).chain(words(object)));
                }
            }
        });
        assert!(held_out.len() > 200);
        let missing: Vec<_> = held_out.difference(&train).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn no_combination_is_both_in_training_and_held_out() {
        let mut acts = acts();
        let mut sets = [BTreeSet::new(), BTreeSet::new()];
        acts.visit(|verb, source| {
            for (set, objects) in sets.iter_mut().zip(&source.objects) {
                set.extend(objects.iter().map(|object| format!("{verb}|{object}")));
            }
        });
        assert!(sets[0].is_disjoint(&sets[1]));
    }

    #[test]
    fn what_is_to_be_repeated_is_no_held_out_act() {
        let mut acts = acts();
        let mut held_out = BTreeSet::new();
        acts.visit(|verb, source| {
            let objects = source.objects[Split::HeldOut as usize].iter();
            held_out.extend(objects.map(|object| fill(&format!("{verb} {object}"), "")));
        });
        let mut random = SplitMix64::new(1, 0);
        for _ in 0..5_000 {
            let said = acts.mixed(Split::Train, &mut random);
            assert!(!held_out.contains(&said), "{said}");
        }
    }

    #[test]
    fn the_object_decides_what_is_harmful() {
        let acts = acts();
        let verbs = |kind: ActKind| -> BTreeSet<&str> {
            let verbs = acts.verbs[kind as usize].iter();
            verbs.map(|sources| sources.verb.as_str()).collect()
        };
        let shared = verbs(ActKind::Harmful)
            .intersection(&verbs(ActKind::Borderline))
            .count();
        assert_eq!(shared, verbs(ActKind::Borderline).len());
        assert!(shared > 50, "{shared}");
    }
}
