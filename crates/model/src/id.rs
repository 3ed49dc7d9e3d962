//! Ids and names. An [`InstanceId`] names everything an instance owns on its host: directory, cgroup, interface, record.

use std::fmt;

/// A name that is not a DNS-1123 name of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} \"{name}\" is not valid: {why}")]
pub struct InvalidName {
    pub what: &'static str,
    pub name: String,
    pub why: &'static str,
}

/// Checks a DNS-1123 label (RFC 1123): at most 63 of `a-z 0-9 -`, beginning and ending with a letter or digit.
pub fn check_label(what: &'static str, name: &str) -> Result<(), InvalidName> {
    let fail = |why| Err(InvalidName { what, name: name.to_owned(), why });
    if name.is_empty() || name.len() > 63 {
        return fail("it must have 1 to 63 characters");
    }
    check_label_characters(what, name)
}

/// Checks a DNS-1123 subdomain (RFC 1123): labels joined by dots, 253 characters at most.
pub fn check_subdomain(what: &'static str, name: &str) -> Result<(), InvalidName> {
    if name.is_empty() || name.len() > 253 {
        return Err(InvalidName { what, name: name.to_owned(), why: "it must have 1 to 253 characters" });
    }
    name.split('.').try_for_each(|label| check_label_characters(what, label))
}

fn check_label_characters(what: &'static str, label: &str) -> Result<(), InvalidName> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = label.as_bytes();
    let ends = bytes.first().copied().is_some_and(plain) && bytes.last().copied().is_some_and(plain);
    if ends && bytes.iter().all(|&c| plain(c) || c == b'-') {
        return Ok(());
    }
    Err(InvalidName {
        what,
        name: label.to_owned(),
        why: "use a-z, 0-9 and '-', beginning and ending with a letter or digit",
    })
}

/// The id of an instance: `i-` and 12 lower-case hexadecimal digits, unique in the pool and never reused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(String);

impl InstanceId {
    /// The id made of 48 random bits.
    pub fn from_bits(bits: u64) -> Self {
        Self(format!("i-{:012x}", bits & 0xffff_ffff_ffff))
    }

    /// Reads an id; anything but the exact form is refused, so an id is always safe as a file or interface name part.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let digits = text.strip_prefix("i-").unwrap_or_default().as_bytes();
        if digits.len() == 12 && digits.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Self(text.to_owned()));
        }
        Err(InvalidName { what: "instance id", name: text.to_owned(), why: "it must be i- and 12 hexadecimal digits" })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 12 digits alone, for names with little room (an interface name has 15 characters).
    pub fn digits(&self) -> &str {
        &self.0[2..]
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(check_label("name", "web-1").is_ok());
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert!(check_label("name", bad).is_err(), "{bad}");
        }
        assert!(check_subdomain("name", "a.b-c.d").is_ok());
        for bad in ["", ".", "a..b", "a.B", &"a".repeat(254)] {
            assert!(check_subdomain("name", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn instance_ids() {
        let id = InstanceId::from_bits(u64::MAX);
        assert_eq!(id.as_str(), "i-ffffffffffff");
        assert_eq!(InstanceId::parse(id.as_str()).unwrap(), id);
        for bad in ["", "i-", "i-00000000000", "i-00000000000G", "../../../etc/pas", "i-0000000000000"] {
            assert!(InstanceId::parse(bad).is_err(), "{bad}");
        }
    }
}
