//! Guesses which files a script wants next: those that it names.
//!
//! An interpreter finds one module after the other, each a round trip away. Their names
//! are in the module that wants them, as words between other bytes, whether it is source
//! or compiled. So every word of a module that looks like the name of another one is
//! taken for a wish. No grammar: a wrong guess costs its bytes, nothing else.
//!
//! A module is called like its file up to the first dot, or like its directory if it is
//! the file that stands for that (`__init__`, `index`). Words mean modules of the same
//! kind, and shared libraries, which extend an interpreter; and only those that the
//! search path of an interpreter could lead to.
//!
//! Promises: at most [`MAX_FILES`] files are known by name, so memory is bounded whatever
//! the image; a name that many files have means none of them, and a module that has very
//! many names, as a table of all encodings has, wishes for none.

use std::cell::LazyCell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rafs::units::Nid;

/// Most modules that are known, in the order in which they are found.
const MAX_FILES: usize = 1 << 15;

/// Largest module that is looked into, in bytes.
pub(crate) const MAX_SIZE: u64 = 256 << 10;

/// Modules of one name that are known; more help nobody.
const MAX_SAME_NAME: usize = 256;

/// Modules further down, or below longer names (in bytes, all together), are not known:
/// whoever makes an image could make paths so long that they fill the memory.
const MAX_DEPTH: usize = 16;
const MAX_PATH: usize = 512;

/// Shortest and longest word that can be a name, in bytes.
const WORD: std::ops::RangeInclusive<usize> = 3..=47;

/// Files that one name may mean.
const MAX_MEANINGS: usize = 3;

/// A module that names more than these is a table of names, and wishes for none.
const MAX_WISHES: usize = 40;

/// Has the compiled modules of the directory above it.
const COMPILED: &[u8] = b"__pycache__";

/// Directories with modules for all, beside those whose names no module could have.
const ROOTS: [&[u8]; 3] = [b"node_modules", b"python3", b"perl5"];

/// Stand for their directory.
const DIRECTORIES: [&[u8]; 3] = [b"__init__", b"index", b"main"];

/// What kinds of files name each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Python,
    CompiledPython,
    JavaScript,
    Ruby,
    Perl,
    Php,
    Lua,
    /// Names nothing here: see [`elf`](crate::elf).
    Library,
    /// The same, for Python only.
    PythonLibrary,
}

impl Kind {
    /// The kind of a file, by its name.
    fn of(name: &[u8]) -> Option<Self> {
        let dot = name.iter().rposition(|byte| *byte == b'.')?;
        Some(match name.get(dot..)? {
            b".py" => Self::Python,
            b".pyc" => Self::CompiledPython,
            b".js" | b".cjs" | b".mjs" => Self::JavaScript,
            b".rb" => Self::Ruby,
            b".pm" | b".pl" => Self::Perl,
            b".php" => Self::Php,
            b".lua" => Self::Lua,
            b".so" if is_for_python(name) => Self::PythonLibrary,
            b".so" => Self::Library,
            _ => return None,
        })
    }

    /// Whether files of this kind mean files of the other one by their words.
    fn can_mean(self, other: Self) -> bool {
        match other {
            Self::PythonLibrary => matches!(self, Self::Python | Self::CompiledPython),
            Self::Library => matches!(self, Self::Ruby | Self::Perl | Self::Php | Self::Lua),
            _ => self == other,
        }
    }

    /// Whether it is linked with others, and names none.
    pub(crate) fn is_library(self) -> bool {
        matches!(self, Self::Library | Self::PythonLibrary)
    }

    /// The words between other bytes.
    fn words(self, content: &[u8]) -> impl Iterator<Item = &[u8]> {
        let words = content.split(move |byte| !self.is_part_of_word(*byte));
        words.flat_map(move |word| {
            // Type letters stand between the words of compiled Python.
            let shorter = (self == Self::CompiledPython).then(|| word.split_last());
            let shorter = shorter.flatten().map(|(_, shorter)| shorter);
            std::iter::once(word).chain(shorter)
        })
    }

    fn is_part_of_word(self, byte: u8) -> bool {
        byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' && self == Self::JavaScript
    }
}

/// Python marks the libraries that extend it.
fn is_for_python(name: &[u8]) -> bool {
    let contains = |mark: &[u8]| name.windows(mark.len()).any(|part| part == mark);
    contains(b".cpython-") || contains(b".abi3.")
}

