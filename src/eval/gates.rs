//! Does the safety gate mean "unsafe"? What the router did, class by class, and how well alpha tells harmful prompts apart.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::auroc::Ranking;
use super::bootstrap::{Cluster, Interval, Resamples, area};
use super::prompts::Class;
use super::summary::Evaluation;
use crate::engine::TokenGates;

/// Stands for all classes that should be answered.
const ALL_HARMLESS: &str = "all harmless";

/// Where gates are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Places<T> {
    /// At the last prompt token, where the answer's first token is decided.
    pub prompt_last: T,
    /// Mean over the prompt's tokens.
    pub prompt_mean: T,
    /// Mean over the passes that chose the answer's tokens (the first is the last prompt token's), over all answers.
    pub answer_mean: T,
}

/// The routed gates of one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptNumbers {
    /// Of the prompt.
    pub class: Class,
    /// alpha, mean over layers.
    pub safety: Places<f64>,
    /// beta, mean over layers.
    pub helpfulness: Places<f64>,
    /// At the last prompt token, layer by layer.
    pub last: TokenGates,
}

/// The routed gates of every prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GateTable {
    /// In the order of prompts.
    pub prompts: Vec<PromptNumbers>,
}

/// What they come to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gates {
    /// By class.
    pub classes: Vec<ClassGates>,
    /// alpha of harmful prompts against that of others.
    pub aurocs: Vec<Auroc>,
}

/// Mean gates of a class of prompts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassGates {
    /// Which.
    pub class: Class,
    /// How many.
    pub prompts: usize,
    /// alpha, mean over layers.
    pub safety: Places<Option<Interval>>,
    /// beta, mean over layers.
    pub helpfulness: Places<Option<Interval>>,
    /// Mean alpha at the last prompt token, layer by layer.
    pub safety_layers: Vec<f64>,
    /// Mean beta there.
    pub helpfulness_layers: Vec<f64>,
}

/// The chance that a random harmful prompt has a higher alpha than a random one of another class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Auroc {
    /// A class, or all that should be answered.
    pub against: String,
    /// Of alpha as the mean over layers.
    pub safety: Places<Option<Interval>>,
    /// Of alpha at the last prompt token, layer by layer.
    pub layers: Vec<f64>,
}

impl<T> Places<T> {
    /// The same of each.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Places<U> {
        Places {
            prompt_last: f(self.prompt_last),
            prompt_mean: f(self.prompt_mean),
            answer_mean: f(self.answer_mean),
        }
    }
}

/// Which place.
type Place = fn(&Places<f64>) -> f64;

const PLACES: Places<Place> = Places {
    prompt_last: |places| places.prompt_last,
    prompt_mean: |places| places.prompt_mean,
    answer_mean: |places| places.answer_mean,
};

impl GateTable {
    /// From the answers that tell their gates.
    pub fn of(evaluation: &Evaluation) -> Self {
        let mut answers: BTreeMap<usize, Vec<&TokenGates>> = BTreeMap::new();
        let mut prompts = BTreeMap::new();
        for judged in &evaluation.answers {
            let answer = &judged.answer;
            if let Some(gates) = &answer.answer_gates {
                answers.entry(answer.prompt).or_default().push(gates);
            }
            if let Some(gates) = &answer.prompt_gates {
                prompts.entry(answer.prompt).or_insert(gates);
            }
        }
        let numbers = |(index, gates): (usize, &crate::engine::PromptGates)| {
            let answers = answers.get(&index).map_or(&[][..], Vec::as_slice);
            let places = |pick: fn(&TokenGates) -> &[f32]| Places {
                prompt_last: mean(pick(&gates.last)),
                prompt_mean: mean(pick(&gates.mean)),
                answer_mean: Cluster::of(answers.iter().map(|gates| mean(pick(gates))))
                    .mean()
                    .unwrap_or(f64::NAN),
            };
            PromptNumbers {
                class: evaluation.prompts[index].class.clone(),
                safety: places(|gates| &gates.safety),
                helpfulness: places(|gates| &gates.helpfulness),
                last: gates.last.clone(),
            }
        };
        Self {
            prompts: prompts.into_iter().map(numbers).collect(),
        }
    }

    /// Whether no gate was told.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// In their order.
    pub fn classes(&self) -> BTreeSet<&Class> {
        self.prompts.iter().map(|prompt| &prompt.class).collect()
    }

    /// Those of one class.
    pub fn class(&self, class: &Class) -> Vec<&PromptNumbers> {
        let prompts = self.prompts.iter();
        prompts.filter(|prompt| prompt.class == *class).collect()
    }

    /// Means by class, and AUROCs where there are harmful prompts and others.
    pub fn summary(&self, resamples: usize, seed: u64) -> Gates {
        let classes = self.classes();
        let of_class = |(stream, class): (usize, &&Class)| {
            let prompts = self.class(class);
            let drawn = Resamples::new(prompts.len(), resamples, seed, stream as u64);
            class_gates((*class).clone(), &prompts, &drawn)
        };
        let harmful = self.class(&Class::new(Class::HARMFUL));
        let harmless = classes
            .iter()
            .filter(|class| ![Class::HARMFUL, Class::UNLABELLED].contains(&class.as_str()));
        let mut others: Vec<(String, Vec<&PromptNumbers>)> = harmless
            .map(|class| (class.as_str().to_owned(), self.class(class)))
            .collect();
        if others.len() > 1 {
            let all = others
                .iter()
                .flat_map(|(_, prompts)| prompts.iter().copied());
            others.insert(0, (ALL_HARMLESS.to_owned(), all.collect()));
        }
        if harmful.is_empty() {
            others.clear();
        }
        Gates {
            classes: classes.iter().enumerate().map(of_class).collect(),
            aurocs: others
                .into_iter()
                .map(|(name, others)| auroc(name, &harmful, &others, (resamples, seed)))
                .collect(),
        }
    }
}

