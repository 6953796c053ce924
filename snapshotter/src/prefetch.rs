//! Lists of files that are fetched first when an image is mounted next.
//!
//! They come over the system API, from whoever knows what a pod will read, and are used once.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Deserialize;

use crate::error::Error;

/// Longest list, in bytes.
const MAX_LIST: u64 = 1 << 20;
/// Most images whose lists wait to be used.
const MAX_IMAGES: usize = 1024;

/// One list, as a client sends it.
#[derive(Debug, Deserialize)]
pub struct Wish {
    /// Reference of the image.
    image: String,
    /// A file with a path on each line.
    prefetch: String,
}

/// The lists that wait, by reference of the image.
#[derive(Debug, Default)]
pub struct Lists(Mutex<BTreeMap<String, Vec<String>>>);

impl Lists {
    /// Reads the files of all `wishes`, in the place of earlier ones of the same images.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is no list, or too much; nothing has changed then.
    pub fn add(&self, wishes: &[Wish]) -> Result<(), Error> {
        let mut new = BTreeMap::new();
        for wish in wishes {
            new.insert(wish.image.clone(), read(Path::new(&wish.prefetch))?);
        }
        let mut lists = self.lock();
        let unknown = new.keys().filter(|image| !lists.contains_key(*image));
        if lists.len() + unknown.count() > MAX_IMAGES {
            let reason = format!("lists of {MAX_IMAGES} images wait to be used");
            return Err(Error::Invalid(reason));
        }
        lists.extend(new);
        Ok(())
    }

    /// The list of an image that is about to be mounted; it is not used again.
    pub(crate) fn take(&self, image: &str) -> Option<Vec<String>> {
        self.lock().remove(image)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Absolute paths, one a line.
fn read(path: &Path) -> Result<Vec<String>, Error> {
    let wrong = |reason: String| Error::Invalid(format!("{}: {reason}", path.display()));
    if !path.is_absolute() {
        return Err(wrong("is no absolute path".to_owned()));
    }
    let mut text = String::new();
    // One byte more than allowed is enough to see that it is too much.
    let read = File::open(path).and_then(|file| file.take(MAX_LIST + 1).read_to_string(&mut text));
    let length = read.map_err(|error| wrong(error.to_string()))?;
    if u64::try_from(length).unwrap_or(u64::MAX) > MAX_LIST {
        return Err(wrong(format!("is longer than {MAX_LIST} bytes")));
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let list: Vec<String> = lines.map(str::to_owned).collect();
    match list.iter().find(|line| !line.starts_with('/')) {
        Some(line) => Err(wrong(format!("`{line}` is no absolute path"))),
        None => Ok(list),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_whole_and_used_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let wish = |image: &str, prefetch: String| Wish {
            image: image.to_owned(),
            prefetch,
        };
        let lists = Lists::default();
        let good = file("good", "/a\n\n /b c \n");
        lists.add(&[wish("x", good.clone())]).unwrap();
        let long = "/a\n".repeat(1 << 20);
        for (name, text) in [("relative", "/a\nb"), ("long", &long)] {
            let wishes = [wish("y", good.clone()), wish("z", file(name, text))];
            assert!(lists.add(&wishes).is_err(), "{name}");
        }
        assert!(lists.add(&[wish("y", "/nonexistent".to_owned())]).is_err());
        assert!(lists.add(&[wish("y", "good".to_owned())]).is_err());
        assert_eq!(lists.take("y"), None);
        assert_eq!(lists.take("x").unwrap(), ["/a", "/b c"]);
        assert_eq!(lists.take("x"), None);
        let many: Vec<Wish> = (0..=MAX_IMAGES)
            .map(|image| wish(&image.to_string(), good.clone()))
            .collect();
        assert!(lists.add(&many).is_err());
        lists.add(&many[1..]).unwrap();
    }
}
