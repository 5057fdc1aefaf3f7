//! How groups and values lie in redb's tables.
//!
//! redb gives a page a length of a power of two, and a value over half a page one of its own: a state of 33 KB would take 64 KB, be zeroed
//! and written whole. So a state is cut into parts that fill pages, and a rest that shares one with others.

use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, Table, TableDefinition, TableError};

use super::journal::Mark;
use super::pending::{Found, Item};
use super::wrong;
use crate::backend::{Group, Key, Kind};
use crate::error::Error;

/// A group's head.
pub(super) const HEADS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("heads");
/// Commits and moves: small, and read together. The key is the group, the kind's byte, the id.
pub(super) const OBJECTS: TableDefinition<&[u8; 65], &[u8]> = TableDefinition::new("objects");
/// Parts of states. The key is that of an object, then how many parts there are, and which this is.
pub(super) const STATES: TableDefinition<&[u8; 67], &[u8]> = TableDefinition::new("states");
/// What the tree says of its journal, under one key.
pub(super) const JOURNAL: TableDefinition<&str, &[u8]> = TableDefinition::new("journal");
pub(super) const JOURNAL_KEY: &str = "mark";
/// Their names: a database with another table is somebody else's.
pub(super) const TABLES: [&str; 4] = ["heads", "objects", "states", "journal"];

/// redb's shortest page.
const PAGE: usize = 4096;
/// What a leaf with one entry needs beside the value, and a little more.
const AROUND: usize = 128;

type Objects = ReadOnlyTable<&'static [u8; 65], &'static [u8]>;
type Parts = ReadOnlyTable<&'static [u8; 67], &'static [u8]>;

fn object_key(group: Group, key: Key) -> [u8; 65] {
    let mut out = [0; 65];
    out[..32].copy_from_slice(&group.0);
    out[32] = key.kind as u8;
    out[33..].copy_from_slice(&key.id);
    out
}

fn part_key(group: Group, key: Key, [count, number]: [u8; 2]) -> [u8; 67] {
    let mut out = [0; 67];
    out[..65].copy_from_slice(&object_key(group, key));
    (out[65], out[66]) = (count, number);
    out
}

fn id_of(key: &[u8]) -> [u8; 32] {
    let mut id = [0; 32];
    id.copy_from_slice(&key[33..65]);
    id
}

/// The lengths of a value's parts.
fn cuts(mut length: usize) -> Vec<usize> {
    let mut cuts = Vec::new();
    while length + AROUND > PAGE && cuts.len() < 254 {
        let page = 1 << (length + AROUND).ilog2();
        cuts.push(page - AROUND);
        length -= page - AROUND;
    }
    if length > 0 || cuts.is_empty() {
        cuts.push(length);
    }
    cuts
}

/// A table for reading; `None`: nothing was ever written to it.
pub(super) fn table<K: redb::Key + 'static>(
    place: &str,
    begun: &ReadTransaction,
    definition: TableDefinition<'_, K, &'static [u8]>,
) -> Result<Option<ReadOnlyTable<K, &'static [u8]>>, Error> {
    match begun.open_table(definition) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(wrong(place, "reading", error)),
    }
}

fn reading(place: &str) -> impl Fn(redb::StorageError) -> Error {
    move |error| wrong(place, "reading", error)
}

/// A group's head: what was found of it over the tree, else the tree's.
pub(super) fn head(
    place: &str,
    begun: &ReadTransaction,
    group: Group,
    found: Found,
) -> Result<Option<Vec<u8>>, Error> {
    match found {
        Found::Value(head) => Ok(Some(head.to_vec())),
        Found::Gone => Ok(None),
        Found::Below => {
            let Some(heads) = table(place, begun, HEADS)? else {
                return Ok(None);
            };
            let head = heads.get(&group.0).map_err(reading(place))?;
            Ok(head.map(|head| head.value().to_vec()))
        }
    }
}

