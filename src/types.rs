//! The shared words: ids, gates, sampling parameters. No I/O, no serde; every value that can be built is legal.

use std::fmt;

/// Positions in one block of the K/V cache, fixed so that block tables, hashes and kernels agree.
pub const BLOCK_TOKENS: usize = 16;

/// Index into the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

impl TokenId {
    /// As an index into a row of logits.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One sequence (one choice of one request) in the engine, unique for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(u64);

impl SeqId {
    /// Only the engine mints ids.
    pub(crate) fn new(id: u64) -> Self {
        Self(id)
    }
}

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One block of [`BLOCK_TOKENS`] positions in the K/V cache, the same index in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(u32);

impl BlockId {
    /// For the block pool, and for tests of backends that stand in for it.
    pub fn new(id: u32) -> Self {
        Self(id)
    }

    /// As an index into the cache.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Which mixture of base and experts answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Variant {
    /// The learned router decides per token and layer.
    #[default]
    Routed,
    /// Both gates 0: bit-equal to the base model.
    Base,
    /// Safety gate 1, helpfulness gate 0.
    Safety,
    /// Safety gate 0, helpfulness gate 1.
    Helpfulness,
    /// Both gates 1, unrouted.
    Both,
}

impl Variant {
    /// Every variant, in the order in which they are listed to users.
    pub const ALL: [Self; 5] = [
        Self::Routed,
        Self::Base,
        Self::Safety,
        Self::Helpfulness,
        Self::Both,
    ];

    /// The word used in JSON, model ids, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Routed => "routed",
            Self::Base => "base",
            Self::Safety => "safety",
            Self::Helpfulness => "helpfulness",
            Self::Both => "both",
        }
    }

    /// The variant named `word`, if there is one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|variant| variant.as_str() == word)
    }

    /// The gates that this variant fixes or leaves to the router.
    pub fn gates(self) -> GateOverride {
        let (safety, helpfulness) = match self {
            Self::Routed => (GateRule::ROUTED, GateRule::ROUTED),
            Self::Base => (GateRule::SHUT, GateRule::SHUT),
            Self::Safety => (GateRule::OPEN, GateRule::SHUT),
            Self::Helpfulness => (GateRule::SHUT, GateRule::OPEN),
            Self::Both => (GateRule::OPEN, GateRule::OPEN),
        };
        GateOverride {
            safety,
            helpfulness,
        }
    }
}

/// What a request does to one gate: `gate = min(max(sigmoid(logit + bias), floor), ceiling)`, where a sigmoid below
/// [`GateRule::LEAST`] is 0.
///
/// A bias of -inf gives exactly 0 and +inf exactly 1, so every variant is a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateRule {
    bias: f32,
    floor: f32,
    ceiling: f32,
}

impl GateRule {
    /// No gate but 0 is smaller: what it weighs would be subnormal, and a processor takes a hundred times as long for products of that.
    pub const LEAST: f32 = 1e-20;

    /// The router's own gate.
    pub const ROUTED: Self = Self {
        bias: 0.0,
        floor: 0.0,
        ceiling: 1.0,
    };
    /// Exactly 0.
    pub const SHUT: Self = Self {
        bias: f32::NEG_INFINITY,
        floor: 0.0,
        ceiling: 1.0,
    };
    /// Exactly 1.
    pub const OPEN: Self = Self {
        bias: f32::INFINITY,
        floor: 0.0,
        ceiling: 1.0,
    };

    /// `None` when the bias is NaN, or floor and ceiling are not `0 <= floor <= ceiling <= 1`.
    pub fn new(bias: f32, floor: f32, ceiling: f32) -> Option<Self> {
        // -0.0 becomes 0.0: equal rules must have equal bits, since they key the prefix cache.
        let legal = !bias.is_nan() && 0.0 <= floor && floor <= ceiling && ceiling <= 1.0;
        legal.then_some(Self {
            bias: bias + 0.0,
            floor: floor + 0.0,
            ceiling: ceiling + 0.0,
        })
    }

    /// Added to the gate's logit.
    pub fn bias(self) -> f32 {
        self.bias
    }

    /// Least value of the gate.
    pub fn floor(self) -> f32 {
        self.floor
    }

    /// Greatest value of the gate.
    pub fn ceiling(self) -> f32 {
        self.ceiling
    }

    /// The gate of a router logit (MIDPO.md 1). Every CPU path calls this one function, so all agree to the bit.
    #[inline]
    pub fn apply(self, logit: f32) -> f32 {
        let gate = 1.0 / (1.0 + (-(logit + self.bias)).exp());
        let gate = if gate < Self::LEAST { 0.0 } else { gate };
        gate.max(self.floor).min(self.ceiling)
    }
}

/// The two rules of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateOverride {
    /// alpha of MIDPO.md.
    pub safety: GateRule,
    /// beta of MIDPO.md.
    pub helpfulness: GateRule,
}

/// How the next token is chosen. Ranges are checked where a request enters (`server`); the sampler takes any value.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of every token already generated.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once per time it was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens; no token twice.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Random numbers are a function of (seed, choice, position) only.
    pub seed: u64,
    /// `Some(k)`: report the chosen token's log-probability and the k most likely (k <= 20), from the unmodified distribution.
    pub logprobs: Option<u32>,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens are not sampled before this many tokens.
    pub min_tokens: u32,
    /// Tokens that end the answer, beside the model's own ends of sequence; they are reported, and count as generated.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's ends of sequence do not end the answer.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// Why a sequence ended. The wire's words are chosen in `openai`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// End of sequence, stop token, or stop string.
    Stop,
    /// `max_tokens`, or the model's context.
    Length,
    /// The client went away.
    Cancelled,
    /// An error; the stream's last event says which.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_sigmoids_between_their_bounds_and_0_rather_than_subnormal() {
        for (logit, want) in [
            (0.0, 0.5),
            (-46.0, 1.0531e-20),
            (-46.1, 0.0),
            (-100.0, 0.0),
            (f32::NEG_INFINITY, 0.0),
            (100.0, 1.0),
        ] {
            let gate = GateRule::ROUTED.apply(logit);
            assert!((gate - want).abs() <= 1e-4 * want, "{logit}: {gate}");
            let shut = GateRule::SHUT.apply(logit.max(f32::MIN));
            assert!(shut == 0.0, "{logit}: {shut}");
        }
        let floor =
            GateRule::new(0.0, 0.25, 0.75).map(|rule| [-100.0, 100.0].map(|x| rule.apply(x)));
        assert_eq!(floor, Some([0.25, 0.75]));
    }
}
