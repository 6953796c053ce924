use proptest::prelude::*;

use super::*;

/// The last byte is partial.
const CHUNKS: u32 = 77;

fn index(i: usize) -> ChunkIndex {
    ChunkIndex::new(u32::try_from(i).unwrap())
}

#[derive(Clone, Debug)]
enum Op {
    Mark(usize),
    /// Check a suspect: found good or bad.
    Check(usize, bool),
    /// Close the map and open it again, as after a restart of the process.
    Reopen,
    /// The same in another boot of the machine.
    Reboot,
    /// Everything that the map speaks of reaches the disk.
    Sync,
    /// Another data file takes the place of the one that the map speaks of.
    DataFileReplaced,
    /// Another process opens the map while this one has it, and marks a chunk.
    MarkElsewhere(usize),
    DataFileLost,
}

fn op() -> impl Strategy<Value = Op> {
    let chunk = 0..usize::try_from(CHUNKS).unwrap();
    prop_oneof![
        8 => chunk.clone().prop_map(Op::Mark),
        4 => (chunk.clone(), any::<bool>()).prop_map(|(i, good)| Op::Check(i, good)),
        2 => chunk.prop_map(Op::MarkElsewhere),
        2 => Just(Op::Reopen),
        1 => Just(Op::Reboot),
        1 => Just(Op::Sync),
        1 => Just(Op::DataFileReplaced),
        1 => Just(Op::DataFileLost),
    ]
}

/// Opens a map as [`cache`](crate::cache) does.
fn open(path: &Path, chunks: u32, data: DataFileId, boot: &BootId) -> ReadyMap {
    let found = ReadyMap::find(path, chunks, data, boot).unwrap();
    found.open(&path.with_extension("suspects")).unwrap()
}

fn data(number: u8) -> DataFileId {
    DataFileId([number; 16])
}

/// Without a map; what the cache does when the data file is new.
fn fresh(path: &Path, chunks: u32, boot: &BootId) -> ReadyMap {
    let _ = fs::remove_file(path);
    open(path, chunks, data(1), boot)
}

proptest! {
    /// The map agrees with two plain arrays, across restarts of process and machine.
    #[test]
    fn agrees_with_arrays_of_bool(ops in prop::collection::vec(op(), 0..60)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let mut boot = BootId::invented(1);
        let mut run = 1;
        let mut file = 1;
        let mut map = fresh(&path, CHUNKS, &boot);
        let mut ready = [false; CHUNKS as usize];
        let mut suspect = [false; CHUNKS as usize];
        let mut synced = None;
        for op in ops {
            match op {
                Op::Mark(i) => {
                    prop_assert_eq!(map.mark(index(i)), !ready[i]);
                    ready[i] = true;
                }
                Op::Check(i, good) => if map.is_suspect(index(i)) {
                    map.clear_suspect(index(i));
                    suspect[i] = false;
                    if good {
                        map.mark(index(i));
                        ready[i] = true;
                    }
                },
                Op::MarkElsewhere(i) => {
                    let other = open(&path, CHUNKS, data(file), &boot);
                    other.mark(index(i));
                    ready[i] = true;
                }
                Op::Reopen => {
                    drop(map);
                    map = open(&path, CHUNKS, data(file), &boot);
                }
                Op::Sync => {
                    map.synced(|| Ok(())).unwrap();
                    synced = Some(ready);
                }
                Op::Reboot | Op::DataFileReplaced => {
                    drop(map);
                    if matches!(op, Op::DataFileReplaced) {
                        file += 1;
                        synced = None;
                    } else {
                        run += 1;
                        boot = BootId::invented(run);
                    }
                    map = open(&path, CHUNKS, data(file), &boot);
                    if synced != Some(ready) {
                        suspect.iter_mut().zip(ready).for_each(|(s, r)| *s |= r);
                        ready = [false; CHUNKS as usize];
                        synced = None;
                    }
                }
                Op::DataFileLost => {
                    drop(map);
                    map = fresh(&path, CHUNKS, &boot);
                    file = 1;
                    ready = [false; CHUNKS as usize];
                    suspect = ready;
                    synced = None;
                }
            }
            for i in 0..ready.len() {
                prop_assert_eq!(map.is_ready(index(i)), ready[i], "chunk {}", i);
                prop_assert_eq!(map.is_suspect(index(i)), suspect[i], "suspect {}", i);
            }
            let count = ready.iter().filter(|r| **r).count();
            prop_assert_eq!(map.count(), u32::try_from(count).unwrap());
            prop_assert_eq!(map.all_ready(), count == ready.len());
        }
    }
}

