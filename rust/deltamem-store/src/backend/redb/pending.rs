//! Changes that are in the journal and not yet in the tree: what a reader sees over the tree, and what a checkpoint writes into it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backend::{Batch, Group, HeadChange, Key, Kind};
use crate::error::Error;

/// A value that readers and the writer hold together.
pub(super) type Shared = Arc<Vec<u8>>;

/// An id and what is said of its value; `None`: it is gone.
pub(super) type Said = ([u8; 32], Option<Shared>);
/// An id and its value.
pub(super) type Item = ([u8; 32], Vec<u8>);

/// What the changes say of one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// It is this.
    Value(Shared),
    /// It is gone.
    Gone,
    /// Nothing: it is as the tree has it.
    Below,
}

impl From<&Option<Shared>> for Found {
    fn from(value: &Option<Shared>) -> Self {
        value.clone().map_or(Self::Gone, Self::Value)
    }
}

/// The sum of changes, each over those before it.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// `None`: the group is gone.
    heads: BTreeMap<Group, Option<Shared>>,
    /// Groups whose values in the tree are all gone.
    cleared: BTreeSet<Group>,
    /// `None`: the value is gone.
    values: BTreeMap<(Group, Key), Option<Shared>>,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.cleared.is_empty() && self.values.is_empty()
    }

    /// Makes a change, whose group's head was the expected one.
    fn absorb(&mut self, batch: Batch) {
        let group = batch.group;
        if batch.clear || batch.head == HeadChange::Remove {
            self.cleared.insert(group);
            let old = self.values.range(of_group(group)).map(|(key, _)| *key);
            for key in old.collect::<Vec<_>>() {
                self.values.remove(&key);
            }
        }
        match batch.head {
            HeadChange::Keep => {}
            HeadChange::Put(head) => drop(self.heads.insert(group, Some(Arc::new(head)))),
            HeadChange::Remove => drop(self.heads.insert(group, None)),
        }
        for key in batch.deletes {
            self.values.insert((group, key), None);
        }
        for (key, value) in batch.puts {
            self.values.insert((group, key), Some(Arc::new(value)));
        }
    }

    pub(super) fn head(&self, group: Group) -> Found {
        self.heads.get(&group).map_or(Found::Below, Found::from)
    }

    pub(super) fn value(&self, group: Group, key: Key) -> Found {
        match self.values.get(&(group, key)) {
            Some(value) => value.into(),
            None if self.cleared.contains(&group) => Found::Gone,
            None => Found::Below,
        }
    }

    /// What is said of the values of one kind in a group, in the order of ids, and whether those in the tree are gone.
    pub(super) fn of(&self, group: Group, kind: Kind) -> (Vec<Said>, bool) {
        let key = |id| (group, Key { kind, id });
        let range = self.values.range(key([0; 32])..=key([0xFF; 32]));
        let said = range.map(|((_, key), value)| (key.id, value.clone())).collect();
        (said, self.cleared.contains(&group))
    }

    /// What is said of heads, in the order of groups; the store's own is among them.
    pub(super) fn heads(&self) -> impl Iterator<Item = (Group, &Option<Shared>)> {
        self.heads.iter().map(|(group, head)| (*group, head))
    }

    pub(super) fn cleared(&self) -> impl Iterator<Item = Group> {
        self.cleared.iter().copied()
    }

    /// What is said of values, in the order of groups and keys.
    pub(super) fn values(&self) -> impl Iterator<Item = (Group, Key, &Option<Shared>)> {
        self.values
            .iter()
            .map(|((group, key), value)| (*group, *key, value))
    }
}

impl Extend<Batch> for Pending {
    fn extend<T: IntoIterator<Item = Batch>>(&mut self, batches: T) {
        for batch in batches {
            self.absorb(batch);
        }
    }
}

fn of_group(group: Group) -> std::ops::RangeInclusive<(Group, Key)> {
    // Kinds are in the order of their bytes: c, l, s.
    let key = |kind, id| (group, Key { kind, id });
    key(Kind::Commit, [0; 32])..=key(Kind::State, [0xFF; 32])
}

