//! What every backend must do, as one suite. `backends!` makes a module of tests out of a function that opens an empty backend.

#![allow(dead_code)] // each test file uses the part that it needs
#![allow(clippy::panic, clippy::expect_used, clippy::cast_possible_truncation)]

pub mod disk;
pub mod memories;
pub mod workload;

use deltamem_store::backend::{Applied, Backend, Batch, Cursor, Group, HeadChange, Key, Kind, Page};

pub fn group(n: u8) -> Group {
    Group([n; 32])
}

pub fn key(kind: Kind, n: u8) -> Key {
    let mut id = [0; 32];
    id[31] = n;
    Key { kind, id }
}

/// A batch that only moves the head.
pub fn moving(n: u8, expected: Option<&str>, head: &str) -> Batch {
    Batch {
        group: group(n),
        expected: expected.map(|head| head.as_bytes().to_vec()),
        clear: false,
        head: HeadChange::Put(head.as_bytes().to_vec()),
        deletes: Vec::new(),
        puts: Vec::new(),
    }
}

fn refused(found: Option<&str>) -> Applied {
    Applied::Refused {
        found: found.map(|head| head.as_bytes().to_vec()),
    }
}

fn head(backend: &dyn Backend, n: u8) -> Option<String> {
    backend
        .read(group(n), &[])
        .unwrap()
        .head
        .map(|head| String::from_utf8(head).unwrap())
}

/// Every item of a listing, once, in order.
pub fn everything<T: Ord>(mut page: impl FnMut(Option<&Cursor>) -> Page<T>) -> Vec<T> {
    let mut items = Vec::new();
    let mut from = None;
    for _ in 0..100_000 {
        let found = page(from.as_ref());
        items.extend(found.items);
        from = found.next;
        if from.is_none() {
            items.sort_unstable();
            items.dedup();
            return items;
        }
    }
    panic!("a listing that never ends");
}

pub fn a_head_moves_only_from_the_expected_one(backend: &dyn Backend) {
    assert_eq!(head(backend, 1), None);
    assert_eq!(backend.apply(moving(1, Some("x"), "a")).unwrap(), refused(None));
    assert_eq!(backend.apply(moving(1, None, "a")).unwrap(), Applied::Done);
    assert_eq!(backend.apply(moving(1, None, "b")).unwrap(), refused(Some("a")));
    assert_eq!(
        backend.apply(moving(1, Some("b"), "c")).unwrap(),
        refused(Some("a"))
    );
    assert_eq!(backend.apply(moving(1, Some("a"), "b")).unwrap(), Applied::Done);
    assert_eq!(head(backend, 1).as_deref(), Some("b"));
    assert_eq!(head(backend, 2), None);
}

pub fn a_batch_is_made_whole_or_not_at_all(backend: &dyn Backend) {
    let (one, two, three) = (key(Kind::Commit, 1), key(Kind::State, 1), key(Kind::Log, 1));
    let mut batch = moving(1, None, "a");
    batch.puts = vec![
        (one, b"one".to_vec()),
        (two, Vec::new()),
        (three, vec![0; 100_000]),
    ];
    assert_eq!(backend.apply(batch).unwrap(), Applied::Done);
    let mut late = moving(1, None, "b");
    late.puts = vec![(one, b"late".to_vec())];
    late.deletes = vec![two];
    assert_eq!(backend.apply(late).unwrap(), refused(Some("a")));
    let read = backend
        .read(group(1), &[three, two, one, key(Kind::Commit, 2)])
        .unwrap();
    assert_eq!(read.head, Some(b"a".to_vec()));
    assert_eq!(
        read.values,
        [
            Some(vec![0; 100_000]),
            Some(Vec::new()),
            Some(b"one".to_vec()),
            None
        ]
    );
    let mut next = moving(1, Some("a"), "b");
    next.deletes = vec![two, key(Kind::State, 9)];
    next.puts = vec![(one, b"two".to_vec())];
    next.head = HeadChange::Keep;
    assert_eq!(backend.apply(next).unwrap(), Applied::Done);
    let read = backend.read(group(1), &[one, two]).unwrap();
    assert_eq!(read.head, Some(b"a".to_vec()));
    assert_eq!(read.values, [Some(b"two".to_vec()), None]);
}

pub fn a_removed_group_leaves_nothing(backend: &dyn Backend) {
    for n in [1, 2] {
        let mut batch = moving(n, None, "a");
        batch.puts = Kind::ALL.map(|kind| (key(kind, 1), vec![n; 10])).to_vec();
        assert_eq!(backend.apply(batch).unwrap(), Applied::Done);
    }
    let mut removal = moving(1, Some("wrong"), "");
    removal.head = HeadChange::Remove;
    assert_eq!(backend.apply(removal.clone()).unwrap(), refused(Some("a")));
    removal.expected = Some(b"a".to_vec());
    assert_eq!(backend.apply(removal).unwrap(), Applied::Done);
    let keys = Kind::ALL.map(|kind| key(kind, 1));
    let gone = backend.read(group(1), &keys).unwrap();
    assert_eq!((gone.head, gone.values), (None, vec![None; 3]));
    assert_eq!(
        backend.read(group(2), &keys).unwrap().values,
        vec![Some(vec![2; 10]); 3]
    );
    for kind in Kind::ALL {
        assert!(everything(|from| backend.list(group(1), kind, from, 10).unwrap()).is_empty());
    }
    assert_eq!(
        everything(|from| backend.groups(from, 10).unwrap()),
        [(group(2), b"a".to_vec())]
    );
}

