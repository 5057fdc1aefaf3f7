//! What a session does with its memory: commit, look, branch, tag, merge, roll back, fork, delete.

use std::collections::{BTreeSet, HashSet};

use deltamem_core::{Fingerprint, Snapshot};

use crate::backend::Kind;
use crate::commit::{Commit, CommitId, Parts, StateId, canonical_meta, check_message};
use crate::error::Error;
use crate::history::{History, Relation};
use crate::name::{check_memory, check_ref};
use crate::record::{Limits, MAX_REFS, Move, RefKind, Usage, WhenFull};
use crate::store::{Edit, Opened, Store, Target};

/// Commits in a log up to which each is read by itself; beyond, the whole history is.
const FEW: usize = 32;

/// A commit to be made.
#[derive(Debug, Clone, Copy)]
pub struct NewCommit<'a> {
    /// On which branch.
    pub branch: &'a str,
    /// The head that the caller built on; `None`: the branch does not exist yet, and the commit has no parent.
    pub expected: Option<CommitId>,
    /// For a merge: the commit that was merged in, the second parent.
    pub merged: Option<CommitId>,
    /// The state, with its fingerprint and its tokens.
    pub snapshot: &'a Snapshot,
    /// What the fingerprint is made of, where it is known.
    pub parts: Option<Parts>,
    /// The caller's words, at most 64 KiB.
    pub message: &'a str,
    /// The caller's data: the text of a JSON object, at most 16 KiB.
    pub meta: Option<&'a str>,
}

/// The model that a state is loaded into.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Its fingerprint.
    pub fingerprint: Fingerprint,
    /// What the fingerprint is made of, where it is known.
    pub parts: Option<Parts>,
}

/// A branch or a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ref {
    /// Which of the two.
    pub kind: RefKind,
    /// Its name.
    pub name: String,
    /// The commit that it names.
    pub target: CommitId,
}

/// What a memory is, without its states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// The branch that HEAD means.
    pub head: String,
    /// Branches, then tags, each in the order of their names.
    pub refs: Vec<Ref>,
    /// What it keeps.
    pub usage: Usage,
    /// What it may keep.
    pub limits: Limits,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it last changed.
    pub touched_ms: u64,
    /// When it goes if it does not change; `None`: never.
    pub expires_ms: Option<u64>,
}

impl Store {
    /// Makes a commit, durable when this returns; the first one makes the memory. Nothing is written on any error but
    /// [`Error::Io`] and [`Error::Unavailable`], where the commit is there whole or not at all.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the branch's head is not the expected one, with both; [`Error::Quota`], [`Error::Name`], [`Error::Ref`]
    /// when there is no commit `merged`.
    pub fn commit(&self, name: &str, new: &NewCommit<'_>) -> Result<Commit, Error> {
        check_memory(name)?;
        check_ref("branch's name", new.branch)?;
        check_message(new.message)?;
        let meta = canonical_meta(new.meta)?;
        let bytes = new.snapshot.to_bytes();
        let state = StateId::of(&bytes);
        self.changing(name, |opened| {
            let now = self.now();
            let head = opened.and_then(|opened| opened.record.branch(new.branch).copied());
            if head.map(|head| head.target) != new.expected {
                return Err(Error::Conflict {
                    name: name.to_owned(),
                    branch: new.branch.to_owned(),
                    expected: new.expected,
                    found: head.map(|head| head.target),
                });
            }
            let mut edit = match opened {
                Some(opened) => Edit::of(opened, now),
                None => self.new_memory(name, new.branch, now)?,
            };
            check_free(&edit, RefKind::Branch, new.branch)?;
            let mut parents: Vec<CommitId> = head.iter().map(|head| head.target).collect();
            let mut generation = head.map_or(0, |head| head.generation);
            if let Some(merged) = new.merged {
                let other = opened
                    .map(|opened| self.find_commit(opened, merged))
                    .transpose()?
                    .flatten()
                    .filter(|_| !parents.is_empty() && parents[0] != merged);
                let Some(other) = other else {
                    return Err(Error::Ref {
                        name: name.to_owned(),
                        text: merged.to_string(),
                        problem: "cannot be merged: a merge wants two commits of this memory that differ, its branch's head and another".into(),
                    });
                };
                generation = generation.max(other.generation);
                parents.push(merged);
            }
            let mut commit = Commit {
                id: CommitId([0; 32]),
                parents,
                generation: generation + 1,
                branch: new.branch.to_owned(),
                state,
                state_bytes: bytes.len() as u64,
                fingerprint: new.snapshot.fingerprint(),
                parts: new.parts,
                tokens_seen: new.snapshot.tokens_seen(),
                time_ms: now,
                message: new.message.to_owned(),
                meta: meta.clone(),
            };
            let encoded = commit.encode();
            commit.id = Commit::id_of(&encoded);
            let mut added = edit.put(Kind::Commit, &commit.id.0, &encoded)?;
            if head.is_none_or(|head| head.state != state) {
                added += edit.put(Kind::State, &state.0, &bytes)?;
            }
            edit.record.usage.commits += 1;
            edit.record.usage.bytes += added;
            let why = if new.merged.is_some() { "merge" } else { "commit" };
            edit.move_ref(RefKind::Branch, new.branch, Some(Target::from(&commit)), why);
            self.hold_quota(&mut edit, opened)?;
            Ok((edit, commit))
        })
    }

