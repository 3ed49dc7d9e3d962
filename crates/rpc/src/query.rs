//! Query strings of flat structures: fields by name, lists by repeating the name, nothing where there is no value.

use std::collections::BTreeMap;

use joey_model::{ErrorKind, Fault};
use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{self, DeserializeOwned, IntoDeserializer, Visitor};
use serde::{Serialize, forward_to_deserialize_any};

/// Writes a flat structure as a query string, without the question mark. Nested structures have no such form and are left out.
pub fn query(value: &impl Serialize) -> String {
    let mut out = form_urlencoded::Serializer::new(String::new());
    if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(value) {
        for (name, value) in fields {
            match value {
                serde_json::Value::Array(items) => {
                    for item in items.iter().filter_map(scalar) {
                        out.append_pair(&name, &item);
                    }
                }
                value => {
                    if let Some(text) = scalar(&value) {
                        out.append_pair(&name, &text);
                    }
                }
            }
        }
    }
    out.finish()
}

fn scalar(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::Null | serde_json::Value::Array(_) | serde_json::Value::Object(_) => None,
        serde_json::Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// Reads a query string, without the question mark. Unknown names are ignored unless the structure refuses them.
pub fn parse_query<T: DeserializeOwned>(query: &str) -> Result<T, Fault> {
    let mut fields: BTreeMap<String, Values> = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        fields.entry(name.into_owned()).or_default().0.push(value.into_owned());
    }
    T::deserialize(MapDeserializer::new(fields.into_iter())).map_err(|error: de::value::Error| {
        Fault::new(ErrorKind::Invalid, "InvalidQuery", format!("query is not understood: {error}"))
    })
}

/// Every value given for one name.
#[derive(Default)]
struct Values(Vec<String>);

impl Values {
    fn last(self) -> String {
        self.0.into_iter().next_back().unwrap_or_default()
    }
}

impl IntoDeserializer<'_> for Values {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! parsed {
    ($($method:ident $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            let text = self.last();
            match text.parse() {
                Ok(value) => visitor.$visit(value),
                Err(_) => Err(de::Error::invalid_value(de::Unexpected::Str(&text), &visitor)),
            }
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Values {
    type Error = de::value::Error;

    parsed! {
        deserialize_u8 visit_u8 deserialize_u16 visit_u16 deserialize_u32 visit_u32 deserialize_u64 visit_u64
        deserialize_i8 visit_i8 deserialize_i16 visit_i16 deserialize_i32 visit_i32 deserialize_i64 visit_i64
        deserialize_f32 visit_f32 deserialize_f64 visit_f64
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.last().as_str() {
            "" | "1" | "true" => visitor.visit_bool(true),
            "0" | "false" => visitor.visit_bool(false),
            other => Err(de::Error::invalid_value(de::Unexpected::Str(other), &visitor)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_seq(SeqDeserializer::new(self.0.into_iter()))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_enum(self.last().into_deserializer())
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_string(self.last())
    }

    forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use joey_api::instance::{ExecRequest, LogOptions};

    use super::*;

    #[test]
    fn there_and_back() {
        let exec = ExecRequest {
            command: vec!["sh".into(), "-c".into(), "echo a&b=ü; ".into()],
            stdin: true,
            tty: true,
            ..Default::default()
        };
        assert_eq!(parse_query::<ExecRequest>(&query(&exec)).unwrap(), exec);
        let logs = LogOptions {
            follow: true,
            tail: Some(7),
            since: Some("2026-01-02T03:04:05.000006Z".parse().unwrap()),
            ..Default::default()
        };
        assert_eq!(parse_query::<LogOptions>(&query(&logs)).unwrap(), logs);
        assert_eq!(parse_query::<LogOptions>("").unwrap(), LogOptions::default());
        assert!(parse_query::<LogOptions>("tail=many").is_err());
        assert!(parse_query::<LogOptions>("follow=perhaps").is_err());
        assert!(parse_query::<LogOptions>("follow").unwrap().follow);
    }
}
