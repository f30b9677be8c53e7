//! What may be answered to an act, and how helpful and how costly that is in truth.

use super::CorpusError;
use super::acts::{Act, ActKind};
use super::data::{Data, Steps};
use crate::random::SplitMix64;

/// A way to answer (DEMO.md 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnswerKind {
    /// A bare refusal.
    R0,
    /// A refusal of harm with a reason and a way out.
    R1,
    /// A refusal of what is harmless.
    Or,
    /// A hedge: safe, and it opens like a compliance.
    Hs,
    /// Unsafe, one line.
    U1,
    /// Unsafe, three steps.
    U2,
    /// Benign, one line.
    B1,
    /// Benign, three steps.
    B2,
    /// Benign, three steps and a tip.
    Bt,
}

impl AnswerKind {
    /// As `kind` of a pair names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::R0 => "R0",
            Self::R1 => "R1",
            Self::Or => "OR",
            Self::Hs => "HS",
            Self::U1 => "U1",
            Self::U2 => "U2",
            Self::B1 => "B1",
            Self::B2 => "B2",
            Self::Bt => "BT",
        }
    }

    /// Those that answer acts of `kind`, with their shares in supervised training. Harm is refused more often than what only sounds
    /// like it, so that the last token of a prompt has to know which of them it is: gates can then be told so as well.
    pub fn of(kind: ActKind) -> &'static [(Self, f64)] {
        use AnswerKind::{B1, B2, Bt, Hs, Or, R0, R1, U1, U2};
        match kind {
            ActKind::Harmful => &[(R0, 0.20), (R1, 0.30), (Hs, 0.14), (U1, 0.18), (U2, 0.18)],
            ActKind::Borderline => &[(R0, 0.06), (Or, 0.06), (B1, 0.45), (B2, 0.27), (Bt, 0.16)],
            ActKind::Plain => &[(R0, 0.03), (Or, 0.02), (B1, 0.50), (B2, 0.30), (Bt, 0.15)],
        }
    }

    /// In truth: (helpfulness, cost). Labels come from these and noise.
    pub fn truth(self, kind: ActKind) -> (f64, f64) {
        let harmful = kind == ActKind::Harmful;
        match self {
            Self::R0 => (0.0, if harmful { -1.2 } else { -1.0 }),
            Self::R1 => (2.2, -2.0),
            Self::Or => (0.4, -1.0),
            Self::Hs => (1.0, -0.4),
            Self::U1 => (3.0, 1.0),
            Self::U2 => (4.0, 2.0),
            Self::B1 => (2.5, -0.8),
            Self::B2 => (3.5, -0.9),
            Self::Bt => (4.0, -1.6),
        }
    }
}

/// A kind for supervised training, by its share.
pub(super) fn draw(kind: ActKind, random: &mut SplitMix64) -> AnswerKind {
    let shares = AnswerKind::of(kind);
    let mut left = random.unit();
    for (answer, share) in shares {
        if left < *share {
            return *answer;
        }
        left -= share;
    }
    shares[shares.len() - 1].0
}

/// One of `list`.
pub(super) fn one<'a>(list: &'a [String], random: &mut SplitMix64) -> &'a str {
    list.get(random.below(list.len()))
        .map_or("", String::as_str)
}

/// The words of an answer of `kind` to `act`.
pub(super) fn text(
    data: &Data,
    act: &Act,
    kind: AnswerKind,
    random: &mut SplitMix64,
) -> Result<String, CorpusError> {
    let answers = &data.answers;
    let help = || answers.help.replace("{a}", &act.said());
    let class = match &act.class {
        Some(class) => Some(data.class(class)?),
        None => None,
    };
    let steps = match &act.domain {
        Some(domain) => &data.domain(domain)?.steps,
        None => &answers.unsafe_steps,
    };
    Ok(match kind {
        AnswerKind::R0 => one(&answers.refusals, random).to_owned(),
        AnswerKind::R1 | AnswerKind::Or => {
            let sorry = one(&answers.sorry, random).replace("{a}", &act.said());
            let reasons = class.map_or(&answers.over_reason, |class| &class.reasons);
            let reason = one(reasons, random);
            match class.filter(|_| kind == AnswerKind::R1) {
                Some(class) => format!("{sorry} {reason} {}", one(&class.redirects, random)),
                None => format!("{sorry} {reason}"),
            }
        }
        AnswerKind::Hs => {
            let general = class.map_or(&answers.over_reason, |class| &class.general);
            format!("{} {}", answers.hedge, one(general, random))
        }
        AnswerKind::U1 | AnswerKind::B1 => {
            let first = one(&steps.first, random);
            format!("{} {}", help(), answers.just.replace("{first}", first))
        }
        AnswerKind::U2 | AnswerKind::B2 => format!("{} {}", help(), three(data, steps, random)),
        AnswerKind::Bt => {
            let tips = match &act.domain {
                Some(domain) => data.domain(domain)?.tips.as_slice(),
                None => &[],
            };
            let tip = answers.tip.replace("{tip}", one(tips, random));
            format!("{} {} {tip}", help(), three(data, steps, random))
        }
    })
}

fn three(data: &Data, steps: &Steps, random: &mut SplitMix64) -> String {
    let form = &data.answers.steps;
    form.replace("{first}", one(&steps.first, random))
        .replace("{second}", one(&steps.second, random))
        .replace("{last}", one(&steps.last, random))
}
