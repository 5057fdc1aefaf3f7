//! The disk fails at every point of a random workload: no write, sync or power cut loses what was acknowledged, and what was not is there
//! whole or not at all.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod suite;

use std::sync::Arc;

use deltamem_store::backend::redb::{RedbBackend, RedbOptions};
use deltamem_store::{Error, Options, Store};
use suite::disk::{Disk, Trouble};
use suite::memories::{Hands, sealed};
use suite::workload::{Dice, Work, broke, look, model, perform, work};

fn open(disk: &Disk, options: Options) -> Result<Store, Error> {
    // A journal that is brought in every few commits; with a key none at all.
    let journal_bytes = if options.key.is_some() { 0 } else { 24 << 10 };
    let redb = RedbOptions {
        journal_bytes,
        ..RedbOptions::default()
    };
    let backend = RedbBackend::open_media(Box::new(disk.clone()), redb)?;
    Store::open(Arc::new(backend), options)
}

fn options(hands: &Hands, keyed: bool) -> Options {
    Options {
        key: if keyed { sealed().key } else { None },
        ..hands.options()
    }
}

/// A workload: what is done, and how far the clock goes on before it.
fn workload(seed: u64, steps: usize) -> Vec<(u64, Work)> {
    let mut dice = Dice(seed);
    (0..steps).map(|_| (1 + dice.roll(3), work(&mut dice))).collect()
}

/// What the disk does without any trouble, after the store was opened: operations, writes, syncs.
fn counts(steps: &[(u64, Work)], keyed: bool) -> ((u64, u64, u64), (u64, u64, u64)) {
    let (disk, hands) = (Disk::new(), Hands::at(1_000));
    let store = open(&disk, options(&hands, keyed)).unwrap();
    let before = disk.counts();
    for (pause, work) in steps {
        hands.pass(*pause);
        let _ = perform(&store, work);
    }
    (before, disk.counts())
}

/// Does the work until the trouble, and holds the store that is opened on what is left against the model before and after the step
/// that broke.
fn until_the_power_goes(steps: &[(u64, Work)], keyed: bool, cut: u64, seed: u64) {
    let (disk, hands) = (Disk::new(), Hands::at(1_000));
    disk.expect(Trouble::Power(cut));
    let plain = model(&hands);
    let mut before = look(&plain);
    let mut after = before.clone();
    if let Ok(store) = open(&disk, options(&hands, keyed)) {
        for (pause, work) in steps {
            hands.pass(*pause);
            before = look(&plain);
            let expected = perform(&plain, work).map_err(|error| error.to_string());
            after = look(&plain);
            match perform(&store, work) {
                Err(error) if broke(&error) => break,
                found => assert_eq!(found.map_err(|error| error.to_string()), expected, "{work:?}"),
            }
            before.clone_from(&after);
        }
    }
    assert!(disk.out(), "operation {cut} never came");
    let mut dice = Dice(seed ^ cut);
    // Everything that was not synced is lost, all of it is there, or some.
    let odds = [0, 4, 1 + dice.roll(3)][usize::try_from(cut % 3).unwrap()];
    let left = disk.after_power_cut(|| dice.roll(4) < odds);
    let store =
        open(&left, options(&hands, keyed)).unwrap_or_else(|error| panic!("power cut at {cut}: {error}"));
    let report = store.verify().unwrap();
    assert_eq!(report.damages, [], "power cut at {cut}");
    let found = look(&store);
    assert!(
        found == before || found == after || between(&before, &after, &found),
        "power cut at {cut}: {found:#?}\nis neither\n{before:#?}\nnor\n{after:#?}"
    );
    // Work goes on.
    hands.pass(1);
    let more = Work::Commit {
        name: 0,
        branch: 0,
        state: 5,
        stale: false,
    };
    match perform(&store, &more) {
        Ok(_) | Err(Error::Quota { .. }) => {}
        Err(error) => panic!("power cut at {cut}, afterwards: {error}"),
    }
    assert_eq!(store.verify().unwrap().damages, []);
}

/// A gc is made of one change for each memory, so a cut leaves some made and some not; each memory is as it was or as it should be.
fn between<T: PartialEq>(
    before: &std::collections::BTreeMap<String, T>,
    after: &std::collections::BTreeMap<String, T>,
    found: &std::collections::BTreeMap<String, T>,
) -> bool {
    before.keys().eq(after.keys())
        && before.keys().eq(found.keys())
        && found
            .iter()
            .all(|(name, seen)| before[name] == *seen || after[name] == *seen)
}

fn cut_the_power_everywhere(seeds: std::ops::Range<u64>, steps: usize, stride: usize) {
    for seed in seeds {
        let steps = workload(seed, steps);
        let keyed = seed % 2 == 1;
        let (_, (total, _, _)) = counts(&steps, keyed);
        for cut in (1..=total).step_by(stride) {
            until_the_power_goes(&steps, keyed, cut, seed);
        }
    }
}

#[test]
fn a_power_cut_anywhere_loses_nothing_that_was_acknowledged() {
    cut_the_power_everywhere(0..2, 24, 1);
}

