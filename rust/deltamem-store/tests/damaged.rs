//! Files that were cut, changed or are not ours: an error that says what and where, never a panic, never a false memory; and what is
//! whole can be saved.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod suite;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use deltamem_store::backend::Backend;
use deltamem_store::backend::redb::{RedbBackend, RedbOptions, SalvageBackend};
use deltamem_store::{CommitId, Error, Options, Store};
use suite::memories::{commit, open_file as open, sealed, snapshot};
use suite::workload::Dice;

fn keyed(keyed: bool) -> Options {
    if keyed { sealed() } else { Options::default() }
}

/// A store file of some memories, and their commits with the number of each one's state.
fn example(path: &Path, with_key: bool) -> BTreeMap<String, BTreeMap<CommitId, u64>> {
    let store = open(path, keyed(with_key)).unwrap();
    let mut all = BTreeMap::new();
    for name in 0..12_u64 {
        let name = format!("memory {name}");
        let made = (0..8).map(|n| (commit(&store, &name, n).id, n)).collect();
        all.insert(name, made);
    }
    store.tag("memory 3", "t", "HEAD~2").unwrap();
    store.close().unwrap();
    all
}

/// Reads all that a store gives; what it gives must be true. Whether all was there.
fn only_truth(store: &Store, truth: &BTreeMap<String, BTreeMap<CommitId, u64>>) -> bool {
    let mut all = true;
    let Ok(names) = store.names("") else {
        return false;
    };
    all &= names.iter().eq(truth.keys());
    for name in names {
        let Some(commits) = truth.get(&name) else {
            assert!(name.starts_with("recovered-"), "{name} never was");
            continue;
        };
        for (id, n) in commits {
            match store.checkout(&name, &id.to_string()) {
                Ok((commit, state)) => {
                    assert_eq!((commit.id, state), (*id, snapshot(*n)));
                }
                Err(_) => all = false,
            }
        }
        match store.log(&name, &["HEAD"], 100) {
            Ok(log) => {
                all &= log.len() == commits.len();
                assert!(log.iter().all(|commit| commits.contains_key(&commit.id)));
            }
            Err(_) => all = false,
        }
    }
    all
}

fn said(error: &Error) {
    let named = matches!(
        error,
        Error::Damaged { .. }
            | Error::NotAStore { .. }
            | Error::Newer { .. }
            | Error::Key { .. }
            | Error::Unavailable { .. }
    );
    assert!(named, "{error:?}");
    assert!(
        error.to_string().contains("memories"),
        "it names the file: {error}"
    );
}

/// Looks at one damaged file; whether anything was amiss, and the commits that a repair saved.
fn endure(
    directory: &Path,
    bytes: &[u8],
    with_key: bool,
    truth: &BTreeMap<String, BTreeMap<CommitId, u64>>,
) -> (bool, u64) {
    let path = directory.join("memories");
    std::fs::write(&path, bytes).unwrap();
    let saved = match SalvageBackend::open(&path) {
        Ok(backend) => {
            let broken = Store::open_damaged(Arc::new(backend), keyed(with_key)).unwrap();
            let whole = Store::in_memory(Options::default()).unwrap();
            let report = broken.repair(&whole).unwrap();
            only_truth(&whole, truth);
            assert_eq!(whole.verify().unwrap().damages, []);
            report.commits
        }
        Err(error) => {
            said(&error);
            0
        }
    };
    assert_eq!(
        std::fs::read(&path).unwrap(),
        bytes,
        "a repair leaves the file as it is"
    );
    let amiss = match open(&path, keyed(with_key)) {
        Err(error) => {
            said(&error);
            true
        }
        Ok(store) => {
            // A table whose very description is altered is an error and no list of findings.
            let clean = match store.verify() {
                Ok(report) => report.damages.is_empty(),
                Err(error) => {
                    said(&error);
                    false
                }
            };
            let all = only_truth(&store, truth);
            assert!(
                all || !clean,
                "something is missing and verify says that the store is clean"
            );
            !clean
        }
    };
    (amiss, saved)
}

static PANICS: AtomicU64 = AtomicU64::new(0);

/// redb's panics are caught where it is called; here they are counted instead of printed.
fn count_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic
            .location()
            .is_some_and(|place| place.file().contains("redb-"))
        {
            PANICS.fetch_add(1, Ordering::SeqCst);
        } else {
            before(panic);
        }
    }));
}

