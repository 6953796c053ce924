//! Content that is about to be sent: a file or memory, readable any number of times.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;

/// What to send. Cheap to clone.
#[derive(Clone, Debug)]
pub enum BlobSource {
    /// A file, from its first byte; its position is not used, its name need not exist.
    File(Arc<File>),
    /// Memory.
    Bytes(Bytes),
}

impl BlobSource {
    /// At most `len` bytes from `offset` on.
    ///
    /// # Errors
    /// What reading the file said; `UnexpectedEof` if there is nothing at `offset`.
    pub async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let piece = match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).map_or(bytes.len(), |at| at.min(bytes.len()));
                bytes.slice(start..bytes.len().min(start.saturating_add(len)))
            }
            Self::File(file) => {
                let file = Arc::clone(file);
                let read = move || {
                    let mut piece = vec![0; len];
                    let read = file.read_at(&mut piece, offset)?;
                    piece.truncate(read);
                    io::Result::Ok(Bytes::from(piece))
                };
                tokio::task::spawn_blocking(read)
                    .await
                    .map_err(io::Error::other)??
            }
        };
        if piece.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn files_and_memory_read_the_same() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        for source in [
            BlobSource::File(Arc::new(file.try_clone().unwrap())),
            BlobSource::Bytes(Bytes::from_static(b"0123456789")),
        ] {
            assert_eq!(source.read_at(0, 4).await.unwrap(), "0123");
            assert_eq!(source.read_at(8, 4).await.unwrap(), "89");
            assert!(source.read_at(10, 4).await.is_err());
            assert!(source.read_at(u64::MAX >> 1, 4).await.is_err());
        }
    }
}
