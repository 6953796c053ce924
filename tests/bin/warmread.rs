//! How fast resident data is read through `storage` alone, by one thread: against the
//! same reads of the cache file, and against copying memory.
//!
//! What is left between the rows is what asking costs: the ready map, the chunk table,
//! and a counter. The last rows are what a miss costs beside the network: decoding and
//! verifying. `misc/bench/warmread.sh` runs it.

use std::hint::black_box;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use storage::backend::Priority;
use storage::backend::local::LocalBackend;
use storage::blob::{Blob, Served};
use storage::cache::CacheDir;
use storage::{Compressor, Digest, Digester, codec};
use support::blob::SampleBlob;

/// Measure reads of resident data.
#[derive(Debug, Parser)]
struct Cli {
    /// Length of a read, in KiB
    #[arg(long, default_value_t = 1024)]
    kib: usize,

    /// Size of the blob, in MiB; beyond what processors cache
    #[arg(long, default_value_t = 256)]
    mib: usize,

    /// Time for each row, in milliseconds
    #[arg(long, default_value_t = 1000)]
    ms: u64,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let (step, size) = (cli.kib << 10, cli.mib << 20);
    ensure!(step > 0 && size >= step, "nothing to read");
    let dir = tempfile::tempdir()?;
    let sample = SampleBlob::new(size / support::blob::CHUNK, 1)?;
    std::fs::write(dir.path().join(sample.info.id.to_string()), &sample.file)?;
    let backend = Arc::new(LocalBackend::new(vec![dir.path().to_owned()]));
    let cache = CacheDir::open(&dir.path().join("cache"))?;
    let blob = Blob::open(&cache, sample.info.clone(), backend, sample.digests.clone())?;
    blob.ensure(0..u64::try_from(size)?, Priority::Prefetch)?;
    ensure!(blob.is_complete(), "the blob is not resident");
    let file = std::fs::File::open(blob.data_path())?;
    let mut buffer = vec![0; step];
    let time = Duration::from_millis(cli.ms);
    let bench = |read: &mut dyn FnMut(u64) -> Result<()>| -> Result<f64> {
        let (start, mut bytes, mut at) = (Instant::now(), 0.0, 0);
        while start.elapsed() < time {
            read(u64::try_from(at)?)?;
            #[allow(clippy::cast_precision_loss, reason = "a figure for people to read")]
            let step_size = step as f64;
            bytes += step_size;
            at = if at + 2 * step > size { 0 } else { at + step };
        }
        Ok(bytes / start.elapsed().as_secs_f64() / 1e9)
    };
    // The first round brings the file into the page cache.
    bench(&mut |at| Ok(file.read_exact_at(&mut buffer, at)?))?;
    let memory = bench(&mut |at| {
        let at = usize::try_from(at)?;
        buffer.copy_from_slice(black_box(&sample.plain[at..at + step]));
        black_box(&mut buffer);
        Ok(())
    })?;
    let raw = bench(&mut |at| Ok(file.read_exact_at(&mut buffer, at)?))?;
    let storage = bench(&mut |at| {
        let end = at + u64::try_from(step)?;
        match blob.read(at..end, Priority::OnDemand)? {
            Served::File(file) => file.read_exact_at(&mut buffer, at)?,
            Served::Memory(bytes) => buffer.copy_from_slice(&bytes),
        }
        Ok(())
    })?;
    let asked = bench(&mut |at| {
        let resident = blob.is_resident(at..at + u64::try_from(step)?);
        ensure!(black_box(resident), "not resident");
        Ok(())
    })?;
    // About as compressible as programs are: half noise, half zeros.
    let mut plain = sample.plain[..step].to_vec();
    plain.chunks_mut(64).for_each(|part| {
        let half = part.len() / 2;
        part[half..].fill(0);
    });
    let packed = codec::compress(Compressor::Zstd, &plain)?.unwrap_or_default();
    let decode = bench(&mut |_| {
        codec::decompress_into(Compressor::Zstd, black_box(&packed), &mut buffer)?;
        Ok(())
    })?;
    let digest = bench(&mut |_| {
        black_box(Digest::of(Digester::Blake3, black_box(&plain)));
        Ok(())
    })?;
    let mut out = std::io::stdout();
    writeln!(out, "reads of {} KiB, one thread, GB/s", cli.kib)?;
    writeln!(out, "{:<34}{memory:>8.1}", "copying memory")?;
    writeln!(out, "{:<34}{raw:>8.1}", "pread of the cache file")?;
    writeln!(out, "{:<34}{storage:>8.1}", "through storage")?;
    writeln!(out, "{:<34}{asked:>8.1}", "asking alone, nothing is copied")?;
    writeln!(out, "{:<34}{decode:>8.1}", "decoding zstd")?;
    writeln!(out, "{:<34}{digest:>8.1}", "digest (BLAKE3)")?;
    Ok(())
}
