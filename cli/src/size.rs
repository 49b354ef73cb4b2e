//! Sizes: as they are typed, and as they are shown.

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes in a GiB.
pub const GIB: u64 = 1 << 30;

/// Reads a memory size: a number of MiB, or a number with a unit (`512M`, `1.5G`). The units
/// are powers of 1024 whether they are written `G`, `GB` or `GiB`.
pub fn memory_mib(text: &str) -> Result<u64, String> {
    whole(text, MIB, "MiB")
}

/// Reads a disk size: a number of GiB, or a number with a unit (`80G`, `1T`).
pub fn disk_gib(text: &str) -> Result<u64, String> {
    whole(text, GIB, "GiB")
}

/// Reads a number of things.
pub fn count(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| "a whole number is wanted, such as 2".to_owned())
}

/// Reads a time in seconds, a day at most.
pub fn seconds(text: &str) -> Result<u64, String> {
    let seconds = text.trim().parse().ok().filter(|seconds| *seconds <= 86_400);
    seconds.ok_or_else(|| "a number of seconds is wanted, at most 86400 (a day)".to_owned())
}

/// Reads `text` as a multiple of `unit` bytes; a bare number counts units.
fn whole(text: &str, unit: u64, unit_name: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let scale = match suffix.trim().to_ascii_uppercase().as_str() {
        "" => unit,
        "M" | "MB" | "MIB" => MIB,
        "G" | "GB" | "GIB" => GIB,
        "T" | "TB" | "TIB" => 1 << 40,
        _ => return Err(format!("a size is a number of {unit_name}, or a number with M, G or T")),
    };
    let bytes = scaled(number, scale)
        .ok_or_else(|| format!("a size is a number of {unit_name}, or a number with M, G or T"))?;
    if bytes % u128::from(unit) != 0 {
        return Err(format!("not a whole number of {unit_name}"));
    }
    match u64::try_from(bytes / u128::from(unit)) {
        Ok(units) if units > 0 => Ok(units),
        Ok(_) => Err("a size of nothing".to_owned()),
        Err(_) => Err("larger than anything there is".to_owned()),
    }
}

/// The decimal `number` (`12`, `1.5`) times `scale`, exactly; `None` where it is no number or
/// the product is no integer.
fn scaled(number: &str, scale: u64) -> Option<u128> {
    let (integer, fraction) = number.split_once('.').unwrap_or((number, ""));
    if integer.is_empty() || integer.len() > 18 || fraction.len() > 9 || (number.ends_with('.')) {
        return None;
    }
    let ten_power = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = format!("{integer}{fraction}").parse().ok()?;
    let product = digits * u128::from(scale);
    product.is_multiple_of(ten_power).then_some(product / ten_power)
}

/// Bytes for people: three significant digits or fewer, in powers of 1024.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    let mut scale: u64 = 1024;
    while unit + 1 < UNITS.len() && bytes / scale >= 1024 {
        scale <<= 10;
        unit += 1;
    }
    let tenths = (u128::from(bytes) * 10 + u128::from(scale) / 2) / u128::from(scale);
    if tenths % 10 == 0 || tenths >= 1000 {
        format!("{} {}", (tenths + 5) / 10, UNITS[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_mib_without_a_unit() {
        for (text, mib) in [
            ("512", 512),
            ("512M", 512),
            ("1G", 1024),
            ("1.5G", 1536),
            ("2GiB", 2048),
            ("2 gb", 2048),
            ("1T", 1 << 20),
            ("0.25g", 256),
        ] {
            assert_eq!(memory_mib(text), Ok(mib), "{text}");
        }
    }

    #[test]
    fn disks_are_gib_without_a_unit() {
        assert_eq!(disk_gib("80"), Ok(80));
        assert_eq!(disk_gib("80G"), Ok(80));
        assert_eq!(disk_gib("1T"), Ok(1024));
        assert_eq!(disk_gib("65536M"), Ok(64));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "G", "x", "1X", "-1", "1..5G", ".5G", "1.G", "0", "1.0001M", "99999999999999999999", "1e3"]
        {
            assert!(memory_mib(text).is_err(), "{text}");
        }
        assert!(disk_gib("500M").unwrap_err().contains("whole"));
    }

    #[test]
    fn numbers_are_refused_in_words() {
        assert_eq!((count("2"), seconds("0"), seconds("86400")), (Ok(2), Ok(0), Ok(86_400)));
        for text in ["", "x", "-1", "1.5", "99999999999"] {
            assert!(count(text).unwrap_err().contains("whole number"), "{text}");
            assert!(seconds(text).unwrap_err().contains("seconds"), "{text}");
        }
    }

    #[test]
    fn people_read_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (GIB, "1 GiB"),
            (523 * MIB, "523 MiB"),
            (64 * GIB, "64 GiB"),
            (1536 * MIB, "1.5 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
