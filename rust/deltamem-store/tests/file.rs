//! What holds for the one file of an embedded store: who may open it, what deletion leaves in it, what a key hides, and that many
//! sessions share an fsync.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod suite;

use std::path::Path;
use std::sync::Arc;

use deltamem_store::backend::redb::{RedbBackend, RedbOptions};
use deltamem_store::backend::{Batch, Group, HeadChange, Key, Kind};
use deltamem_store::{Error, GcOptions, NewCommit, Options, Store, StoreKey};
use suite::disk::Disk;
use suite::memories::{commit, open_file as open, sealed, snapshot};

/// Whether these bytes stand in the store's file or its journal.
fn holds(path: &Path, needle: &[u8]) -> bool {
    let journal = std::fs::read(path.with_extension("journal")).unwrap_or_default();
    let files = [std::fs::read(path).unwrap(), journal];
    let mut windows = files.iter().flat_map(|bytes| bytes.windows(needle.len()));
    windows.any(|window| window == needle)
}

/// A commit whose every part can be found in a file.
fn telling(store: &Store, name: &str, n: u64) {
    let head = store.head(name, "main").unwrap();
    let snapshot = snapshot(n);
    let new = NewCommit {
        branch: "main",
        expected: head,
        merged: None,
        snapshot: &snapshot,
        parts: None,
        message: &format!("the secret of {name} {n}"),
        meta: Some("{\"phone\":\"0171-555\"}"),
    };
    store.commit(name, &new).unwrap();
    store.tag(name, &format!("tag-of-{name}-{n}"), "HEAD").unwrap();
}

/// The numbers of a state, as they stand in a file.
fn numbers(n: u64) -> Vec<u8> {
    let bytes = snapshot(n).to_bytes();
    bytes[bytes.len() - 100..].to_vec()
}

#[test]
fn a_deleted_memory_leaves_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let store = open(&path, Options::default()).unwrap();
    for n in 0..60 {
        telling(&store, "alice", n);
        telling(&store, "bob", 1_000 + n);
    }
    store.fork("alice", "carol", Some("HEAD~50")).unwrap();
    let of_alice = |n: u64| {
        [
            b"the secret of alice ".to_vec(),
            numbers(n),
            b"tag-of-alice-".to_vec(),
            b"alice".to_vec(),
        ]
    };
    for needle in of_alice(30) {
        assert!(holds(&path, &needle), "{}", String::from_utf8_lossy(&needle));
    }
    store.delete("alice").unwrap();
    store.delete("carol").unwrap();
    let done = store.gc(&GcOptions::default()).unwrap().compacted.unwrap();
    assert!(done.after < done.before, "{done:?}");
    for n in 0..60 {
        for needle in of_alice(n) {
            assert!(
                !holds(&path, &needle),
                "{n}: {}",
                String::from_utf8_lossy(&needle)
            );
        }
        assert!(holds(&path, &numbers(1_000 + n)));
    }
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        1,
        "nothing lies beside it"
    );
    telling(&store, "bob", 7);
    assert_eq!(store.verify().unwrap().damages, []);
    drop(store);
    let store = open(&path, Options::default()).unwrap();
    assert_eq!(store.log("bob", &["HEAD"], 1000).unwrap().len(), 61);
    assert_eq!(store.names("").unwrap(), ["bob"]);
}

#[test]
fn what_a_rollback_left_goes_with_the_reflog() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let store = open(&path, Options::default()).unwrap();
    commit(&store, "m", 1);
    commit(&store, "m", 2);
    store.rollback("m", "main", "HEAD~1", None).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert!(holds(&path, &numbers(2)), "the rollback can still be undone");
    store
        .gc(&GcOptions {
            reflog_ms: 0,
            compact: true,
        })
        .unwrap();
    assert!(!holds(&path, &numbers(2)));
    assert!(holds(&path, &numbers(1)));
}

#[test]
fn a_key_hides_names_words_and_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let store = open(&path, sealed()).unwrap();
    for n in 0..20 {
        telling(&store, "alice", n);
    }
    let id = store.resolve("alice", "HEAD").unwrap();
    let needles = [
        b"alice".to_vec(),
        b"secret".to_vec(),
        b"0171-555".to_vec(),
        b"main".to_vec(),
        b"deltamem-snapshot".to_vec(),
        id.0.to_vec(),
        numbers(3),
    ];
    for needle in &needles {
        assert!(!holds(&path, needle), "{}", String::from_utf8_lossy(needle));
    }
    drop(store);
    let wrong = Options {
        key: Some(StoreKey::new([43; 32])),
        ..Options::default()
    };
    let error = open(&path, wrong).unwrap_err();
    assert!(
        matches!(error, Error::Key { .. }) && error.to_string().contains("not the one"),
        "{error}"
    );
    let error = open(&path, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Key { .. }), "{error}");
    let store = open(&path, sealed()).unwrap();
    assert_eq!(store.resolve("alice", "HEAD").unwrap(), id);
    // The same bytes without a key do show: the search itself works.
    let plain = directory.path().join("plain");
    let other = open(&plain, Options::default()).unwrap();
    telling(&other, "alice", 3);
    for needle in needles.iter().filter(|needle| **needle != id.0.to_vec()) {
        assert!(holds(&plain, needle), "{}", String::from_utf8_lossy(needle));
    }
}

type Values = Vec<(Key, Vec<u8>)>;

/// Every value of the only memory, as the backend has it.
fn sealed_values(store: &Store) -> (Group, Vec<u8>, Values) {
    let (group, head) = store.backend().groups(None, 10).unwrap().items.remove(0);
    let values = Kind::ALL
        .iter()
        .flat_map(|kind| store.backend().list(group, *kind, None, 1000).unwrap().items)
        .collect();
    (group, head, values)
}

