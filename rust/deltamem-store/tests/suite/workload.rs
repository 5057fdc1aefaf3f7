//! Random work on a store, and everything that can be seen of one: the same work on two stores under the same clock gives the same
//! commits, so a store in memory is the model of every other.

use std::collections::BTreeMap;

use deltamem_store::{Commit, CommitId, Error, GcOptions, Limits, NewCommit, RefKind, Store, WhenFull};

use super::memories::{Hands, snapshot};

/// A pseudo-random stream (`SplitMix64`), the same everywhere.
#[derive(Debug, Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }
}

/// One thing to do. Names and branches are small numbers; what cannot be done is refused by both stores alike.
#[derive(Debug, Clone)]
pub enum Work {
    Commit {
        name: u8,
        branch: u8,
        state: u64,
        stale: bool,
    },
    Merge {
        name: u8,
        branch: u8,
        other: u8,
        state: u64,
    },
    Branch {
        name: u8,
        branch: u8,
        back: u8,
    },
    Tag {
        name: u8,
        tag: u8,
        back: u8,
    },
    DeleteBranch {
        name: u8,
        branch: u8,
    },
    Rollback {
        name: u8,
        branch: u8,
        back: u8,
    },
    Undo {
        name: u8,
        branch: u8,
    },
    Fork {
        name: u8,
        to: u8,
    },
    Delete {
        name: u8,
    },
    Use {
        name: u8,
        branch: u8,
    },
    Limit {
        name: u8,
        commits: u64,
        prune: bool,
    },
    Live {
        name: u8,
        ttl: u64,
    },
    Gc {
        reflog: u64,
        compact: bool,
    },
}

pub fn work(dice: &mut Dice) -> Work {
    let name = dice.roll(3) as u8;
    let branch = dice.roll(3) as u8;
    let other = dice.roll(3) as u8;
    let state = dice.roll(1000);
    let back = dice.roll(4) as u8;
    match dice.roll(40) {
        0..=17 => Work::Commit {
            name,
            branch,
            state,
            stale: dice.roll(8) == 0,
        },
        18..=20 => Work::Merge {
            name,
            branch,
            other,
            state,
        },
        21..=23 => Work::Branch { name, branch, back },
        24 => Work::Tag {
            name,
            tag: other,
            back,
        },
        25 => Work::DeleteBranch { name, branch },
        26..=28 => Work::Rollback { name, branch, back },
        29..=30 => Work::Undo { name, branch },
        31..=32 => Work::Fork { name, to: other },
        33 => Work::Delete { name },
        34 => Work::Use { name, branch },
        35 => Work::Limit {
            name,
            commits: 3 + dice.roll(8),
            prune: dice.roll(2) == 0,
        },
        36 => Work::Live {
            name,
            ttl: 20 + dice.roll(60),
        },
        37 => Work::Gc {
            reflog: 0,
            compact: false,
        },
        38 => Work::Gc {
            reflog: 30,
            compact: false,
        },
        _ => Work::Gc {
            reflog: 60,
            compact: true,
        },
    }
}

fn memory(n: u8) -> String {
    format!("memory/{n} é")
}

fn branch_name(n: u8) -> String {
    ["main", "what/if", "third"][usize::from(n) % 3].to_owned()
}

fn behind(branch: &str, back: u8) -> String {
    format!("{branch}~{back}")
}