pub fn clearing_leaves_only_what_the_batch_writes(backend: &dyn Backend) {
    let mut batch = moving(1, None, "a");
    batch.puts = (0..20).map(|n| (key(Kind::Commit, n), vec![n])).collect();
    backend.apply(batch).unwrap();
    let mut again = moving(1, Some("a"), "b");
    again.clear = true;
    again.puts = vec![(key(Kind::Commit, 3), vec![33])];
    assert_eq!(backend.apply(again).unwrap(), Applied::Done);
    assert_eq!(
        everything(|from| backend.list(group(1), Kind::Commit, from, 3).unwrap()),
        [(key(Kind::Commit, 3), vec![33])]
    );
    assert_eq!(head(backend, 1).as_deref(), Some("b"));
}

pub fn listings_are_complete_whatever_the_page(backend: &dyn Backend) {
    let mut store = moving(0, None, "header");
    store.group = Group::STORE;
    backend.apply(store).unwrap();
    for n in 1..=40 {
        let mut batch = moving(n, None, &format!("head {n}"));
        batch.puts = (0..n)
            .flat_map(|i| Kind::ALL.map(|kind| (key(kind, i), vec![n, i, kind as u8])))
            .collect();
        backend.apply(batch).unwrap();
    }
    for limit in [1, 7, 39, 40, 41, 1000] {
        let groups = everything(|from| backend.groups(from, limit).unwrap());
        let expected: Vec<_> = (1..=40)
            .map(|n| (group(n), format!("head {n}").into_bytes()))
            .collect();
        assert_eq!(groups, expected, "pages of {limit}");
        for kind in Kind::ALL {
            let values = everything(|from| backend.list(group(39), kind, from, limit).unwrap());
            let expected: Vec<_> = (0..39).map(|i| (key(kind, i), vec![39, i, kind as u8])).collect();
            assert_eq!(values, expected, "pages of {limit}");
        }
    }
    assert!(
        backend
            .list(group(99), Kind::Commit, None, 5)
            .unwrap()
            .items
            .is_empty()
    );
}

pub fn of_many_writers_one_wins_each_step(backend: &dyn Backend) {
    const WRITERS: u8 = 8;
    const STEPS: u32 = 25;
    backend.apply(moving(1, None, "0")).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                let mut seen = "0".to_owned();
                for step in 0..STEPS {
                    loop {
                        let next = (seen.parse::<u32>().unwrap() + 1).to_string();
                        let mut batch = moving(1, Some(&seen), &next);
                        let mut id = [writer; 32];
                        id[..4].copy_from_slice(&step.to_be_bytes());
                        batch.puts = vec![(Key { kind: Kind::Log, id }, next.clone().into_bytes())];
                        match backend.apply(batch).unwrap() {
                            Applied::Done => {
                                seen = next;
                                break;
                            }
                            Applied::Refused { found } => seen = String::from_utf8(found.unwrap()).unwrap(),
                        }
                    }
                }
            });
        }
    });
    let total = u32::from(WRITERS) * STEPS;
    assert_eq!(head(backend, 1), Some(total.to_string()));
    let mut numbers: Vec<u32> = everything(|from| backend.list(group(1), Kind::Log, from, 50).unwrap())
        .into_iter()
        .map(|(_, value)| String::from_utf8(value).unwrap().parse().unwrap())
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=total).collect::<Vec<_>>(), "each step was won once");
}

pub fn compaction_keeps_what_is_there(backend: &dyn Backend) {
    let values: Vec<_> = (0..50).map(|n| (key(Kind::State, n), vec![n; 5000])).collect();
    for n in [1, 2] {
        let mut batch = moving(n, None, "a");
        batch.puts.clone_from(&values);
        backend.apply(batch).unwrap();
    }
    let mut removal = moving(1, Some("a"), "");
    removal.head = HeadChange::Remove;
    backend.apply(removal).unwrap();
    let done = backend.compact().unwrap();
    assert!(done.after <= done.before, "{done:?}");
    assert_eq!(
        everything(|from| backend.list(group(2), Kind::State, from, 9).unwrap()),
        values
    );
    assert_eq!(backend.check().unwrap(), []);
    assert_eq!(backend.apply(moving(2, Some("a"), "b")).unwrap(), Applied::Done);
}

/// A module of tests for one backend: `$open` makes an empty one, with whatever must outlive it.
#[macro_export]
macro_rules! backends {
    ($name:ident, $open:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::backends!(@tests $open,
                a_head_moves_only_from_the_expected_one
                a_batch_is_made_whole_or_not_at_all
                a_removed_group_leaves_nothing
                clearing_leaves_only_what_the_batch_writes
                listings_are_complete_whatever_the_page
                of_many_writers_one_wins_each_step
                compaction_keeps_what_is_there
            );
        }
    };
    (@tests $open:expr, $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                let (backend, _kept) = $open;
                $crate::suite::$test(&*backend);
            }
        )*
    };
}
