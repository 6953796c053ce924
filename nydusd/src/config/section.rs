//! Typed access to one table of a configuration file.
//!
//! A [`Section`] hands out values by key and remembers which keys were asked
//! for. Whatever nobody asked for is unknown: clients of all ages send keys of
//! their own, so it is reported as a warning and never an error. A value of the
//! wrong type or outside its range is an error that names the key with its full
//! path, the value, and what is allowed.

use std::ops::RangeInclusive;

use super::ConfigError;
use super::node::{Node, Table};

/// One table, and which of its keys have been used.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    /// Dotted path of the table; empty for the whole file.
    path: String,
    table: &'a Table,
    asked: Vec<&'static str>,
    /// Warnings of this table and of the tables below it.
    warnings: Vec<String>,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub(crate) fn root(table: &'a Table) -> Self {
        Self::at(String::new(), table)
    }

    fn at(path: String, table: &'a Table) -> Self {
        Self {
            path,
            table,
            asked: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Full path of a key of this table, as messages show it.
    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    fn get(&mut self, key: &'static str) -> Option<&'a Node> {
        self.asked.push(key);
        self.table.get(key).filter(|node| **node != Node::Null)
    }

    /// An error that says what `key` may hold.
    pub(crate) fn wrong(&self, key: &str, allowed: impl Into<String>) -> ConfigError {
        let value = match self.table.get(key) {
            Some(_) if is_secret(key) => "(not shown)".to_owned(),
            Some(node) => node.to_string(),
            None => "nothing".to_owned(),
        };
        ConfigError::Wrong {
            key: self.path_of(key),
            value,
            allowed: allowed.into(),
        }
    }

    /// A boolean; absent means `default`.
    pub(crate) fn flag(&mut self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(Node::Bool(value)) => Ok(*value),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A boolean that must be there.
    pub(crate) fn required_flag(&mut self, key: &'static str) -> Result<bool, ConfigError> {
        if self.get(key).is_none() {
            return Err(ConfigError::Missing {
                key: self.path_of(key),
            });
        }
        self.flag(key, false)
    }

    /// A string, if present.
    pub(crate) fn text(&mut self, key: &'static str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Text(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// A string that must be there and not be empty.
    pub(crate) fn required_text(&mut self, key: &'static str) -> Result<&'a str, ConfigError> {
        match self.text(key)? {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(ConfigError::Missing {
                key: self.path_of(key),
            }),
        }
    }

    /// A list of strings; absent means empty.
    pub(crate) fn texts(&mut self, key: &'static str) -> Result<Vec<String>, ConfigError> {
        let Some(node) = self.get(key) else {
            return Ok(Vec::new());
        };
        let Node::List(items) = node else {
            return Err(self.wrong(key, "a list of strings"));
        };
        items
            .iter()
            .map(|item| match item {
                Node::Text(text) => Ok(text.clone()),
                _ => Err(self.wrong(key, "a list of strings")),
            })
            .collect()
    }

    /// A whole number in `allowed`; absent means `default`.
    pub(crate) fn number(
        &mut self,
        key: &'static str,
        default: u64,
        allowed: RangeInclusive<u64>,
    ) -> Result<u64, ConfigError> {
        let value = match self.get(key) {
            None => return Ok(default),
            Some(Node::Number(value)) => u64::try_from(*value).ok(),
            Some(_) => None,
        };
        value
            .filter(|value| allowed.contains(value))
            .ok_or_else(|| {
                let (low, high) = (allowed.start(), allowed.end());
                self.wrong(key, format!("a whole number from {low} to {high}"))
            })
    }

    /// Whether a list or table under `key` has anything in it.
    pub(crate) fn has_content(&mut self, key: &'static str) -> bool {
        match self.get(key) {
            None => false,
            Some(Node::List(items)) => !items.is_empty(),
            Some(Node::Table(table)) => !table.is_empty(),
            Some(_) => true,
        }
    }

    /// A table below this one, if present. Give it back with [`Section::close`].
    pub(crate) fn section(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Section<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Table(table)) => Ok(Some(Self::at(self.path_of(key), table))),
            Some(_) => Err(self.wrong(key, "a table")),
        }
    }

    /// A list of tables; absent means none. Give each back with [`Section::close`].
    pub(crate) fn sections(&mut self, key: &'static str) -> Result<Vec<Section<'a>>, ConfigError> {
        let Some(node) = self.get(key) else {
            return Ok(Vec::new());
        };
        let Node::List(items) = node else {
            return Err(self.wrong(key, "a list of tables"));
        };
        let tables = items.iter().enumerate().map(|(index, item)| match item {
            Node::Table(table) => Ok(Self::at(self.path_of(&format!("{key}[{index}]")), table)),
            _ => Err(self.wrong(key, "a list of tables")),
        });
        tables.collect()
    }

    /// A table with names and strings, in the order of the names; absent means empty.
    pub(crate) fn pairs(
        &mut self,
        key: &'static str,
    ) -> Result<Vec<(String, String)>, ConfigError> {
        let Some(node) = self.get(key) else {
            return Ok(Vec::new());
        };
        let wrong = || self.wrong(key, "a table of strings");
        let Node::Table(table) = node else {
            return Err(wrong());
        };
        let pairs = table.iter().map(|(name, value)| match value {
            Node::Text(text) => Ok((name.clone(), text.clone())),
            _ => Err(wrong()),
        });
        pairs.collect()
    }

    /// A table that must be there. Give it back with [`Section::close`].
    pub(crate) fn required_section(
        &mut self,
        key: &'static str,
    ) -> Result<Section<'a>, ConfigError> {
        let missing = ConfigError::Missing {
            key: self.path_of(key),
        };
        self.section(key)?.ok_or(missing)
    }

    /// Takes note of keys that are known and have no effect here.
    pub(crate) fn ignore(&mut self, keys: &[&'static str]) {
        self.asked.extend_from_slice(keys);
    }

    /// Adds a warning about `key`.
    pub(crate) fn warn(&mut self, key: &str, text: &str) {
        self.warnings.push(format!("{}: {text}", self.path_of(key)));
    }

    /// Takes over what a table below this one has to report.
    pub(crate) fn close(&mut self, child: Section<'_>) {
        self.warnings.extend(child.into_warnings());
    }

    /// All warnings, unknown keys included.
    pub(crate) fn into_warnings(self) -> Vec<String> {
        let unknown = self
            .table
            .keys()
            .filter(|key| !self.asked.contains(&key.as_str()))
            .map(|key| format!("{}: unknown key, ignored", self.path_of(key)));
        let mut warnings: Vec<String> = unknown.collect();
        warnings.extend(self.warnings);
        warnings
    }
}

/// Keys whose values must not reach a message.
fn is_secret(key: &str) -> bool {
    matches!(
        key,
        "auth"
            | "registry_token"
            | "access_key_id"
            | "access_key_secret"
            | "account_key"
            | "sas_token"
            | "encryption_key"
    )
}
