//! Recognises how a stream is compressed by its first bytes, and decompresses it.

use std::io::{self, BufReader, Cursor, ErrorKind, Read};

/// Enough that a fast source is read with few calls.
const BUFFER: usize = 256 << 10;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all, or in a way that is not known.
    None,
    /// gzip, of one or more members.
    Gzip,
    /// Zstandard, of one or more frames.
    Zstd,
}

impl Compression {
    fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// Reads the first bytes of `reader` and returns a reader of the decompressed stream.
///
/// # Errors
/// Reading failed, or the decompressor could not be set up. Damaged data is
/// reported by the reader that is returned.
pub fn open(
    mut reader: impl Read + Send + 'static,
) -> io::Result<(Compression, Box<dyn Read + Send>)> {
    let start = first_bytes(&mut reader)?;
    let compression = Compression::of(&start);
    let whole = BufReader::with_capacity(BUFFER, Cursor::new(start).chain(reader));
    Ok((
        compression,
        match compression {
            Compression::None => Box::new(whole),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
            Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        },
    ))
}

fn first_bytes(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = [0; 4];
    let mut len = 0;
    while len < start.len() {
        match reader.read(&mut start[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(start[..len].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn text(reader: Vec<u8>) -> (Compression, String) {
        let (compression, mut reader) = open(Cursor::new(reader)).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        (compression, text)
    }

    #[test]
    fn every_compression_is_recognised() {
        let mut gzip = Vec::new();
        for part in ["some ", "text"] {
            let mut encoder = flate2::write::GzEncoder::new(&mut gzip, flate2::Compression::fast());
            encoder.write_all(part.as_bytes()).unwrap();
            encoder.finish().unwrap();
        }
        assert_eq!(text(gzip), (Compression::Gzip, "some text".to_owned()));
        let frames = [
            zstd::encode_all(&b"some "[..], 1).unwrap(),
            zstd::encode_all(&b"text"[..], 1).unwrap(),
        ];
        assert_eq!(
            text(frames.concat()),
            (Compression::Zstd, "some text".to_owned())
        );
        assert_eq!(
            text(b"some text".to_vec()),
            (Compression::None, "some text".to_owned())
        );
        assert_eq!(text(b"so".to_vec()), (Compression::None, "so".to_owned()));
        assert_eq!(text(Vec::new()), (Compression::None, String::new()));
    }
}
