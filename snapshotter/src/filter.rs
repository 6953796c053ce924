//! Filters of lists, in containerd's syntax.
//!
//! A filter is a list of conditions, separated by commas, all of which must hold;
//! of several filters, one is enough. A condition is a field (`name`, `parent`,
//! `kind`, `labels.key`, `labels."a.key"`), alone or with `==`, `!=` or `~=` (a
//! regular expression, refused here) and a value, quoted or not.

use crate::error::Error;
use crate::store::Record;

/// Longest filter; what clients send has a few hundred bytes.
const MAX_LEN: usize = 64 << 10;

/// Filters of one request.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Condition>>);

#[derive(Debug, PartialEq)]
struct Condition {
    field: Field,
    test: Test,
}

#[derive(Debug, PartialEq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
}

#[derive(Debug, PartialEq)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
}

impl Filters {
    /// Parses the filters of a request; none at all matches everything.
    ///
    /// # Errors
    /// [`Error::Invalid`] with what was not understood.
    pub fn parse(filters: &[String]) -> Result<Self, Error> {
        filters
            .iter()
            .map(|text| {
                parse(text).map_err(|why| Error::Invalid(format!("filter {text:?}: {why}")))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether `record` is asked for.
    #[must_use]
    pub fn matches(&self, record: &Record) -> bool {
        self.0.is_empty()
            || self
                .0
                .iter()
                .any(|all| all.iter().all(|one| one.holds(record)))
    }
}

impl Condition {
    fn holds(&self, record: &Record) -> bool {
        let value = match &self.field {
            Field::Name => Some(record.name.as_str()),
            Field::Parent => record.parent.as_deref(),
            Field::Kind => Some(record.kind.name()),
            Field::Label(key) => record.labels.get(key).map(String::as_str),
        };
        match &self.test {
            Test::Present => value.is_some_and(|value| !value.is_empty()),
            Test::Equal(wanted) => value.unwrap_or_default() == wanted,
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
        }
    }
}

fn parse(text: &str) -> Result<Vec<Condition>, &'static str> {
    if text.len() > MAX_LEN {
        return Err("too long");
    }
    let mut rest = text.trim();
    let mut conditions = Vec::new();
    while !rest.is_empty() {
        let (condition, after) = condition(rest)?;
        conditions.push(condition);
        rest = match after.strip_prefix(',') {
            Some(after) if !after.trim().is_empty() => after.trim_start(),
            Some(_) => return Err("nothing after the comma"),
            None if after.is_empty() => after,
            None => return Err("expected a comma"),
        };
    }
    Ok(conditions)
}

fn condition(text: &str) -> Result<(Condition, &str), &'static str> {
    let (field, rest) = field(text)?;
    let (test, rest) = if let Some(rest) = rest.strip_prefix("==") {
        let (value, rest) = value(rest)?;
        (Test::Equal(value), rest)
    } else if let Some(rest) = rest.strip_prefix("!=") {
        let (value, rest) = value(rest)?;
        (Test::NotEqual(value), rest)
    } else if rest.starts_with("~=") {
        return Err("regular expressions are not supported");
    } else {
        (Test::Present, rest)
    };
    Ok((Condition { field, test }, rest))
}

fn field(text: &str) -> Result<(Field, &str), &'static str> {
    if let Some(rest) = text.strip_prefix("labels.") {
        let (key, rest) = if rest.starts_with(['"', '`']) {
            quoted(rest)?
        } else {
            let end = rest.find([',', '=', '!', '~']).unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        };
        if key.is_empty() {
            return Err("a label without name");
        }
        return Ok((Field::Label(key), rest));
    }
    let end = text.find([',', '=', '!', '~']).unwrap_or(text.len());
    let field = match &text[..end] {
        "name" => Field::Name,
        "parent" => Field::Parent,
        "kind" => Field::Kind,
        _ => return Err("unknown field; known are name, parent, kind and labels.KEY"),
    };
    Ok((field, &text[end..]))
}

fn value(text: &str) -> Result<(String, &str), &'static str> {
    if text.starts_with(['"', '`']) {
        return quoted(text);
    }
    let end = text.find(',').unwrap_or(text.len());
    Ok((text[..end].trim().to_owned(), &text[end..]))
}

/// A quoted text at the beginning; in double quotes, a backslash protects what follows.
fn quoted(text: &str) -> Result<(String, &str), &'static str> {
    let mut chars = text.char_indices();
    let Some((_, quote)) = chars.next() else {
        return Err("expected a quote");
    };
    let mut value = String::new();
    while let Some((at, char)) = chars.next() {
        if char == quote {
            return Ok((value, &text[at + quote.len_utf8()..]));
        }
        if char == '\\' && quote == '"' {
            match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, 't')) => value.push('\t'),
                Some((_, next @ ('\\' | '"'))) => value.push(next),
                _ => return Err("unknown escape sequence"),
            }
        } else {
            value.push(char);
        }
    }
    Err("a quote is not closed")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::{Kind, Record};

    fn matches(filter: &str, record: &Record) -> bool {
        Filters::parse(&[filter.to_owned()])
            .unwrap()
            .matches(record)
    }

    #[test]
    fn what_containerd_asks_after_a_skipped_layer() {
        let mut record = Record::for_tests("sha256:1", Kind::Committed, Some("k8s.io/7/sha256:0"));
        record
            .labels
            .insert("containerd.io/snapshot.ref".into(), "sha256:1".into());
        let filter = r#"labels."containerd.io/snapshot.ref"==sha256:1,parent=="k8s.io/7/sha256:0""#;
        assert!(matches(filter, &record));
        assert!(!matches(&filter.replace("sha256:1", "sha256:2"), &record));
        assert!(!matches(&filter.replace("/7/", "/8/"), &record));
        record.parent = None;
        assert!(!matches(filter, &record));
        assert!(matches(r#"parent=="",kind==committed,name!=x"#, &record));
        assert!(!matches("labels.none", &record));
    }

    #[test]
    fn nonsense_is_refused() {
        for filter in [
            "size==1",
            "name==a,",
            "name~=a",
            "labels.\"x",
            "labels.==a",
            "name==\"\\q\"",
        ] {
            assert!(Filters::parse(&[filter.to_owned()]).is_err(), "{filter}");
        }
    }

    proptest! {
        #[test]
        fn any_text_ends_well(text: String) {
            let _ = Filters::parse(&[text]);
        }

        #[test]
        fn a_quoted_label_is_found(key in "[a-z./\" \\\\-]{1,20}", value in "[ -~]{1,20}") {
            let mut record = Record::for_tests("n", Kind::Active, None);
            record.labels.insert(key.clone(), value.clone());
            let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
            let filter = format!("labels.{}=={}", quote(&key), quote(&value));
            prop_assert!(matches(&filter, &record));
        }
    }
}
