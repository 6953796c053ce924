//! Output files: a regular file appears complete under its name or not at all.
//!
//! Data goes to a temporary file beside the target, which takes the target's name
//! at the end. FIFOs and devices are written directly, front to back, because
//! their readers want the data while it is produced.
//!
//! What happens to the temporary file when the program ends early is in
//! `output/temporary.rs`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use temporary::Temporary;

mod temporary;

/// A file being written.
#[derive(Debug)]
pub struct Output {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A FIFO or device, and its path for messages.
    Stream(File, PathBuf),
    /// A file that gets this name if all goes well.
    Named(Temporary, PathBuf),
    /// A file in this directory whose name is not known yet.
    Unnamed(Temporary, PathBuf),
}

impl Output {
    /// Opens `path` for writing. Opening a FIFO waits for its reader.
    ///
    /// # Errors
    /// The file cannot be created or opened; the message names it.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let kind = match std::fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_fifo() || is_device(&metadata) => {
                let file = OpenOptions::new().write(true).open(path);
                let file = file.with_context(|| format!("cannot open {}", path.display()))?;
                Kind::Stream(file, path.to_owned())
            }
            Ok(metadata) if metadata.is_dir() => {
                anyhow::bail!("cannot write {}: it is a directory", path.display());
            }
            _ => Kind::Named(temporary(parent(path), path)?, path.to_owned()),
        };
        Ok(Self { kind })
    }

    /// Opens a file in `dir` that gets its name at the end.
    ///
    /// # Errors
    /// The file cannot be created; the message names the directory.
    pub fn create_in(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            kind: Kind::Unnamed(temporary(dir, dir)?, dir.to_owned()),
        })
    }

    /// The file, to be written at any position; `None` for a FIFO or device.
    #[must_use]
    pub fn regular(&self) -> Option<&File> {
        match &self.kind {
            Kind::Stream(..) => None,
            Kind::Named(file, _) | Kind::Unnamed(file, _) => Some(file.file()),
        }
    }

    /// Gives the file its name, `name` if it was created without one. Returns the path.
    ///
    /// # Errors
    /// The file cannot be completed; it is removed then.
    pub fn commit(self, name: &str) -> anyhow::Result<PathBuf> {
        let (file, path) = match self.kind {
            Kind::Stream(mut file, path) => {
                file.flush()
                    .with_context(|| format!("cannot write {}", path.display()))?;
                return Ok(path);
            }
            Kind::Named(file, path) => (file, path),
            Kind::Unnamed(file, dir) => (file, dir.join(name)),
        };
        file.persist(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Drops what was written, and the file that the target's name led to before:
    /// for output that turned out to be empty.
    ///
    /// # Errors
    /// The old file cannot be removed.
    pub fn discard(self) -> anyhow::Result<()> {
        if let Kind::Named(_, path) = self.kind {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file().write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

impl Output {
    fn file(&mut self) -> &mut File {
        match &mut self.kind {
            Kind::Stream(file, _) => file,
            Kind::Named(file, _) | Kind::Unnamed(file, _) => file.file_mut(),
        }
    }
}

/// Writes a whole file.
///
/// # Errors
/// As for [`Output`]; the message names the file.
pub fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut output = Output::create(path)?;
    output
        .write_all(bytes)
        .with_context(|| format!("cannot write {}", path.display()))?;
    output.commit("").map(|_| ())
}

/// Writes to standard output; a reader that has seen enough is no failure.
///
/// # Errors
/// Standard output cannot be written for another reason.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    match written.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

fn temporary(dir: &Path, target: &Path) -> anyhow::Result<Temporary> {
    Temporary::new_in(dir).with_context(|| {
        format!(
            "cannot create a file in {} for {}",
            dir.display(),
            target.display()
        )
    })
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn is_device(metadata: &std::fs::Metadata) -> bool {
    let kind = metadata.file_type();
    kind.is_char_device() || kind.is_block_device()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_dropped_output_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        write_file(&path, b"old").unwrap();
        let mut output = Output::create(&path).unwrap();
        output.write_all(b"half of the new").unwrap();
        drop(output);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn names_are_given_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create_in(dir.path()).unwrap();
        output.write_all(b"x").unwrap();
        assert_eq!(output.commit("id").unwrap(), dir.path().join("id"));
        assert_eq!(names(dir.path()), ["id"]);
        Output::create(&dir.path().join("id"))
            .unwrap()
            .discard()
            .unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn errors_name_the_file() {
        let error = write_file(Path::new("/nonexistent/dir/file"), b"").unwrap_err();
        assert!(
            format!("{error:#}").contains("/nonexistent/dir"),
            "{error:#}"
        );
        let error = write_file(Path::new("/"), b"").unwrap_err();
        assert!(format!("{error:#}").contains("directory"), "{error:#}");
    }
}
