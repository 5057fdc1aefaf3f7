//! What a store does, whatever its backend: each behaviour is given a function that opens an empty store. `memories!` makes a module of
//! tests out of one.

#![allow(dead_code)] // each test file uses the part that it needs

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use deltamem_core::{Fingerprint, Geometry, SamplerState, Snapshot};
use deltamem_store::backend::redb::{RedbBackend, RedbOptions};
use deltamem_store::{
    Commit, CommitId, Error, GcOptions, Limits, Model, NewCommit, Options, Parts, RefKind, Relation, Store,
    StoreKey, WhenFull,
};

pub type Open<'a> = &'a dyn Fn(Options) -> Store;

pub const MODEL: Fingerprint = Fingerprint([7; 32]);

/// A clock that only tests move.
#[derive(Clone)]
pub struct Hands(Arc<AtomicU64>);

impl Hands {
    pub fn at(ms: u64) -> Self {
        Self(Arc::new(AtomicU64::new(ms)))
    }

    pub fn pass(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }

    pub fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    pub fn set(&self, ms: u64) {
        self.0.store(ms, Ordering::SeqCst);
    }

    pub fn options(&self) -> Options {
        let hands = self.0.clone();
        Options {
            clock: Arc::new(move || hands.load(Ordering::SeqCst)),
            ..Options::default()
        }
    }
}

/// A clock that goes on by one at each look.
pub fn ticking() -> Options {
    let hands = AtomicU64::new(1_000);
    Options {
        clock: Arc::new(move || hands.fetch_add(1, Ordering::SeqCst)),
        ..Options::default()
    }
}

/// The store in the file at `path`.
pub fn open_file(path: &Path, options: Options) -> Result<Store, Error> {
    Store::open(
        Arc::new(RedbBackend::open(path, RedbOptions::default())?),
        options,
    )
}

pub fn sealed() -> Options {
    Options {
        key: Some(StoreKey::new([42; 32])),
        ..Options::default()
    }
}

/// A snapshot whose numbers come from `n`.
pub fn snapshot(n: u64) -> Snapshot {
    let geometry = Geometry::new(2, 1, 4).unwrap();
    let memory: Vec<f32> = (0..geometry.elements())
        .map(|i| (n * 1000 + i as u64) as f32)
        .collect();
    let sampler = SamplerState {
        seed: [1; 32],
        position: 0,
    };
    Snapshot::new(geometry, MODEL, memory.into(), n, 1, sampler).unwrap()
}

pub fn commit_on(
    store: &Store,
    name: &str,
    branch: &str,
    expected: Option<CommitId>,
    n: u64,
) -> Result<Commit, Error> {
    store.commit(
        name,
        &NewCommit {
            branch,
            expected,
            merged: None,
            snapshot: &snapshot(n),
            parts: None,
            message: &format!("turn {n}"),
            meta: None,
        },
    )
}

/// Commits `n` on main, on top of what is there.
pub fn commit(store: &Store, name: &str, n: u64) -> Commit {
    let head = store.head(name, "main").unwrap();
    commit_on(store, name, "main", head, n).unwrap()
}

fn clean(store: &Store) {
    let report = store.verify().unwrap();
    assert_eq!(report.damages, []);
}

fn ids(commits: &[Commit]) -> Vec<CommitId> {
    commits.iter().map(|commit| commit.id).collect()
}

