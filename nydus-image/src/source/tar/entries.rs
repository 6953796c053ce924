//! A tar archive as a sequence of entries, read once from front to back.
//!
//! Joins what belongs to one entry: GNU long names, pax records and sparse maps.
//! Every error names the archive and the byte offset where it was found. Memory
//! is bounded whatever the archive says: names and records by [`MAX_EXTENSION`].

use std::io::{ErrorKind, Read};
use std::ops::Range;

use rafs::tree::{Attr, Xattrs};
use storage::original::{NotInPlace, Place};

use super::header::{BLOCK, BadField, Header, until_nul};
use super::pax::{self, Records};
use super::sparse;
use crate::source::{InPlace, encode_device, printable};

/// Largest extension (long name, pax records), in bytes.
const MAX_EXTENSION: u64 = 1 << 20;

/// Largest sum of global pax records, in bytes. Small, because every entry looks at
/// all of them; archives use it for a comment.
const MAX_GLOBAL: usize = 16 << 10;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{archive}: at byte {at}: {cause}")]
pub struct TarError {
    /// Name of the archive, as the user knows it.
    pub archive: String,
    /// Where in the uncompressed archive.
    pub at: u64,
    /// What is wrong there.
    #[source]
    pub cause: Cause,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Reading the stream itself failed; for compressed archives this includes damaged data.
    #[error("cannot read the archive")]
    Read(#[source] std::io::Error),
    /// The stream ends inside a header or inside the data of an entry.
    #[error("the archive ends too early, inside {0}")]
    Truncated(&'static str),
    /// Not what a tar archive looks like.
    #[error("the archive is damaged: {0}")]
    Damaged(String),
    /// A kind of entry that no image can hold.
    #[error("entry {path}: {what} is not supported")]
    Unsupported {
        /// Name of the entry.
        path: String,
        /// What it asks for.
        what: String,
    },
    /// The archive is fine, but this entry cannot stay where it is.
    #[error("entry {path}: {what}")]
    NotInPlace {
        /// Name of the entry.
        path: String,
        /// Why.
        what: String,
    },
    /// An entry that would leave the image or contradicts another one.
    #[error("entry {path}: {what}")]
    Refused {
        /// Name of the entry.
        path: String,
        /// Why.
        what: String,
    },
}

impl TarError {
    /// Whether the archive could be read, but not be used in place.
    #[must_use]
    pub fn is_not_in_place(&self) -> bool {
        match &self.cause {
            Cause::NotInPlace { .. } => true,
            Cause::Read(error) => NotInPlace::is_in(error),
            _ => false,
        }
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One member of the archive.
#[derive(Debug)]
pub(super) struct Entry {
    /// Where its header is.
    pub(super) at: u64,
    /// Its name as written.
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// Target of a hard or symbolic link.
    pub(super) link: Vec<u8>,
    pub(super) attr: Attr,
    pub(super) xattrs: Xattrs,
    /// Device number in Linux's 32-bit encoding; 0 for other entries.
    pub(super) device: u32,
    /// Length of the file, holes included; 0 for other entries.
    pub(super) size: u64,
    /// The ranges of the file whose data the archive has, in the order in which
    /// [`Archive::read_data`] returns it.
    pub(super) data: Vec<Range<u64>>,
}

/// The reader. `R` should be buffered.
#[derive(Debug)]
pub(super) struct Archive<R> {
    name: String,
    reader: R,
    /// Bytes consumed so far.
    at: u64,
    /// Bytes of the current entry's data that were not read yet.
    data_left: u64,
    /// Padding behind the data.
    padding: u64,
    /// Pax records that hold for all entries that follow.
    global: Records,
    ended: bool,
}

/// Extensions collected for the next entry.
#[derive(Default)]
struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    records: Option<Records>,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(name: String, reader: R) -> Self {
        Self {
            name,
            reader,
            at: 0,
            data_left: 0,
            padding: 0,
            global: Records::default(),
            ended: false,
        }
    }

    /// Moves to the next entry, past what is left of the current one's data.
    /// `None` at the end of the archive.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_data()?;
            let at = self.at;
            let Some(header) = self.header()? else {
                if extensions.is_empty() {
                    return Ok(None);
                }
                return Err(self.truncated("an extended header"));
            };
            match header.kind() {
                b'L' => extensions.long_path = Some(self.extension_text(&header)?),
                b'K' => extensions.long_link = Some(self.extension_text(&header)?),
                b'x' => extensions.records = Some(self.records(&header)?),
                b'g' => {
                    let records = self.records(&header)?;
                    self.global.extend(records);
                    if self.global.bytes() > MAX_GLOBAL {
                        return Err(self.damaged("its global headers are too large"));
                    }
                }
                _ => return self.entry(at, &header, extensions).map(Some),
            }
        }
    }

    /// Fills `buf` with the next bytes of the current entry's data.
    pub(super) fn read_data(&mut self, buf: &mut [u8]) -> Result<(), TarError> {
        let len = buf.len() as u64;
        debug_assert!(
            len <= self.data_left,
            "sparse maps are checked against the stored size"
        );
        self.read_exact(buf, "the data of an entry")?;
        self.data_left = self.data_left.saturating_sub(len);
        Ok(())
    }

    /// Fills `buf` with the next bytes of the current entry's data, and tells where
    /// they are in `layer`, which this archive reads.
    pub(super) fn read_chunk(
        &mut self,
        layer: &InPlace,
        buf: &mut [u8],
    ) -> Result<Place, TarError> {
        let (archive, at) = (self.name.clone(), self.at);
        let failed = |error| TarError {
            archive: archive.clone(),
            at,
            cause: Cause::Read(error),
        };
        layer.chunk(buf, |buf| self.read_data(buf), failed)
    }

    /// Reads the stream to its end, so that its writer can finish and a compressed
    /// stream is checked completely.
    pub(super) fn drain(mut self) -> Result<(), TarError> {
        let mut scratch = vec![0; 64 << 10];
        loop {
            match self.reader.read(&mut scratch) {
                Ok(0) => return Ok(()),
                Ok(n) => self.at += n as u64,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fail(Cause::Read(error))),
            }
        }
    }

