//! Durable records of snapshots: one file, one transaction per change.
//!
//! A record is found by name; `children` leads from a parent to the snapshots on
//! top of it. Numbers (ids) name directories and are never used twice.
//!
//! Promises: a change is on disk when its call returns, or has not happened; only
//! one process has the file open. Everything here blocks.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{
    Database, MultimapTableDefinition, ReadableDatabase as _, ReadableMultimapTable as _,
    ReadableTable, TableDefinition,
};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::labels::Labels;

/// Name to record, as JSON.
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// Name of a parent to names of its children.
const CHILDREN: MultimapTableDefinition<'_, &str, &str> = MultimapTableDefinition::new("children");
/// Numbers of this store: see below.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
/// What people have asked for at run time, by name, as JSON.
const WISHES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("wishes");
/// The program that all daemons are to run.
const PROGRAM: &str = "program";
/// The id of the next snapshot.
const NEXT_ID: &str = "next_id";
/// Version of the layout of this file.
const VERSION: &str = "version";

/// More ancestors than any image has layers: a longer chain is a cycle.
const MAX_DEPTH: usize = 4096;

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A read-only look at its parent.
    View,
    /// Can be written to.
    Active,
    /// Unchanging; others can be made on top of it.
    Committed,
}

impl Kind {
    /// The name that filters use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// Disk space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes that are allocated.
    pub bytes: u64,
    /// Files, directories and the like.
    pub inodes: u64,
}

/// Everything that is known of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names its directory.
    pub id: u64,
    /// What containerd calls it.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Name of the snapshot below, which is committed.
    pub parent: Option<String>,
    /// When it was made.
    pub created: SystemTime,
    /// When its labels were changed last.
    pub updated: SystemTime,
    /// Labels, without secrets.
    pub labels: Labels,
    /// Its own disk space; of committed snapshots only.
    pub usage: Usage,
}

/// What a new snapshot will be.
#[derive(Clone, Debug)]
pub struct New<'a> {
    /// What it is; committed for layers that need no unpacking.
    pub kind: Kind,
    /// Its name.
    pub name: &'a str,
    /// The snapshot below.
    pub parent: Option<&'a str>,
    /// Its labels.
    pub labels: Labels,
}

/// The program that all daemons were replaced by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replacement {
    /// The program.
    pub program: PathBuf,
    /// What the configuration named at that time: it decides again when it names another.
    pub instead_of: PathBuf,
}

/// The records of all snapshots.
#[derive(Debug)]
pub struct Store {
    database: Database,
}