/// Heads in the order of groups, behind `past`.
pub(super) fn heads<'a>(
    place: &'a str,
    begun: &ReadTransaction,
    past: [u8; 32],
) -> Result<impl Iterator<Item = Result<Item, Error>> + 'a, Error> {
    let range = match table(place, begun, HEADS)? {
        Some(heads) => Some(heads.range::<&[u8; 32]>(&past..).map_err(reading(place))?),
        None => None,
    };
    let items = range.into_iter().flatten().map(move |entry| {
        let (group, head) = entry.map_err(reading(place))?;
        Ok((*group.value(), head.value().to_vec()))
    });
    Ok(items.filter(move |item| !matches!(item, Ok((id, _)) if *id == past)))
}

/// What the tree says of its journal.
pub(super) fn mark(place: &str, begun: &ReadTransaction) -> Result<Option<Mark>, Error> {
    let Some(table) = table(place, begun, JOURNAL)? else {
        return Ok(None);
    };
    let mark = table.get(JOURNAL_KEY).map_err(reading(place))?;
    mark.map(|mark| Mark::decode(mark.value()))
        .transpose()
        .map_err(|what| Error::damaged(place, format!("what it says of its journal is damaged: {what}")))
}

/// The tables of values, each opened when it is first needed.
pub(super) struct Values<'a> {
    place: &'a str,
    begun: &'a ReadTransaction,
    objects: Option<Objects>,
    states: Option<Parts>,
}

impl<'a> Values<'a> {
    pub(super) fn new(place: &'a str, begun: &'a ReadTransaction) -> Self {
        Self {
            place,
            begun,
            objects: None,
            states: None,
        }
    }

    pub(super) fn get(&mut self, group: Group, key: Key) -> Result<Option<Vec<u8>>, Error> {
        let (place, begun) = (self.place, self.begun);
        if key.kind != Kind::State {
            if self.objects.is_none() {
                self.objects = table(place, begun, OBJECTS)?;
            }
            let Some(table) = &self.objects else {
                return Ok(None);
            };
            let value = table.get(&object_key(group, key)).map_err(reading(place))?;
            return Ok(value.map(|value| value.value().to_vec()));
        }
        if self.states.is_none() {
            self.states = table(place, begun, STATES)?;
        }
        let Some(table) = &self.states else {
            return Ok(None);
        };
        let whole = [[0; 2], [0xFF; 2]].map(|part| part_key(group, key, part));
        let parts = table
            .range::<&[u8; 67]>(&whole[0]..=&whole[1])
            .map_err(reading(place))?;
        let mut joined = joined(place, parts);
        Ok(joined.next().transpose()?.map(|(_, value)| value))
    }
}

/// The values of one kind in a group, in the order of ids, behind `past`.
pub(super) fn values<'a>(
    place: &'a str,
    begun: &ReadTransaction,
    group: Group,
    kind: Kind,
    past: Option<[u8; 32]>,
) -> Result<Box<dyn Iterator<Item = Result<Item, Error>> + 'a>, Error> {
    let first = Key {
        kind,
        id: past.unwrap_or([0; 32]),
    };
    let last = Key { kind, id: [0xFF; 32] };
    if kind == Kind::State {
        let Some(table) = table(place, begun, STATES)? else {
            return Ok(Box::new(std::iter::empty()));
        };
        // Behind the last part that there can be.
        let start = past.map_or([0; 2], |_| [0xFF; 2]);
        let (start, end) = (part_key(group, first, start), part_key(group, last, [0xFF; 2]));
        let range = table.range::<&[u8; 67]>(&start..=&end).map_err(reading(place))?;
        return Ok(Box::new(joined(place, range)));
    }
    let Some(table) = table(place, begun, OBJECTS)? else {
        return Ok(Box::new(std::iter::empty()));
    };
    let (start, end) = (object_key(group, first), object_key(group, last));
    let range = table.range::<&[u8; 65]>(&start..=&end).map_err(reading(place))?;
    let items = range.map(move |entry| {
        let (key, value) = entry.map_err(reading(place))?;
        Ok((id_of(key.value()), value.value().to_vec()))
    });
    Ok(Box::new(items.filter(
        move |item| !matches!(item, Ok((id, _)) if Some(*id) == past),
    )))
}

