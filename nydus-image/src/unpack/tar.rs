//! Headers of tar members, in the POSIX form that every reader knows.
//!
//! What the old header cannot say (long names, large numbers, times with
//! nanoseconds or before 1970, extended attributes) goes into an extended header
//! before it, one record for each. Nothing is written there that the old header
//! says as well, so ordinary files cost one block.

use rafs::tree::Attr;

/// Bytes of a block.
const BLOCK: usize = 512;

/// Zeros at the end of an archive.
pub const END: usize = 2 * BLOCK;

/// Largest numbers of the octal fields.
const MAX_ID: u32 = 0o777_7777;
const MAX_LONG: u64 = 0o777_7777_7777;

/// Zeros that follow `size` bytes of data.
#[must_use]
pub fn padding(size: u64) -> usize {
    let block = 512;
    // Less than a block.
    usize::try_from(size.next_multiple_of(block) - size).unwrap_or_default()
}

/// Type of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Another name of an earlier member.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
}

impl Kind {
    fn flag(self) -> u8 {
        match self {
            Self::File => b'0',
            Self::HardLink => b'1',
            Self::Symlink => b'2',
            Self::CharDevice => b'3',
            Self::BlockDevice => b'4',
            Self::Directory => b'5',
            Self::Fifo => b'6',
        }
    }
}

/// A member of an archive.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Relative; with a `/` at the end for a directory.
    pub path: Vec<u8>,
    /// Its type.
    pub kind: Kind,
    /// Target of a symbolic link, or path of the earlier member.
    pub link: Vec<u8>,
    /// Bytes of data that follow.
    pub size: u64,
    /// Permissions, owner and time.
    pub attr: Attr,
    /// Device number in Linux's 32-bit encoding.
    pub device: u32,
    /// Extended attributes by full key.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What no form of header can say.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TarError {
    /// A `=` ends the key of a record.
    #[error("the name of its extended attribute {0} contains `=`")]
    AttributeName(String),
}

impl Entry {
    /// A marker: a file without content that belongs to root.
    #[must_use]
    pub fn empty_file(path: Vec<u8>) -> Self {
        Self {
            path,
            kind: Kind::File,
            link: Vec::new(),
            size: 0,
            attr: Attr {
                permissions: 0o644,
                ..Attr::default()
            },
            device: 0,
            xattrs: Vec::new(),
        }
    }

    /// All headers of the member: whole blocks, to be followed by the data.
    ///
    /// # Errors
    /// [`TarError`].
    pub fn header(&self) -> Result<Vec<u8>, TarError> {
        let records = self.records()?;
        let mut out = Vec::with_capacity(BLOCK);
        if !records.is_empty() {
            let name = [b"PaxHeaders/", base_name(&self.path)].concat();
            let mut block = Block::new(&name, b'x');
            block.octal(100, 8, 0o644);
            block.octal(124, 12, u64::try_from(records.len()).unwrap_or(MAX_LONG));
            out.extend_from_slice(&block.finish());
            out.extend_from_slice(&records);
            out.resize(out.len().next_multiple_of(BLOCK), 0);
        }
        out.extend_from_slice(&self.block());
        Ok(out)
    }

    /// The old header. Numbers that do not fit are 0; a record has them.
    fn block(&self) -> [u8; BLOCK] {
        let fit = |number: u64, max: u64| if number > max { 0 } else { number };
        let attr = &self.attr;
        let mut block = Block::new(&self.path, self.kind.flag());
        block.octal(100, 8, attr.permissions.into());
        block.octal(108, 8, fit(attr.uid.into(), MAX_ID.into()));
        block.octal(116, 8, fit(attr.gid.into(), MAX_ID.into()));
        block.octal(124, 12, fit(self.size, MAX_LONG));
        let seconds = u64::try_from(attr.mtime).unwrap_or_default();
        block.octal(136, 12, fit(seconds, MAX_LONG));
        block.text(157, 100, &self.link);
        if matches!(self.kind, Kind::CharDevice | Kind::BlockDevice) {
            let (major, minor) = device_numbers(self.device);
            block.octal(329, 8, major.into());
            block.octal(337, 8, minor.into());
        }
        block.finish()
    }

    /// What the old header cannot say.
    fn records(&self) -> Result<Vec<u8>, TarError> {
        let mut records = Records::default();
        let long = |text: &[u8]| text.len() > 100;
        let foreign = |text: &[u8]| long(text) && std::str::from_utf8(text).is_err();
        if foreign(&self.path) || foreign(&self.link) {
            // Names are bytes, not UTF-8 as records are otherwise.
            records.add(b"hdrcharset", b"BINARY");
        }
        if long(&self.path) {
            records.add(b"path", &self.path);
        }
        if long(&self.link) {
            records.add(b"linkpath", &self.link);
        }
        let attr = &self.attr;
        for (key, id) in [(b"uid", attr.uid), (b"gid", attr.gid)] {
            if id > MAX_ID {
                records.add(key, id.to_string().as_bytes());
            }
        }
        if self.size > MAX_LONG {
            records.add(b"size", self.size.to_string().as_bytes());
        }
        let plain = u64::try_from(attr.mtime).is_ok_and(|seconds| seconds <= MAX_LONG);
        if !plain || attr.mtime_nsec != 0 {
            records.add(b"mtime", decimal(attr.mtime, attr.mtime_nsec).as_bytes());
        }
        for (key, value) in &self.xattrs {
            if key.contains(&b'=') {
                return Err(TarError::AttributeName(key.escape_ascii().to_string()));
            }
            records.add(&[b"SCHILY.xattr.", key.as_slice()].concat(), value);
        }
        Ok(records.0)
    }
}