fn flip_bits(with_key: bool, times: u64) {
    count_panics();
    let directory = tempfile::tempdir().unwrap();
    let truth = example(&directory.path().join("memories"), with_key);
    let good = std::fs::read(directory.path().join("memories")).unwrap();
    assert_eq!(endure(directory.path(), &good, with_key, &truth), (false, 96));
    let mut dice = Dice(11);
    let (mut amiss, mut saved) = (0, 0);
    for _ in 0..times {
        let mut bytes = good.clone();
        let at = usize::try_from(dice.roll(good.len() as u64)).unwrap();
        bytes[at] ^= 1 << dice.roll(8);
        let (found, commits) = endure(directory.path(), &bytes, with_key, &truth);
        amiss += u64::from(found);
        saved += commits;
    }
    println!(
        "{amiss} of {times} flipped bits were in use; a repair saved {:.2} % of the commits; redb panicked {} times",
        saved as f64 / times as f64 / 0.96,
        PANICS.load(Ordering::SeqCst)
    );
    assert!(
        amiss * 4 > times,
        "{amiss} of {times} flips were noticed, more of the file than that is in use"
    );
    assert!(saved > times * 90, "{saved} commits were saved of {}", times * 96);
}

#[test]
fn flipped_bits_never_panic_nor_lie() {
    flip_bits(false, 150);
}

#[test]
fn flipped_bits_of_an_encrypted_file_never_panic_nor_lie() {
    flip_bits(true, 150);
}

#[test]
#[ignore = "long"]
fn many_flipped_bits_never_panic_nor_lie() {
    flip_bits(false, 5_000);
}

#[test]
fn cut_files_are_refused_and_what_is_whole_is_saved() {
    count_panics();
    let directory = tempfile::tempdir().unwrap();
    let truth = example(&directory.path().join("memories"), false);
    let good = std::fs::read(directory.path().join("memories")).unwrap();
    let mut saved = Vec::new();
    for part in 1..40 {
        let end = good.len() * part / 40;
        for end in [end, end & !4095, (end & !4095) + 1] {
            let (amiss, commits) = endure(directory.path(), &good[..end], false, &truth);
            assert!(amiss || end == 0, "cut at {end} of {}", good.len());
            saved.push(commits);
        }
    }
    println!("saved of 96 commits, from short to long: {saved:?}");
    assert!(saved.iter().max() > Some(&40), "{saved:?}");
}

#[test]
fn other_files_are_named_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    for bytes in [
        &b"SQLite format 3\0 and so on"[..],
        b"x",
        &[0xFF; 10_000],
        b"redb",
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = open(&path, Options::default()).unwrap_err();
        assert!(matches!(error, Error::NotAStore { .. }), "{error:?}");
        said(&error);
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "it is left as it was");
    }
    std::fs::remove_file(&path).unwrap();
    let table: redb::TableDefinition<&str, u64> = redb::TableDefinition::new("accounts");
    let other = redb::Database::create(&path).unwrap();
    let begun = other.begin_write().unwrap();
    begun.open_table(table).unwrap().insert("a", 1).unwrap();
    begun.commit().unwrap();
    drop(other);
    let error = open(&path, Options::default()).unwrap_err();
    assert!(
        matches!(&error, Error::NotAStore { what, .. } if what.contains("accounts")),
        "{error}"
    );
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(open(&path, Options::default()).is_err());
    assert!(open(&directory.path().join("none/memories"), Options::default()).is_err());
}

#[test]
fn a_damaged_state_costs_its_commit_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let truth = example(&path, false);
    let mut bytes = std::fs::read(&path).unwrap();
    // The newest state of one memory, wherever it stands in the file.
    let wanted = snapshot(7).to_bytes();
    let places: Vec<usize> = (0..bytes.len() - wanted.len())
        .filter(|at| bytes[*at..].starts_with(&wanted[wanted.len() - 64..]))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at + 10] ^= 1;
    }
    std::fs::write(&path, &bytes).unwrap();
    let broken =
        Store::open_damaged(Arc::new(SalvageBackend::open(&path).unwrap()), Options::default()).unwrap();
    let whole = Store::in_memory(Options::default()).unwrap();
    let report = broken.repair(&whole).unwrap();
    assert_eq!((report.memories, report.commits), (12, 84));
    assert!(!report.losses.is_empty());
    for (name, commits) in &truth {
        let head = whole.show(name, "main").unwrap();
        assert_eq!(
            commits.get(&head.id),
            Some(&6),
            "the branch goes back to the last whole commit"
        );
    }
    assert_eq!(whole.verify().unwrap().damages, []);
    assert!(
        broken
            .backend()
            .apply(deltamem_store::backend::Batch {
                group: deltamem_store::backend::Group::STORE,
                expected: None,
                clear: false,
                head: deltamem_store::backend::HeadChange::Keep,
                deletes: Vec::new(),
                puts: Vec::new(),
            })
            .is_err()
    );
    let backend: &Arc<dyn Backend> = broken.backend();
    assert!(backend.compact().is_err());
}

/// A store whose process was killed: its file and its journal as they were while it was open, and the truth.
fn killed(directory: &Path) -> (PathBuf, BTreeMap<String, BTreeMap<CommitId, u64>>) {
    let (live, path) = (directory.join("live"), directory.join("memories"));
    let mut truth = example(&live, false);
    let store = open(&live, Options::default()).unwrap();
    let late = (5_000..5_020).map(|n| (commit(&store, "late", n).id, n));
    truth.insert("late".into(), late.collect());
    std::fs::copy(&live, &path).unwrap();
    std::fs::copy(live.with_extension("journal"), path.with_extension("journal")).unwrap();
    (path, truth)
}

