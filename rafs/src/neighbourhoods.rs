//! Which chunks of a blob belong to the same directory: for the data path, which
//! guesses from a few reads in a directory that more will follow.

use storage::BlobIndex;
use storage::speculate::Neighbourhoods;

use crate::error::Error;
use crate::image::Image;
use crate::units::{FileKind, Nid};
use crate::visited::Visited;

/// A chunk that no file was found for.
const NOBODY: u32 = 0;

impl Image {
    /// The neighbourhoods of every blob, in the order of the blob table: runs of chunks
    /// whose files are in one directory. A chunk of several files counts for one of them.
    ///
    /// Walks the whole image, O(its length) in time and four bytes a chunk.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for an image whose directories or files are damaged.
    pub fn neighbourhoods(&self) -> Result<Vec<Neighbourhoods>, Error> {
        let records = self.chunk_record_count();
        let owners = self.blobs().iter().map(|info| {
            // A count that the table does not bear out is not allocated for.
            let chunks = usize::try_from(info.chunk_count).unwrap_or(usize::MAX);
            vec![NOBODY; chunks.min(records)]
        });
        let mut owners: Vec<Vec<u32>> = owners.collect();
        let mut visited = Visited::new(self);
        let mut pending = vec![self.root()];
        let mut number = NOBODY;
        while let Some(dir) = pending.pop() {
            visited.first(&self.inode(dir)?)?;
            number = number.saturating_add(1);
            self.claim(dir, number, &mut owners, &mut visited, &mut pending)?;
        }
        Ok(owners
            .iter()
            .map(|owners| Neighbourhoods::new(owners))
            .collect())
    }

    /// Marks the chunks of the files in `dir` as those of directory `number`.
    fn claim(
        &self,
        dir: Nid,
        number: u32,
        owners: &mut [Vec<u32>],
        visited: &mut Visited,
        pending: &mut Vec<Nid>,
    ) -> Result<(), Error> {
        let mut files = Vec::new();
        self.readdir(dir, 0, |entry| {
            match entry.kind {
                FileKind::Directory if entry.name == b"." || entry.name == b".." => {}
                FileKind::Directory => pending.push(entry.nid),
                FileKind::File => files.push(entry.nid),
                _ => {}
            }
            std::ops::ControlFlow::Continue(())
        })?;
        for nid in files {
            if !visited.first(&self.inode(nid)?)? {
                continue;
            }
            for extent in self.extents(nid, 0..u64::MAX) {
                let extent = extent?;
                let owner = owners
                    .get_mut(BlobIndex::as_usize(extent.blob))
                    .and_then(|owners| owners.get_mut(extent.chunk.as_usize()));
                if let Some(owner) = owner
                    && *owner == NOBODY
                {
                    *owner = number;
                }
            }
        }
        Ok(())
    }
}