    /// Holds a planned change to the memory's quota: refuses it, or plans the oldest history away.
    fn hold_quota(&self, edit: &mut Edit, opened: Option<&Opened>) -> Result<(), Error> {
        let limits = edit.record.limits;
        let over = |usage: Usage, of: u64| -> Option<(&'static str, u64, u64)> {
            let room = |limit: u64| limit - limit / 8 * of;
            let commits = limits.commits.filter(|limit| usage.commits > room(*limit));
            let bytes = limits.bytes.filter(|limit| usage.bytes > room(*limit));
            commits
                .map(|limit| ("commits", usage.commits, limit))
                .or(bytes.map(|limit| ("bytes", usage.bytes, limit)))
        };
        let quota = |(what, found, limit)| Error::Quota {
            name: edit.record.name.clone(),
            what,
            found,
            limit,
        };
        let Some(first) = over(edit.record.usage, 0) else {
            return Ok(());
        };
        let (WhenFull::Prune, Some(opened)) = (limits.when_full, opened) else {
            return Err(quota(first));
        };

        // What there is, as it is kept: exact, where the record's usage may count a state twice.
        let mut history = History::default();
        let mut sizes = std::collections::HashMap::new();
        self.each_value(opened.group, Kind::Commit, |key, value| {
            let commit = self.open_commit(opened, key, &value)?;
            sizes.insert(key, value.len() as u64);
            history.0.insert(commit.id, commit);
            Ok(())
        })?;
        self.each_value(opened.group, Kind::State, |key, value| {
            sizes.insert(key, value.len() as u64);
            Ok(())
        })?;
        for (key, value) in &edit.puts {
            if key.kind == Kind::Commit {
                let commit = self.open_commit(opened, *key, value)?;
                history.0.insert(commit.id, commit);
            }
            if key.kind != Kind::Log {
                sizes.insert(*key, value.len() as u64);
            }
        }
        let mut usage = Usage {
            commits: history.0.len() as u64,
            bytes: sizes.values().sum(),
        };
        let kept: BTreeSet<CommitId> = edit.record.refs.values().map(|entry| entry.target).collect();
        let mut users = std::collections::HashMap::<StateId, usize>::new();
        for commit in history.0.values() {
            *users.entry(commit.state).or_default() += 1;
        }
        // States that no commit uses are left to gc; they count, so they may cost history.
        let mut gone: HashSet<CommitId> = HashSet::new();
        for commit in history.oldest_first(&kept) {
            if over(usage, 1).is_none() {
                break;
            }
            gone.insert(commit.id);
            usage.commits -= 1;
            let key = edit.domain.key(Kind::Commit, &commit.id.0);
            usage.bytes -= sizes.get(&key).copied().unwrap_or(0);
            edit.deletes.push(key);
            if let Some(count) = users.get_mut(&commit.state) {
                *count -= 1;
                if *count == 0 {
                    let key = edit.domain.key(Kind::State, &commit.state.0);
                    usage.bytes -= sizes.get(&key).copied().unwrap_or(0);
                    edit.deletes.push(key);
                }
            }
        }
        if let Some(still) = over(usage, 0) {
            return Err(Error::Quota {
                name: edit.record.name.clone(),
                what: still.0,
                found: still.1,
                limit: still.2,
            });
        }
        edit.record.shallow.retain(|id| !gone.contains(id));
        let cut = history.0.values().filter(|commit| {
            !gone.contains(&commit.id) && commit.parents.iter().any(|parent| gone.contains(parent))
        });
        edit.record.shallow.extend(cut.map(|commit| commit.id));
        let deleted: HashSet<_> = edit.deletes.iter().copied().collect();
        edit.puts.retain(|(key, _)| !deleted.contains(key));
        edit.record.usage = usage;
        Ok(())
    }