/// States put together from parts that come in the order of their keys.
fn joined<'a>(
    place: &'a str,
    mut parts: redb::Range<'a, &'static [u8; 67], &'static [u8]>,
) -> impl Iterator<Item = Result<Item, Error>> + 'a {
    std::iter::from_fn(move || {
        let mut value = Vec::new();
        let mut number = 0;
        loop {
            let (key, part) = match parts.next() {
                Some(Ok(entry)) => entry,
                Some(Err(error)) => return Some(Err(wrong(place, "reading", error))),
                None if number == 0 => return None,
                None => return Some(Err(in_part(place))),
            };
            let key = key.value();
            if key[66] != number || key[65] <= number {
                return Some(Err(in_part(place)));
            }
            value.extend_from_slice(part.value());
            number += 1;
            if number == key[65] {
                return Some(Ok((id_of(key), value)));
            }
        }
    })
}

fn in_part(place: &str) -> Error {
    Error::damaged(place, "a part of a state is missing")
}

/// What an entry's key says: the value's own key, how many parts it has, and which this is.
pub(super) fn read_key(bytes: &[u8]) -> Option<(Key, [u8; 2])> {
    let kind = Kind::ALL
        .into_iter()
        .find(|kind| *kind as u8 == *bytes.get(32).unwrap_or(&0))?;
    let part = match (bytes.len(), kind) {
        (65, Kind::Commit | Kind::Log) => [1, 0],
        (67, Kind::State) => [bytes[65], bytes[66]],
        _ => return None,
    };
    let id = id_of(bytes);
    Some((Key { kind, id }, part))
}

