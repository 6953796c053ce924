//! A hostile end of a blob: tar header, table of contents, sections.
#![no_main]

use libfuzzer_sys::fuzz_target;
use storage::Digest;
use storage::format::tar_header;
use storage::format::toc::{Tail, Toc, locate, tail_size};

/// Memory that an input may take: one section, and so many times its length.
const BASE: usize = 4 << 20;
const FACTOR: usize = 64;

/// Bytes a section may take in memory.
const LIMIT: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| fuzz::memory::bounded(data.len(), BASE, FACTOR, || check(data)));

fn check(data: &[u8]) {
    let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
    let tail = usize::try_from(tail_size(len)).unwrap_or(0);
    if let Ok(found) = locate(&data[data.len() - tail..]) {
        if let Tail::Toc(toc) = found {
            use_toc(&toc, data);
        }
    }
    if let Ok(toc) = Toc::decode(data) {
        use_toc(&toc, data);
    }
    let _ = Toc::verified(data, &Digest::default());
    if let Ok((name, size)) = tar_header::decode(data) {
        // What a reader understands can be written again.
        if let Ok(again) = tar_header::encode(&name, size) {
            let decoded = tar_header::decode(&again).expect("own header");
            assert_eq!(decoded, (name, size));
        }
    }
}

fn use_toc(toc: &Toc, file: &[u8]) {
    for entry in toc.entries.iter().take(64) {
        let start = usize::try_from(entry.offset).unwrap_or(usize::MAX);
        let size = usize::try_from(entry.stored_size).unwrap_or(usize::MAX);
        let end = start.checked_add(size);
        let stored = end.and_then(|end| file.get(start..end)).unwrap_or(file);
        if let Ok(plain) = entry.extract(stored, LIMIT) {
            assert_eq!(u64::try_from(plain.len()), Ok(entry.plain_size));
            assert!(entry.plain_size <= LIMIT);
        }
        let first = toc
            .entry(&entry.name)
            .expect("an entry is found by its name");
        assert_eq!(first.name, entry.name);
    }
    if let Ok(bytes) = toc.encode() {
        let array = &bytes[..bytes.len() - tar_header::SIZE];
        assert_eq!(&Toc::decode(array).expect("own table"), toc);
    }
}