impl Store {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// It is no store, is damaged, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let database = Database::create(path)
            .map_err(|error| Error::Records(format!("{}: {error}", path.display())))?;
        let transaction = database.begin_write()?;
        transaction.open_table(SNAPSHOTS)?;
        transaction.open_multimap_table(CHILDREN)?;
        transaction.open_table(WISHES)?;
        let mut numbers = transaction.open_table(NUMBERS)?;
        let version = numbers.get(VERSION)?.map_or(1, |version| version.value());
        if version != 1 {
            return Err(Error::Records(format!(
                "{} has version {version}, this program knows version 1",
                path.display()
            )));
        }
        numbers.insert(VERSION, 1)?;
        drop(numbers);
        transaction.commit()?;
        Ok(Self { database })
    }

    /// The snapshot `name`.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn stat(&self, name: &str) -> Result<Record, Error> {
        let transaction = self.database.begin_read()?;
        read(&transaction.open_table(SNAPSHOTS)?, name)
    }

    /// The snapshot `name` and everything below it, nearest first.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn chain(&self, name: &str) -> Result<Vec<Record>, Error> {
        let transaction = self.database.begin_read()?;
        chain(&transaction.open_table(SNAPSHOTS)?, name)
    }

    /// All snapshots, by name.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn all(&self) -> Result<Vec<Record>, Error> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(SNAPSHOTS)?;
        table
            .iter()?
            .map(|entry| Ok(serde_json::from_slice(entry?.1.value())?))
            .collect()
    }

    /// Makes a snapshot. `place` is called with its record and those below it,
    /// nearest first, when everything is checked and nothing is durable yet.
    /// Returns the same records, its own first.
    ///
    /// # Errors
    /// The name is taken, the parent does not exist or is not committed, or
    /// whatever `place` says; then there are no records of it.
    pub fn create(
        &self,
        new: New<'_>,
        place: impl FnOnce(&Record, &[Record]) -> Result<(), Error>,
    ) -> Result<Vec<Record>, Error> {
        if new.name.is_empty() {
            return Err(Error::Invalid("a snapshot needs a name".to_owned()));
        }
        let transaction = self.database.begin_write()?;
        let mut table = transaction.open_table(SNAPSHOTS)?;
        let mut numbers = transaction.open_table(NUMBERS)?;
        let mut below = match new.parent {
            None => Vec::new(),
            Some(parent) => chain(&table, parent)?,
        };
        if let Some(parent) = below.first()
            && parent.kind != Kind::Committed
        {
            return Err(Error::Invalid(format!(
                "parent {:?} is not a committed snapshot",
                parent.name
            )));
        }
        if table.get(new.name)?.is_some() {
            return Err(Error::AlreadyExists(new.name.to_owned()));
        }
        let id = numbers.get(NEXT_ID)?.map_or(1, |id| id.value());
        numbers.insert(NEXT_ID, id + 1)?;
        let now = SystemTime::now();
        let record = Record {
            id,
            name: new.name.to_owned(),
            kind: new.kind,
            parent: new.parent.map(str::to_owned),
            created: now,
            updated: now,
            labels: new.labels,
            usage: Usage::default(),
        };
        write(&mut table, &record)?;
        if let Some(parent) = new.parent {
            transaction
                .open_multimap_table(CHILDREN)?
                .insert(parent, new.name)?;
        }
        place(&record, &below)?;
        drop((table, numbers));
        transaction.commit()?;
        below.insert(0, record);
        Ok(below)
    }

    /// Makes the active snapshot `key` a committed one called `name`.
    ///
    /// # Errors
    /// The name is taken; or `key` does not exist or is not active.
    pub fn commit(&self, name: &str, key: &str, labels: Labels, usage: Usage) -> Result<(), Error> {
        if name.is_empty() {
            return Err(Error::Invalid("a snapshot needs a name".to_owned()));
        }
        let transaction = self.database.begin_write()?;
        let mut table = transaction.open_table(SNAPSHOTS)?;
        if table.get(name)?.is_some() {
            return Err(Error::AlreadyExists(name.to_owned()));
        }
        let mut record = read(&table, key)?;
        if record.kind != Kind::Active {
            return Err(Error::precondition(key, "is not active"));
        }
        table.remove(key)?;
        record.name = name.to_owned();
        record.kind = Kind::Committed;
        record.created = SystemTime::now();
        record.updated = record.created;
        record.labels = labels;
        record.usage = usage;
        write(&mut table, &record)?;
        if let Some(parent) = &record.parent {
            let mut children = transaction.open_multimap_table(CHILDREN)?;
            children.remove(parent.as_str(), key)?;
            children.insert(parent.as_str(), name)?;
        }
        drop(table);
        transaction.commit()?;
        Ok(())
    }

    /// Forgets the snapshot `name` and returns what it was.
    ///
    /// # Errors
    /// It does not exist, or others stand on top of it.
    pub fn remove(&self, name: &str) -> Result<Record, Error> {
        let transaction = self.database.begin_write()?;
        let mut table = transaction.open_table(SNAPSHOTS)?;
        let mut children = transaction.open_multimap_table(CHILDREN)?;
        let record = read(&table, name)?;
        if !children.get(name)?.is_empty() {
            return Err(Error::precondition(name, "has snapshots on top of it"));
        }
        table.remove(name)?;
        if let Some(parent) = &record.parent {
            children.remove(parent.as_str(), name)?;
        }
        drop((table, children));
        transaction.commit()?;
        Ok(record)
    }

    /// Lets `change` edit the labels of the snapshot `name`; returns the outcome.
    ///
    /// # Errors
    /// It does not exist, or what `change` says.
    pub fn update(
        &self,
        name: &str,
        change: impl FnOnce(&mut Labels) -> Result<(), Error>,
    ) -> Result<Record, Error> {
        let transaction = self.database.begin_write()?;
        let mut table = transaction.open_table(SNAPSHOTS)?;
        let mut record = read(&table, name)?;
        change(&mut record.labels)?;
        record.updated = SystemTime::now();
        write(&mut table, &record)?;
        drop(table);
        transaction.commit()?;
        Ok(record)
    }

    /// The program that daemons run in the place of the configured one, if any.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn replacement(&self) -> Result<Option<Replacement>, Error> {
        let table = self.database.begin_read()?.open_table(WISHES)?;
        let found = table.get(PROGRAM)?;
        found
            .map(|text| Ok(serde_json::from_slice(text.value())?))
            .transpose()
    }

    /// Remembers that, or forgets it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_replacement(&self, replacement: Option<&Replacement>) -> Result<(), Error> {
        let transaction = self.database.begin_write()?;
        let mut table = transaction.open_table(WISHES)?;
        match replacement {
            Some(replacement) => {
                let text = serde_json::to_vec(replacement)?;
                table.insert(PROGRAM, text.as_slice())?;
            }
            None => drop(table.remove(PROGRAM)?),
        }
        drop(table);
        transaction.commit()?;
        Ok(())
    }
}

fn read(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Record, Error> {
    match table.get(name)? {
        Some(bytes) => Ok(serde_json::from_slice(bytes.value())?),
        None => Err(Error::NotFound(name.to_owned())),
    }
}

fn chain(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Vec<Record>, Error> {
    let mut records = vec![read(table, name)?];
    while let Some(parent) = records.last().and_then(|record| record.parent.clone()) {
        if records.len() > MAX_DEPTH {
            return Err(Error::Records(format!("snapshot {name:?} is below itself")));
        }
        records.push(read(table, &parent)?);
    }
    Ok(records)
}

fn write(
    table: &mut redb::Table<'_, &'static str, &'static [u8]>,
    record: &Record,
) -> Result<(), Error> {
    let bytes = serde_json::to_vec(record)?;
    table.insert(record.name.as_str(), bytes.as_slice())?;
    Ok(())
}

/// A time as seconds and nanoseconds since 1970.
#[must_use]
pub fn since_1970(time: SystemTime) -> Duration {
    // Clocks before 1970 are wrong, and nothing depends on them.
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
impl Record {
    /// A record that only has what most tests look at.
    pub(crate) fn for_tests(name: &str, kind: Kind, parent: Option<&str>) -> Self {
        Self {
            id: 1,
            name: name.to_owned(),
            kind,
            parent: parent.map(str::to_owned),
            created: UNIX_EPOCH,
            updated: UNIX_EPOCH,
            labels: Labels::new(),
            usage: Usage::default(),
        }
    }
}

#[cfg(test)]
mod tests;