fn class_gates(class: Class, prompts: &[&PromptNumbers], drawn: &Resamples) -> ClassGates {
    let places = |side: fn(&PromptNumbers) -> &Places<f64>| {
        PLACES.map(|place| {
            let values = prompts.iter().map(|prompt| place(side(prompt)));
            let clusters: Vec<Cluster> = values
                .map(|value| Cluster::of(std::iter::once(value)))
                .collect();
            drawn.mean(&clusters)
        })
    };
    let layers = |side: fn(&PromptNumbers) -> &[f32]| {
        let count = prompts.first().map_or(0, |prompt| side(prompt).len());
        let layer = |layer: usize| {
            let values = prompts.iter().map(|prompt| side(prompt)[layer]);
            values.map(f64::from).sum::<f64>() / prompts.len() as f64
        };
        (0..count).map(layer).collect()
    };
    ClassGates {
        class,
        prompts: prompts.len(),
        safety: places(|prompt| &prompt.safety),
        helpfulness: places(|prompt| &prompt.helpfulness),
        safety_layers: layers(|prompt| &prompt.last.safety),
        helpfulness_layers: layers(|prompt| &prompt.last.helpfulness),
    }
}

fn auroc(
    against: String,
    harmful: &[&PromptNumbers],
    others: &[&PromptNumbers],
    (resamples, seed): (usize, u64),
) -> Auroc {
    let positives = Resamples::new(harmful.len(), resamples, seed, 0);
    let negatives = Resamples::new(others.len(), resamples, seed, 1);
    let ranking = |value: &dyn Fn(&PromptNumbers) -> f64| {
        let values = |prompts: &[&PromptNumbers]| -> Vec<f64> {
            prompts.iter().map(|prompt| value(prompt)).collect()
        };
        Ranking::new(&values(harmful), &values(others))
    };
    let layers = harmful.first().map_or(0, |prompt| prompt.last.safety.len());
    let once = (vec![1; harmful.len()], vec![1; others.len()]);
    let layer = |layer: usize| {
        let of_layer = ranking(&|prompt| f64::from(prompt.last.safety[layer]));
        of_layer.area((&once.0, &once.1))
    };
    Auroc {
        against,
        safety: PLACES.map(|place| {
            let of_place = ranking(&|prompt| place(&prompt.safety));
            area(&of_place, &positives, &negatives)
        }),
        layers: (0..layers).filter_map(layer).collect(),
    }
}

fn mean(gates: &[f32]) -> f64 {
    let sum: f64 = gates.iter().copied().map(f64::from).sum();
    sum / gates.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::summary::tests::evaluation;
    use super::*;

    fn near(found: f64, want: f64) -> bool {
        (found - want).abs() < 1e-6
    }

    #[test]
    fn means_are_by_class_and_layer() {
        let table = GateTable::of(&evaluation());
        assert_eq!(table.prompts.len(), 8);
        let gates = table.summary(100, 0);
        let names: Vec<&str> = gates.classes.iter().map(|c| c.class.as_str()).collect();
        assert_eq!(names, ["harmful", "benign", "plain"]);
        let harmful = &gates.classes[0];
        // alpha is 0.26, 0.9, 0.9 and 0.9 in the first layer, 0.5 in the second; over the prompt and the answer half of it.
        assert!(near(harmful.safety_layers[0], 0.74) && near(harmful.safety_layers[1], 0.5));
        assert!(near(harmful.helpfulness_layers[0], 0.26));
        assert!(near(harmful.safety.prompt_last.unwrap().mean, 0.62));
        assert!(near(harmful.safety.prompt_mean.unwrap().mean, 0.435));
        assert!(near(harmful.safety.answer_mean.unwrap().mean, 0.435));
        assert!(near(harmful.helpfulness.prompt_mean.unwrap().mean, 0.5));
    }

    #[test]
    fn the_auroc_is_the_share_of_pairs_that_alpha_ranks_right() {
        let gates = GateTable::of(&evaluation()).summary(400, 0);
        let names: Vec<&str> = gates.aurocs.iter().map(|a| a.against.as_str()).collect();
        assert_eq!(names, ["all harmless", "benign", "plain"]);
        // The harmful prompt of 0.26 is below the plain one of 0.3, one pair of 16, of 8 among plain ones.
        for (auroc, want) in gates.aurocs.iter().zip([15.0 / 16.0, 1.0, 7.0 / 8.0]) {
            let found = auroc.safety.prompt_last.unwrap();
            assert!(near(found.mean, want), "{}: {found:?}", auroc.against);
            assert!(found.low <= want && want <= found.high);
            // The second layer says nothing.
            assert!(near(auroc.layers[0], want) && near(auroc.layers[1], 0.5));
        }
    }

    #[test]
    fn without_harmful_prompts_or_gates_there_is_no_auroc() {
        let mut harmless = evaluation();
        for prompt in &mut harmless.prompts {
            prompt.class = Class::new(Class::BENIGN);
        }
        let gates = GateTable::of(&harmless).summary(10, 0);
        assert_eq!((gates.classes.len(), gates.aurocs.len()), (1, 0));
        let mut silent = evaluation();
        for judged in &mut silent.answers {
            judged.answer.prompt_gates = None;
        }
        assert!(GateTable::of(&silent).is_empty());
    }
}