    /// An error about `entry`.
    pub(super) fn refuse(&self, entry: &Entry, what: impl Into<String>) -> TarError {
        let path = printable(&entry.path);
        self.error_at(
            entry.at,
            Cause::Refused {
                path,
                what: what.into(),
            },
        )
    }

    /// An error about `entry`, which has to be stored anew.
    pub(super) fn not_in_place(&self, entry: &Entry, what: String) -> TarError {
        let path = printable(&entry.path);
        self.error_at(entry.at, Cause::NotInPlace { path, what })
    }

    fn entry(
        &mut self,
        at: u64,
        header: &Header,
        extensions: Extensions,
    ) -> Result<Entry, TarError> {
        let mut records = self.global.clone();
        records.extend(extensions.records.unwrap_or_default());
        let mut path = extensions.long_path.unwrap_or_else(|| header.path());
        if let Some(name) = records
            .get("GNU.sparse.name")
            .or_else(|| records.get("path"))
        {
            path = name.to_vec();
        }
        let link = match records.get("linkpath") {
            Some(link) => link.to_vec(),
            None => extensions.long_link.unwrap_or_else(|| header.link()),
        };
        let kind = self.kind(at, header, &path)?;
        let field = |error: BadField| self.damaged_entry(at, &path, &error.to_string());
        let attr = attributes(header, &records).map_err(field)?;
        let (major, minor) = match kind {
            Kind::CharDevice | Kind::BlockDevice => header.device().map_err(field)?,
            _ => (0, 0),
        };
        let device = encode_device(major.into(), minor.into())
            .ok_or_else(|| self.damaged_entry(at, &path, "its device number is too large"))?;
        let mut entry = Entry {
            at,
            path,
            kind,
            link,
            attr,
            xattrs: Xattrs::new(),
            device,
            size: 0,
            data: Vec::new(),
        };
        for (key, value) in records.xattrs() {
            entry.xattrs.insert(key.into(), value.into());
        }
        if kind == Kind::File {
            self.start_data(&mut entry, header, &records)?;
        }
        Ok(entry)
    }