/// A directory, by the names on the way to it from the root of the image.
pub(crate) type Path = Arc<[Vec<u8>]>;

/// The path of a directory in `dir`; `None` if it is too long for modules.
pub(crate) fn below(dir: &Path, name: &[u8]) -> Option<Path> {
    let bytes = dir.iter().map(Vec::len).sum::<usize>() + name.len();
    let fits = dir.len() < MAX_DEPTH && bytes <= MAX_PATH;
    fits.then(|| dir.iter().cloned().chain([name.to_vec()]).collect())
}

/// A module, or a library.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    pub(crate) nid: Nid,
    pub(crate) kind: Kind,
    /// Where it is found by its name.
    home: Path,
    /// Where those are that it can name without more ado: the directory that it stands
    /// for, or else its home.
    inside: Path,
}

/// The modules of an image, by name.
#[derive(Debug, Default)]
pub(crate) struct Names {
    by_name: HashMap<Box<[u8]>, Vec<Module>>,
    count: usize,
}

impl Names {
    /// Takes in a file if it is a module.
    ///
    /// * `name`: without directories;
    /// * `dir`: where it is.
    pub(crate) fn add(&mut self, nid: Nid, name: &[u8], dir: &Path) -> Option<Module> {
        let kind = Kind::of(name)?;
        let mut stem = name.split(|byte| *byte == b'.').next()?;
        let inside = match dir.split_last() {
            Some((last, above)) if last == COMPILED => above.into(),
            _ => Arc::clone(dir),
        };
        let mut home = Arc::clone(&inside);
        if DIRECTORIES.contains(&stem) {
            let (last, above) = inside.split_last()?;
            (stem, home) = (last, above.into());
        }
        if self.count == MAX_FILES || !WORD.contains(&stem.len()) {
            return None;
        }
        let same_name = self.by_name.entry(stem.into()).or_default();
        if same_name.len() == MAX_SAME_NAME {
            return None;
        }
        self.count += 1;
        let module = Module {
            nid,
            kind,
            home,
            inside: Arc::clone(&inside),
        };
        same_name.push(module.clone());
        Some(module)
    }

    /// The modules that the content of `from` names, in the order of their names in it.
    pub(crate) fn wishes(&self, from: &Module, content: &[u8]) -> Vec<Module> {
        // Few words are the name of anything, and only those need all the others.
        let all = LazyCell::new(|| from.kind.words(content).collect());
        let mut seen = HashSet::new();
        let mut wishes = Vec::new();
        for word in from.kind.words(content) {
            let Some(named) = self.by_name.get(word) else {
                continue;
            };
            if seen.insert(word) {
                wishes.extend(meanings(named, from, &all));
            }
            if wishes.len() > MAX_WISHES {
                return Vec::new();
            }
        }
        wishes
    }
}

/// Those of the modules `named` by a word that `from` can mean by it.
///
/// * `words`: all words beside that one.
fn meanings(named: &[Module], from: &Module, words: &HashSet<&[u8]>) -> Vec<Module> {
    let fits = |module: &&Module| module.nid != from.nid && from.kind.can_mean(module.kind);
    let near = |module: &&Module| fits(module) && module.home == from.inside;
    let mut found: Vec<Module> = named.iter().filter(near).cloned().collect();
    if found.is_empty() {
        let within_reach = |module: &&Module| {
            fits(module)
                && (module.kind.is_library() || is_within_reach(&module.home, &from.inside, words))
        };
        found = named.iter().filter(within_reach).cloned().collect();
    }
    if found.len() > MAX_MEANINGS {
        found.clear();
    }
    found
}

/// Whether a module in `home` can be meant by one in `from` that has these words: those
/// in directories above it, those that are installed for all, and below both those whose
/// directories are words as well.
fn is_within_reach(home: &Path, from: &Path, words: &HashSet<&[u8]>) -> bool {
    let pairs = home.iter().zip(from.iter());
    let common = pairs.take_while(|(one, other)| one == other).count();
    let installed = home.iter().rposition(|name| is_root(name));
    let known = installed.map_or(0, |at| at + 1).max(common);
    home.iter()
        .skip(known)
        .all(|name| words.contains(name.as_slice()))
}

