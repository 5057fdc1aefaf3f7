//! What a file still holds where its tree can no longer be read: every page that has the form of a leaf of ours, found by looking at each
//! place where one may begin. Values are bound to their places by the store's seals, so a wrong guess opens nowhere. Pages that are
//! free but not yet written over are found too: older heads, and what was deleted since the file was last written anew.

use std::collections::BTreeMap;
use std::io;

use redb::StorageBackend;

use crate::backend::{Group, Key, Kind};

const PAGE: u64 = 4096;
const LEAF: u8 = 1;
/// The width of a key in the table of heads, and in the others.
const HEAD: usize = 32;
const OBJECT: usize = 65;
/// The modes of a seal, and the fewest bytes that one takes.
const MODES: [u8; 2] = [1, 2];
const SEAL: usize = 16;
/// The longest value of a leaf that is looked at: a state of the largest memory.
const MAX_LEAF: usize = (1 << 30) + (1 << 20);

/// Where values stand: offset and length in the file.
type Places = Vec<(u64, usize)>;

/// An index of what was found.
#[derive(Debug, Default)]
pub(crate) struct Carved {
    pub heads: BTreeMap<Group, Places>,
    objects: BTreeMap<(Group, Key), Places>,
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
            for width in [HEAD, OBJECT] {
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
            if size <= SEAL || inside.is_some_and(|mode| !MODES.contains(mode) && key[..32] != [0; 32]) {
                continue;
            }
            // What was cut off is lost; the entries before it are not.
            if at + size as u64 > length {
                break;
            }
            let mut group = [0; 32];
            group.copy_from_slice(&key[..32]);
            let places = if width == HEAD {
                self.heads.entry(Group(group)).or_default()
            } else {
                let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == key[32])?;
                let mut id = [0; 32];
                id.copy_from_slice(&key[33..]);
                self.objects.entry((Group(group), Key { kind, id })).or_default()
            };
            places.push((at, size));
        }
        Some(())
    }

    /// The values of one kind in a group; a key comes once for each value that was found for it.
    pub(crate) fn of(&self, group: Group, kind: Kind) -> impl Iterator<Item = (Key, (u64, usize))> {
        let key = |id| (group, Key { kind, id });
        let range = self.objects.range(key([0; 32])..=key([0xFF; 32]));
        range.flat_map(|((_, key), places)| places.iter().map(|place| (*key, *place)))
    }
}

/// The bytes at a place.
pub(crate) fn bytes(file: &dyn StorageBackend, (at, size): (u64, usize)) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    file.read(at, &mut bytes)?;
    Ok(bytes)
}
