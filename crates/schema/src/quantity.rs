//! Amounts in their one canonical form, as kube-apiserver stores them: `1000m` → `1`, `0.5` → `500m`, `1024Mi` → `1Gi`.
//!
//! The notation (decimal, binary, exponent) is kept; within it the mantissa is whole and as short as can be. Nothing finer
//! than a thousand-millionth is kept (rounded away from zero), nothing above 2⁶³−1. What an amount means is not known here.

/// What every amount looks like, in the words of Kubernetes.
const FORM: &str = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
const SUFFIX: &str = "unable to parse quantity's suffix";
const NUMBER: &str = "unable to parse numeric part of quantity";
const NANO: i128 = 1_000_000_000;
const DECIMAL: [(&str, i32); 10] =
    [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Notation {
    Decimal,
    Binary,
    Exponent,
}

/// The canonical form of an amount, or why it is none.
pub(super) fn canonical(text: &str) -> Result<String, &'static str> {
    let (nanos, notation) = parse(text)?;
    Ok(match notation {
        _ if nanos == 0 => "0".to_owned(),
        Notation::Binary if nanos.abs() >= 1024 * NANO && nanos % NANO == 0 => binary(nanos / NANO),
        Notation::Binary | Notation::Decimal => decimal(nanos, Notation::Decimal),
        Notation::Exponent => decimal(nanos, Notation::Exponent),
    })
}

fn parse(text: &str) -> Result<(i128, Notation), &'static str> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let end = unsigned.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return Err(FORM);
    }
    if fraction.contains('.') {
        return Err(NUMBER);
    }
    let (notation, ten, two) = unit(suffix)?;
    let magnitude = nanos(whole, fraction, ten, two);
    Ok((if text.starts_with('-') { -magnitude } else { magnitude }, notation))
}

/// Notation, power of ten and power of two of a suffix.
fn unit(suffix: &str) -> Result<(Notation, i32, u32), &'static str> {
    if let Some((_, ten)) = DECIMAL.iter().find(|(word, _)| *word == suffix) {
        return Ok((Notation::Decimal, *ten, 0));
    }
    if let Some(place) = BINARY.iter().position(|word| *word == suffix) {
        return Ok((Notation::Binary, 0, 10 * (place as u32 + 1)));
    }
    let digits = suffix.strip_prefix(['e', 'E']).ok_or(SUFFIX)?;
    let exponent: i32 = digits.parse().map_err(|_| SUFFIX)?;
    Ok((Notation::Exponent, exponent.clamp(-64, 64), 0))
}

/// The magnitude in thousand-millionths, rounded up, and held at 2⁶³−1.
fn nanos(whole: &str, fraction: &str, ten: i32, two: u32) -> i128 {
    let most = i128::from(i64::MAX) * NANO;
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return 0;
    }
    // Digits × 10^power × 2^two: beyond the bounds the digits themselves do not matter.
    let power = i64::from(ten) + 9 - fraction.len() as i64;
    if digits.len() as i64 + power > 29 {
        return most;
    }
    if digits.len() as i64 + power + i64::from(two / 3) < 0 {
        return 1;
    }
    // At most 29 digits count; what is cut off only rounds up.
    let (kept, cut) = digits.split_at(digits.len().min(28));
    let power = power + cut.len() as i64;
    let mut value: i128 = kept.parse().unwrap_or(0);
    let mut inexact = cut.bytes().any(|digit| digit != b'0');
    let (mut scale, mut twos) = (power, two);
    while scale > 0 {
        value *= 10;
        scale -= 1;
    }
    // Doubled first, so that nothing is cut off while there is room.
    while twos > 0 || scale < 0 {
        if twos > 0 && value < 1 << 125 {
            value *= 2;
            twos -= 1;
        } else if scale < 0 {
            inexact |= value % 10 != 0;
            value /= 10;
            scale += 1;
        } else {
            return most;
        }
    }
    (value + i128::from(inexact)).min(most)
}

fn decimal(nanos: i128, notation: Notation) -> String {
    let (mut mantissa, mut power) = (nanos, -9);
    while mantissa % 1000 == 0 && power < 18 {
        mantissa /= 1000;
        power += 3;
    }
    match (notation, power) {
        (_, 0) => mantissa.to_string(),
        (Notation::Exponent, power) => format!("{mantissa}e{power}"),
        (_, power) => {
            let suffix = DECIMAL.iter().find(|(_, ten)| *ten == power).map(|(word, _)| *word).unwrap_or_default();
            format!("{mantissa}{suffix}")
        }
    }
}

fn binary(units: i128) -> String {
    let (mut mantissa, mut place) = (units, 0);
    while mantissa % 1024 == 0 && place < BINARY.len() {
        mantissa /= 1024;
        place += 1;
    }
    match place {
        0 => mantissa.to_string(),
        place => format!("{mantissa}{}", BINARY[place - 1]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for (text, expected) in [
            ("0", "0"),
            ("0m", "0"),
            ("-0", "0"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.5", "500m"),
            (".5", "500m"),
            ("5.", "5"),
            ("+2", "2"),
            ("-0.25", "-250m"),
            ("0.0001", "100u"),
            ("1n", "1n"),
            ("0.1n", "1n"),
            ("-0.1n", "-1n"),
            ("100000", "100k"),
            ("1024", "1024"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Ki", "512"),
            ("1025Ki", "1025Ki"),
            ("0.1Ki", "102400m"),
            ("1Ki", "1Ki"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("12e-1", "1200e-3"),
            ("1e0", "1"),
            ("1E", "1E"),
            ("5M", "5M"),
            ("0.000000000000000000000000000000000001", "1n"),
            ("0001000m", "1"),
            ("1e99", "9223372036854775807"),
            ("100E", "9223372036854775807"),
            ("7Ei", "7Ei"),
            ("1.0000000000000000000000000Ki", "1Ki"),
            ("100Ei", "9223372036854775807"),
            ("9223372036854775807", "9223372036854775807"),
        ] {
            assert_eq!(canonical(text).as_deref(), Ok(expected), "{text}");
            assert_eq!(canonical(expected).as_deref(), Ok(expected), "{expected} is canonical");
        }
        for bad in ["", "m", "1x", "1.2.3", "1 Gi", "1Gib", "abc", "1e", "--1", "1ki", "½", "1e1.5", "0x10"] {
            assert!(canonical(bad).is_err(), "{bad}");
        }
    }
}
