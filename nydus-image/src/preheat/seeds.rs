//! Seed peers, and which of them gets which blob.
//!
//! Any daemon that holds a blob will do, because the scheduler tells the others. Several
//! share the work by rendezvous hashing: the blob goes to those seeds whose hash with its
//! digest is highest, so that a seed more or less moves only its own share.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

use reqwest::Url;
use sha2::{Digest as _, Sha256};
use storage::oci::ContentDigest;

/// The proxy of a daemon, as `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Seed(String);

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        server(text).map(Self)
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks the URL of a server; returns it without a slash at its end.
///
/// # Errors
/// What is wrong with it, without quoting what may be a password.
pub(super) fn server(text: &str) -> Result<String, String> {
    let example = "a URL like http://seed:4001 is expected";
    let url = Url::parse(text).map_err(|error| format!("{error}; {example}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("it is neither http:// nor https://; {example}"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a user name and password cannot be given here".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("it has a query; {example}"));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// The `replicas` seeds for a blob, the best first; all if there are fewer.
pub(super) fn for_blob<'a>(
    seeds: &'a [Seed],
    digest: &ContentDigest,
    replicas: usize,
) -> Vec<&'a Seed> {
    let mut all: Vec<&Seed> = seeds.iter().collect();
    all.sort_by_key(|seed| {
        let mut hash = Sha256::new();
        hash.update(seed.0.as_bytes());
        hash.update([0]);
        hash.update(digest.as_str().as_bytes());
        Reverse(<[u8; 32]>::from(hash.finalize()))
    });
    all.dedup();
    all.truncate(replicas);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeds(count: usize) -> Vec<Seed> {
        (0..count)
            .map(|number| format!("http://seed-{number}:4001").parse().unwrap())
            .collect()
    }

    fn digest(number: usize) -> ContentDigest {
        ContentDigest::of(number.to_string().as_bytes())
    }

    #[test]
    fn urls_are_checked() {
        let seed: Seed = "http://seed:4001/".parse().unwrap();
        assert_eq!(seed.to_string(), "http://seed:4001");
        for bad in [
            "",
            "seed:4001",
            "ftp://seed",
            "http://",
            "http://u:s3cret@seed",
            "http://seed/?ns=x",
        ] {
            let error = bad.parse::<Seed>().unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn blobs_are_spread_and_stay_where_they_are() {
        let (four, five) = (seeds(4), seeds(5));
        let mut counts = [0; 4];
        let mut moved = 0;
        for number in 0..400 {
            let before = for_blob(&four, &digest(number), 1)[0];
            let place = four.iter().position(|seed| seed == before).unwrap();
            counts[place] += 1;
            let after = for_blob(&five, &digest(number), 1)[0];
            assert!(after == before || *after == five[4]);
            moved += usize::from(after != before);
        }
        assert!(counts.iter().all(|count| *count > 50), "{counts:?}");
        assert!((20..150).contains(&moved), "{moved}");
    }

    #[test]
    fn replicas_are_different_seeds() {
        let mut twice = seeds(3);
        twice.extend(seeds(3));
        assert_eq!(for_blob(&twice, &digest(1), 2).len(), 2);
        assert_eq!(for_blob(&twice, &digest(1), 9).len(), 3);
    }
}
