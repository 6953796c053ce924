//! Layers as tar streams: undoing their compression.
#![forbid(unsafe_code)]

use std::io::{self, BufRead as _, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

/// Enough for the largest read a decoder makes at once.
const BUFFER: usize = 128 << 10;
/// A zstd frame that wants a window of more than 2^26 bytes (64 MiB) is refused: several
/// layers are decoded at a time.
const MAX_ZSTD_WINDOW_LOG: u32 = 26;

/// The tar stream inside a layer, which is gzip, zstd or plain by its first bytes;
/// media types are too often wrong.
///
/// # Errors
/// What reading the first bytes said.
pub fn decode<'r>(layer: impl Read + Send + 'r) -> io::Result<Box<dyn Read + Send + 'r>> {
    let mut layer = BufReader::with_capacity(BUFFER, layer);
    let start = layer.fill_buf()?;
    if start.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(MultiGzDecoder::new(layer)));
    }
    if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(layer)?;
        decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(layer))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn every_compression_gives_the_same_bytes() {
        let plain = b"some bytes that are no tar".repeat(1000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::encode_all(plain.as_slice(), 3).unwrap();
        for stored in [&plain, &gzip, &zstd, &Vec::new()] {
            let mut bytes = Vec::new();
            decode(stored.as_slice())
                .unwrap()
                .read_to_end(&mut bytes)
                .unwrap();
            assert_eq!(bytes.is_empty(), stored.is_empty());
            assert!(stored.is_empty() || bytes == plain);
        }
        let mut twice = gzip.clone();
        twice.extend_from_slice(&gzip);
        let mut bytes = Vec::new();
        decode(twice.as_slice())
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        assert_eq!(bytes.len(), 2 * plain.len());
        let mut short = decode(&gzip[..gzip.len() - 9]).unwrap();
        assert!(short.read_to_end(&mut Vec::new()).is_err());
    }
}
