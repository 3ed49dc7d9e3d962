//! Amounts in the notation of Kubernetes: `500m` of a CPU, `64Mi` of memory, `5M` bits per second.

/// Why an amount could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("amount \"{text}\" is not valid: {why}")]
pub struct InvalidQuantity {
    pub text: String,
    pub why: &'static str,
}

/// Reads an amount into thousandths of its unit, rounded up: `0.1` → 100, `250m` → 250, `2` → 2000.
///
/// Suffixes are those of Kubernetes' resource.Quantity: n u m, k M G T P E, Ki Mi Gi Ti Pi Ei, and a decimal exponent.
pub fn parse_milli(text: &str) -> Result<u64, InvalidQuantity> {
    let fail = |why| InvalidQuantity { text: text.to_owned(), why };
    let (number, suffix) = text.split_at(text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || fraction.contains('.') || whole.len() > 19 {
        return Err(fail("it must begin with a number that is not negative"));
    }
    let (multiply, divide): (u128, u128) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let digits = suffix.strip_prefix(['e', 'E']).ok_or_else(|| fail("its unit is not known"))?;
            let exponent: i32 = digits.parse().map_err(|_| fail("its exponent is not a number"))?;
            match exponent {
                0..=18 => (10u128.pow(exponent.unsigned_abs()), 1),
                -18..0 => (1, 10u128.pow(exponent.unsigned_abs())),
                _ => return Err(fail("its exponent is out of range")),
            }
        }
    };
    let fraction = &fraction[..fraction.len().min(9)];
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| fail("its number is too long"))?;
    let scale = 10u128.pow(fraction.len() as u32) * divide;
    let milli = digits
        .checked_mul(multiply)
        .and_then(|n| n.checked_mul(1000))
        .ok_or_else(|| fail("it is too large"))?
        .div_ceil(scale);
    u64::try_from(milli).map_err(|_| fail("it is too large"))
}

/// Reads an amount in whole units, rounded up: bytes of memory, bits per second.
pub fn parse_units(text: &str) -> Result<u64, InvalidQuantity> {
    parse_milli(text).map(|milli| milli.div_ceil(1000))
}

/// Bytes as a person reads them: `1.5MiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes}B") } else { format!("{value:.1}{}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        for (text, milli) in [
            ("0", 0),
            ("2", 2_000),
            ("0.1", 100),
            (".5", 500),
            ("250m", 250),
            ("1u", 1),
            ("5M", 5_000_000_000),
            ("64Mi", 64 * 1024 * 1024 * 1000),
            ("1.5Gi", 3 * 512 * 1024 * 1024 * 1000),
            ("1e3", 1_000_000),
            ("1E3", 1_000_000),
            ("12e-1", 1_200),
        ] {
            assert_eq!(parse_milli(text), Ok(milli), "{text}");
        }
        for bad in ["", "-1", "m", "1x", "1.2.3", "1e99", "99999999999E", "1 Gi", "1Gib"] {
            assert!(parse_milli(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_units("100m"), Ok(1));
        assert_eq!(human_bytes(1536 * 1024), "1.5MiB");
    }
}