    /// The commits that `refs` reach, children before parents; of those without order the newest first; at most `limit`.
    ///
    /// # Errors
    /// [`Error::Ref`] and [`Error::NotFound`] as for [`Store::resolve`].
    pub fn log(&self, name: &str, refs: &[&str], limit: usize) -> Result<Vec<Commit>, Error> {
        self.reading(name, |opened| {
            let starts = refs
                .iter()
                .map(|text| self.resolve_in(opened, text, None))
                .collect::<Result<Vec<_>, _>>()?;
            let ids: Vec<CommitId> = starts.iter().map(|commit| commit.id).collect();
            let history = if limit <= FEW {
                self.nearest(opened, starts, limit)?
            } else {
                self.history(opened)?
            };
            Ok(history.log(&ids, limit).into_iter().cloned().collect())
        })
    }

    /// At least the `limit` commits that a log from `starts` begins with.
    fn nearest(&self, opened: &Opened, starts: Vec<Commit>, limit: usize) -> Result<History, Error> {
        let mut history = History::default();
        let ids: Vec<CommitId> = starts.iter().map(|commit| commit.id).collect();
        history
            .0
            .extend(starts.into_iter().map(|commit| (commit.id, commit)));
        loop {
            // A log step needs the parents of what it has given so far; each round reads all that are missing.
            let mut wanted: BTreeSet<CommitId> = BTreeSet::new();
            for commit in history.log(&ids, limit) {
                if !opened.record.shallow.contains(&commit.id) {
                    wanted.extend(commit.parents.iter().filter(|id| !history.0.contains_key(id)));
                }
            }
            if wanted.is_empty() {
                return Ok(history);
            }
            for id in wanted {
                let commit = self.commit_of(opened, id)?;
                history.0.insert(id, commit);
            }
        }
    }

    /// All commits that the memory holds.
    pub(crate) fn history(&self, opened: &Opened) -> Result<History, Error> {
        let mut history = History::default();
        self.each_value(opened.group, Kind::Commit, |key, value| {
            let commit = self.open_commit(opened, key, &value)?;
            history.0.insert(commit.id, commit);
            Ok(())
        })?;
        Ok(history)
    }

    /// The commit that `text` means.
    ///
    /// # Errors
    /// As for [`Store::resolve`].
    pub fn show(&self, name: &str, text: &str) -> Result<Commit, Error> {
        self.reading(name, |opened| self.resolve_in(opened, text, None))
    }

    /// The commit that `text` means, and its state, whatever model it belongs to.
    ///
    /// # Errors
    /// As for [`Store::resolve`]; [`Error::Damaged`] when the state's bytes are not those that were committed.
    pub fn checkout(&self, name: &str, text: &str) -> Result<(Commit, Snapshot), Error> {
        self.reading(name, |opened| {
            let commit = self.resolve_in(opened, text, None)?;
            let bytes = self.state_of(opened, commit.state)?;
            Ok((commit, Snapshot::from_bytes(&bytes)?))
        })
    }