#[test]
#[ignore = "long"]
fn a_power_cut_anywhere_loses_nothing_in_many_workloads() {
    cut_the_power_everywhere(2..12, 60, 1);
}

/// A write or a sync fails once, and the same store goes on: each failed step is made whole or not at all.
fn with_trouble(steps: &[(u64, Work)], keyed: bool, trouble: Trouble) -> u64 {
    let (disk, hands) = (Disk::new(), Hands::at(1_000));
    let store = open(&disk, options(&hands, keyed)).unwrap();
    disk.expect(trouble);
    let (mut plain, mut done) = (model(&hands), Vec::new());
    let mut failed = 0;
    for (pause, work) in steps {
        hands.pass(*pause);
        match perform(&store, work) {
            Err(error) if broke(&error) => {
                failed += 1;
                assert!(matches!(error, Error::Io { .. }), "{trouble:?}: {error}");
                let without = look(&plain);
                let _ = perform(&plain, work);
                let with = look(&plain);
                let seen = look(&store);
                assert!(
                    seen == without || seen == with || between(&without, &with, &seen),
                    "{trouble:?} in {work:?}: {seen:#?}\nis neither\n{without:#?}\nnor\n{with:#?}"
                );
                // Both go on from one point: the step is taken back in the model, or finished in the store.
                if seen == without && without != with {
                    plain = again(&done, &hands);
                    continue;
                }
                if seen != with {
                    let _ = perform(&store, work);
                    assert_eq!(look(&store), with, "{trouble:?} in {work:?}, again");
                }
            }
            found => {
                let expected = perform(&plain, work).map_err(|error| error.to_string());
                assert_eq!(
                    found.map_err(|error| error.to_string()),
                    expected,
                    "{trouble:?} in {work:?}"
                );
            }
        }
        done.push((hands.now(), work.clone()));
    }
    assert!(failed <= 1, "{trouble:?}: {failed} steps failed");
    assert_eq!(look(&store), look(&plain), "{trouble:?}");
    assert_eq!(store.verify().unwrap().damages, [], "{trouble:?}");
    drop(store);
    let store = open(&disk, options(&hands, keyed)).unwrap();
    assert_eq!(look(&store), look(&plain), "{trouble:?}, opened again");
    failed
}

/// A model that did only these steps, each at its time.
fn again(done: &[(u64, Work)], hands: &Hands) -> Store {
    let now = hands.now();
    let plain = model(hands);
    for (time, work) in done {
        hands.set(*time);
        let _ = perform(&plain, work);
    }
    hands.set(now);
    plain
}

fn fail_everything_once(seeds: std::ops::Range<u64>, steps: usize) {
    for seed in seeds {
        let steps = workload(seed, steps);
        let keyed = seed % 2 == 1;
        let ((_, first_write, first_sync), (_, writes, syncs)) = counts(&steps, keyed);
        let writes = (first_write + 1..=writes).map(Trouble::Write);
        let troubles: Vec<Trouble> = writes
            .chain((first_sync + 1..=syncs).map(Trouble::Sync))
            .collect();
        let failed: u64 = troubles
            .iter()
            .map(|trouble| with_trouble(&steps, keyed, *trouble))
            .sum();
        // What fails while the old file is closed after a compaction concerns nobody.
        let all = troubles.len() as u64;
        assert!(failed * 10 > all * 8, "{failed} of {all} troubles were heard of");
    }
}

#[test]
fn any_write_or_sync_may_fail_and_the_store_goes_on() {
    fail_everything_once(20..22, 20);
}

#[test]
#[ignore = "long"]
fn any_write_or_sync_may_fail_in_many_workloads() {
    fail_everything_once(22..30, 50);
}

#[test]
fn a_full_disk_refuses_what_does_not_fit_and_loses_nothing() {
    let (disk, hands) = (Disk::new(), Hands::at(1_000));
    let store = open(&disk, options(&hands, false)).unwrap();
    let plain = model(&hands);
    let mut refused = 0;
    let mut dice = Dice(5);
    for round in 0..6 {
        // A little room, then none.
        disk.room(disk.used() + 20_000);
        for _ in 0..40 {
            hands.pass(1);
            let work = Work::Commit {
                name: dice.roll(3) as u8,
                branch: 0,
                state: dice.roll(100_000),
                stale: false,
            };
            match perform(&store, &work) {
                Err(Error::Full { .. }) => {
                    refused += 1;
                    assert_eq!(look(&store), look(&plain), "round {round}");
                }
                found => {
                    let expected = perform(&plain, &work).unwrap();
                    assert_eq!(found.unwrap(), expected);
                }
            }
        }
        assert_eq!(store.verify().unwrap().damages, []);
    }
    assert!(refused > 20, "the disk was full {refused} times");
    disk.room(u64::MAX);
    hands.pass(1);
    let work = Work::Commit {
        name: 0,
        branch: 1,
        state: 1,
        stale: false,
    };
    assert_eq!(perform(&store, &work).unwrap(), perform(&plain, &work).unwrap());
    assert_eq!(look(&store), look(&plain));
}
