//! What a file still holds where its tree can no longer be read: every page that has the form of a leaf of ours, found by looking at each
//! place where one may begin. Values are bound to their places by the store's seals, so a wrong guess opens nowhere. Pages that are
//! free but not yet written over are found too: older heads, and what was deleted since the file was last written anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use redb::StorageBackend;

use super::tree::read_key;
use crate::backend::{Group, Key, Kind};

const PAGE: u64 = 4096;
const LEAF: u8 = 1;
/// The width of a key in the table of heads, of commits and moves, and of parts of states.
const HEAD: usize = 32;
const OBJECT: usize = 65;
const PART: usize = 67;
/// The modes of a seal, and the fewest bytes that one takes.
const MODES: [u8; 3] = [1, 2, 3];
const SEAL: usize = 16;
/// The longest value of a leaf that is looked at: a state of the largest memory.
const MAX_LEAF: usize = (1 << 30) + (1 << 20);

/// Where values stand: offset and length in the file.
type Places = Vec<(u64, usize)>;

/// An index of what was found.
#[derive(Debug, Default)]
pub(crate) struct Carved {
    pub heads: BTreeMap<Group, Places>,
    /// By group, key, and which part of how many.
    parts: BTreeMap<(Group, Key, [u8; 2]), Places>,
}

impl Carved {
    /// Looks through a whole file.
    pub(crate) fn search(file: &dyn StorageBackend) -> io::Result<Self> {
        let mut found = Self::default();
        let length = file.len()?;
        let mut page = vec![0; usize::try_from(PAGE).map_err(io::Error::other)?];
        for start in (PAGE..length).step_by(usize::try_from(PAGE).map_err(io::Error::other)?) {
            let there = usize::try_from((length - start).min(PAGE)).map_err(io::Error::other)?;
            file.read(start, &mut page[..there])?;
            for width in [HEAD, OBJECT, PART] {
                found.leaf(&page[..there], start, length, width);
            }
        }
        Ok(found)
    }

    /// The entries of a page, if it reads as a leaf with keys of this width. Only its beginning is at hand: values may reach beyond.
    /// Whether they are ours is seen by the first byte of each value, a seal's mode, and for sure when the store opens it.
    fn leaf(&mut self, page: &[u8], start: u64, length: u64, width: usize) -> Option<()> {
        let count = usize::from(u16::from_le_bytes([*page.get(2)?, *page.get(3)?]));
        let keys = 4 + 4 * count;
        if *page.first()? != LEAF || count == 0 || page.get(keys + width * count - 1).is_none() {
            return None;
        }
        let mut values = Vec::with_capacity(count);
        let mut from = keys + width * count;
        for index in 0..count {
            let at = 4 + 4 * index;
            let end = usize::try_from(u32::from_le_bytes(page.get(at..at + 4)?.try_into().ok()?)).ok()?;
            if end < from || end > MAX_LEAF {
                return None;
            }
            values.push((start + from as u64, end - from));
            from = end;
        }
        let keys: Vec<&[u8]> = page[keys..].chunks_exact(width).take(count).collect();
        if !keys.is_sorted() {
            return None;
        }
        for (key, (at, size)) in keys.into_iter().zip(values) {
            let inside = usize::try_from(at - start).ok().and_then(|first| page.get(first));
            let (group, of_store) = (group_of(key), key[..32] == [0; 32]);
            let value = if width == HEAD { None } else { Some(read_key(key)?) };
            // The first byte of a value is a seal's mode; a later part may be anything.
            let begins = value.is_none_or(|(_, [_, number])| number == 0);
            if begins
                && (size <= SEAL && width != PART
                    || inside.is_some_and(|mode| !MODES.contains(mode) && !of_store))
            {
                continue;
            }
            // What was cut off is lost; the entries before it are not.
            if at + size as u64 > length {
                break;
            }
            let places = match value {
                None => self.heads.entry(group).or_default(),
                Some((key, part)) => self.parts.entry((group, key, part)).or_default(),
            };
            places.push((at, size));
        }
        Some(())
    }

    /// Where the parts of the values of one kind in a group stand; a part comes once for each place that was found for it.
    pub(crate) fn of(&self, group: Group, kind: Kind) -> impl Iterator<Item = (Key, [u8; 2], (u64, usize))> {
        let key = |byte: u8| (group, Key { kind, id: [byte; 32] }, [byte; 2]);
        let range = self.parts.range(key(0)..=key(0xFF));
        range.flat_map(|((_, key, part), places)| places.iter().map(|place| (*key, *part, *place)))
    }
}

fn group_of(key: &[u8]) -> Group {
    let mut group = [0; 32];
    group.copy_from_slice(&key[..32]);
    Group(group)
}

/// Parts of values that were found, in any order, perhaps in several versions.
#[derive(Debug, Default)]
pub(crate) struct Pieces(BTreeMap<(Key, u8), BTreeMap<u8, Versions>>);

type Versions = BTreeSet<Vec<u8>>;

/// The most versions of one value that are put together.
const VERSIONS: usize = 64;

impl Pieces {
    pub(crate) fn add(&mut self, key: Key, [count, number]: [u8; 2], bytes: Vec<u8>) {
        let parts = self.0.entry((key, count)).or_default();
        parts.entry(number).or_default().insert(bytes);
    }

    /// Every value of which all parts are there, in each version that they make.
    pub(crate) fn whole(self) -> Vec<(Key, Vec<u8>)> {
        let mut whole = Vec::new();
        for ((key, count), parts) in self.0 {
            if !parts.keys().copied().eq(0..count) {
                continue;
            }
            let mut values = vec![Vec::new()];
            for versions in parts.values() {
                let longer = values.iter().flat_map(|value: &Vec<u8>| {
                    let join = |part: &Vec<u8>| [value.as_slice(), part.as_slice()].concat();
                    versions.iter().map(join).collect::<Vec<_>>()
                });
                values = longer.take(VERSIONS).collect();
            }
            whole.extend(values.into_iter().map(|value| (key, value)));
        }
        whole
    }
}

/// The bytes at a place.
pub(crate) fn bytes(file: &dyn StorageBackend, (at, size): (u64, usize)) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    file.read(at, &mut bytes)?;
    Ok(bytes)
}
