//! `/v1/models`: the served model and its variants.

use axum::extract::{Path, State};
use axum::{Extension, Json};

use super::AppState;
use super::auth::Caller;
use super::error::{ApiError, echo};
use crate::openai::{ErrorBody, Model, ModelList};
use crate::types::Variant;

/// Every model that the caller may use: the served one, and its variants with it as `parent`.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses((status = 200, body = ModelList), (status = 401, body = ErrorBody))
)]
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
) -> Json<ModelList> {
    Json(ModelList {
        object: "list".to_owned(),
        data: models(&state, &caller),
    })
}

/// One model.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "models",
    params(("id" = String, Path, description = "`<name>` or `<name>:<variant>`")),
    responses((status = 200, body = Model), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody))
)]
pub async fn retrieve(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let models = models(&state, &caller);
    let known = models.iter().map(|model| model.id.clone()).collect();
    let found = models.into_iter().find(|model| model.id == id);
    found.map(Json).ok_or_else(|| ApiError::ModelNotFound {
        model: echo(&id),
        known,
    })
}

fn models(state: &AppState, caller: &Caller) -> Vec<Model> {
    let name = &state.config().served_model_name;
    let limits = state.engine().limits();
    let model = |id: String, variant: Variant| Model {
        parent: (id != *name).then(|| name.clone()),
        id,
        object: "model".to_owned(),
        created: state.model().created,
        owned_by: "midpo".to_owned(),
        root: name.clone(),
        max_model_len: limits.context_tokens_max,
        variant: variant.as_str().to_owned(),
    };
    let default = if limits.routed {
        Variant::Routed
    } else {
        Variant::Base
    };
    let served = variants(limits.routed)
        .filter(|variant| !limits.routed || caller.policy.allow_variants.contains(variant))
        .map(|variant| model(format!("{name}:{}", variant.as_str()), variant));
    std::iter::once(model(name.clone(), default))
        .chain(served)
        .collect()
}

fn variants(routed: bool) -> impl Iterator<Item = Variant> {
    Variant::ALL
        .into_iter()
        .filter(move |variant| routed || *variant == Variant::Base)
}

/// What `model` names: the name as it was asked for, and the variant of its suffix.
/// # Errors
/// [`ApiError::ModelNotFound`].
pub fn find(state: &AppState, asked: Option<&str>) -> Result<(String, Option<Variant>), ApiError> {
    let name = &state.config().served_model_name;
    let Some(asked) = asked else {
        return Ok((name.clone(), None));
    };
    parse(name, asked)
        .map(|variant| (asked.to_owned(), variant))
        .ok_or_else(|| {
            let ids = variants(state.engine().limits().routed)
                .map(|variant| format!("{name}:{}", variant.as_str()));
            ApiError::ModelNotFound {
                model: echo(asked),
                known: std::iter::once(name.clone()).chain(ids).collect(),
            }
        })
}

/// `None`: another model. `Some(None)`: the served one, without a suffix.
fn parse(name: &str, asked: &str) -> Option<Option<Variant>> {
    if asked == name {
        return Some(None);
    }
    let suffix = asked.strip_prefix(name)?.strip_prefix(':')?;
    Variant::parse(suffix).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_knows_the_served_name_and_its_variants_only() {
        for (asked, want) in [
            ("m", Some(None)),
            ("m:base", Some(Some(Variant::Base))),
            ("m:routed", Some(Some(Variant::Routed))),
            ("m:", None),
            ("m:Base", None),
            ("mm", None),
            ("m:base:base", None),
            ("", None),
            (":base", None),
        ] {
            assert_eq!(parse("m", asked), want, "{asked}");
        }
    }
}
