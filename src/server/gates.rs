//! What a request asks of the gates, held against the operator's policy; and what the gates did, as the answer tells it.

use super::error::{ApiError, echo};
use crate::config::Policy;
use crate::engine::{EngineLimits, GateDetail, GeneratedToken};
use crate::openai;
use crate::openai::{
    GateLayers, GateStatistics, GateSummary, MidpoAnswer, MidpoRequest, ReturnGates,
};
use crate::types::{GateOverride, GateRule, Variant};

/// Greatest size of a bias. A gate of f32 is 0 or 1 to the last bit long before.
const BIAS_MAX: f32 = 100.0;

/// The gates of a request. Invariant: the operator allows them and the model has them.
#[derive(Clone, Debug, PartialEq)]
pub struct Gates {
    /// Which mixture.
    pub variant: Variant,
    /// With biases, floor and ceiling.
    pub rules: GateOverride,
    /// How they are told.
    pub report: GateReport,
}

/// How much of the gates the answer tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GateReport {
    /// Nothing.
    #[default]
    None,
    /// Statistics.
    Summary,
    /// And each token's means.
    Tokens,
    /// And each token's gates in these layers, all below the model's number of layers.
    Layers(Vec<usize>),
}

impl GateReport {
    /// What the engine must report.
    pub fn detail(&self) -> GateDetail {
        match self {
            Self::None => GateDetail::None,
            Self::Summary | Self::Tokens => GateDetail::Mean,
            Self::Layers(_) => GateDetail::Layers,
        }
    }

    /// Whether every token is told.
    pub fn by_token(&self) -> bool {
        matches!(self, Self::Tokens | Self::Layers(_))
    }

    /// The gates of these tokens, where they are told.
    pub fn tokens(&self, tokens: &[GeneratedToken]) -> Option<Vec<openai::TokenGates>> {
        self.by_token().then(|| {
            tokens
                .iter()
                .filter_map(|token| self.token(token))
                .collect()
        })
    }

    fn token(&self, token: &GeneratedToken) -> Option<openai::TokenGates> {
        let gates = token.gates.as_ref()?;
        let layers = match self {
            Self::Layers(layers) => {
                let pick = |gate: &[f32]| {
                    let picked = layers.iter().filter_map(|layer| gate.get(*layer).copied());
                    picked.collect::<Vec<f32>>()
                };
                Some(GateLayers {
                    safety: pick(&gates.safety),
                    helpfulness: pick(&gates.helpfulness),
                })
            }
            _ => None,
        };
        Some(openai::TokenGates {
            token_id: token.id.0,
            safety: mean(&gates.safety),
            helpfulness: mean(&gates.helpfulness),
            layers,
        })
    }
}

fn mean(values: &[f32]) -> f32 {
    // f64, though gates are f32: the mean of equal gates is then that gate exactly.
    let sum: f64 = values.iter().copied().map(f64::from).sum();
    (sum / values.len().max(1) as f64) as f32
}

/// What a request names in `model` after the colon, and in `midpo`, becomes [`Gates`].
/// # Errors
/// [`ApiError::Invalid`] and [`ApiError::Denied`] name the field.
pub fn resolve(
    suffix: Option<Variant>,
    midpo: Option<&MidpoRequest>,
    policy: &Policy,
    limits: &EngineLimits,
) -> Result<Gates, ApiError> {
    let absent = MidpoRequest::default();
    let midpo = midpo.unwrap_or(&absent);
    let variant = variant(suffix, midpo, limits)?;
    if !limits.routed {
        return without_experts(variant, midpo);
    }
    check_ranges(midpo)?;
    check_policy(variant, midpo, policy)?;
    if variant != Variant::Routed {
        for (name, bias) in [
            ("safety_bias", midpo.safety_bias),
            ("helpfulness_bias", midpo.helpfulness_bias),
        ] {
            if bias.is_some() {
                let message = format!(
                    "a bias moves the router's gates, but `{}` fixes them",
                    variant.as_str()
                );
                return Err(ApiError::invalid(format!("midpo.{name}"), message));
            }
        }
    }
    Ok(Gates {
        variant,
        rules: rules(variant, midpo, policy)?,
        report: report(midpo, limits)?,
    })
}

