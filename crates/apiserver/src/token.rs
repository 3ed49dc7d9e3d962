//! Service-account tokens: JSON web tokens signed with ECDSA P-256 (RFC 7515, ES256), made and verified here.
//!
//! Claims follow Kubernetes' bound tokens. That account and Pod still exist is the caller's matter.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::{Value, json};

use crate::auth::Identity;

/// Who issued a token, and whom it is for when nobody else is named.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Shortest and longest life of a token, in seconds (Kubernetes' TokenRequest).
pub const LIFE: std::ops::RangeInclusive<i64> = 600..=(1 << 32);

pub struct Tokens {
    key: EcdsaKeyPair,
    random: SystemRandom,
    key_id: String,
}

/// What a token is about.
pub struct Account<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub uid: &'a str,
    pub audiences: Vec<String>,
    /// Name and uid of the Pod it is bound to.
    pub pod: Option<(String, String)>,
}

/// Whom a genuine token speaks for, if what it is bound to is still there.
pub struct Bearer {
    pub who: Identity,
    pub namespace: String,
    pub account: String,
    /// Name and uid of the Pod it is bound to.
    pub pod: Option<(String, String)>,
}

impl Tokens {
    /// Takes the key in PKCS#8.
    pub fn new(pkcs8: &[u8]) -> Option<Self> {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random).ok()?;
        let digest = ring::digest::digest(&ring::digest::SHA256, key.public_key().as_ref());
        let key_id = URL_SAFE_NO_PAD.encode(digest.as_ref());
        Some(Self { key, random, key_id })
    }

    /// A token that is valid from now for `life` seconds.
    pub fn sign(&self, account: &Account<'_>, now: Timestamp, life: i64) -> Option<String> {
        let mut kubernetes = json!({
            "namespace": account.namespace,
            "serviceaccount": {"name": account.name, "uid": account.uid},
        });
        if let Some((name, uid)) = &account.pod {
            kubernetes["pod"] = json!({"name": name, "uid": uid});
        }
        let claims = json!({
            "iss": ISSUER,
            "sub": format!("system:serviceaccount:{}:{}", account.namespace, account.name),
            "aud": account.audiences,
            "iat": now.as_second(),
            "nbf": now.as_second(),
            "exp": now.as_second() + life,
            "jti": crate::object::uid(),
            "kubernetes.io": kubernetes,
        });
        let header = json!({"alg": "ES256", "kid": self.key_id, "typ": "JWT"});
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = self.key.sign(&self.random, signed.as_bytes()).ok()?;
        Some(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())))
    }

    /// The account of a token that is genuine, in time and meant for this server.
    pub fn verify(&self, token: &str, now: Timestamp) -> Option<Bearer> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        // The algorithm is ours to choose, never the token's.
        if header["alg"] != "ES256" {
            return None;
        }
        let public = ring::signature::UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key());
        public.verify(signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        let (from, until) = (claims["nbf"].as_i64()?, claims["exp"].as_i64()?);
        let for_us = claims["aud"].as_array()?.iter().any(|audience| audience == ISSUER);
        if now.as_second() + 10 < from || now.as_second() >= until || !for_us {
            return None;
        }
        let subject = claims["sub"].as_str()?;
        let (namespace, account) = subject.strip_prefix("system:serviceaccount:")?.split_once(':')?;
        let mut who =
            Identity::new(subject, &["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")]);
        let bound = &claims["kubernetes.io"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        who.uid = text(&bound["serviceaccount"]["uid"])?;
        let pod = match &bound["pod"] {
            Value::Null => None,
            pod => Some((text(&pod["name"])?, text(&pod["uid"])?)),
        };
        Some(Bearer { who, namespace: namespace.to_owned(), account: account.to_owned(), pod })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_forgery() {
        let key = rcgen::KeyPair::generate().unwrap().serialize_der();
        let tokens = Tokens::new(&key).unwrap();
        let account = Account { namespace: "a", name: "b", uid: "u", audiences: vec![ISSUER.to_owned()], pod: None };
        let now = Timestamp::now();
        let token = tokens.sign(&account, now, 600).unwrap();
        let who = tokens.verify(&token, now).unwrap().who;
        assert_eq!((who.user.as_str(), who.uid.as_str()), ("system:serviceaccount:a:b", "u"));
        assert!(tokens.verify(&token, now + jiff::SignedDuration::from_secs(601)).is_none());
        let other = Tokens::new(&rcgen::KeyPair::generate().unwrap().serialize_der()).unwrap();
        assert!(other.verify(&token, now).is_none());
        let mut parts: Vec<&str> = token.split('.').collect();
        let none = URL_SAFE_NO_PAD.encode("{\"alg\":\"none\"}");
        parts[0] = &none;
        parts[2] = "";
        assert!(tokens.verify(&parts.join("."), now).is_none());
        let elsewhere = Account { audiences: vec!["other".into()], ..account };
        assert!(tokens.verify(&tokens.sign(&elsewhere, now, 600).unwrap(), now).is_none());
    }
}