pub fn a_commit_comes_back_as_it_was_made(open: Open) {
    for options in [Options::default(), sealed()] {
        let store = open(options);
        let parts = Parts {
            backbone: Fingerprint([1; 32]),
            adapter: Fingerprint([2; 32]),
            config: Fingerprint([3; 32]),
            tokenizer: Some(Fingerprint([4; 32])),
        };
        let made = store
            .commit(
                "Zoë/日本",
                &NewCommit {
                    branch: "main",
                    expected: None,
                    merged: None,
                    snapshot: &snapshot(1),
                    parts: Some(parts),
                    message: "hello",
                    meta: Some("{\"b\":1, \"a\": [true]}"),
                },
            )
            .unwrap();
        assert_eq!(made.meta, "{\"a\":[true],\"b\":1}");
        assert_eq!((made.parents.len(), made.generation, made.tokens_seen), (0, 1, 1));
        let (shown, state) = store.checkout("Zoë/日本", "HEAD").unwrap();
        assert_eq!(shown, made);
        assert_eq!(state, snapshot(1));
        assert_eq!(state.to_bytes(), snapshot(1).to_bytes());
        assert_eq!(store.names("").unwrap(), ["Zoë/日本"]);
        let model = |changed: fn(&mut Parts)| {
            let mut parts = parts;
            changed(&mut parts);
            Model {
                fingerprint: Fingerprint([9; 32]),
                parts: Some(parts),
            }
        };
        let other = model(|parts| (parts.adapter, parts.tokenizer) = (Fingerprint([0; 32]), None));
        let error = store.checkout_for("Zoë/日本", "HEAD", &other).unwrap_err();
        assert!(
            matches!(&error, Error::Fingerprint { differs, .. } if differs[..] == ["adapter", "tokenizer"]),
            "{error}"
        );
        let same = Model {
            fingerprint: MODEL,
            parts: None,
        };
        assert_eq!(
            store.checkout_for("Zoë/日本", "HEAD", &same).unwrap().1,
            snapshot(1)
        );
        clean(&store);
    }
}

pub fn of_two_workers_one_wins_and_the_other_hears_of_both_heads(open: Open) {
    let store = open(Options::default());
    let first = commit(&store, "m", 1);
    let second = commit_on(&store, "m", "main", Some(first.id), 2).unwrap();
    let error = commit_on(&store, "m", "main", Some(first.id), 3).unwrap_err();
    assert!(
        matches!(&error, Error::Conflict { expected, found, .. } if *expected == Some(first.id) && *found == Some(second.id)),
        "{error}"
    );
    assert!(
        error.to_string().contains(&first.id.to_string())
            && error.to_string().contains(&second.id.to_string())
    );
    let error = commit_on(&store, "m", "main", None, 3).unwrap_err();
    assert!(matches!(error, Error::Conflict { expected: None, .. }), "{error}");
    let error = commit_on(&store, "n", "main", Some(first.id), 3).unwrap_err();
    assert!(matches!(error, Error::Conflict { found: None, .. }), "{error}");
    assert_eq!(ids(&store.log("m", &["HEAD"], 9).unwrap()), [second.id, first.id]);
    assert_eq!(store.names("").unwrap(), ["m"]);
    clean(&store);
}