    /// Finds size and sparse map of a regular file and makes its data readable.
    fn start_data(
        &mut self,
        entry: &mut Entry,
        header: &Header,
        records: &Records,
    ) -> Result<(), TarError> {
        let number = |key: &str| match records.get(key) {
            Some(value) => pax::decimal(value)
                .map(Some)
                .ok_or_else(|| self.damaged_entry(entry.at, &entry.path, &format!("bad {key}"))),
            None => Ok(None),
        };
        let size_in_header = header
            .size()
            .map_err(|error| self.damaged_entry(entry.at, &entry.path, &error.to_string()));
        let stored = match number("size")? {
            Some(size) => size,
            None => size_in_header?,
        };
        let real_size = match number("GNU.sparse.realsize")? {
            Some(size) => Some(size),
            None => number("GNU.sparse.size")?,
        };
        let version_1 = records.get("GNU.sparse.major") == Some(b"1");
        let bad_map = |this: &Self, entry: &Entry| {
            this.damaged_entry(entry.at, &entry.path, "its sparse map is wrong")
        };
        let map = if header.kind() == b'S' {
            let mut map = sparse::Map::new();
            let (more, size) =
                sparse::gnu_header(header.block(), &mut map).ok_or_else(|| bad_map(self, entry))?;
            let mut more = more;
            while more {
                let block = self.block("a sparse map")?;
                more =
                    sparse::gnu_extension(&block, &mut map).ok_or_else(|| bad_map(self, entry))?;
            }
            self.set_data(stored);
            Some((map, size))
        } else if let Some(size) = real_size {
            self.set_data(stored);
            let map = if version_1 {
                self.text_map(entry)?
            } else {
                sparse::from_records(records).ok_or_else(|| bad_map(self, entry))?
            };
            Some((map, size))
        } else {
            self.set_data(stored);
            None
        };
        match map {
            Some((map, size)) if sparse::fits(&map, size, self.data_left) => {
                entry.size = size;
                entry.data = map;
            }
            Some(_) => return Err(bad_map(self, entry)),
            None => {
                entry.size = stored;
                entry.data = std::iter::once(0..stored)
                    .filter(|all| !all.is_empty())
                    .collect();
            }
        }
        Ok(())
    }

    fn text_map(&mut self, entry: &Entry) -> Result<sparse::Map, TarError> {
        let mut parser = sparse::TextMap::default();
        loop {
            if self.data_left < BLOCK as u64 {
                return Err(self.damaged_entry(entry.at, &entry.path, "its sparse map is cut off"));
            }
            let mut block = [0; BLOCK];
            self.read_data(&mut block)?;
            match parser.add(&block) {
                Some(Some(map)) => return Ok(map),
                Some(None) => {}
                None => {
                    return Err(self.damaged_entry(
                        entry.at,
                        &entry.path,
                        "its sparse map is wrong",
                    ));
                }
            }
        }
    }

