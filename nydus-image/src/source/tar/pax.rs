//! Extended attributes of archive members: the records of POSIX pax headers.
//!
//! A record is `<length> <key>=<value>\n`, where the length counts the whole
//! record. Values are bytes: capabilities contain newlines and NULs.

/// The records of one extended header, in order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Records(Vec<(Vec<u8>, Vec<u8>)>);

/// Prefix of keys that carry an extended attribute of the file.
const XATTR: &[u8] = b"SCHILY.xattr.";

impl Records {
    /// Splits the data of an extended header; `None` if it is damaged.
    pub(super) fn parse(mut data: &[u8]) -> Option<Self> {
        let mut records = Vec::new();
        while !data.is_empty() {
            let space = data.iter().take(20).position(|byte| *byte == b' ')?;
            let len: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
            let record = data.get(space + 1..len)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|byte| *byte == b'=')?;
            records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
            data = &data[len..];
        }
        Some(Self(records))
    }

    /// Adds later records; where keys are equal, the later one counts.
    pub(super) fn extend(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// The value that counts for `key`. An empty value takes back an earlier one.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let last = self.0.iter().rev().find(|(name, _)| name == key.as_bytes());
        last.map(|(_, value)| value.as_slice())
            .filter(|value| !value.is_empty())
    }

    /// All records in order, for keys that may repeat.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// Extended attributes of the file, as (full key, value).
    pub(super) fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?, value)))
    }

    /// Memory that the records take, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.0
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum()
    }
}

/// A decimal number; `None` if it is none or too large.
pub(super) fn decimal(value: &[u8]) -> Option<u64> {
    if !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// A time in seconds with an optional sign and fraction, as (seconds, nanoseconds).
/// Digits after the ninth of the fraction are dropped.
pub(super) fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let dot = value
        .iter()
        .position(|byte| *byte == b'.')
        .unwrap_or(value.len());
    let whole = i64::try_from(decimal(&value[..dot])?).ok()?;
    let fraction = value.get(dot + 1..).unwrap_or(&[]);
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction
        .iter()
        .copied()
        .chain(std::iter::repeat(b'0'))
        .take(9);
    let nanos = digits.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanos) {
        (false, _) => (whole, nanos),
        (true, 0) => (-whole, 0),
        // Nanoseconds count forwards also before 1970.
        (true, _) => (-whole - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_bytes() {
        let records = Records::parse(b"29 SCHILY.xattr.user.k=a\n\0b=c\n12 size=42\n");
        assert_eq!(records, None, "the first length is wrong");
        let records = Records::parse(b"30 SCHILY.xattr.user.k=a\n\0b=c\n11 size=42\n").unwrap();
        assert_eq!(records.get("size"), Some(b"42".as_slice()));
        assert_eq!(
            records.xattrs().collect::<Vec<_>>(),
            [(b"user.k".as_slice(), b"a\n\0b=c".as_slice())]
        );
    }

    #[test]
    fn damaged_records_are_refused() {
        for bad in [
            b"5 a=b".as_slice(),
            b"x a=b\n",
            b"6 abc\n",
            b"99999999999999999999 a=b\n",
            b"3 a=b\n",
            b"0 a=b\n",
            b"100 a=b\n",
        ] {
            assert_eq!(Records::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn times_count_forwards_before_1970() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.0000000019"), Some((12, 1)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-3"), Some((-3, 0)));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b""), None);
    }
}