pub fn no_turn_is_lost_among_many_workers(open: Open) {
    let store = open(Options::default());
    commit(&store, "shared", 0);
    std::thread::scope(|scope| {
        for worker in 1..=6_u64 {
            let store = &store;
            scope.spawn(move || {
                for turn in 0..10 {
                    let n = worker * 100 + turn;
                    // A branch of its own never conflicts, although it is the same memory.
                    let own = format!("w{worker}");
                    let head = store.head("shared", &own).unwrap();
                    commit_on(store, "shared", &own, head, n).unwrap();
                    loop {
                        let head = store.head("shared", "main").unwrap();
                        match commit_on(store, "shared", "main", head, n) {
                            Ok(_) => break,
                            Err(Error::Conflict { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            });
        }
    });
    let log = store.log("shared", &["main"], 1000).unwrap();
    assert_eq!(log.len(), 61);
    let mut seen: Vec<u64> = log.iter().map(|commit| commit.tokens_seen).collect();
    seen.sort_unstable();
    let expected: Vec<u64> = std::iter::once(0)
        .chain((1..=6).flat_map(|w| (0..10).map(move |t| w * 100 + t)))
        .collect();
    assert_eq!(seen, expected);
    assert_eq!(store.info("shared").unwrap().usage.commits, 121);
    clean(&store);
}

pub fn refs_mean_what_they_mean_in_git(open: Open) {
    for key in [None, sealed().key] {
        let store = open(Options { key, ..ticking() });
        let made: Vec<Commit> = (0..5).map(|n| commit(&store, "m", n)).collect();
        store.branch("m", "what/if", "HEAD~2").unwrap();
        let aside = commit_on(&store, "m", "what/if", Some(made[2].id), 10).unwrap();
        store.tag("m", "v1", "main~3").unwrap();
        let merge = store
            .commit(
                "m",
                &NewCommit {
                    branch: "main",
                    expected: Some(made[4].id),
                    merged: Some(aside.id),
                    snapshot: &snapshot(11),
                    parts: None,
                    message: "",
                    meta: None,
                },
            )
            .unwrap();
        assert_eq!(merge.generation, 6);
        let resolve = |text: &str| store.resolve("m", text).unwrap();
        for (text, commit) in [
            ("HEAD", &merge),
            ("@", &merge),
            ("main", &merge),
            ("main^", &made[4]),
            ("HEAD^2", &aside),
            ("HEAD^2~1", &made[2]),
            ("~3", &made[2]),
            ("HEAD^^^", &made[2]),
            ("v1", &made[1]),
            ("v1^0", &made[1]),
            ("main@{1}", &made[4]),
            ("main@{2}^", &made[2]),
            ("what/if@{1}", &made[2]),
            (&merge.id.to_string(), &merge),
            (&aside.id.to_string()[..16], &aside),
        ] {
            assert_eq!(resolve(text), commit.id, "{text}");
        }
        assert_eq!(store.resolve_on("m", "what/if", "HEAD").unwrap(), aside.id);
        for (text, word) in [
            ("HEAD~6", "beyond the first commit"),
            ("HEAD^3", "a parent that no commit has"),
            ("v1^2", "has 1 parents"),
            ("nobody", "there are the branches main, what/if"),
            ("abc", "not the beginning of an id"),
            ("ffffffffffffffff", "no commit's id begins with"),
            ("main@{9}", "moves ago"),
            ("what/if@{2}", "it was made 2 moves ago"),
        ] {
            let error = store.resolve("m", text).unwrap_err();
            assert!(
                matches!(error, Error::Ref { .. }) && error.to_string().contains(word),
                "{text}: {error}"
            );
        }
        assert!(matches!(
            store.resolve("n", "HEAD").unwrap_err(),
            Error::NotFound { .. }
        ));
        let log = store.log("m", &["HEAD"], 100).unwrap();
        assert_eq!(
            ids(&log),
            [
                merge.id, made[4].id, aside.id, made[3].id, made[2].id, made[1].id, made[0].id
            ]
        );
        assert_eq!(ids(&store.log("m", &["HEAD"], 3).unwrap()), ids(&log[..3]));
        assert_eq!(store.log("m", &["v1", "what/if"], 100).unwrap().len(), 4);
        clean(&store);
    }
}

pub fn an_ambiguous_prefix_is_refused_with_what_there_is(open: Open) {
    let store = open(Options::default());
    // Some two of 700 random ids share their first four digits (the chance that none do is 2 %, and the clock stands still).
    let hands = Hands::at(5);
    let store = {
        drop(store);
        open(hands.options())
    };
    let made: Vec<String> = (0..700).map(|n| commit(&store, "m", n).id.to_string()).collect();
    let mut starts: Vec<&str> = made.iter().map(|id| &id[..4]).collect();
    starts.sort_unstable();
    let twice = starts
        .windows(2)
        .find(|pair| pair[0] == pair[1])
        .expect("the ids are fixed by their content")[0];
    let error = store.resolve("m", twice).unwrap_err();
    assert!(error.to_string().contains("commits begin so"), "{error}");
    for id in made.iter().filter(|id| id.starts_with(twice)) {
        assert_eq!(store.resolve("m", &id[..32]).unwrap().to_string(), *id);
    }
}

pub fn branches_tags_and_head_keep_their_rules(open: Open) {
    let store = open(Options::default());
    let first = commit(&store, "m", 1);
    commit(&store, "m", 2);
    store.branch("m", "b", "HEAD~1").unwrap();
    store.tag("m", "t", "HEAD").unwrap();
    assert!(matches!(
        store.branch("m", "b", "HEAD"),
        Err(Error::Exists { what: "branch", .. })
    ));
    assert!(matches!(
        store.tag("m", "b", "HEAD"),
        Err(Error::Exists { what: "branch", .. })
    ));
    assert!(matches!(
        store.branch("m", "t", "HEAD"),
        Err(Error::Exists { what: "tag", .. })
    ));
    assert!(matches!(
        commit_on(&store, "m", "t", None, 3),
        Err(Error::Exists { what: "tag", .. })
    ));
    assert!(matches!(
        store.branch("m", "a b", "HEAD"),
        Err(Error::Name { .. })
    ));
    assert!(matches!(store.delete_branch("m", "main"), Err(Error::Ref { .. })));
    assert!(matches!(store.delete_tag("m", "b"), Err(Error::NotFound { .. })));
    store.use_branch("m", "b").unwrap();
    assert_eq!(store.resolve("m", "HEAD").unwrap(), first.id);
    store.delete_branch("m", "main").unwrap();
    store.delete_tag("m", "t").unwrap();
    let info = store.info("m").unwrap();
    assert_eq!((info.head.as_str(), info.refs.len()), ("b", 1));
    assert_eq!(
        (info.refs[0].kind, info.refs[0].name.as_str()),
        (RefKind::Branch, "b")
    );
    let reflog = store.reflog("m", None, 100).unwrap();
    let moves: Vec<(&str, &str)> = reflog
        .iter()
        .map(|entry| (entry.name.as_str(), entry.why.as_str()))
        .collect();
    let expected = [
        ("t", "delete"),
        ("main", "delete"),
        ("t", "tag"),
        ("b", "branch"),
        ("main", "commit"),
        ("main", "commit"),
    ];
    assert_eq!(moves, expected);
    assert_eq!(store.reflog("m", Some("main"), 2).unwrap().len(), 2);
    clean(&store);
}

pub fn a_rollback_is_bit_equal_and_can_itself_be_undone(open: Open) {
    let store = open(Options::default());
    let made: Vec<Commit> = (0..4).map(|n| commit(&store, "m", n)).collect();
    store.rollback("m", "main", "HEAD~2", Some(made[3].id)).unwrap();
    let (at, state) = store.checkout("m", "main").unwrap();
    assert_eq!((at.id, state.to_bytes()), (made[1].id, snapshot(1).to_bytes()));
    let error = store
        .rollback("m", "main", "HEAD~1", Some(made[3].id))
        .unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }));
    store.rollback("m", "main", "main@{1}", None).unwrap();
    assert_eq!(store.resolve("m", "main").unwrap(), made[3].id);
    store.rollback("m", "main", "main@{1}", None).unwrap();
    assert_eq!(store.resolve("m", "main").unwrap(), made[1].id);
    assert!(matches!(
        store.rollback("m", "none", "main", None),
        Err(Error::NotFound { .. })
    ));
    clean(&store);
}

pub fn a_merge_knows_its_base_and_when_it_needs_no_commit(open: Open) {
    let store = open(Options::default());
    let base = commit(&store, "m", 1);
    store.branch("m", "other", "HEAD").unwrap();
    let theirs = commit_on(&store, "m", "other", Some(base.id), 2).unwrap();
    assert_eq!(store.relation("m", "main", "other").unwrap(), Relation::Behind);
    assert_eq!(store.relation("m", "other", "main").unwrap(), Relation::Ahead);
    assert_eq!(store.relation("m", "main", "main").unwrap(), Relation::Same);
    store.branch("m", "third", "HEAD").unwrap();
    let ours = commit_on(&store, "m", "third", Some(base.id), 3).unwrap();
    assert_eq!(
        store.relation("m", "third", "other").unwrap(),
        Relation::Diverged(vec![base.id])
    );
    let error = store.fast_forward("m", "third", ours.id, theirs.id).unwrap_err();
    assert!(matches!(error, Error::Ref { .. }), "{error}");
    store.fast_forward("m", "main", base.id, theirs.id).unwrap();
    assert_eq!(store.resolve("m", "main").unwrap(), theirs.id);
    commit_on(&store, "m", "alone", None, 9).unwrap();
    assert_eq!(store.relation("m", "alone", "main").unwrap(), Relation::Unrelated);
    clean(&store);
}

pub fn a_fork_goes_its_own_way(open: Open) {
    for options in [Options::default(), sealed()] {
        let store = open(options);
        let made: Vec<Commit> = (0..3).map(|n| commit(&store, "m", n)).collect();
        store.tag("m", "t", "HEAD~1").unwrap();
        store.fork("m", "all", None).unwrap();
        store.fork("m", "some", Some("HEAD~1")).unwrap();
        assert!(matches!(store.fork("m", "all", None), Err(Error::Exists { .. })));
        store.delete("m").unwrap();
        assert_eq!(store.names("").unwrap(), ["all", "some"]);
        assert_eq!(store.log("all", &["HEAD"], 9).unwrap().len(), 3);
        assert_eq!(store.resolve("all", "t").unwrap(), made[1].id);
        assert_eq!(store.resolve("some", "main").unwrap(), made[1].id);
        assert_eq!(store.checkout("some", "main~1").unwrap().1, snapshot(0));
        assert!(store.resolve("some", "t").is_err());
        commit(&store, "some", 50);
        assert_eq!(store.log("all", &["HEAD"], 9).unwrap().len(), 3);
        clean(&store);
    }
}

pub fn an_exported_memory_comes_back_whole_and_a_changed_file_does_not(open: Open) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.dm");
    let store = open(sealed());
    let made: Vec<Commit> = (0..3).map(|n| commit(&store, "m", n)).collect();
    store.tag("m", "t", "HEAD~1").unwrap();
    store.rollback("m", "main", "HEAD~1", None).unwrap();
    store.export("m", &path).unwrap();
    assert!(matches!(store.export("m", &path), Err(Error::Exists { .. })));
    assert!(matches!(store.import(&path, None), Err(Error::Exists { .. })));
    assert_eq!(store.import(&path, Some("again")).unwrap(), "again");
    let other = Store::in_memory(Options::default()).unwrap();
    assert_eq!(other.import(&path, None).unwrap(), "m");
    for (store, name) in [(&store, "again"), (&other, "m")] {
        assert_eq!(store.resolve(name, "main").unwrap(), made[1].id);
        // Where it was before the rollback is in reach: import itself is the last move.
        assert_eq!(store.resolve(name, "main@{2}").unwrap(), made[2].id);
        assert_eq!(store.checkout(name, "main@{2}").unwrap().1, snapshot(2));
        clean(store);
    }
    let good = std::fs::read(&path).unwrap();
    let bad = directory.path().join("bad");
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&bad, &bytes).unwrap();
        let error = other.import(&bad, Some("bad")).unwrap_err();
        let named = matches!(
            error,
            Error::Damaged { .. } | Error::NotAStore { .. } | Error::Newer { .. }
        );
        assert!(named, "byte {at}: {error}");
    }
    for end in (0..good.len()).step_by(7) {
        std::fs::write(&bad, &good[..end]).unwrap();
        assert!(other.import(&bad, Some("bad")).is_err(), "cut at {end}");
    }
    let mut newer = good.clone();
    newer[16] = 9;
    std::fs::write(&bad, &newer).unwrap();
    assert!(matches!(
        other.import(&bad, None),
        Err(Error::Newer {
            found: 9,
            known: 1,
            ..
        })
    ));
    assert!(matches!(
        other.import(&directory.path().join("none"), None),
        Err(Error::NotFound { .. })
    ));
    assert_eq!(other.names("").unwrap(), ["m"]);
}