fn saved(path: &Path) -> (Store, deltamem_store::RepairReport) {
    let broken =
        Store::open_damaged(Arc::new(SalvageBackend::open(path).unwrap()), Options::default()).unwrap();
    let whole = Store::in_memory(Options::default()).unwrap();
    let report = broken.repair(&whole).unwrap();
    assert_eq!(whole.verify().unwrap().damages, []);
    (whole, report)
}

#[test]
fn what_is_only_in_the_journal_of_a_killed_process_is_read_and_saved() {
    let directory = tempfile::tempdir().unwrap();
    let (path, truth) = killed(directory.path());
    let reader = RedbBackend::open_read_only(&path, RedbOptions::default());
    assert!(
        matches!(reader, Err(Error::Unavailable { .. })),
        "a reader repairs nothing"
    );
    let (whole, report) = saved(&path);
    assert_eq!((report.losses.as_slice(), report.commits), (&[][..], 96 + 20));
    assert_eq!(whole.checkout("late", "HEAD").unwrap().1, snapshot(5_019));
    let store = open(&path, Options::default()).unwrap();
    assert!(only_truth(&store, &truth));
    assert_eq!(store.checkout("late", "HEAD").unwrap().1, snapshot(5_019));
    assert_eq!(store.verify().unwrap().damages, []);
    store.close().unwrap();
    assert!(
        !path.with_extension("journal").exists(),
        "nothing lies beside a closed store"
    );
    assert_eq!(
        open(&path, Options::default())
            .unwrap()
            .log("late", &["HEAD"], 100)
            .unwrap()
            .len(),
        20
    );
}

#[test]
fn a_journal_that_is_missing_another_files_or_damaged_is_named_and_the_rest_is_saved() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _) = killed(directory.path());
    let journal = path.with_extension("journal");
    let good = std::fs::read(&journal).unwrap();

    std::fs::remove_file(&journal).unwrap();
    let missing = open(&path, Options::default()).unwrap_err();
    assert!(
        matches!(&missing, Error::Damaged { what, .. } if what.contains("is missing")),
        "{missing}"
    );
    let (whole, report) = saved(&path);
    assert_eq!(report.commits, 96);
    assert!(
        report.losses.iter().any(|loss| loss.what.contains("missing")),
        "{:?}",
        report.losses
    );
    assert!(whole.names("").unwrap().iter().all(|name| name != "late"));

    let others = tempfile::tempdir().unwrap();
    let (other, _) = killed(others.path());
    std::fs::copy(other.with_extension("journal"), &journal).unwrap();
    let foreign = open(&path, Options::default()).unwrap_err();
    assert!(
        matches!(&foreign, Error::Unavailable { reason, .. } if reason.contains("another file")),
        "{foreign}"
    );

    let mut dice = Dice(3);
    let (mut noticed, mut all) = (0, 0);
    for _ in 0..60 {
        let mut bad = good.clone();
        let at = usize::try_from(dice.roll(60_000)).unwrap();
        bad[at] ^= 1 << dice.roll(8);
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("memories");
        std::fs::copy(&path, &copy).unwrap();
        std::fs::write(copy.with_extension("journal"), &bad).unwrap();
        match open(&copy, Options::default()) {
            Ok(store) => {
                let commits = store.log("late", &["HEAD"], 100).unwrap().len();
                assert!(commits >= 19, "byte {at}: {commits} commits without a word");
            }
            Err(error) => {
                said(&error);
                noticed += 1;
                let (whole, report) = saved(&copy);
                assert!(!report.losses.is_empty());
                all += whole.log("late", &["HEAD"], 100).map_or(0, |log| log.len());
            }
        }
    }
    assert!(noticed > 20, "{noticed} of 60 flips were noticed");
    assert!(
        all * 10 > noticed * 20 * 4,
        "{all} commits were saved of {}",
        noticed * 20
    );
}

#[test]
fn a_reader_finds_that_a_file_was_cut_where_nothing_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let truth = example(&path, false);
    let good = std::fs::read(&path).unwrap();
    let shared = RedbOptions {
        shared: true,
        ..RedbOptions::default()
    };
    let look = || -> Result<_, Error> {
        let backend = RedbBackend::open_read_only(&path, shared)?;
        let store = Store::open(Arc::new(backend), Options::default())?;
        let report = store.verify()?;
        Ok((report.damages, only_truth(&store, &truth)))
    };
    assert_eq!(look().unwrap(), (vec![], true));
    let mut readable = 0;
    for missing in 1..60 {
        std::fs::write(&path, &good[..good.len() - missing * 4096]).unwrap();
        if let Ok((damages, all)) = look() {
            assert!(
                !damages.is_empty(),
                "{missing} pages are missing, and verify says that the store is clean"
            );
            readable += u32::from(all);
        }
    }
    assert!(readable > 0, "no cut left everything readable");
}