    /// [`Store::checkout`] for one model: a state of another one is refused.
    ///
    /// # Errors
    /// As there, and [`Error::Fingerprint`], which names what differs.
    pub fn checkout_for(&self, name: &str, text: &str, model: &Model) -> Result<(Commit, Snapshot), Error> {
        let (commit, snapshot) = self.checkout(name, text)?;
        if commit.fingerprint == model.fingerprint {
            return Ok((commit, snapshot));
        }
        let differs = match (&commit.parts, &model.parts) {
            (Some(found), Some(expected)) => found.differing(expected),
            _ => Vec::new(),
        };
        Err(Error::Fingerprint {
            commit: commit.id,
            found: commit.fingerprint,
            expected: model.fingerprint,
            differs: differs.into(),
        })
    }

    /// A branch's head; `None`: there is no such branch, or no such memory.
    ///
    /// # Errors
    /// What the backend says.
    pub fn head(&self, name: &str, branch: &str) -> Result<Option<CommitId>, Error> {
        match self.reading(name, |opened| {
            Ok(opened.record.branch(branch).map(|entry| entry.target))
        }) {
            Err(Error::NotFound { .. }) => Ok(None),
            found => found,
        }
    }

    /// What the memory is.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn info(&self, name: &str) -> Result<Info, Error> {
        self.reading(name, |opened| {
            let record = &opened.record;
            let refs = record.refs.iter().map(|((kind, name), entry)| Ref {
                kind: *kind,
                name: name.clone(),
                target: entry.target,
            });
            Ok(Info {
                name: record.name.clone(),
                head: record.head.clone(),
                refs: refs.collect(),
                usage: record.usage,
                limits: record.limits,
                created_ms: record.created_ms,
                touched_ms: record.touched_ms,
                expires_ms: record.ttl_ms.map(|ttl| record.touched_ms.saturating_add(ttl)),
            })
        })
    }

    /// Makes a branch at the commit that `at` means.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Name`], [`Error::Quota`] beyond 4,096 refs, and as for [`Store::resolve`].
    pub fn branch(&self, name: &str, branch: &str, at: &str) -> Result<Commit, Error> {
        self.make_ref(name, RefKind::Branch, branch, at)
    }

    /// Makes a tag at the commit that `at` means.
    ///
    /// # Errors
    /// As for [`Store::branch`].
    pub fn tag(&self, name: &str, tag: &str, at: &str) -> Result<Commit, Error> {
        self.make_ref(name, RefKind::Tag, tag, at)
    }

    fn make_ref(&self, name: &str, kind: RefKind, new: &str, at: &str) -> Result<Commit, Error> {
        check_ref(
            if kind == RefKind::Tag {
                "tag's name"
            } else {
                "branch's name"
            },
            new,
        )?;
        self.changing_existing(name, |opened| {
            let commit = self.resolve_in(opened, at, None)?;
            let mut edit = Edit::of(opened, self.now());
            if edit.record.refs.contains_key(&(kind, new.to_owned())) {
                return Err(Error::Exists {
                    what: kind.word(),
                    name: new.to_owned(),
                    hint: "take another name, delete it first, or roll the branch back to move it",
                });
            }
            check_free(&edit, kind, new)?;
            edit.move_ref(kind, new, Some(Target::from(&commit)), kind.word());
            Ok((edit, commit))
        })
    }

    /// Deletes a branch. Its commits stay until no branch, no tag and no move in the reflog names them and a gc runs.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Ref`] for the branch in use.
    pub fn delete_branch(&self, name: &str, branch: &str) -> Result<(), Error> {
        self.delete_ref(name, RefKind::Branch, branch)
    }

    /// Deletes a tag.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn delete_tag(&self, name: &str, tag: &str) -> Result<(), Error> {
        self.delete_ref(name, RefKind::Tag, tag)
    }

    fn delete_ref(&self, name: &str, kind: RefKind, old: &str) -> Result<(), Error> {
        self.changing_existing(name, |opened| {
            let mut edit = Edit::of(opened, self.now());
            if !edit.record.refs.contains_key(&(kind, old.to_owned())) {
                return Err(no_ref(name, kind, old));
            }
            if kind == RefKind::Branch && edit.record.head == old {
                return Err(Error::Ref {
                    name: name.to_owned(),
                    text: old.to_owned(),
                    problem: "is the branch in use (HEAD); use another branch first, or delete the memory"
                        .into(),
                });
            }
            edit.move_ref(kind, old, None, "delete");
            Ok((edit, ()))
        })
    }

    /// Makes `branch` the one that HEAD means.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn use_branch(&self, name: &str, branch: &str) -> Result<(), Error> {
        self.changing_existing(name, |opened| {
            let mut edit = Edit::of(opened, self.now());
            if edit.record.branch(branch).is_none() {
                return Err(no_ref(name, RefKind::Branch, branch));
            }
            branch.clone_into(&mut edit.record.head);
            Ok((edit, ()))
        })
    }

    /// Moves a branch to the commit that `to` means; the commits that it leaves stay in reach of the reflog, and
    /// `rollback(branch, "branch@{1}")` takes the move back. With `expected`, only if that is the branch's head.
    ///
    /// # Errors
    /// [`Error::Conflict`], [`Error::NotFound`], and as for [`Store::resolve`].
    pub fn rollback(
        &self,
        name: &str,
        branch: &str,
        to: &str,
        expected: Option<CommitId>,
    ) -> Result<Commit, Error> {
        self.changing_existing(name, |opened| {
            Self::expect_head(opened, branch, expected)?;
            let commit = self.resolve_in(opened, to, Some(branch))?;
            let mut edit = Edit::of(opened, self.now());
            edit.move_ref(RefKind::Branch, branch, Some(Target::from(&commit)), "rollback");
            Ok((edit, commit))
        })
    }

    /// Moves a branch forward to `to`, a descendant of its head: a merge that needs no commit.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the head is not `expected`, [`Error::Ref`] when `to` does not descend from it.
    pub fn fast_forward(
        &self,
        name: &str,
        branch: &str,
        expected: CommitId,
        to: CommitId,
    ) -> Result<Commit, Error> {
        self.changing_existing(name, |opened| {
            Self::expect_head(opened, branch, Some(expected))?;
            let commit = self.resolve_in(opened, &to.to_string(), Some(branch))?;
            if self.history(opened)?.relation(expected, to) != Relation::Behind {
                return Err(Error::Ref {
                    name: name.to_owned(),
                    text: to.to_string(),
                    problem: format!("does not descend from {expected}, the head of {branch:?}; merge it, or roll back to it"),
                });
            }
            let mut edit = Edit::of(opened, self.now());
            edit.move_ref(RefKind::Branch, branch, Some(Target::from(&commit)), "fast-forward");
            Ok((edit, commit))
        })
    }

    fn expect_head(opened: &Opened, branch: &str, expected: Option<CommitId>) -> Result<(), Error> {
        let found = opened.record.branch(branch).map(|entry| entry.target);
        match (found, expected) {
            (None, None) => Err(no_ref(&opened.record.name, RefKind::Branch, branch)),
            (found, Some(_)) if found != expected => Err(Error::Conflict {
                name: opened.record.name.clone(),
                branch: branch.to_owned(),
                expected,
                found,
            }),
            _ => Ok(()),
        }
    }

    /// How two commits stand to each other: what a merge of `theirs` into `ours` has to do, and from which common ancestor.
    ///
    /// # Errors
    /// As for [`Store::resolve`].
    pub fn relation(&self, name: &str, ours: &str, theirs: &str) -> Result<Relation, Error> {
        self.reading(name, |opened| {
            let ours = self.resolve_in(opened, ours, None)?.id;
            let theirs = self.resolve_in(opened, theirs, None)?.id;
            Ok(self.history(opened)?.relation(ours, theirs))
        })
    }

    /// The last `limit` moves of the memory's branches and tags (of the one called `of`, if given), the newest first.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn reflog(&self, name: &str, of: Option<&str>, limit: usize) -> Result<Vec<Move>, Error> {
        self.reading(name, |opened| {
            let mut found = Vec::new();
            let mut number = opened.record.moves;
            while found.len() < limit && number > opened.record.oldest_move {
                number -= 1;
                let entry = self.find_move(opened, number)?;
                found.extend(entry.filter(|entry| of.is_none_or(|of| entry.name == of)));
            }
            Ok(found)
        })
    }

    /// Deletes a memory with all its commits, branches and its reflog. In a store with a key the memory's key is destroyed with it.
    /// The bytes leave the file at the next [`Store::gc`] that compacts.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn delete(&self, name: &str) -> Result<(), Error> {
        self.changing_existing(name, |opened| {
            let mut edit = Edit::of(opened, self.now());
            edit.remove = true;
            Ok((edit, ()))
        })
    }

    /// Sets how long the memory lives without a change, from now; `None`: for ever. One that has expired is as if it were not
    /// there, and the next [`Store::gc`] removes it.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn set_ttl(&self, name: &str, ttl_ms: Option<u64>) -> Result<(), Error> {
        self.changing_existing(name, |opened| {
            let mut edit = Edit::of(opened, self.now());
            edit.record.ttl_ms = ttl_ms;
            Ok((edit, ()))
        })
    }

    /// Sets what the memory may keep. It holds from the next commit on; what is over it then is pruned or the commit refused.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn set_limits(&self, name: &str, limits: Limits) -> Result<(), Error> {
        self.changing_existing(name, |opened| {
            let mut edit = Edit::of(opened, self.now());
            edit.record.limits = limits;
            Ok((edit, ()))
        })
    }

    pub(crate) fn changing_existing<T>(
        &self,
        name: &str,
        mut plan: impl FnMut(&Opened) -> Result<(Edit, T), Error>,
    ) -> Result<T, Error> {
        self.changing(name, |opened| match opened {
            Some(opened) => plan(opened),
            None => Err(Error::no_memory(name)),
        })
    }

    /// The names of all memories that begin with `prefix`, in the order of their bytes.
    ///
    /// # Errors
    /// What the backend says; [`Error::Damaged`] for a head that does not open.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let now = self.now();
        let mut names = BTreeSet::new();
        self.each_group(|group, head| {
            let opened = self.decode_uncached(group, head)?;
            if opened.record.name.starts_with(prefix) && !opened.record.expired(now) {
                names.insert(opened.record.name.clone());
            }
            Ok(())
        })?;
        Ok(names.into_iter().collect())
    }
}

/// A ref that is new must not share its name with one of the other kind, nor be one too many.
fn check_free(edit: &Edit, kind: RefKind, name: &str) -> Result<(), Error> {
    let refs = &edit.record.refs;
    if refs.contains_key(&(kind, name.to_owned())) {
        return Ok(());
    }
    let other = if kind == RefKind::Branch {
        RefKind::Tag
    } else {
        RefKind::Branch
    };
    if refs.contains_key(&(other, name.to_owned())) {
        return Err(Error::Exists {
            what: other.word(),
            name: name.to_owned(),
            hint: "a branch and a tag must not share a name; take another one",
        });
    }
    if refs.len() >= MAX_REFS {
        return Err(Error::Quota {
            name: edit.record.name.clone(),
            what: "refs",
            found: refs.len() as u64 + 1,
            limit: MAX_REFS as u64,
        });
    }
    Ok(())
}

fn no_ref(name: &str, kind: RefKind, missing: &str) -> Error {
    Error::NotFound {
        what: kind.word(),
        name: missing.to_owned(),
        in_memory: Some(name.to_owned()),
        hint: "Store.info() lists what there is".into(),
    }
}
