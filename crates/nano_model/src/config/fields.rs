//! Typed access to a JSON object, with errors that name the field and its value.

use nano_core::TokenId;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// No real model is near it, and products of three such numbers still fit 64 bits.
const MAX_COUNT: u64 = 1 << 20;

/// A JSON object and how to name it in messages.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(value: &'a Value, prefix: &'a str) -> Result<Self> {
        if let Value::Object(object) = value {
            return Ok(Self { object, prefix });
        }
        let (field, reason) = match prefix.trim_end_matches('.') {
            "" => ("the file", "must be a JSON object".to_owned()),
            part => (part, format!("must be a JSON object, got {value}")),
        };
        Err(Error::BadConfig { field: field.to_owned(), reason })
    }

    /// Every key and its value.
    pub(super) fn all(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.object.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The value, unless it is missing or null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(super) fn bad(&self, name: &str, reason: impl Into<String>) -> Error {
        Error::BadConfig { field: format!("{}{name}", self.prefix), reason: reason.into() }
    }

    fn required(&self, name: &str) -> Result<&'a Value> {
        self.get(name).ok_or_else(|| self.bad(name, "is missing"))
    }

    /// A size or number of things, at least 1.
    pub(super) fn count(&self, name: &str) -> Result<usize> {
        let value = self.required(name)?;
        // Some configs hold whole numbers as floats.
        let whole = value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 0.0);
        let count = value.as_u64().or(whole.map(|number| number as u64));
        let most = if name == "max_position_embeddings" { u64::from(u32::MAX) } else { MAX_COUNT };
        match count {
            Some(count) if (1..=most).contains(&count) => Ok(count as usize),
            _ => Err(self.bad(name, format!("must be a whole number in [1, {most}], got {value}"))),
        }
    }

    pub(super) fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        self.get(name).map(|_| self.count(name)).transpose()
    }

    pub(super) fn optional_number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(self.bad(name, format!("must be a number, got {value}"))),
        }
    }

    /// A number above 0.
    pub(super) fn positive(&self, name: &str) -> Result<f64> {
        self.required(name)?;
        match self.optional_number(name)? {
            Some(number) if number > 0.0 => Ok(number),
            number => {
                Err(self.bad(name, format!("must be above 0, got {}", number.unwrap_or(0.0))))
            }
        }
    }

    pub(super) fn optional_positive(&self, name: &str) -> Result<Option<f64>> {
        self.get(name).map(|_| self.positive(name)).transpose()
    }

    pub(super) fn optional_bool(&self, name: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value {
            Value::Bool(flag) => Ok(Some(*flag)),
            _ => Err(self.bad(name, format!("must be true or false, got {value}"))),
        }
    }

    /// A token id or a list of them; missing is none.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<TokenId>> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        let token = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.map(TokenId).ok_or_else(|| self.bad(name, format!("must be token ids, got {value}")))
        };
        list.iter().map(token).collect()
    }
}
