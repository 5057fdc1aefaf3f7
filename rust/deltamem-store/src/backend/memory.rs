//! A backend in the process's own memory: for tests and for memories that need not outlive the process. Also the model that the
//! others are held against.

use std::collections::BTreeMap;
use std::ops::Bound;

use parking_lot::RwLock;

use super::{Applied, Backend, Batch, Compacted, Cursor, Group, HeadChange, Key, Kind, Page, Read};
use crate::error::Error;

#[derive(Debug, Default)]
struct Content {
    head: Vec<u8>,
    values: BTreeMap<Key, Vec<u8>>,
}

/// Groups in maps. What is removed is gone at once.
#[derive(Debug, Default)]
pub struct MemoryBackend {
    groups: RwLock<BTreeMap<Group, Content>>,
}

impl MemoryBackend {
    /// An empty backend.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Backend for MemoryBackend {
    fn place(&self) -> String {
        "the store in memory".into()
    }

    fn read(&self, group: Group, keys: &[Key]) -> Result<Read, Error> {
        let groups = self.groups.read();
        let content = groups.get(&group);
        Ok(Read {
            head: content.map(|content| content.head.clone()),
            values: keys
                .iter()
                .map(|key| content.and_then(|content| content.values.get(key).cloned()))
                .collect(),
        })
    }

    fn apply(&self, batch: Batch) -> Result<Applied, Error> {
        let mut groups = self.groups.write();
        let found = groups.get(&batch.group).map(|content| &content.head);
        if found != batch.expected.as_ref() {
            return Ok(Applied::Refused {
                found: found.cloned(),
            });
        }
        if batch.head == HeadChange::Remove {
            groups.remove(&batch.group);
            return Ok(Applied::Done);
        }
        let content = groups.entry(batch.group).or_default();
        if batch.clear {
            content.values.clear();
        }
        if let HeadChange::Put(head) = batch.head {
            content.head = head;
        }
        for key in &batch.deletes {
            content.values.remove(key);
        }
        content.values.extend(batch.puts);
        Ok(Applied::Done)
    }

    fn list(
        &self,
        group: Group,
        kind: Kind,
        from: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<(Key, Vec<u8>)>, Error> {
        let groups = self.groups.read();
        let Some(content) = groups.get(&group) else {
            return Ok(Page {
                items: Vec::new(),
                next: None,
            });
        };
        let start = match last(from) {
            Some(id) => Bound::Excluded(Key { kind, id }),
            None => Bound::Included(Key { kind, id: [0; 32] }),
        };
        let end = Bound::Included(Key { kind, id: [0xFF; 32] });
        let items: Vec<(Key, Vec<u8>)> = content
            .values
            .range((start, end))
            .take(limit.max(1))
            .map(|(key, value)| (*key, value.clone()))
            .collect();
        Ok(Page::of_ordered(items, limit.max(1), |(key, _)| key.id))
    }

    fn groups(&self, from: Option<&Cursor>, limit: usize) -> Result<Page<(Group, Vec<u8>)>, Error> {
        let groups = self.groups.read();
        let start = Bound::Excluded(last(from).map_or(Group::STORE, Group));
        let items: Vec<(Group, Vec<u8>)> = groups
            .range((start, Bound::Unbounded))
            .take(limit.max(1))
            .map(|(group, content)| (*group, content.head.clone()))
            .collect();
        Ok(Page::of_ordered(items, limit.max(1), |(group, _)| group.0))
    }

    fn compact(&self) -> Result<Compacted, Error> {
        let size = self.size()?;
        Ok(Compacted {
            before: size,
            after: size,
        })
    }

    fn check(&self) -> Result<Vec<(String, String)>, Error> {
        Ok(Vec::new())
    }

    fn size(&self) -> Result<u64, Error> {
        let groups = self.groups.read();
        let bytes: usize = groups
            .values()
            .map(|content| {
                32 + content.head.len()
                    + content
                        .values
                        .values()
                        .map(|value| 33 + value.len())
                        .sum::<usize>()
            })
            .sum();
        Ok(bytes as u64)
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// The last id that an ordered backend gave, out of its cursor.
pub(crate) fn last(from: Option<&Cursor>) -> Option<[u8; 32]> {
    from.and_then(|cursor| cursor.0.as_slice().try_into().ok())
}
