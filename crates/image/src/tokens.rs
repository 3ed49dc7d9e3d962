//! Tokens of registries' token services: exchanged by one pull for all that may share them, by way of a guard, and kept while
//! they are good. How one is exchanged is the business of `registry`.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use joey_guard::{Failed, Guard, Limits, Refused};
use joey_model::Digest;
use reqwest::header::HeaderValue;
use sha2::{Digest as _, Sha256};

use crate::error::Problem;
use crate::locks::Locks;

/// Life of a token whose service does not say (Docker's token specification).
pub(crate) const USUAL_LIFE: Duration = Duration::from_secs(60);
/// However long it is good.
const LONGEST_LIFE: Duration = Duration::from_secs(3600);
/// How long a refusal holds for those who ask for the same: they were under way together.
const REFUSAL: Duration = Duration::from_secs(5);
/// Tokens that are kept, and bytes of each at most.
const KEPT: (usize, usize) = (1024, 8 << 10);

pub(crate) struct Tokens {
    guard: Guard,
    kept: Mutex<HashMap<Digest, Kept>>,
    /// Who wants a token that is being exchanged waits for it.
    exchanging: Locks,
}

struct Kept {
    result: Result<HeaderValue, Problem>,
    until: Instant,
}

/// What is asked for: the same wish has the same token.
pub(crate) struct Wish {
    name: Digest,
    application: String,
}

impl Wish {
    /// Of one registry, from one service with all it is asked, as one user; `host` is the service's. Calls for a registry are
    /// guarded apart from others for the same service: a registry names whichever service it likes.
    pub(crate) fn new(registry: &str, service: &str, host: &str, user: Option<(&str, &str)>) -> Self {
        let digest = |parts: &[&str]| {
            let mut hash = Sha256::new();
            for part in parts {
                hash.update((part.len() as u64).to_be_bytes());
                hash.update(part);
            }
            Digest::from_sha256(&hash.finalize().into())
        };
        let (name, password) = user.unwrap_or_default();
        let name = digest(&[registry, service, name, password]);
        let user = user.map_or_else(String::new, |(name, password)| digest(&[registry, name, password]).to_string());
        Self { name, application: format!("{registry} {host} {user}") }
    }
}

/// Why a token was not exchanged, without the words around it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Said {
    /// Not now: what happened.
    Detail(String),
    /// Not at all.
    Problem(Problem),
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Detail(detail) => f.write_str(detail),
            Self::Problem(problem) => problem.fmt(f),
        }
    }
}