/// Every entry of one kind in a group that can be read from one end, up to the first error; `each` gets its key and its bytes.
pub(super) fn entries(
    place: &str,
    begun: &ReadTransaction,
    (group, kind): (Group, Kind),
    backwards: bool,
    each: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(), Error> {
    let [first, last] = [[0; 32], [0xFF; 32]].map(|id| Key { kind, id });
    if kind == Kind::State {
        let ends = [part_key(group, first, [0; 2]), part_key(group, last, [0xFF; 2])];
        return ends_of(place, begun, STATES, ends, backwards, each);
    }
    let ends = [object_key(group, first), object_key(group, last)];
    ends_of(place, begun, OBJECTS, ends, backwards, each)
}

fn ends_of<const N: usize>(
    place: &str,
    begun: &ReadTransaction,
    definition: TableDefinition<'_, &'static [u8; N], &'static [u8]>,
    [start, end]: [[u8; N]; 2],
    backwards: bool,
    each: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(), Error> {
    let Some(table) = table(place, begun, definition)? else {
        return Ok(());
    };
    let mut range = table.range::<&[u8; N]>(&start..=&end).map_err(reading(place))?;
    while let Some(entry) = if backwards {
        range.next_back()
    } else {
        range.next()
    } {
        let (key, value) = entry.map_err(reading(place))?;
        each(key.value(), value.value());
    }
    Ok(())
}

/// Groups that have values and no head.
pub(super) fn headless(place: &str, begun: &ReadTransaction) -> Result<Vec<(String, String)>, Error> {
    let heads = table(place, begun, HEADS)?;
    let mut found = headless_in(place, begun, OBJECTS, heads.as_ref())?;
    found.extend(headless_in(place, begun, STATES, heads.as_ref())?);
    Ok(found)
}

fn headless_in<const N: usize>(
    place: &str,
    begun: &ReadTransaction,
    definition: TableDefinition<'_, &'static [u8; N], &'static [u8]>,
    heads: Option<&ReadOnlyTable<&'static [u8; 32], &'static [u8]>>,
) -> Result<Vec<(String, String)>, Error> {
    let mut found = Vec::new();
    let Some(values) = table(place, begun, definition)? else {
        return Ok(found);
    };
    let mut start = [0; N];
    loop {
        // One look for each group: past all of its keys.
        let first = values.range::<&[u8; N]>(&start..).map_err(reading(place))?.next();
        let Some(entry) = first else {
            return Ok(found);
        };
        let (key, _) = entry.map_err(reading(place))?;
        let mut group = [0; 32];
        group.copy_from_slice(&key.value()[..32]);
        let head = match heads {
            None => None,
            Some(heads) => heads.get(&group).map_err(reading(place))?,
        };
        if head.is_none() {
            found.push((
                format!("group {} of {place}", Group(group).to_hex()),
                "it has values and no head".into(),
            ));
        }
        start[..32].copy_from_slice(&group);
        start[32..].fill(0xFF);
    }
}

/// Writes a value, over what may be there.
pub(super) fn put(
    place: &str,
    objects: &mut Table<'_, &'static [u8; 65], &'static [u8]>,
    states: &mut Table<'_, &'static [u8; 67], &'static [u8]>,
    (group, key): (Group, Key),
    value: Option<&[u8]>,
) -> Result<(), Error> {
    let writing = |error: redb::StorageError| wrong(place, "writing", error);
    if key.kind != Kind::State {
        let at = object_key(group, key);
        match value {
            Some(value) => objects.insert(&at, value).map_err(writing)?,
            None => objects.remove(&at).map_err(writing)?,
        };
        return Ok(());
    }
    let whole = [[0; 2], [0xFF; 2]].map(|part| part_key(group, key, part));
    let there = states
        .range::<&[u8; 67]>(&whole[0]..=&whole[1])
        .map_err(writing)?
        .next()
        .is_some();
    if there {
        states
            .retain_in::<&[u8; 67], _>(&whole[0]..=&whole[1], |_, _| false)
            .map_err(writing)?;
    }
    let Some(mut rest) = value else {
        return Ok(());
    };
    let cuts = cuts(rest.len());
    let count = u8::try_from(cuts.len()).unwrap_or(u8::MAX);
    for (number, cut) in (0..count).zip(cuts) {
        let (part, more) = rest.split_at(cut);
        states
            .insert(&part_key(group, key, [count, number]), part)
            .map_err(writing)?;
        rest = more;
    }
    Ok(())
}

/// Removes every value of a group.
pub(super) fn clear(
    place: &str,
    objects: &mut Table<'_, &'static [u8; 65], &'static [u8]>,
    states: &mut Table<'_, &'static [u8; 67], &'static [u8]>,
    group: Group,
) -> Result<(), Error> {
    clear_in(place, objects, group)?;
    clear_in(place, states, group)
}

fn clear_in<const N: usize>(
    place: &str,
    table: &mut Table<'_, &'static [u8; N], &'static [u8]>,
    group: Group,
) -> Result<(), Error> {
    let (mut start, mut end) = ([0; N], [0xFF; N]);
    start[..32].copy_from_slice(&group.0);
    end[..32].copy_from_slice(&group.0);
    table
        .retain_in::<&[u8; N], _>(&start..=&end, |_, _| false)
        .map_err(|error| wrong(place, "writing", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fill_pages_and_make_up_the_value() {
        for length in (0..70_000).step_by(13).chain([1 << 20, (1 << 30) + 5]) {
            let cuts = cuts(length);
            assert_eq!(cuts.iter().sum::<usize>(), length);
            assert!(cuts.len() < 32, "{length}: {} parts", cuts.len());
            let (last, full) = cuts.split_last().unwrap_or((&0, &[]));
            assert!(
                full.iter()
                    .all(|cut| (cut + AROUND).is_power_of_two() && cut + AROUND >= PAGE)
            );
            assert!(
                *last + AROUND <= PAGE || (last + AROUND).is_power_of_two(),
                "{length}: {last}"
            );
        }
        assert_eq!(cuts(33_225), [32_768 - AROUND, 585]);
    }
}