    fn kind(&self, at: u64, header: &Header, path: &[u8]) -> Result<Kind, TarError> {
        Ok(match header.kind() {
            // V7 archives mark directories by the name only.
            b'0' | 0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                let what = format!("an entry of type {:?}", char::from(other));
                let path = printable(path);
                return Err(self.error_at(at, Cause::Unsupported { path, what }));
            }
        })
    }

    /// The next header; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let at = self.at;
        let Some(block) = self.block_or_end()? else {
            if at > 0 {
                tracing::warn!(
                    "{}: the archive has no end mark; is it complete?",
                    self.name
                );
            }
            self.ended = true;
            return Ok(None);
        };
        if block.iter().all(|byte| *byte == 0) {
            self.ended = true;
            return match self.block_or_end()? {
                Some(second) if second.iter().any(|byte| *byte != 0) => {
                    Err(self.error_at(at, Cause::Damaged("a lone block of zeros".to_owned())))
                }
                _ => Ok(None),
            };
        }
        Header::new(block).map(Some).map_err(|error| {
            let hint = if at == 0 {
                "; is this a tar archive?"
            } else {
                ""
            };
            self.error_at(at, Cause::Damaged(format!("{error}{hint}")))
        })
    }

    fn records(&mut self, header: &Header) -> Result<Records, TarError> {
        let at = self.at;
        let data = self.extension(header)?;
        Records::parse(&data).ok_or_else(|| {
            self.error_at(
                at,
                Cause::Damaged("an extended header cannot be parsed".to_owned()),
            )
        })
    }

    /// A long name, which ends at the first NUL.
    fn extension_text(&mut self, header: &Header) -> Result<Vec<u8>, TarError> {
        Ok(until_nul(&self.extension(header)?).to_vec())
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, TarError> {
        let size = header
            .size()
            .map_err(|error| self.damaged(&error.to_string()))?;
        if size > MAX_EXTENSION {
            return Err(self.damaged("an extended header is too large"));
        }
        self.set_data(size);
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        self.read_data(&mut data)?;
        Ok(data)
    }

    fn set_data(&mut self, size: u64) {
        self.data_left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let mut left = self.data_left.saturating_add(self.padding);
        let mut scratch = [0; 16 << 10];
        while left > 0 {
            let step = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(scratch.len());
            self.read_exact(&mut scratch[..step], "the data of an entry")?;
            left -= step as u64;
        }
        (self.data_left, self.padding) = (0, 0);
        Ok(())
    }

    fn block(&mut self, inside: &'static str) -> Result<[u8; BLOCK], TarError> {
        let mut block = [0; BLOCK];
        self.read_exact(&mut block, inside)?;
        Ok(block)
    }

    fn read_exact(&mut self, buf: &mut [u8], inside: &'static str) -> Result<(), TarError> {
        if self.fill(buf)? == buf.len() {
            Ok(())
        } else {
            Err(self.truncated(inside))
        }
    }

    /// One block, or `None` if the stream ends exactly before it.
    fn block_or_end(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        match self.fill(&mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(self.truncated("a header")),
        }
    }

    /// Reads until `buf` is full or the stream ends; returns the number of bytes.
    fn fill(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.reader.read(&mut buf[filled..]) {
                Ok(0) => break,
                Ok(n) => {
                    filled += n;
                    self.at += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fail(Cause::Read(error))),
            }
        }
        Ok(filled)
    }

    fn truncated(&self, inside: &'static str) -> TarError {
        self.fail(Cause::Truncated(inside))
    }

    fn damaged(&self, what: &str) -> TarError {
        self.fail(Cause::Damaged(what.to_owned()))
    }

    fn damaged_entry(&self, at: u64, path: &[u8], what: &str) -> TarError {
        self.error_at(
            at,
            Cause::Damaged(format!("entry {}: {what}", printable(path))),
        )
    }

    fn fail(&self, cause: Cause) -> TarError {
        self.error_at(self.at, cause)
    }

    fn error_at(&self, at: u64, cause: Cause) -> TarError {
        TarError {
            archive: self.name.clone(),
            at,
            cause,
        }
    }
}

impl Extensions {
    fn is_empty(&self) -> bool {
        self.long_path.is_none() && self.long_link.is_none() && self.records.is_none()
    }
}

/// Permissions, owner and time; pax records come before header fields.
fn attributes(header: &Header, records: &Records) -> Result<Attr, BadField> {
    let id = |key, field, fallback: Result<u32, BadField>| match records.get(key) {
        Some(value) => pax::decimal(value)
            .and_then(|id| u32::try_from(id).ok())
            .ok_or(BadField { field }),
        None => fallback,
    };
    let (mtime, mtime_nsec) = match records.get("mtime") {
        Some(value) => pax::time(value).ok_or(BadField { field: "time" })?,
        None => (header.mtime()?, 0),
    };
    Ok(Attr {
        permissions: header.mode()?,
        uid: id("uid", "owner", header.uid())?,
        gid: id("gid", "group", header.gid())?,
        mtime,
        mtime_nsec,
    })
}