impl Tokens {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { guard: Guard::new(limits), kept: Mutex::default(), exchanging: Locks::default() }
    }

    /// A token other than `refused`, kept or exchanged.
    pub(crate) async fn get<F>(
        &self,
        wish: &Wish,
        refused: Option<&HeaderValue>,
        exchange: impl Fn() -> F,
    ) -> Result<HeaderValue, Refused<Said>>
    where
        F: Future<Output = Result<(HeaderValue, Duration), Failed<Said>>>,
    {
        let _alone = self.exchanging.lock(&wish.name).await;
        match self.find(&wish.name) {
            Some(Ok(token)) if Some(&token) != refused => return Ok(token),
            Some(Err(problem)) => return Err(Refused::Failed(Said::Problem(problem))),
            _ => {}
        }
        let exchanged = self.guard.call(&wish.application, exchange).await;
        match &exchanged {
            Ok((token, life)) if token.len() <= KEPT.1 => {
                // It shall be good for some time still when it is used for the last time.
                self.keep(&wish.name, Ok(token.clone()), (*life).min(LONGEST_LIFE) / 10 * 9);
            }
            Err(Refused::Failed(Said::Problem(problem @ Problem::Denied { .. }))) => {
                self.keep(&wish.name, Err(problem.clone()), REFUSAL);
            }
            _ => {}
        }
        exchanged.map(|(token, _)| token)
    }

    fn find(&self, name: &Digest) -> Option<Result<HeaderValue, Problem>> {
        let kept = self.kept.lock().expect("no holder panics");
        kept.get(name).filter(|kept| kept.until > Instant::now()).map(|kept| kept.result.clone())
    }

    fn keep(&self, name: &Digest, result: Result<HeaderValue, Problem>, life: Duration) {
        let now = Instant::now();
        let mut kept = self.kept.lock().expect("no holder panics");
        kept.retain(|_, kept| kept.until > now);
        kept.remove(name);
        if kept.len() < KEPT.0 {
            kept.insert(name.clone(), Kept { result, until: now + life });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn one_exchange_for_all_that_wish_the_same() {
        let (tokens, asked) = (Tokens::new(Limits::default()), AtomicUsize::new(0));
        let exchange = || async {
            let number = asked.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok((HeaderValue::from_str(&format!("Bearer {number}")).unwrap(), USUAL_LIFE))
        };
        let wish = Wish::new("r", "https://t/?scope=a", "t", None);
        let all = futures::future::join_all((0..200).map(|_| tokens.get(&wish, None, exchange))).await;
        assert!(all.iter().all(|token| token.as_ref().is_ok_and(|token| token == "Bearer 0")));
        // All who were refused with the old one get the same new one.
        let old = HeaderValue::from_static("Bearer 0");
        let all = futures::future::join_all((0..200).map(|_| tokens.get(&wish, Some(&old), exchange))).await;
        assert!(all.iter().all(|token| token.as_ref().is_ok_and(|token| token == "Bearer 1")));
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        let others = [
            Wish::new("r", "https://t/?scope=b", "t", None),
            Wish::new("q", "https://t/?scope=a", "t", None),
            Wish::new("r", "https://t/?scope=a", "t", Some(("u", "p"))),
            Wish::new("r", "https://t/?scope=a", "t", Some(("u", "q"))),
        ];
        for (number, wish) in others.iter().enumerate() {
            let token = tokens.get(wish, None, exchange).await.unwrap();
            assert_eq!(token, format!("Bearer {}", number + 2), "nobody else's");
        }
    }

    #[tokio::test]
    async fn refusals_hold_for_a_moment_and_failures_do_not() {
        let (tokens, asked) = (Tokens::new(Limits { tries: 1, ..Limits::default() }), AtomicUsize::new(0));
        let denied = Problem::Denied { registry: "r".to_owned(), anonymous: true };
        let refuse = || async {
            asked.fetch_add(1, Ordering::Relaxed);
            Err(Failed::Final(Said::Problem(denied.clone())))
        };
        let wish = Wish::new("r", "https://t/", "t", None);
        for _ in 0..50 {
            let refused = tokens.get(&wish, None, refuse).await;
            assert_eq!(refused, Err(Refused::Failed(Said::Problem(denied.clone()))));
        }
        assert_eq!(asked.swap(0, Ordering::Relaxed), 1);
        let fail = || async {
            asked.fetch_add(1, Ordering::Relaxed);
            Err(Failed::Again { error: Said::Detail("it answered 503".to_owned()), after: None })
        };
        let wish = Wish::new("r", "https://t/", "t", Some(("u", "p")));
        for _ in 0..50 {
            assert!(tokens.get(&wish, None, fail).await.is_err());
        }
        assert_eq!(asked.load(Ordering::Relaxed), 3, "the guard leaves it alone");
    }

    #[tokio::test]
    async fn a_registry_that_names_anothers_service_is_in_nobody_elses_way() {
        let limits = Limits { per_second: 0.001, burst: 5, patience: Duration::ZERO, ..Limits::default() };
        let tokens = Tokens::new(limits);
        let exchange = || async { Ok((HeaderValue::from_static("Bearer t"), USUAL_LIFE)) };
        let held = async |registry: &str, scope: usize| {
            let wish = Wish::new(registry, &format!("https://auth.example/?scope={scope}"), "auth.example", None);
            matches!(tokens.get(&wish, None, exchange).await, Err(Refused::Held(_)))
        };
        for scope in 0..5 {
            assert!(!held("https://hostile.example", scope).await);
        }
        assert!(held("https://hostile.example", 5).await, "it has used up what is its own");
        assert!(!held("https://registry.example", 0).await);
    }
}