#[test]
fn the_file_is_what_other_tools_expect() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map");
    let map = fresh(&path, 9, &BootId::invented(1));
    map.mark(ChunkIndex::new(1));
    map.mark(ChunkIndex::new(8));
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 4096 + 2);
    assert_eq!(bytes[..12], *b"PAMB\x01\0\0\0PAMC");
    assert_eq!(bytes[12..16], [0; 4]);
    assert_eq!(bytes[4096..], [0b0100_0000, 0b1000_0000]);
    for i in 0..9 {
        map.mark(ChunkIndex::new(i));
    }
    assert!(map.all_ready());
    assert!(!map.mark(ChunkIndex::new(9)) && !map.is_ready(ChunkIndex::new(9)));
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[12..16], *b"PAMM");
    assert_eq!(bytes[4096..], [0xff, 0x80]);
}

#[test]
fn a_torn_or_foreign_map_counts_as_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map");
    let boot = BootId::invented(1);
    let good = {
        let map = fresh(&path, 20, &boot);
        (0..20).for_each(|i| {
            map.mark(ChunkIndex::new(i));
        });
        fs::read(&path).unwrap()
    };
    let damaged = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let cases = [
        good[..4098].to_vec(),
        [good.clone(), vec![0]].concat(),
        vec![],
        damaged(0),
        damaged(4),
        damaged(9),
    ];
    for bytes in cases {
        fs::write(&path, bytes).unwrap();
        let map = open(&path, 20, data(1), &boot);
        assert_eq!(map.count(), 0);
        assert!(!map.is_suspect(ChunkIndex::new(0)));
    }
    // A map of another tool says nothing about the boot: each chunk is checked once.
    let mut foreign = good.clone();
    foreign[16..4096].fill(0);
    fs::write(&path, foreign).unwrap();
    let map = open(&path, 20, data(1), &boot);
    assert_eq!(map.count(), 0);
    assert!(map.is_suspect(ChunkIndex::new(19)));
    // Another process knows what is still to be checked, too.
    map.clear_suspect(ChunkIndex::new(3));
    let map = open(&path, 20, data(1), &boot);
    assert!(map.count() == 0 && map.is_suspect(ChunkIndex::new(19)));
    assert!(!map.is_suspect(ChunkIndex::new(3)));
}

#[test]
fn a_reset_never_empties_the_map_of_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map");
    let boot = BootId::invented(1);
    let old = fresh(&path, 8, &boot);
    old.mark(ChunkIndex::new(3));
    let new = open(&path, 8, data(2), &boot);
    assert!(old.is_ready(ChunkIndex::new(3)));
    // Nor do marks for the old data file reach the new map.
    old.mark(ChunkIndex::new(4));
    assert_eq!(new.count(), 0);
}

#[test]
fn threads_lose_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let map = fresh(&dir.path().join("map"), 4000, &BootId::invented(1));
    let news: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4_u32)
            .map(|thread| {
                let map = &map;
                scope.spawn(move || {
                    (0..4000)
                        .filter(|i| (i + thread) % 3 != 0 && map.mark(ChunkIndex::new(*i)))
                        .count()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!(news, 4000);
    assert!(map.all_ready());
}

#[test]
fn the_boot_id_of_this_machine_can_be_read() {
    assert_ne!(BootId::current().unwrap(), BootId::unknown());
    assert!(BootId::parse("12345").is_none());
    assert!(BootId::parse("704a03d7-91f1-47f2-a696-059d033edb4x").is_none());
}