/// The last component, at most 80 bytes of it.
fn base_name(path: &[u8]) -> &[u8] {
    let trimmed = path.strip_suffix(b"/").unwrap_or(path);
    let name = trimmed.rsplit(|byte| *byte == b'/').next().unwrap_or(&[]);
    &name[..name.len().min(80)]
}

/// Seconds as a decimal number without zeros at the end.
///
/// The nanoseconds count forward also before 1970: -1 s and 999999999 ns is
/// -0.000000001.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    let total = total.unsigned_abs();
    let (whole, rest) = (total / 1_000_000_000, total % 1_000_000_000);
    if rest == 0 {
        return format!("{sign}{whole}");
    }
    let rest = format!("{rest:09}");
    format!("{sign}{whole}.{}", rest.trim_end_matches('0'))
}

/// Major and minor number from Linux's 32-bit encoding.
fn device_numbers(device: u32) -> (u32, u32) {
    let major = device >> 8 & 0xfff;
    let minor = device & 0xff | device >> 12 & 0xf_ff00;
    (major, minor)
}

/// The content of an extended header.
#[derive(Default)]
struct Records(Vec<u8>);

impl Records {
    /// Adds `<length> <key>=<value>\n`, where the length counts itself.
    fn add(&mut self, key: &[u8], value: &[u8]) {
        let rest = key.len() + value.len() + 3;
        let mut len = rest;
        // Longer digits make the record longer: at most twice.
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        let parts = [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat();
        self.0.extend_from_slice(&parts);
    }
}

/// A header block being filled.
struct Block([u8; BLOCK]);

impl Block {
    fn new(path: &[u8], flag: u8) -> Self {
        let mut block = Self([0; BLOCK]);
        block.text(0, 100, path);
        for (at, size) in [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12)] {
            block.octal(at, size, 0);
        }
        block.0[156] = flag;
        block.text(257, 8, b"ustar\x0000");
        block
    }

    /// As much of `text` as fits.
    fn text(&mut self, at: usize, size: usize, text: &[u8]) {
        let len = text.len().min(size);
        self.0[at..at + len].copy_from_slice(&text[..len]);
    }

    /// An octal number with leading zeros, ended by a NUL; it fits.
    fn octal(&mut self, at: usize, size: usize, number: u64) {
        let digits = format!("{number:0width$o}", width = size - 1);
        self.text(at, size - 1, digits.as_bytes());
    }

    fn finish(mut self) -> [u8; BLOCK] {
        self.text(148, 8, b"        ");
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.text(148, 8, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_decimal_numbers() {
        assert_eq!(decimal(0, 0), "0");
        assert_eq!(decimal(-1, 999_999_999), "-0.000000001");
        assert_eq!(decimal(-2, 0), "-2");
        assert_eq!(decimal(-2, 250_000_000), "-1.75");
        assert_eq!(decimal(12, 500), "12.0000005");
        assert_eq!(decimal(i64::MIN, 0), "-9223372036854775808");
    }

    #[test]
    fn records_count_their_own_length() {
        for len in [
            0, 1, 80, 85, 86, 87, 88, 89, 90, 970, 980, 990, 999, 100_000,
        ] {
            let mut records = Records::default();
            records.add(b"key", &vec![b'v'; len]);
            let text = String::from_utf8(records.0.clone()).unwrap();
            let (number, _) = text.split_once(' ').unwrap();
            assert_eq!(number.parse::<usize>().unwrap(), records.0.len());
        }
    }

    #[test]
    fn device_numbers_are_taken_apart() {
        for (major, minor) in [(1, 3), (259, 70_000), (4095, 0xf_ffff), (0, 0)] {
            let device = nix::sys::stat::makedev(major, minor);
            let (a, b) = device_numbers(u32::try_from(device).unwrap());
            assert_eq!((u64::from(a), u64::from(b)), (major, minor));
        }
    }

    #[test]
    fn ordinary_files_need_one_block_and_others_say_what_is_special() {
        let mut entry = Entry::empty_file(b"dir/file".to_vec());
        assert_eq!(entry.header().unwrap().len(), BLOCK);
        entry.xattrs.push((b"user.a=b".to_vec(), Vec::new()));
        assert!(matches!(entry.header(), Err(TarError::AttributeName(_))));
        entry.xattrs = vec![(b"user.a".to_vec(), b"1\n\0".to_vec())];
        entry.size = MAX_LONG + 1;
        entry.attr.uid = MAX_ID + 1;
        let header = entry.header().unwrap();
        for record in [
            &b"SCHILY.xattr.user.a=1\n\0\n"[..],
            b"size=8589934592\n",
            b"uid=2097152\n",
        ] {
            assert!(header.windows(record.len()).any(|window| window == record));
        }
    }

    #[test]
    fn another_reader_understands_it() {
        let mut entry = Entry::empty_file([b"d/".repeat(80), b"name".to_vec()].concat());
        entry.attr = Attr {
            permissions: 0o4751,
            uid: 70_000,
            gid: 4_000_000_000,
            mtime: 1_700_000_000,
            mtime_nsec: 5,
        };
        entry.size = 3;
        let mut bytes = entry.header().unwrap();
        bytes.extend_from_slice(b"abc");
        bytes.resize(bytes.len() + padding(3) + END, 0);
        let mut archive = ::tar::Archive::new(&bytes[..]);
        let member = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(&*member.path_bytes(), entry.path.as_slice());
        assert_eq!(member.size(), 3);
        let header = member.header();
        assert_eq!(header.mode().unwrap(), 0o4751);
        assert_eq!(header.uid().unwrap(), 70_000);
        assert_eq!(header.mtime().unwrap(), 1_700_000_000);
    }
}