/// Whether modules in a directory of this name are installed for all.
fn is_root(name: &[u8]) -> bool {
    ROOTS.contains(&name) || name.iter().any(|byte| matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The modules of these files, numbered from 1.
    fn known(files: &[&str]) -> (Names, Vec<Module>) {
        let mut names = Names::default();
        let modules = (1..).zip(files).map(|(number, file)| {
            let mut dir: Vec<Vec<u8>> = file.split('/').map(|name| name.into()).collect();
            let name = dir.pop().unwrap();
            let module = names.add(Nid::new(number), &name, &dir.into());
            module.unwrap_or_else(|| panic!("{file} is no module"))
        });
        let modules = modules.collect();
        (names, modules)
    }

    fn wishes(names: &Names, from: &Module, content: &[u8]) -> Vec<u64> {
        let wishes = names.wishes(from, content);
        wishes.iter().map(|module| module.nid.get()).collect()
    }

    #[test]
    fn words_are_names_of_the_same_kind_and_of_libraries() {
        let (names, modules) = known(&[
            "lib/python3.11/__pycache__/ssl.cpython-311.pyc",
            "lib/python3.11/__pycache__/socket.cpython-311.pyc",
            "lib/python3.11/json/__pycache__/__init__.cpython-311.pyc",
            "lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so",
            "lib/python3.11/socket.py",
            "lib/ruby/_ssl.so",
        ]);
        // Lengths and letters of types stand between the words.
        let content = b"\x00\xda\x06socket\xda\x04_ssl\xda\x04jsonr\x05\x00 ssl socket none";
        assert_eq!(wishes(&names, &modules[0], content), [2, 4, 3]);
        assert_eq!(wishes(&names, &modules[4], b"import _ssl, ssl"), [4]);
        assert!(wishes(&names, &modules[0], b"").is_empty());
    }

    #[test]
    fn only_what_is_within_reach_is_meant() {
        let (names, modules) = known(&[
            "usr/lib/python3.11/email/__init__.py",
            "usr/lib/python3.11/email/parser.py",
            "usr/lib/python3.11/html/parser.py",
            "usr/lib/python3.11/email/mime/text.py",
            "usr/lib/python3.11/copy.py",
            "usr/share/python3/debpython/version.py",
            "app/main/helper.py",
        ]);
        // A directory's own first, then those above it.
        assert_eq!(wishes(&names, &modules[0], b"parser copy"), [2, 5]);
        assert_eq!(wishes(&names, &modules[1], b"parser copy"), [5]);
        assert!(wishes(&names, &modules[0], b"text version helper").is_empty());
        assert_eq!(wishes(&names, &modules[4], b"email.mime.text"), [1, 4]);
        // From an application: what is installed.
        assert_eq!(wishes(&names, &modules[6], b"copy html.parser"), [5, 3]);
    }

    #[test]
    fn what_is_no_module_has_no_name() {
        let mut names = Names::default();
        for file in ["README", "a.py", "index.js", "x.txt", ".py", ""] {
            let added = names.add(Nid::new(1), file.as_bytes(), &Arc::from([]));
            assert!(added.is_none(), "{file}");
        }
    }

    #[test]
    fn paths_have_a_limit_and_so_have_names() {
        let mut dir = Path::from([]);
        let mut depth = 0;
        while let Some(next) = below(&dir, b"d") {
            (dir, depth) = (next, depth + 1);
        }
        assert_eq!(depth, MAX_DEPTH);
        assert!(below(&Path::from([]), &[b'x'; MAX_PATH + 1]).is_none());
        let mut names = Names::default();
        let mut add = |number| names.add(Nid::new(number), b"util.py", &Path::from([]));
        let known = (0..1000).filter(|number| add(*number).is_some()).count();
        assert_eq!(known, MAX_SAME_NAME);
    }

    #[test]
    fn what_is_known_and_wished_for_is_bounded() {
        let mut names = Names::default();
        let (mut text, mut from) = (Vec::new(), None);
        for number in 0..MAX_FILES + 10 {
            let name = format!("module{number}.rb");
            let at = Nid::new(u64::try_from(number).unwrap());
            let module = names.add(at, name.as_bytes(), &Arc::from([]));
            assert_eq!(module.is_some(), number < MAX_FILES);
            from = from.or(module);
            text.extend_from_slice(format!("require 'module{number}'\n").as_bytes());
        }
        let from = from.unwrap();
        assert!(names.wishes(&from, &text).is_empty());
        assert!(names.wishes(&from, text.get(..200).unwrap()).len() > 5);
    }
}
