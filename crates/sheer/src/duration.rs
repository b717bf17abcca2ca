//! Durations as people write and read them: `90s`, `10m`, `1h30m`.

use std::time::Duration;

const UNITS: &[(&str, u64)] = &[("d", 86_400_000), ("h", 3_600_000), ("ms", 1), ("m", 60_000), ("s", 1000)];

/// Parses a sum of numbers with units `d`, `h`, `m`, `s` and `ms`.
///
/// # Errors
/// A sentence for the person who wrote it.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is no duration; write for example 30s, 10m, 1h30m or 24h");
    let (mut rest, mut millis) = (text, 0u64);
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let (unit, each) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit)).ok_or_else(wrong)?;
        millis = number.checked_mul(*each).and_then(|part| millis.checked_add(part)).ok_or_else(wrong)?;
        rest = &rest[unit.len()..];
    }
    Ok(Duration::from_millis(millis))
}

/// Seconds in three digits at most and a fitting unit, such as `1.3ms`.
pub(crate) fn show_seconds(seconds: f64) -> String {
    match seconds {
        s if s < 0.000_999_5 => figure(s * 1e6, "µs"),
        s if s < 0.999_5 => figure(s * 1e3, "ms"),
        s if s < 120.0 => figure(s, "s"),
        s if s < 7200.0 => format!("{:.0}m", s / 60.0),
        s if s < 172_800.0 => format!("{:.0}h", s / 3600.0),
        s => format!("{:.0}d", s / 86_400.0),
    }
}

fn figure(value: f64, unit: &str) -> String {
    if value < 9.95 { format!("{value:.1}{unit}") } else { format!("{value:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sums_of_units() {
        for (text, millis) in
            [("250ms", 250), ("30s", 30_000), ("10m", 600_000), ("1h30m", 5_400_000), ("2d", 172_800_000)]
        {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for wrong in ["", "10", "s", "-1s", "1.5h", "1 h", "10x", "99999999999999999999s", "9999999999999999d"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shows_few_digits() {
        for (seconds, text) in [
            (0.0, "0.0µs"),
            (0.000_042, "42µs"),
            (0.000_999_6, "1.0ms"),
            (0.001_3, "1.3ms"),
            (0.25, "250ms"),
            (1.04, "1.0s"),
            (59.9, "60s"),
            (600.0, "10m"),
            (86_400.0, "24h"),
            (1_000_000.0, "12d"),
        ] {
            assert_eq!(show_seconds(seconds), text);
        }
    }
}