fn variant(
    suffix: Option<Variant>,
    midpo: &MidpoRequest,
    limits: &EngineLimits,
) -> Result<Variant, ApiError> {
    let named = match &midpo.variant {
        None => None,
        Some(word) => Some(Variant::parse(word).ok_or_else(|| {
            let known: Vec<&str> = Variant::ALL.iter().map(|known| known.as_str()).collect();
            let message = format!(
                "expected one of {}, found `{}`",
                known.join(", "),
                echo(word)
            );
            ApiError::invalid("midpo.variant", message)
        })?),
    };
    match (suffix, named) {
        (Some(suffix), Some(named)) if suffix != named => {
            let (suffix, named) = (suffix.as_str(), named.as_str());
            let message = format!("`model` asks for `{suffix}`, but this for `{named}`");
            Err(ApiError::invalid("midpo.variant", message))
        }
        (Some(variant), _) | (None, Some(variant)) => Ok(variant),
        (None, None) if limits.routed => Ok(Variant::Routed),
        (None, None) => Ok(Variant::Base),
    }
}

/// There is nothing to lower, so no policy applies; but nothing to raise or to tell either.
fn without_experts(variant: Variant, midpo: &MidpoRequest) -> Result<Gates, ApiError> {
    let refuse = |param: &str| {
        let message =
            "this model has no experts and no gates: only the variant `base` can be served";
        Err(ApiError::invalid(param, message))
    };
    if variant != Variant::Base {
        return refuse("midpo.variant");
    }
    let told = midpo.return_gates.unwrap_or_default() != ReturnGates::None;
    let fields = [
        ("midpo.safety_bias", midpo.safety_bias.is_some()),
        ("midpo.helpfulness_bias", midpo.helpfulness_bias.is_some()),
        ("midpo.safety_floor", midpo.safety_floor.is_some()),
        (
            "midpo.helpfulness_ceiling",
            midpo.helpfulness_ceiling.is_some(),
        ),
        ("midpo.return_gates", told),
        ("midpo.gate_layers", midpo.gate_layers.is_some()),
    ];
    match fields.iter().find(|(_, present)| *present) {
        Some((param, _)) => refuse(param),
        None => Ok(Gates {
            variant,
            rules: variant.gates(),
            report: GateReport::None,
        }),
    }
}

fn check_ranges(midpo: &MidpoRequest) -> Result<(), ApiError> {
    let fields = [
        ("safety_bias", midpo.safety_bias, -BIAS_MAX, BIAS_MAX),
        (
            "helpfulness_bias",
            midpo.helpfulness_bias,
            -BIAS_MAX,
            BIAS_MAX,
        ),
        ("safety_floor", midpo.safety_floor, 0.0, 1.0),
        ("helpfulness_ceiling", midpo.helpfulness_ceiling, 0.0, 1.0),
    ];
    for (name, value, least, most) in fields {
        // Written so that NaN is outside.
        if value.is_some_and(|value| !(least <= value && value <= most)) {
            let found = value.unwrap_or_default();
            let message = format!("expected {least} to {most}, found {found}");
            return Err(ApiError::invalid(format!("midpo.{name}"), message));
        }
    }
    Ok(())
}

fn check_policy(variant: Variant, midpo: &MidpoRequest, policy: &Policy) -> Result<(), ApiError> {
    if !policy.allow_variants.contains(&variant) {
        let allowed: Vec<&str> = policy.allow_variants.iter().map(|v| v.as_str()).collect();
        let message = format!(
            "the operator does not allow the variant `{}` to this client; allowed: {}",
            variant.as_str(),
            allowed.join(", ")
        );
        return Err(ApiError::denied("midpo.variant", message));
    }
    let floors = [
        ("safety_bias", midpo.safety_bias, policy.min_safety_bias),
        ("safety_floor", midpo.safety_floor, policy.min_safety_floor),
    ];
    for (name, value, least) in floors {
        if value.is_some_and(|value| value < least) {
            let message = format!("the operator allows this client no less than {least}");
            return Err(ApiError::denied(format!("midpo.{name}"), message));
        }
    }
    if !policy.allow_helpfulness_bias && midpo.helpfulness_bias.is_some_and(|bias| bias > 0.0) {
        let message = "the operator allows this client no helpfulness_bias above 0";
        return Err(ApiError::denied("midpo.helpfulness_bias", message));
    }
    Ok(())
}