/// Does one thing. The text tells what came of it, the same for equal stores.
pub fn perform(store: &Store, work: &Work) -> Result<String, Error> {
    let shown = |commit: Commit| commit.id.to_string();
    match work {
        Work::Commit {
            name,
            branch,
            state,
            stale,
        } => {
            let (name, branch) = (memory(*name), branch_name(*branch));
            let head = store.head(&name, &branch)?;
            let expected = if *stale { Some(CommitId([1; 32])) } else { head };
            commit(store, &name, &branch, expected, None, *state)
        }
        Work::Merge {
            name,
            branch,
            other,
            state,
        } => {
            let (name, branch, other) = (memory(*name), branch_name(*branch), branch_name(*other));
            let merged = store.head(&name, &other)?;
            let head = store.head(&name, &branch)?;
            commit(store, &name, &branch, head, merged, *state)
        }
        Work::Branch { name, branch, back } => store
            .branch(&memory(*name), &branch_name(*branch), &behind("HEAD", *back))
            .map(shown),
        Work::Tag { name, tag, back } => store
            .tag(&memory(*name), &format!("tag{tag}"), &behind("HEAD", *back))
            .map(shown),
        Work::DeleteBranch { name, branch } => store
            .delete_branch(&memory(*name), &branch_name(*branch))
            .map(|()| "deleted".into()),
        Work::Rollback { name, branch, back } => {
            let branch = branch_name(*branch);
            store
                .rollback(&memory(*name), &branch, &behind(&branch, *back), None)
                .map(shown)
        }
        Work::Undo { name, branch } => {
            let branch = branch_name(*branch);
            store
                .rollback(&memory(*name), &branch, &format!("{branch}@{{1}}"), None)
                .map(shown)
        }
        Work::Fork { name, to } => store
            .fork(&memory(*name), &memory(*to), None)
            .map(|()| "forked".into()),
        Work::Delete { name } => store.delete(&memory(*name)).map(|()| "deleted".into()),
        Work::Use { name, branch } => store
            .use_branch(&memory(*name), &branch_name(*branch))
            .map(|()| "used".into()),
        Work::Limit { name, commits, prune } => {
            let limits = Limits {
                commits: Some(*commits),
                bytes: None,
                when_full: if *prune { WhenFull::Prune } else { WhenFull::Refuse },
            };
            store
                .set_limits(&memory(*name), limits)
                .map(|()| "limited".into())
        }
        Work::Live { name, ttl } => store.set_ttl(&memory(*name), Some(*ttl)).map(|()| "dated".into()),
        Work::Gc { reflog, compact } => store
            .gc(&GcOptions {
                reflog_ms: *reflog,
                compact: *compact,
            })
            .map(|done| {
                format!(
                    "{} {} {} {}",
                    done.memories, done.commits, done.states, done.moves
                )
            }),
    }
}

fn commit(
    store: &Store,
    name: &str,
    branch: &str,
    expected: Option<CommitId>,
    merged: Option<CommitId>,
    state: u64,
) -> Result<String, Error> {
    let snapshot = snapshot(state);
    let message = format!("state {state}");
    let new = NewCommit {
        branch,
        expected,
        merged,
        snapshot: &snapshot,
        parts: None,
        message: &message,
        meta: Some("{\"by\":\"workload\"}"),
    };
    store.commit(name, &new).map(|commit| commit.id.to_string())
}

/// Whether the store itself failed, rather than refuse the work.
pub fn broke(error: &Error) -> bool {
    matches!(
        error,
        Error::Io { .. } | Error::Full { .. } | Error::Unavailable { .. } | Error::Damaged { .. }
    )
}

/// What one memory shows: HEAD, its refs, quota, usage, the log of all branches with the states' bytes, and the reflog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    head: String,
    refs: Vec<(RefKind, String, CommitId)>,
    limits: Limits,
    expires_ms: Option<u64>,
    log: Vec<(Commit, blake3::Hash)>,
    moves: Vec<deltamem_store::Move>,
}

/// Everything that a store shows.
pub fn look(store: &Store) -> BTreeMap<String, Seen> {
    let names = store.names("").unwrap();
    names
        .into_iter()
        .map(|name| {
            let info = store.info(&name).unwrap();
            let refs: Vec<&str> = info.refs.iter().map(|found| found.name.as_str()).collect();
            let log = store.log(&name, &refs, usize::MAX).unwrap();
            let log = log
                .into_iter()
                .map(|commit| {
                    let (_, state) = store.checkout(&name, &commit.id.to_string()).unwrap();
                    let hash = blake3::hash(&state.to_bytes());
                    (commit, hash)
                })
                .collect();
            let moves = store.reflog(&name, None, usize::MAX).unwrap();
            let seen = Seen {
                head: info.head,
                refs: info
                    .refs
                    .into_iter()
                    .map(|found| (found.kind, found.name, found.target))
                    .collect(),
                limits: info.limits,
                expires_ms: info.expires_ms,
                log,
                moves,
            };
            (name, seen)
        })
        .collect()
}

/// A store in memory under the same clock.
pub fn model(hands: &Hands) -> Store {
    Store::in_memory(hands.options()).unwrap()
}