pub fn a_memory_lives_its_time_and_no_longer(open: Open) {
    let hands = Hands::at(1_000);
    let store = open(hands.options());
    commit(&store, "m", 1);
    commit(&store, "for ever", 1);
    store.set_ttl("m", Some(100)).unwrap();
    hands.pass(99);
    commit(&store, "m", 2);
    assert_eq!(store.info("m").unwrap().expires_ms, Some(1_199));
    hands.pass(99);
    assert_eq!(store.names("").unwrap(), ["for ever", "m"]);
    hands.pass(1);
    assert!(matches!(store.resolve("m", "HEAD"), Err(Error::NotFound { .. })));
    assert!(matches!(store.set_ttl("m", None), Err(Error::NotFound { .. })));
    assert_eq!(store.names("").unwrap(), ["for ever"]);
    assert_eq!(store.stats().unwrap().expired, 1);
    // The name is free again, and nothing of the old memory comes with it.
    let new = commit(&store, "m", 3);
    assert_eq!(new.generation, 1);
    assert_eq!(store.info("m").unwrap().usage.commits, 1);
    clean(&store);
    store.set_ttl("m", Some(10)).unwrap();
    hands.pass(10);
    assert_eq!(store.gc(&GcOptions::default()).unwrap().memories, 1);
    let stats = store.stats().unwrap();
    assert_eq!((stats.memories, stats.expired), (1, 0));
    clean(&store);
}

