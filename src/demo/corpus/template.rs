//! How an act is asked for: opener, frame, closer.

use super::Split;
use super::acts::Act;
use super::data::TemplateData;
use super::english::continued;
use super::held_out::Part;
use crate::random::SplitMix64;

/// All templates.
pub(super) struct Templates {
    openers: Vec<String>,
    closers: Vec<String>,
    frames: Vec<String>,
    unseen_frames: Vec<String>,
}

/// Share of prompts without an opener, and of those without a closer.
const BARE: f64 = 0.4;
/// Share of training prompts that are typed in a hurry: small letters alone.
const HURRIED: f64 = 0.08;
/// Share of training prompts whose last sign is left out.
const UNFINISHED: f64 = 0.12;

impl Templates {
    pub(super) fn new(data: &TemplateData) -> Self {
        Self {
            openers: data.openers.clone(),
            closers: data.closers.clone(),
            frames: data.frames.clone(),
            unseen_frames: data.unseen_frames.clone(),
        }
    }

    /// In training, held out as compositions, with frames that training never has.
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        let (mut train, mut held_out) = (0, 0);
        for opener in &self.openers {
            for frame in &self.frames {
                for closer in &self.closers {
                    match split(opener, frame, closer) {
                        Split::Train => train += 1,
                        Split::HeldOut => held_out += 1,
                    }
                }
            }
        }
        let rest = self.openers.len() * self.closers.len();
        (train, held_out, rest * self.unseen_frames.len())
    }

    /// A prompt for `act` with a template of training.
    pub(super) fn train(&self, act: &Act, random: &mut SplitMix64) -> String {
        let prompt = self.composed(act, &self.frames, Some(Split::Train), random);
        let draw = random.unit();
        if draw < HURRIED {
            return unfinished(&prompt).to_lowercase();
        }
        if draw < HURRIED + UNFINISHED {
            return unfinished(&prompt).to_owned();
        }
        prompt
    }

    /// A prompt for `act` with a template that training never has.
    pub(super) fn held_out(&self, act: &Act, part: Part, random: &mut SplitMix64) -> String {
        match part {
            Part::Compositions => self.composed(act, &self.frames, Some(Split::HeldOut), random),
            Part::UnseenFrames => self.composed(act, &self.unseen_frames, None, random),
        }
    }

    fn composed(
        &self,
        act: &Act,
        frames: &[String],
        wanted: Option<Split>,
        random: &mut SplitMix64,
    ) -> String {
        loop {
            let opener = drawn(&self.openers, random);
            let frame = &frames[random.below(frames.len())];
            let closer = drawn(&self.closers, random);
            if wanted.is_none_or(|wanted| split(opener, frame, closer) == wanted) {
                return prompt(opener, frame, closer, act);
            }
        }
    }
}

/// The first of the list is none at all.
fn drawn<'a>(list: &'a [String], random: &mut SplitMix64) -> &'a str {
    let at = if random.unit() < BARE {
        0
    } else {
        random.below(list.len())
    };
    &list[at]
}

fn split(opener: &str, frame: &str, closer: &str) -> Split {
    Split::of(&format!("{opener}|{frame}|{closer}"))
}

fn prompt(opener: &str, frame: &str, closer: &str, act: &Act) -> String {
    let asked = frame.replace("{a}", &act.base()).replace("{g}", &act.ing());
    let asked = if opener.ends_with(", ") {
        continued(&asked)
    } else {
        asked
    };
    format!("{opener}{asked}{closer}")
}

fn unfinished(prompt: &str) -> &str {
    prompt.trim_end_matches(['.', '?', '!'])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::data::Data;
    use super::*;

    #[test]
    fn there_are_thousands_of_templates_and_a_fifth_is_held_out() {
        let data = Data::embedded().unwrap();
        let (train, held_out, unseen) = Templates::new(&data.templates).counts();
        assert!(train > 10_000, "{train}");
        let share = held_out as f64 / (train + held_out) as f64;
        assert!((0.18..0.22).contains(&share), "{share}");
        assert!(unseen > 1_000, "{unseen}");
    }

    #[test]
    fn unseen_frames_are_no_training_frames() {
        let data = Data::embedded().unwrap();
        let seen = &data.templates.frames;
        assert!(
            data.templates
                .unseen_frames
                .iter()
                .all(|frame| !seen.contains(frame))
        );
    }
}
