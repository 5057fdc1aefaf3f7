//! Random work on stores of every kind, held step by step against a plain one in memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod suite;

use std::sync::Arc;

use deltamem_store::backend::memory::MemoryBackend;
use deltamem_store::backend::redb::{RedbBackend, RedbOptions};
use deltamem_store::{Options, Store, StoreKey};
use proptest::prelude::*;
use suite::disk::Disk;
use suite::memories::{Hands, sealed};
use suite::workload::{Dice, look, model, perform, work};

fn redb(disk: &Disk, options: Options) -> Store {
    let backend = RedbBackend::open_media(Box::new(disk.clone()), RedbOptions::default()).unwrap();
    Store::open(Arc::new(backend), options).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Encrypted or not, in memory or in redb, closed and opened again or not: the same work gives the same answers, the same commits
    /// and the same history, and every store stays clean.
    #[test]
    fn every_store_does_what_the_plain_one_does(seed in any::<u64>(), steps in 10..60_usize) {
        let hands = Hands::at(1_000);
        let keyed = |key: Option<StoreKey>| Options { key, ..hands.options() };
        let plain = model(&hands);
        let (disk, sealed_disk) = (Disk::new(), Disk::new());
        let mut stores = [
            Store::open(Arc::new(MemoryBackend::new()), keyed(sealed().key)).unwrap(),
            redb(&disk, keyed(None)),
            redb(&sealed_disk, keyed(sealed().key)),
        ];
        let mut dice = Dice(seed);
        for step in 0..steps {
            hands.pass(1 + dice.roll(3));
            let work = work(&mut dice);
            let expected = perform(&plain, &work).map_err(|error| error.to_string());
            for store in &stores {
                let found = perform(store, &work).map_err(|error| error.to_string());
                prop_assert_eq!(&found, &expected, "step {}: {:?}", step, work);
            }
            if step % 16 == 5 {
                let [kept, first, second] = stores;
                drop((first, second));
                stores = [kept, redb(&disk, keyed(None)), redb(&sealed_disk, keyed(sealed().key))];
            }
        }
        let expected = look(&plain);
        for store in &stores {
            prop_assert_eq!(&look(store), &expected);
            let report = store.verify().unwrap();
            prop_assert_eq!(report.damages, vec![]);
        }
        prop_assert_eq!(plain.verify().unwrap().damages, vec![]);
    }
}
