//! A configuration file as a tree of values, whatever syntax it was written in.
//!
//! JSON and TOML are read into the same [`Node`], so that there is one set of
//! rules for keys and values behind both ([`section`](super::section)). A key
//! that occurs twice in one table is refused here, because no later step could
//! tell that it did.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// One table of a configuration file.
pub(crate) type Table = BTreeMap<String, Node>;

/// One value of a configuration file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Node {
    /// JSON's `null`, which means the same as leaving the key out.
    Null,
    /// A boolean.
    Bool(bool),
    /// A whole number of any sign.
    Number(i128),
    /// A number with a fraction; no key takes one.
    Float(f64),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Node>),
    /// A table or JSON object.
    Table(Table),
}

/// The value as an error message shows it: short, on one line.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Text(value) => write!(f, "\"{}\"", value.escape_debug()),
            Self::List(_) => f.write_str("a list"),
            Self::Table(_) => f.write_str("a table"),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a configuration value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Node, E> {
        Ok(Node::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut table = Table::new();
        while let Some((key, value)) = entries.next_entry::<String, Node>()? {
            if table.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key `{key}` occurs twice")));
            }
            table.insert(key, value);
        }
        Ok(Node::Table(table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_syntaxes_give_the_same_tree() {
        let json: Node =
            serde_json::from_str(r#"{"a":1,"b":{"c":["x"],"d":true},"e":-2}"#).unwrap();
        let toml: Node = toml::from_str("a=1\ne=-2\n[b]\nc=['x']\nd=true").unwrap();
        assert_eq!(json, toml);
    }

    #[test]
    fn a_key_may_occur_once() {
        let twice = serde_json::from_str::<Node>(r#"{"backend":{},"backend":{}}"#);
        assert!(
            twice
                .unwrap_err()
                .to_string()
                .contains("key `backend` occurs twice")
        );
    }
}
