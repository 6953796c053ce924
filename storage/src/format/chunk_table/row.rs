//! The rules that one entry of a chunk table must keep.

use super::super::FormatError;
use super::super::entry::{Entry, flags, high32, low32};
use super::{CHUNK, ChunkTable, Contexts, plain_end};
use crate::chunk::Encoding;

/// An entry and what it is checked against.
pub(super) struct Row<'a> {
    pub(super) index: u32,
    pub(super) entry: Entry,
    pub(super) table: &'a ChunkTable,
}

impl Row<'_> {
    fn corrupt<T>(
        &self,
        field: &'static str,
        value: impl Into<u64>,
        problem: &'static str,
    ) -> Result<T, FormatError> {
        Err(FormatError::corrupt(
            CHUNK, self.index, field, value, problem,
        ))
    }

    fn has(&self, flag: u8) -> bool {
        self.entry.flags & flag != 0
    }

    pub(super) fn check_plain_range(&self) -> Result<(), FormatError> {
        let Entry {
            plain_offset,
            plain_size,
            ..
        } = self.entry;
        if plain_size > self.table.limits.chunk_size {
            return self.corrupt("plain size", plain_size, "larger than the chunk size");
        }
        if plain_end(&self.entry) > self.table.limits.plain_size {
            let problem = "ends beyond the uncompressed address space";
            return self.corrupt("plain offset", plain_offset, problem);
        }
        Ok(())
    }

    pub(super) fn encoding(&self) -> Result<Encoding, FormatError> {
        if self.has(flags::ENCRYPTED) {
            return Err(FormatError::Unsupported {
                object: CHUNK,
                feature: "encryption",
            });
        }
        match (
            self.has(flags::ZRAN),
            self.has(flags::BATCH),
            &self.table.contexts,
        ) {
            (true, false, Contexts::Zran { .. }) => self.zran(),
            (true, ..) => self.corrupt("flags", self.entry.flags, "no gzip chunk belongs here"),
            (false, _, Contexts::Zran { .. }) => {
                self.corrupt("flags", self.entry.flags, "only gzip chunks belong here")
            }
            (false, true, Contexts::Batch { .. }) => self.batch(),
            (false, true, _) => self.corrupt(
                "flags",
                self.entry.flags,
                "no chunk of a batch belongs here",
            ),
            (false, false, _) => self.plain(),
        }
    }

    /// A chunk that is a unit of its own.
    fn plain(&self) -> Result<Encoding, FormatError> {
        let Entry {
            plain_size,
            offset,
            size,
            ..
        } = self.entry;
        self.check_stored_range(size)?;
        if self.has(flags::COMPRESSED) {
            if size == 0 {
                return self.corrupt("stored size", size, "must not be 0");
            }
            Ok(Encoding::Compressed { offset, size })
        } else if size == plain_size {
            Ok(Encoding::Raw { offset })
        } else {
            self.corrupt(
                "stored size",
                size,
                "differs from the plain size of a raw chunk",
            )
        }
    }

    fn batch(&self) -> Result<Encoding, FormatError> {
        let (context, within) = (high32(self.entry.data), low32(self.entry.data));
        let batch = self.table.batch_context(context)?;
        self.check_stored_range(batch.compressed_size)?;
        self.check_within(within, batch.uncompressed_size)?;
        Ok(Encoding::Batch {
            offset: self.entry.offset,
            context,
            within,
        })
    }

    /// The stored range of a gzip chunk is informative and not checked.
    fn zran(&self) -> Result<Encoding, FormatError> {
        let (context, within) = (high32(self.entry.data), low32(self.entry.data));
        self.check_within(within, self.table.zran_context(context)?.output_size)?;
        Ok(Encoding::Zran { context, within })
    }

    fn check_within(&self, within: u32, unit: u32) -> Result<(), FormatError> {
        match within.checked_add(self.entry.plain_size) {
            Some(end) if end <= unit => Ok(()),
            _ => self.corrupt(
                "position in its unit",
                within,
                "ends beyond the unit's output",
            ),
        }
    }

    fn check_stored_range(&self, size: u32) -> Result<(), FormatError> {
        // 40 and 32 bits: the sum cannot overflow.
        if self.entry.offset + u64::from(size) > self.table.limits.data_size {
            return self.corrupt(
                "stored offset",
                self.entry.offset,
                "ends beyond the chunk data",
            );
        }
        Ok(())
    }

    pub(super) fn crc32c(&self) -> Result<Option<u32>, FormatError> {
        // The word of such chunks says where they are.
        if self.has(flags::ZRAN) || self.has(flags::BATCH) || !self.has(flags::HAS_CRC) {
            return Ok(None);
        }
        match low32(self.entry.data) {
            0 => self.corrupt("CRC32C", 0_u32, "flagged as present but zero"),
            crc => Ok(Some(crc)),
        }
    }
}