/// Two runs in one order as one, up to `limit`: where both have an id, the upper one counts, and `None` there hides what is below.
pub(super) fn merged(
    below: impl Iterator<Item = Result<Item, Error>>,
    upper: Vec<Said>,
    limit: usize,
) -> Result<Vec<Item>, Error> {
    let (mut below, mut upper) = (below.peekable(), upper.into_iter().peekable());
    let mut items = Vec::new();
    while items.len() < limit {
        let under = match below.peek() {
            Some(Ok((id, _))) => Some(*id),
            Some(Err(_)) => return below.collect(),
            None => None,
        };
        let over = upper.peek().map(|(id, _)| *id);
        match (under, over) {
            (None, None) => break,
            (Some(under), over) if over.is_none_or(|over| under < over) => {
                items.extend(below.next().transpose()?);
            }
            (under, over) => {
                if under == over {
                    below.next();
                }
                if let Some((id, Some(value))) = upper.next() {
                    items.push((id, value.to_vec()));
                }
            }
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::backend::Backend;
    use crate::backend::memory::MemoryBackend;

    fn id(n: u8) -> [u8; 32] {
        [n; 32]
    }

    fn key(n: u8) -> Key {
        let kind = Kind::ALL[usize::from(n) % 3];
        Key { kind, id: id(n / 3) }
    }

    fn batch() -> impl Strategy<Value = Batch> {
        let puts = prop::collection::btree_map(0..12u8, any::<u8>(), 0..4);
        let deletes = prop::collection::btree_set(0..12u8, 0..3);
        (0..3u8, any::<bool>(), 0..4u8, any::<u64>(), deletes, puts).prop_map(
            |(group, clear, head, version, deletes, puts)| Batch {
                group: Group(id(group + 1)),
                expected: None,
                clear: clear && head == 0,
                head: match head {
                    0 | 1 => HeadChange::Put(version.to_le_bytes().to_vec()),
                    2 => HeadChange::Keep,
                    _ => HeadChange::Remove,
                },
                deletes: deletes
                    .iter()
                    .filter(|n| !puts.contains_key(n))
                    .map(|n| key(*n))
                    .collect(),
                puts: puts.iter().map(|(n, value)| (key(*n), vec![*value])).collect(),
            },
        )
    }

    /// A change as a store would make it: over the head that is there, and none of a group that is not.
    fn fit(model: &MemoryBackend, mut batch: Batch) -> Option<Batch> {
        batch.expected = model.read(batch.group, &[]).unwrap().head;
        if batch.expected.is_none() && !matches!(batch.head, HeadChange::Put(_)) {
            return None;
        }
        if batch.head == HeadChange::Remove {
            batch.puts.clear();
            batch.deletes.clear();
        }
        Some(batch)
    }

    proptest! {
        #[test]
        fn a_sum_over_a_tree_reads_like_each_change_made(
            below in prop::collection::vec(batch(), 0..12),
            above in prop::collection::vec(batch(), 0..12),
            limit in 1..5usize,
        ) {
            let (tree, model) = (MemoryBackend::new(), MemoryBackend::new());
            for batch in below {
                if let Some(batch) = fit(&model, batch) {
                    tree.apply(batch.clone()).unwrap();
                    model.apply(batch).unwrap();
                }
            }
            let mut pending = Pending::default();
            for batch in above {
                if let Some(batch) = fit(&model, batch) {
                    model.apply(batch.clone()).unwrap();
                    pending.extend([batch]);
                }
            }
            for group in (0..4).map(|n| Group(id(n + 1))) {
                let keys: Vec<Key> = (0..12).map(key).collect();
                let (under, expected) = (tree.read(group, &keys).unwrap(), model.read(group, &keys).unwrap());
                let over = |found: Found, below: &Option<Vec<u8>>| match found {
                    Found::Value(value) => Some(value.to_vec()),
                    Found::Gone => None,
                    Found::Below => below.clone(),
                };
                prop_assert_eq!(over(pending.head(group), &under.head), expected.head);
                for (at, key) in keys.iter().enumerate() {
                    prop_assert_eq!(over(pending.value(group, *key), &under.values[at]), expected.values[at].clone());
                }
                for kind in Kind::ALL {
                    let (said, cleared) = pending.of(group, kind);
                    let under = tree.list(group, kind, None, 100).unwrap().items;
                    let under = under.into_iter().filter(|_| !cleared).map(|(key, value)| Ok((key.id, value)));
                    let expected = model.list(group, kind, None, limit).unwrap().items;
                    let expected: Vec<_> = expected.into_iter().map(|(key, value)| (key.id, value)).collect();
                    prop_assert_eq!(merged(under, said, limit).unwrap(), expected);
                }
            }
        }
    }
}
