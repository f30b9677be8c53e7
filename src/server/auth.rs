//! Who asks: API keys, and the policy that comes with each.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};

use super::AppState;
use super::error::ApiError;
use crate::config::{ApiKey, Policy, ServerConfig};

/// Whoever sent a request; in its extensions once [`authenticate`] has let it through.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Of the key, for logs; `None` where no keys are configured.
    pub name: Option<Arc<str>>,
    /// What the operator allows.
    pub policy: Arc<Policy>,
}

/// The keys that the server knows.
pub struct Keyring {
    keys: Vec<(String, Caller)>,
    open: Caller,
}

impl Keyring {
    /// As configured.
    pub fn new(config: &ServerConfig) -> Self {
        let keyed = |key: &ApiKey| {
            let caller = Caller {
                name: Some(Arc::from(key.name.as_str())),
                policy: Arc::new(key.policy.clone()),
            };
            (key.secret.clone(), caller)
        };
        Self {
            keys: config.api_keys.iter().map(keyed).collect(),
            open: Caller {
                name: None,
                policy: Arc::new(config.open_policy.clone()),
            },
        }
    }

    /// # Errors
    /// [`ApiError::Unauthorized`] where keys are configured and the request has none of them.
    pub fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if self.keys.is_empty() {
            return Ok(self.open.clone());
        }
        let presented = bearer(headers).ok_or(ApiError::Unauthorized {
            message: "no API key: send the header `Authorization: Bearer KEY`",
        })?;
        self.find(presented).ok_or(ApiError::Unauthorized {
            message: "this API key is not known here",
        })
    }

    /// Compares with every key whether or not one has matched, so that time tells nothing of them but their lengths.
    fn find(&self, presented: &[u8]) -> Option<Caller> {
        let mut found = None;
        for (secret, caller) in &self.keys {
            let equal: Choice = secret.as_bytes().ct_eq(presented);
            if bool::from(equal) {
                found = Some(caller);
            }
        }
        found.cloned()
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then_some(token.trim_ascii())
}

/// Middleware of all routes that need a key where keys are configured.
pub async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    match state.keyring().caller(request.headers()) {
        Ok(caller) => {
            if let Some(name) = &caller.name {
                tracing::Span::current().record("key", name.as_ref());
            }
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use axum::http::HeaderValue;

    fn keyring(secrets: &[&str]) -> Keyring {
        let open = Caller {
            name: None,
            policy: Arc::new(Policy::open()),
        };
        let keys = secrets.iter().map(|secret| {
            let caller = Caller {
                name: Some(Arc::from(format!("name of {secret}"))),
                policy: Arc::new(Policy::guarded()),
            };
            ((*secret).to_owned(), caller)
        });
        Keyring {
            keys: keys.collect(),
            open,
        }
    }

    fn check(secrets: &[&str], header: Option<&str>, want: Option<Option<&str>>) {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(
                header::AUTHORIZATION,
                HeaderValue::from_str(header).unwrap(),
            );
        }
        let found = keyring(secrets).caller(&headers).ok();
        let found = found.map(|caller| caller.name.map(|name| name.to_string()));
        let want = want.map(|name| name.map(str::to_owned));
        assert_eq!(found, want, "{secrets:?} {header:?}");
    }

    #[test]
    fn caller_is_known_by_the_whole_key_and_nothing_else() {
        check(&[], None, Some(None));
        check(&[], Some("Bearer x"), Some(None));
        check(&["a", "bb"], Some("Bearer bb"), Some(Some("name of bb")));
        check(&["a", "bb"], Some("bearer a"), Some(Some("name of a")));
        for header in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer b",
            "Bearer bbb",
            "Basic bb",
            "bb",
            "Bearer a bb",
        ] {
            check(&["a", "bb"], Some(header), None);
        }
        check(&["a"], None, None);
    }
}
