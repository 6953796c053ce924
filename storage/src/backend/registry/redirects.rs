//! Where blobs were found last, if not at the registry: redirects and their end.
//!
//! A redirect to an object store is a signed URL that is good for some minutes. When
//! it ends is written in its query in one of a few ways. A URL that is about to end
//! is not used any more; one whose end nobody can tell is used until the store
//! refuses it. The clock may be wrong: then a URL is renewed too early or upon its
//! refusal, and either costs one request.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use url::Url;

use crate::blob_id::BlobId;
use crate::sync::{Mutex, lock};

/// Most remembered redirects; an image has at most 254 blobs.
const MAX_REMEMBERED: usize = 1024;

/// How long before its end a URL is renewed. Less if it lives less than twice that.
const MARGIN: Duration = Duration::from_secs(5);

/// Redirects of one registry, by blob.
#[derive(Default)]
pub(in crate::backend) struct Redirects(Mutex<HashMap<BlobId, Known>>);

#[derive(Clone)]
struct Known {
    url: Url,
    renew: Option<SystemTime>,
}

impl Redirects {
    /// Where the blob is, unless that has expired.
    pub(in crate::backend) fn get(&self, blob: &BlobId) -> Option<Url> {
        let mut urls = lock(&self.0);
        let known = urls.get(blob)?;
        if known.renew.is_some_and(|renew| renew <= SystemTime::now()) {
            urls.remove(blob);
            return None;
        }
        Some(known.url.clone())
    }

    pub(in crate::backend) fn remember(&self, blob: &BlobId, url: &Url) {
        let mut urls = lock(&self.0);
        if urls.len() >= MAX_REMEMBERED {
            urls.clear();
        }
        let now = SystemTime::now();
        let renew = end(url).map(|end| {
            let life = end.duration_since(now).unwrap_or_default();
            end - MARGIN.min(life / 2)
        });
        let url = url.clone();
        urls.insert(blob.clone(), Known { url, renew });
    }

    /// Forgets `url`, unless another request has found a new one meanwhile.
    pub(in crate::backend) fn forget(&self, blob: &BlobId, url: &Url) {
        let mut urls = lock(&self.0);
        if urls.get(blob).is_some_and(|known| known.url == *url) {
            urls.remove(blob);
        }
    }
}

/// When a signed URL ends, if its query says so.
fn end(url: &Url) -> Option<SystemTime> {
    let parameter = |wanted: &[&str]| {
        url.query_pairs()
            .find(|(name, _)| {
                wanted
                    .iter()
                    .any(|wanted| name.eq_ignore_ascii_case(wanted))
            })
            .map(|(_, value)| value.into_owned())
    };
    // Version 4 signatures: a start and a length.
    if let (Some(start), Some(life)) = (
        parameter(&["X-Amz-Date", "X-Goog-Date", "x-oss-date"]),
        parameter(&["X-Amz-Expires", "X-Goog-Expires", "x-oss-expires"]),
    ) {
        return at(date_seconds(&start)?.checked_add(life.parse().ok()?)?);
    }
    // Azure's signatures: a date.
    if let Some(date) = parameter(&["se"])
        && let Some(seconds) = date_seconds(&date)
    {
        return at(seconds);
    }
    // Older signatures and most content networks: seconds since 1970.
    at(parameter(&["Expires", "e", "exp"])?.parse().ok()?)
}

fn at(seconds: u64) -> Option<SystemTime> {
    // Before 2001 it is no time but a length; after 9999 it is nonsense.
    (1_000_000_000..253_402_300_800)
        .contains(&seconds)
        .then(|| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))?
}

/// Seconds since 1970 of `20260102T030405Z` or `2026-01-02T03:04:05Z`.
fn date_seconds(text: &str) -> Option<u64> {
    let text = text.strip_suffix('Z')?;
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    if digits.len() != 14 || text.len() > 19 {
        return None;
    }
    let number = |from: usize, to: usize| digits.get(from..to)?.parse::<u64>().ok();
    let (year, month, day) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let (hour, minute, second) = (number(8, 10)?, number(10, 12)?, number(12, 14)?);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    // 1 March of the year 0 is 719 468 days before 1970.
    Some((days - 719_468) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_of(query: &str) -> Option<u64> {
        let url = Url::parse(&format!("https://store.example/object?{query}")).unwrap();
        Some(end(&url)?.duration_since(UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn the_end_of_a_signed_url_is_found() {
        assert_eq!(date_seconds("19700101T000000Z"), Some(0));
        assert_eq!(date_seconds("20000229T235959Z"), Some(951_868_799));
        assert_eq!(date_seconds("2026-11-21T09:30:00Z"), Some(1_795_253_400));
        for bad in [
            "",
            "Z",
            "20261321T000000Z",
            "2026Z",
            "20260101T00:00:00+01:00",
        ] {
            assert_eq!(date_seconds(bad), None, "{bad}");
        }
        assert_eq!(
            end_of("X-Amz-Date=20261121T093000Z&X-Amz-Expires=60&X-Amz-Signature=a"),
            Some(1_795_253_460)
        );
        assert_eq!(
            end_of("se=2026-11-21T09%3A30%3A00Z&sig=b"),
            Some(1_795_253_400)
        );
        assert_eq!(end_of("md5=a&expires=1795253400"), Some(1_795_253_400));
        for none in [
            "",
            "token=a",
            "Expires=60",
            "Expires=never",
            "X-Amz-Expires=60",
        ] {
            assert_eq!(end_of(none), None, "{none}");
        }
    }

    #[test]
    fn an_ended_url_is_not_used_and_a_newer_one_is_kept() {
        let redirects = Redirects::default();
        let blob = BlobId::new("a").unwrap();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let url = |end: u64| Url::parse(&format!("http://h/?expires={end}")).unwrap();
        redirects.remember(&blob, &url(now + 60));
        assert_eq!(redirects.get(&blob), Some(url(now + 60)));
        redirects.forget(&blob, &url(now));
        assert_eq!(redirects.get(&blob), Some(url(now + 60)));
        redirects.forget(&blob, &url(now + 60));
        assert_eq!(redirects.get(&blob), None);
        redirects.remember(&blob, &url(now - 1));
        assert_eq!(redirects.get(&blob), None);
    }
}
