//! A hostile chunk table, of any kind of entry and context, and hostile chunk
//! data behind it.
//!
//! Chunks take their stored bytes from the input itself, wherever they claim to
//! be, so the decoders see hostile data too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use storage::chunk::{Chunk, Encoding};
use storage::codec::{decompress_into, zran};
use storage::format::chunk_table::ChunkTable;
use storage::format::stored_table;
use storage::{BlobInfo, ChunkIndex};

/// Memory that opening a table may take: a table that is stored compressed may be
/// this many times as large.
const BASE: usize = 1 << 20;
const FACTOR: usize = 2048;

/// Chunks looked at and chunks decoded of one input.
const CHUNKS: u32 = 10_000;
const DECODED: u32 = 16;

fuzz_target!(|data: &[u8]| {
    let Some((info, stored)) = fuzz::decode_table_input(data) else {
        return;
    };
    let open = || stored_table::open(&info, stored);
    let Ok(table) = fuzz::memory::bounded(stored.len(), BASE, FACTOR, open) else {
        return;
    };
    assert_eq!(table.len(), info.chunk_count);
    for number in 0..table.len().min(CHUNKS) {
        let Ok(chunk) = table.chunk(ChunkIndex::new(number)) else {
            continue;
        };
        let range = chunk.plain_range();
        assert!(range.end <= info.uncompressed_size && !range.is_empty());
        assert!(chunk.plain_size <= info.chunk_size);
        let covering = table.covering(range).expect("the order was checked");
        assert!(
            covering.contains(&number),
            "chunk {number} is not in {covering:?}"
        );
        if number < DECODED {
            decode(&table, &info, &chunk, stored);
        }
    }
    for number in 0..table.context_count().min(CHUNKS) {
        let _ = (table.batch_context(number), table.zran_context(number));
    }
    assert!(table.chunk(ChunkIndex::new(info.chunk_count)).is_err());
    let _ = table.covering(0..u64::MAX);
});

fn decode(table: &ChunkTable, info: &BlobInfo, chunk: &Chunk, data: &[u8]) {
    let within = |start: u32, size: u32, unit: u32| {
        assert!(
            start.checked_add(size).is_some_and(|end| end <= unit),
            "leaves its unit"
        );
    };
    match chunk.encoding {
        Encoding::Raw { .. } => {}
        Encoding::Compressed { offset, size } => {
            let mut plain = vec![0; chunk.plain_size as usize];
            let _ = decompress_into(info.compressor, part(data, offset, size), &mut plain);
        }
        Encoding::Batch {
            offset,
            context,
            within: start,
        } => {
            let Ok(batch) = table.batch_context(context) else {
                return;
            };
            within(start, chunk.plain_size, batch.uncompressed_size);
            let mut plain = vec![0; batch.uncompressed_size as usize];
            let stored = part(data, offset, batch.compressed_size);
            let _ = decompress_into(info.compressor, stored, &mut plain);
        }
        Encoding::Zran {
            context,
            within: start,
        } => {
            let Ok(context) = table.zran_context(context) else {
                return;
            };
            within(start, chunk.plain_size, context.output_size);
            let input = context.input.end - context.input.start;
            let size = u32::try_from(input).unwrap_or(u32::MAX);
            let mut output = vec![0; context.output_size as usize];
            let _ = zran::decode(&context, part(data, context.input.start, size), &mut output);
        }
    }
}

/// Up to `size` bytes of `data` from somewhere that depends on `offset`.
fn part(data: &[u8], offset: u64, size: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(0) % data.len().max(1);
    let rest = &data[start..];
    &rest[..rest.len().min(size as usize)]
}