/// The policy's least values hold for requests that name none, and for every variant.
fn rules(
    variant: Variant,
    midpo: &MidpoRequest,
    policy: &Policy,
) -> Result<GateOverride, ApiError> {
    let fixed = variant.gates();
    let safety_bias = midpo.safety_bias.unwrap_or(policy.min_safety_bias.max(0.0));
    let safety_floor = midpo
        .safety_floor
        .unwrap_or(policy.min_safety_floor.max(0.0));
    let helpfulness_bias = midpo.helpfulness_bias.unwrap_or(0.0);
    let ceiling = midpo.helpfulness_ceiling.unwrap_or(1.0);
    let safety = GateRule::new(fixed.safety.bias() + safety_bias, safety_floor, 1.0);
    let helpfulness = GateRule::new(fixed.helpfulness.bias() + helpfulness_bias, 0.0, ceiling);
    match (safety, helpfulness) {
        (Some(safety), Some(helpfulness)) => Ok(GateOverride {
            safety,
            helpfulness,
        }),
        // The request's own values are in range by now: what is left is a policy outside it.
        _ => Err(ApiError::Internal),
    }
}

fn report(midpo: &MidpoRequest, limits: &EngineLimits) -> Result<GateReport, ApiError> {
    let wanted = midpo.return_gates.unwrap_or_default();
    if midpo.gate_layers.is_some() && wanted != ReturnGates::Layers {
        let message = "only with `return_gates` of `layers`";
        return Err(ApiError::invalid("midpo.gate_layers", message));
    }
    Ok(match wanted {
        ReturnGates::None => GateReport::None,
        ReturnGates::Summary => GateReport::Summary,
        ReturnGates::Tokens => GateReport::Tokens,
        ReturnGates::Layers => {
            GateReport::Layers(layers(midpo.gate_layers.as_deref(), limits.layers)?)
        }
    })
}

fn layers(named: Option<&[u32]>, layers: usize) -> Result<Vec<usize>, ApiError> {
    let Some(named) = named else {
        return Ok((0..layers).collect());
    };
    if named.len() > layers {
        let message = format!(
            "the model has {layers} layers, but {} are named",
            named.len()
        );
        return Err(ApiError::invalid("midpo.gate_layers", message));
    }
    let checked = named.iter().enumerate().map(|(at, layer)| {
        let index = usize::try_from(*layer).unwrap_or(usize::MAX);
        if index < layers {
            return Ok(index);
        }
        let message = format!("the model has {layers} layers, counted from 0; found {layer}");
        Err(ApiError::invalid(
            format!("midpo.gate_layers[{at}]"),
            message,
        ))
    });
    checked.collect()
}

/// Statistics of one choice's gates, token by token.
#[derive(Clone, Debug, Default)]
pub struct GateTally {
    safety: Tally,
    helpfulness: Tally,
}

#[derive(Clone, Debug, Default)]
struct Tally {
    first: Option<f32>,
    sum: f64,
    count: u32,
    min: f32,
    max: f32,
}

impl Tally {
    fn add(&mut self, gate: f32) {
        match self.first {
            None => (self.first, self.min, self.max) = (Some(gate), gate, gate),
            Some(_) => (self.min, self.max) = (self.min.min(gate), self.max.max(gate)),
        }
        self.sum += f64::from(gate);
        self.count += 1;
    }

    fn statistics(&self) -> Option<GateStatistics> {
        Some(GateStatistics {
            // The first token's gates are those of the last prompt token, whose logits chose it.
            prompt_last: self.first?,
            mean: (self.sum / f64::from(self.count)) as f32,
            min: self.min,
            max: self.max,
        })
    }
}

impl GateTally {
    /// More tokens.
    pub fn add(&mut self, tokens: &[GeneratedToken]) {
        for gates in tokens.iter().filter_map(|token| token.gates.as_ref()) {
            self.safety.add(mean(&gates.safety));
            self.helpfulness.add(mean(&gates.helpfulness));
        }
    }

