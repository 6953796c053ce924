//! Which libraries a program needs, from its ELF headers.
//!
//! Reads what the dynamic linker reads first, and no more: file header, program
//! headers, dynamic section and the names that it points to. 64-bit little-endian
//! files only, which is what servers run; others need nothing.
//!
//! Promises: a few small reads, each of bounded length, whatever the file says.
//! Layout: elf(5).

use std::io;

/// Most program headers that are looked at.
const MAX_HEADERS: usize = 64;

/// Most bytes of the dynamic section that are looked at.
const MAX_DYNAMIC: u64 = 16 << 10;

/// Longest name of a library, with its NUL.
const MAX_NAME: usize = 256;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// A file that can be read anywhere.
pub(crate) trait ReadAt {
    /// Reads from `offset` until `buffer` is full or the file ends; how much it was.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

/// One program header, as far as it matters.
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    len: u64,
}

/// Names of the program's interpreter (a path) and libraries; nothing for a file that
/// is no such program.
///
/// # Errors
/// What reading says.
pub(crate) fn needs(file: &dyn ReadAt) -> io::Result<Vec<Vec<u8>>> {
    let header = read(file, 0, HEADER)?;
    // Magic, 64 bits, little-endian, first version.
    if !header.starts_with(b"\x7fELF\x02\x01\x01") || header.len() < HEADER {
        return Ok(Vec::new());
    }
    let size = usize::from(u16_at(&header, 54));
    let count = usize::from(u16_at(&header, 56)).min(MAX_HEADERS);
    if size != PROGRAM_HEADER {
        return Ok(Vec::new());
    }
    let headers = read(file, u64_at(&header, 32), count * PROGRAM_HEADER)?;
    let segments: Vec<Segment> = headers.chunks_exact(PROGRAM_HEADER).map(segment).collect();
    let mut names = Vec::new();
    for segment in &segments {
        match segment.kind {
            PT_INTERP => names.extend(name_at(file, segment.offset)?),
            PT_DYNAMIC => names.extend(libraries(file, &segments, segment)?),
            _ => {}
        }
    }
    Ok(names)
}

fn segment(header: &[u8]) -> Segment {
    Segment {
        kind: u32::try_from(u64_at(header, 0) & u64::from(u32::MAX)).unwrap_or(0),
        offset: u64_at(header, 8),
        address: u64_at(header, 16),
        len: u64_at(header, 32),
    }
}

/// The names that the dynamic section lists.
fn libraries(
    file: &dyn ReadAt,
    segments: &[Segment],
    dynamic: &Segment,
) -> io::Result<Vec<Vec<u8>>> {
    let len = usize::try_from(dynamic.len.min(MAX_DYNAMIC)).unwrap_or(0);
    let section = read(file, dynamic.offset, len)?;
    let entries = || {
        section
            .chunks_exact(16)
            .map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
    };
    let Some(table) = entries()
        .find(|(tag, _)| *tag == DT_STRTAB)
        .and_then(|(_, address)| place(segments, address))
    else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for (_, at) in entries().filter(|(tag, _)| *tag == DT_NEEDED) {
        names.extend(name_at(file, table.saturating_add(at))?);
    }
    Ok(names)
}

/// Where in the file an address of the loaded program is.
fn place(segments: &[Segment], address: u64) -> Option<u64> {
    segments.iter().find_map(|segment| {
        let within = address.checked_sub(segment.address)?;
        (segment.kind == PT_LOAD && within < segment.len)
            .then(|| segment.offset.saturating_add(within))
    })
}

/// The NUL-terminated name at `offset`; `None` if it is empty or too long.
fn name_at(file: &dyn ReadAt, offset: u64) -> io::Result<Option<Vec<u8>>> {
    let bytes = read(file, offset, MAX_NAME)?;
    let end = bytes.iter().position(|byte| *byte == 0);
    let name = end.and_then(|end| bytes.get(..end));
    Ok(name.filter(|name| !name.is_empty()).map(<[u8]>::to_vec))
}

/// Up to `len` bytes; fewer at the end of the file.
fn read(file: &dyn ReadAt, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let got = file.read_at(&mut bytes, offset)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// The number at `at`; 0 behind the end.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
    field.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
    field.map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl ReadAt for Vec<u8> {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let rest = usize::try_from(offset).ok().and_then(|at| self.get(at..));
            let rest = rest.unwrap_or_default();
            let len = rest.len().min(buffer.len());
            buffer[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        }
    }

    #[test]
    fn a_program_of_this_machine_needs_its_interpreter_and_libc() {
        // The test itself is one.
        let program = std::fs::read("/proc/self/exe").unwrap();
        let names = needs(&program).unwrap();
        let has = |part: &[u8]| {
            names
                .iter()
                .any(|name| name.windows(part.len()).any(|window| window == part))
        };
        assert!(has(b"/ld-"), "{names:?}");
        assert!(has(b"libc.so"), "{names:?}");
    }

    #[test]
    fn other_files_need_nothing() {
        assert!(needs(&b"#!/bin/sh\n".to_vec()).unwrap().is_empty());
        assert!(needs(&Vec::new()).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn damaged_programs_do_no_harm(
            cut in 0..5000_usize,
            damage in prop::collection::vec((0..400_usize, any::<u8>()), 0..20),
        ) {
            let mut program = std::fs::read("/proc/self/exe").unwrap();
            program.truncate(100_000 + cut);
            for (at, byte) in damage {
                program[at] = byte;
            }
            let names = needs(&program).unwrap();
            prop_assert!(names.len() <= 1100 * MAX_HEADERS);
        }
    }
}
