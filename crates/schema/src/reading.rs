//! JSON as it was written: the value, and the fields that were written twice, of which only the last counts.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Repeated fields that are told of.
const MAX_TOLD: usize = 50;

/// Parses one JSON document. The texts are paths of fields that occur more than once: `spec.containers[0].image`.
pub fn read_json(bytes: &[u8]) -> Result<(Value, Vec<String>), serde_json::Error> {
    let mut repeated = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Reader { path: &mut String::new(), repeated: &mut repeated }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok((value, repeated))
}

struct Reader<'a> {
    /// Where the value is.
    path: &'a mut String,
    repeated: &'a mut Vec<String>,
}

impl Reader<'_> {
    /// A reader of the value one step further; the path is cut back to what is returned beside it.
    fn below(&mut self, step: &str) -> (Reader<'_>, usize) {
        let length = self.path.len();
        self.path.push_str(step);
        (Reader { path: self.path, repeated: self.repeated }, length)
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Bool(flag))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Value, E> {
        Ok(Number::from_f64(number).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Value, E> {
        Ok(Value::String(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        loop {
            let (reader, length) = self.below(&format!("[{}]", out.len()));
            let item = list.next_element_seed(reader)?;
            self.path.truncate(length);
            match item {
                Some(item) => out.push(item),
                None => return Ok(Value::Array(out)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let step = if self.path.is_empty() { key.clone() } else { format!(".{key}") };
            let (reader, length) = self.below(&step);
            let value = map.next_value_seed(reader)?;
            if out.insert(key, value).is_some() && self.repeated.len() < MAX_TOLD {
                self.repeated.push(self.path.clone());
            }
            self.path.truncate(length);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_fields_are_told() {
        let text = r#"{"a": [1, {"b": 1.5, "b": -2}], "c": {"d": null, "e": "x"}, "a": [true, {"b": "y"}]}"#;
        let (value, repeated) = read_json(text.as_bytes()).unwrap();
        assert_eq!(value, serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(repeated, ["a[1].b", "a"]);
    }

    #[test]
    fn hostile_text_is_refused() {
        for bad in ["", "{", "{} {}", "{\"a\":}", &"[".repeat(100_000)] {
            assert!(read_json(bad.as_bytes()).is_err(), "{}", bad.get(..20).unwrap_or(bad));
        }
    }
}