pub fn a_quota_refuses_or_prunes_and_never_loses_a_head(open: Open) {
    let store = open(Options::default());
    let first = commit(&store, "m", 0);
    let limits = |when_full| Limits {
        commits: Some(8),
        bytes: None,
        when_full,
    };
    store.set_limits("m", limits(WhenFull::Refuse)).unwrap();
    for n in 1..8 {
        commit(&store, "m", n);
    }
    let head = store.head("m", "main").unwrap();
    let error = commit_on(&store, "m", "main", head, 8).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Quota {
                what: "commits",
                found: 9,
                limit: 8,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(store.head("m", "main").unwrap(), head);
    store.tag("m", "kept", "HEAD~5").unwrap();
    store.set_limits("m", limits(WhenFull::Prune)).unwrap();
    for n in 8..40 {
        commit(&store, "m", n);
        assert!(store.info("m").unwrap().usage.commits <= 8);
        clean(&store);
    }
    assert_eq!(store.checkout("m", "HEAD").unwrap().1, snapshot(39));
    assert_eq!(store.checkout("m", "kept").unwrap().1, snapshot(2));
    let left = store.info("m").unwrap().usage.commits;
    assert_eq!(
        store.log("m", &["HEAD"], 100).unwrap().len() as u64,
        left - 1,
        "the tagged one stands apart"
    );
    assert!(left >= 7, "{left} of 8 are left");
    let error = store.resolve("m", "HEAD~20").unwrap_err();
    assert!(error.to_string().contains("pruned"), "{error}");
    assert!(store.resolve("m", &first.id.to_string()).is_err());

    let bytes = Limits {
        commits: None,
        bytes: Some(6_000),
        when_full: WhenFull::Prune,
    };
    store.set_limits("m", bytes).unwrap();
    for n in 40..60 {
        commit(&store, "m", n);
        assert!(store.info("m").unwrap().usage.bytes <= 6_000);
    }
    clean(&store);
    let tight = Limits {
        bytes: Some(100),
        ..bytes
    };
    store.set_limits("m", tight).unwrap();
    let head = store.head("m", "main").unwrap();
    assert!(matches!(
        commit_on(&store, "m", "main", head, 99),
        Err(Error::Quota { what: "bytes", .. })
    ));
    clean(&store);
}

pub fn gc_takes_what_nothing_names_and_nothing_else(open: Open) {
    let hands = Hands::at(1_000_000);
    for key in [None, sealed().key] {
        let store = open(Options {
            key,
            ..hands.options()
        });
        let made: Vec<Commit> = (0..4).map(|n| commit(&store, "m", n)).collect();
        store.rollback("m", "main", "HEAD~2", None).unwrap();
        let kept = store.gc(&GcOptions::default()).unwrap();
        assert_eq!((kept.commits, kept.states, kept.moves), (0, 0, 0));
        assert_eq!(store.checkout("m", "main@{1}").unwrap().1, snapshot(3));
        hands.pass(5_000);
        commit(&store, "m", 9);
        let done = store
            .gc(&GcOptions {
                reflog_ms: 4_000,
                compact: true,
            })
            .unwrap();
        // The four commits and the rollback are old; where the branch came from in its last move is not.
        assert_eq!((done.commits, done.states, done.moves), (2, 2, 5));
        assert!(store.resolve("m", &made[3].id.to_string()).is_err());
        assert_eq!(store.log("m", &["HEAD"], 10).unwrap().len(), 3);
        assert_eq!(store.info("m").unwrap().usage.commits, 3);
        assert!(store.resolve("m", "main@{2}").is_err());
        let again = store
            .gc(&GcOptions {
                reflog_ms: 0,
                compact: false,
            })
            .unwrap();
        assert_eq!((again.commits, again.moves), (0, 0));
        clean(&store);
        commit(&store, "m", 10);
    }
}

pub fn equal_states_are_kept_once(open: Open) {
    let store = open(Options::default());
    let one = commit(&store, "m", 1);
    let before = store.info("m").unwrap().usage.bytes;
    let two = commit_on(&store, "m", "main", Some(one.id), 1).unwrap();
    assert_ne!(one.id, two.id);
    assert_eq!(one.state, two.state);
    let added = store.info("m").unwrap().usage.bytes - before;
    assert!(
        added < one.state_bytes,
        "{added} bytes for a commit of the same state"
    );
    assert_eq!(store.verify().unwrap().states, 1);
}

pub fn bad_names_and_texts_are_refused_before_anything_is_written(open: Open) {
    let store = open(Options::default());
    let try_it = |name: &str, branch: &str, message: &str, meta: Option<&str>| {
        let snapshot = snapshot(1);
        let new = NewCommit {
            branch,
            expected: None,
            merged: None,
            snapshot: &snapshot,
            parts: None,
            message,
            meta,
        };
        store.commit(name, &new).unwrap_err()
    };
    let long = "x".repeat(70_000);
    for error in [
        try_it("", "main", "", None),
        try_it(&long, "main", "", None),
        try_it("a\tb", "main", "", None),
        try_it("a", "a~b", "", None),
        try_it("a", "main", &long, None),
        try_it("a", "main", "", Some("[]")),
        try_it("a", "main", "", Some(&format!("{{\"a\":\"{long}\"}}"))),
    ] {
        assert!(matches!(error, Error::Name { .. }), "{error}");
        assert!(error.to_string().len() < 400, "{error}");
    }
    assert!(store.names("").unwrap().is_empty());
}

pub fn names_are_found_by_their_beginning(open: Open) {
    for options in [Options::default(), sealed()] {
        let store = open(options);
        for name in ["user/1", "user/10", "user/2", "Über", "../x", "user"] {
            commit(&store, name, 1);
        }
        assert_eq!(store.names("user/").unwrap(), ["user/1", "user/10", "user/2"]);
        assert_eq!(store.names("user/1").unwrap(), ["user/1", "user/10"]);
        assert_eq!(
            store.names("").unwrap(),
            ["../x", "user", "user/1", "user/10", "user/2", "Über"]
        );
        assert!(store.names("x").unwrap().is_empty());
        let stats = store.stats().unwrap();
        assert_eq!((stats.memories, stats.commits), (6, 6));
    }
}

/// A module of tests for stores over one kind of backend.
#[macro_export]
macro_rules! memories {
    ($name:ident, $open:expr) => {
        $crate::memories!($name, $open, true);
    };
    // With a third part, the tests pass without a look where it is false: what the backend needs is not installed.
    ($name:ident, $open:expr, $ready:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::memories!(@tests $ready, $open,
                a_commit_comes_back_as_it_was_made
                of_two_workers_one_wins_and_the_other_hears_of_both_heads
                no_turn_is_lost_among_many_workers
                refs_mean_what_they_mean_in_git
                an_ambiguous_prefix_is_refused_with_what_there_is
                branches_tags_and_head_keep_their_rules
                a_rollback_is_bit_equal_and_can_itself_be_undone
                a_merge_knows_its_base_and_when_it_needs_no_commit
                a_fork_goes_its_own_way
                an_exported_memory_comes_back_whole_and_a_changed_file_does_not
                a_memory_lives_its_time_and_no_longer
                a_quota_refuses_or_prunes_and_never_loses_a_head
                gc_takes_what_nothing_names_and_nothing_else
                equal_states_are_kept_once
                bad_names_and_texts_are_refused_before_anything_is_written
                names_are_found_by_their_beginning
            );
        }
    };
    (@tests $ready:expr, $open:expr, $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                if !$ready {
                    return;
                }
                let kept = std::cell::RefCell::new(Vec::new());
                $crate::suite::memories::$test(&|options| {
                    let (backend, keep) = $open;
                    kept.borrow_mut().push(keep);
                    deltamem_store::Store::open(backend, options).unwrap()
                });
            }
        )*
    };
}