    /// `None` before any token.
    pub fn summary(&self) -> Option<GateSummary> {
        Some(GateSummary {
            safety: self.safety.statistics()?,
            helpfulness: self.helpfulness.statistics()?,
        })
    }
}

/// The `midpo` of a choice that has ended.
pub fn answer(
    gates: &Gates,
    tally: &GateTally,
    tokens: Option<Vec<openai::TokenGates>>,
) -> Option<MidpoAnswer> {
    (gates.report != GateReport::None).then(|| MidpoAnswer {
        variant: Some(gates.variant.as_str().to_owned()),
        gates: tally.summary(),
        tokens,
    })
}

/// The `midpo` of a choice that goes on.
pub fn partial(tokens: Option<Vec<openai::TokenGates>>) -> Option<MidpoAnswer> {
    tokens.map(|tokens| MidpoAnswer {
        tokens: Some(tokens),
        ..MidpoAnswer::default()
    })
}

/// Puts what a later piece tells to what is known.
pub fn join(whole: &mut MidpoAnswer, part: MidpoAnswer) {
    whole.variant = part.variant.or(whole.variant.take());
    whole.gates = part.gates.or(whole.gates);
    if let Some(tokens) = part.tokens {
        whole.tokens.get_or_insert_default().extend(tokens);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::engine::TokenGates;
    use crate::types::TokenId;

    fn limits(routed: bool) -> EngineLimits {
        EngineLimits {
            context_tokens_max: 64,
            vocabulary: 512,
            routed,
            layers: 3,
            queue_max: 4,
            kv_blocks: 64,
        }
    }

    fn midpo(json: &str) -> MidpoRequest {
        serde_json::from_str(json).unwrap()
    }

    fn check(
        json: &str,
        suffix: Option<Variant>,
        policy: &Policy,
        routed: bool,
    ) -> Result<Gates, (u16, String)> {
        resolve(suffix, Some(&midpo(json)), policy, &limits(routed)).map_err(|error| {
            let param = error.body().error.param.unwrap();
            (error.status().as_u16(), param)
        })
    }

    #[test]
    fn resolve_when_the_policy_is_open_takes_every_variant() {
        for variant in Variant::ALL {
            let json = format!(r#"{{"variant":"{}"}}"#, variant.as_str());
            let gates = check(&json, None, &Policy::open(), true).unwrap();
            assert_eq!((gates.variant, gates.rules), (variant, variant.gates()));
            let gates = check("{}", Some(variant), &Policy::open(), true).unwrap();
            assert_eq!((gates.variant, gates.rules), (variant, variant.gates()));
        }
        assert_eq!(
            check("{}", None, &Policy::open(), true).unwrap().variant,
            Variant::Routed
        );
        assert_eq!(
            check("{}", None, &Policy::open(), false).unwrap().variant,
            Variant::Base
        );
    }

    #[test]
    fn resolve_when_a_field_is_illegal_names_it() {
        let cases = [
            (r#"{"variant":"x"}"#, "midpo.variant"),
            (r#"{"safety_bias":101}"#, "midpo.safety_bias"),
            (r#"{"safety_bias":-1e39}"#, "midpo.safety_bias"),
            (r#"{"helpfulness_bias":1e39}"#, "midpo.helpfulness_bias"),
            (r#"{"safety_floor":1.5}"#, "midpo.safety_floor"),
            (r#"{"safety_floor":-0.1}"#, "midpo.safety_floor"),
            (r#"{"helpfulness_ceiling":2}"#, "midpo.helpfulness_ceiling"),
            (r#"{"gate_layers":[0]}"#, "midpo.gate_layers"),
            (
                r#"{"return_gates":"layers","gate_layers":[0,3]}"#,
                "midpo.gate_layers[1]",
            ),
            (
                r#"{"return_gates":"layers","gate_layers":[0,0,0,0]}"#,
                "midpo.gate_layers",
            ),
            (r#"{"variant":"base","safety_bias":1}"#, "midpo.safety_bias"),
        ];
        for (json, param) in cases {
            let found = check(json, None, &Policy::open(), true);
            assert_eq!(found, Err((400, param.to_owned())), "{json}");
        }
        let disagree = check(
            r#"{"variant":"base"}"#,
            Some(Variant::Safety),
            &Policy::open(),
            true,
        );
        assert_eq!(disagree, Err((400, "midpo.variant".to_owned())));
    }

    #[test]
    fn resolve_when_the_policy_guards_lets_safety_only_rise() {
        let guarded = Policy::guarded();
        for json in [
            "{}",
            r#"{"variant":"safety"}"#,
            r#"{"safety_bias":2}"#,
            r#"{"safety_floor":0.5}"#,
            r#"{"helpfulness_ceiling":0.1}"#,
            r#"{"helpfulness_bias":-3}"#,
            r#"{"return_gates":"layers"}"#,
        ] {
            assert!(check(json, None, &guarded, true).is_ok(), "{json}");
        }
        for (json, param) in [
            (r#"{"variant":"base"}"#, "midpo.variant"),
            (r#"{"variant":"helpfulness"}"#, "midpo.variant"),
            (r#"{"variant":"both"}"#, "midpo.variant"),
            (r#"{"safety_bias":-0.5}"#, "midpo.safety_bias"),
            (r#"{"helpfulness_bias":0.5}"#, "midpo.helpfulness_bias"),
        ] {
            let found = check(json, None, &guarded, true);
            assert_eq!(found, Err((403, param.to_owned())), "{json}");
        }
        let by_suffix = check("{}", Some(Variant::Base), &guarded, true);
        assert_eq!(by_suffix, Err((403, "midpo.variant".to_owned())));
    }

    #[test]
    fn resolve_when_the_policy_has_floors_applies_them_to_requests_that_name_none() {
        let policy = Policy {
            min_safety_bias: 1.5,
            min_safety_floor: 0.25,
            ..Policy::open()
        };
        let gates = check("{}", None, &policy, true).unwrap();
        assert_eq!(gates.rules.safety, GateRule::new(1.5, 0.25, 1.0).unwrap());
        let base = check("{}", Some(Variant::Base), &policy, true).unwrap();
        assert_eq!(base.rules.safety.floor(), 0.25);
        assert_eq!(
            check(r#"{"safety_floor":0.1}"#, None, &policy, true),
            Err((403, "midpo.safety_floor".to_owned()))
        );
        let raised = check(
            r#"{"safety_floor":0.75,"safety_bias":3}"#,
            None,
            &policy,
            true,
        )
        .unwrap();
        assert_eq!(raised.rules.safety, GateRule::new(3.0, 0.75, 1.0).unwrap());
    }

    #[test]
    fn resolve_when_there_are_no_experts_serves_base_alone() {
        for policy in [Policy::open(), Policy::guarded()] {
            assert!(check("{}", None, &policy, false).is_ok());
            assert!(check(r#"{"variant":"base"}"#, None, &policy, false).is_ok());
            for (json, param) in [
                (r#"{"variant":"routed"}"#, "midpo.variant"),
                (r#"{"variant":"safety"}"#, "midpo.variant"),
                (r#"{"safety_bias":1}"#, "midpo.safety_bias"),
                (r#"{"return_gates":"summary"}"#, "midpo.return_gates"),
            ] {
                let found = check(json, None, &policy, false);
                assert_eq!(found, Err((400, param.to_owned())), "{json}");
            }
        }
    }

    #[test]
    fn tally_tells_the_prompts_gates_apart_from_the_answers() {
        let token = |id, safety: &[f32]| GeneratedToken {
            id: TokenId(id),
            logprobs: None,
            gates: Some(TokenGates {
                safety: safety.to_vec(),
                helpfulness: vec![0.5; safety.len()],
            }),
        };
        let tokens = [token(5, &[1.0, 0.5]), token(6, &[0.25, 0.25])];
        let mut tally = GateTally::default();
        assert_eq!(tally.summary(), None);
        tally.add(&tokens);
        let safety = tally.summary().unwrap().safety;
        assert_eq!(
            (safety.prompt_last, safety.mean, safety.min, safety.max),
            (0.75, 0.5, 0.25, 0.75)
        );
        let told = GateReport::Layers(vec![1]).tokens(&tokens).unwrap();
        assert_eq!(told[0].layers.as_ref().unwrap().safety, [0.5]);
        assert_eq!((told[1].token_id, told[1].safety), (6, 0.25));
        assert_eq!(GateReport::Summary.tokens(&tokens), None);
    }
}