#[test]
fn a_deleted_memorys_key_is_gone_even_for_a_copy_of_its_values() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let store = open(&path, sealed()).unwrap();
    telling(&store, "alice", 1);
    let (group, head, values) = sealed_values(&store);
    let wrapped = head[1..73].to_vec();
    for needle in values.iter().map(|(_, value)| value).chain([&head, &wrapped]) {
        assert!(holds(&path, needle));
    }
    store.delete("alice").unwrap();
    store.gc(&GcOptions::default()).unwrap();
    for needle in values.iter().map(|(_, value)| value).chain([&head, &wrapped]) {
        assert!(!holds(&path, needle));
    }
    // A new memory of the name has a key of its own. Somebody who kept the old values and puts them back gets nothing out of them.
    telling(&store, "alice", 1);
    let (same, new_head, new_values) = sealed_values(&store);
    assert_eq!(same, group);
    let batch = Batch {
        group,
        expected: Some(new_head),
        clear: false,
        head: HeadChange::Keep,
        deletes: Vec::new(),
        puts: values
            .iter()
            .filter(|(key, _)| new_values.iter().all(|(new, _)| new != key))
            .cloned()
            .collect(),
    };
    let planted = batch.puts.len();
    assert!(planted >= 2, "commit and state have other keys");
    store.backend().apply(batch).unwrap();
    assert_eq!(store.verify().unwrap().damages.len(), planted);
    assert_eq!(store.checkout("alice", "HEAD").unwrap().1, snapshot(1));
}

#[test]
fn one_process_writes_and_a_second_one_hears_why_it_may_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let first = open(&path, Options::default()).unwrap();
    commit(&first, "m", 1);
    // A lock belongs to an open file, so a second opening in this process meets what another process would.
    let error = open(&path, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    let error = RedbBackend::open_read_only(&path, RedbOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    first.gc(&GcOptions::default()).unwrap();
    assert!(
        matches!(open(&path, Options::default()), Err(Error::Locked { .. })),
        "the rewritten file is locked too"
    );
    first.close().unwrap();
    first.close().unwrap();
    assert!(matches!(first.names(""), Err(Error::Unavailable { .. })));
    let second = open(&path, Options::default()).unwrap();
    assert_eq!(second.names("").unwrap(), ["m"]);
    drop(second);
    let reader = || {
        Store::open(
            Arc::new(RedbBackend::open_read_only(&path, RedbOptions::default()).unwrap()),
            Options::default(),
        )
    };
    let (one, two) = (reader().unwrap(), reader().unwrap());
    assert_eq!(one.checkout("m", "HEAD").unwrap().1, snapshot(1));
    assert_eq!(two.verify().unwrap().damages, []);
    assert!(matches!(one.delete("m"), Err(Error::ReadOnly { .. })));
    assert!(matches!(
        open(&path, Options::default()),
        Err(Error::Locked { .. })
    ));
    let missing = RedbBackend::open_read_only(&directory.path().join("none"), RedbOptions::default());
    assert!(matches!(missing, Err(Error::NotFound { .. })));
}

#[test]
fn a_shared_file_is_read_beside_its_writer_and_follows_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let options = RedbOptions {
        shared: true,
        ..RedbOptions::default()
    };
    let writer = Store::open(
        Arc::new(RedbBackend::open(&path, options).unwrap()),
        Options::default(),
    )
    .unwrap();
    commit(&writer, "m", 1);
    let reader = Store::open(
        Arc::new(RedbBackend::open_read_only(&path, options).unwrap()),
        Options::default(),
    )
    .unwrap();
    for n in 2..20 {
        commit(&writer, "m", n);
        assert_eq!(reader.checkout("m", "HEAD").unwrap().1, snapshot(n));
        if n % 5 == 0 {
            writer.gc(&GcOptions::default()).unwrap();
        }
    }
    assert!(matches!(
        RedbBackend::open(&path, options),
        Err(Error::Locked { .. })
    ));
    assert!(matches!(reader.delete("m"), Err(Error::ReadOnly { .. })));
}

#[test]
fn many_sessions_share_an_fsync_and_readers_do_not_wait() {
    let disk = Disk::new();
    let backend = RedbBackend::open_media(Box::new(disk.clone()), RedbOptions::default()).unwrap();
    let store = Store::open(Arc::new(backend), Options::default()).unwrap();
    commit(&store, "alone", 0);
    let (_, _, before) = disk.counts();
    for n in 1..=20 {
        commit(&store, "alone", n);
    }
    let (_, _, between) = disk.counts();
    let alone = (between - before) as f64 / 20.0;
    disk.slow(std::time::Duration::from_millis(4));
    std::thread::scope(|scope| {
        for session in 0..16 {
            let store = &store;
            scope.spawn(move || {
                for n in 0..20 {
                    commit(store, &format!("session {session}"), n);
                }
            });
        }
        let began = std::time::Instant::now();
        for _ in 0..50 {
            assert_eq!(store.checkout("alone", "HEAD").unwrap().1, snapshot(20));
        }
        let waited = began.elapsed();
        assert!(
            waited < std::time::Duration::from_millis(150),
            "50 reads took {waited:?} beside syncs of 4 ms each"
        );
    });
    let (_, _, after) = disk.counts();
    let together = (after - between) as f64 / 320.0;
    println!("{alone:.2} fsyncs for a commit alone, {together:.2} with 16 sessions");
    assert!(alone < 1.5, "{alone} fsyncs for one commit");
    assert!(
        together * 5.0 < alone,
        "{together} fsyncs a commit with 16 sessions, {alone} alone"
    );
}
