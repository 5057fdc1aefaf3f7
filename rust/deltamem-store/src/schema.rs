//! The store's header and its schema version: what makes a backend a store, which key it has, and how an older one is brought up to
//! date. A newer one is refused by its number.

use crate::backend::{Applied, Backend, Batch, Group, HeadChange};
use crate::codec::{Reader, Writer};
use crate::error::Error;
use crate::seal::{Vault, random};

/// The schema version that this code writes.
pub const SCHEMA: u32 = 1;

const MAGIC: &[u8; 16] = b"deltamem-store\0\n";
/// What the header's check is derived for, in every version.
const CHECK: &str = "deltamem_rt store: header 1";

/// Brings a store from the version of its index plus one to the next. A step may be cut off anywhere and is then made again, so
/// it must bear that; the header's version goes up after it.
type Step = fn(&dyn Backend, &Vault) -> Result<(), Error>;
const STEPS: [Step; SCHEMA as usize - 1] = [];

/// Reads the header, writes one into an empty backend, and brings an older store up to date.
pub(crate) fn open(backend: &dyn Backend, vault: &Vault) -> Result<(), Error> {
    open_with(backend, vault, SCHEMA, &STEPS)
}

fn open_with(backend: &dyn Backend, vault: &Vault, newest: u32, steps: &[Step]) -> Result<(), Error> {
    let mut found = backend.read(Group::STORE, &[])?.head;
    if found.is_none() {
        if !backend.groups(None, 1)?.items.is_empty() {
            return Err(Error::damaged(backend.place(), "its header is missing"));
        }
        found = swap(backend, None, header(newest, vault, random()?))?;
    }
    let mut raw = found.unwrap_or_default();
    loop {
        let (version, id) = read(&raw, backend, vault, newest)?;
        if version == newest {
            return Ok(());
        }
        steps[version as usize - 1](backend, vault)?;
        raw = swap(backend, Some(raw), header(version + 1, vault, id))?.unwrap_or_default();
    }
}

/// The header as it is after the swap: the new one, or what another process made of it meanwhile.
fn swap(backend: &dyn Backend, expected: Option<Vec<u8>>, new: Vec<u8>) -> Result<Option<Vec<u8>>, Error> {
    let batch = Batch {
        group: Group::STORE,
        expected,
        clear: false,
        head: HeadChange::Put(new.clone()),
        deletes: Vec::new(),
        puts: Vec::new(),
    };
    Ok(match backend.apply(batch)? {
        Applied::Done => Some(new),
        Applied::Refused { found } => found,
    })
}

fn header(version: u32, vault: &Vault, id: [u8; 16]) -> Vec<u8> {
    let mut out = Writer::default();
    out.raw(MAGIC)
        .u32(version)
        .raw(&id)
        .maybe_id(vault.check().as_ref());
    let check = blake3::derive_key(CHECK, &out.0);
    out.raw(&check);
    out.0
}

fn read(raw: &[u8], backend: &dyn Backend, vault: &Vault, newest: u32) -> Result<(u32, [u8; 16]), Error> {
    let place = || backend.place();
    let mut from = Reader::new(raw);
    if from.raw(MAGIC.len(), "magic") != Ok(MAGIC) {
        return Err(Error::NotAStore {
            place: place(),
            what: format!(
                "its header begins with {:?}",
                String::from_utf8_lossy(&raw[..raw.len().min(16)])
            ),
        });
    }
    let damaged = |what: String| Error::damaged(format!("the header of {}", place()), what);
    // Of every version: the magic, the version, and the check of all before at the end. A flipped bit is not a newer version.
    let (content, check) = raw.split_at(raw.len().saturating_sub(32));
    if check != blake3::derive_key(CHECK, content) {
        return Err(damaged("its check does not belong to its bytes".into()));
    }
    let version = from.u32("version").map_err(damaged)?;
    if version > newest {
        return Err(Error::Newer {
            place: place(),
            found: version,
            known: newest,
        });
    }
    if version == 0 {
        return Err(damaged("it says version 0, and the first is 1".into()));
    }
    let id = from.array("id").map_err(damaged)?;
    let check = from.maybe_id("key's check").map_err(damaged)?;
    from.array::<32>("check").map_err(damaged)?;
    from.end().map_err(damaged)?;
    let problem = match (check, vault.check()) {
        (found, given) if found == given => return Ok((version, id)),
        (Some(_), None) => "it is encrypted, and no key was given; give the key that it was made with",
        (None, Some(_)) => {
            "it is not encrypted, and a key was given; open it without one, or export its memories into a store with a key"
        }
        _ => "the key is not the one that it was made with; without that key nothing in it can be read",
    };
    Err(Error::Key {
        place: place(),
        problem,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::backend::memory::MemoryBackend;
    use crate::seal::StoreKey;

    #[test]
    fn an_older_store_is_brought_up_step_by_step_and_a_newer_one_refused() {
        let backend = MemoryBackend::new();
        let vault = Vault::new(None);
        open_with(&backend, &vault, 1, &[]).unwrap();
        let first: Step = |backend, _| {
            assert_eq!(backend.groups(None, 9)?.items.len(), 0);
            backend.apply(put(1)).map(|_| ())
        };
        let second: Step = |backend, _| {
            assert_eq!(backend.groups(None, 9)?.items.len(), 1);
            backend.apply(put(2)).map(|_| ())
        };
        let cut: Step = |_, _| Err(Error::damaged("here", "cut off"));
        assert!(open_with(&backend, &vault, 3, &[first, cut]).is_err());
        open_with(&backend, &vault, 3, &[|_, _| panic!("made already"), second]).unwrap();
        open_with(&backend, &vault, 3, &[first, second]).unwrap();
        assert_eq!(backend.groups(None, 9).unwrap().items.len(), 2);
        let error = open_with(&backend, &vault, 2, &[first]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Newer {
                    found: 3,
                    known: 2,
                    ..
                }
            ),
            "{error}"
        );
    }

    fn put(n: u8) -> Batch {
        Batch {
            group: Group([n; 32]),
            expected: None,
            clear: false,
            head: HeadChange::Put(vec![n]),
            deletes: Vec::new(),
            puts: Vec::new(),
        }
    }

    #[test]
    fn a_missing_a_needless_and_a_wrong_key_are_told_apart() {
        let key = |n| Vault::new(Some(&StoreKey::new([n; 32])));
        let (plain, sealed) = (MemoryBackend::new(), MemoryBackend::new());
        open(&plain, &Vault::new(None)).unwrap();
        open(&sealed, &key(1)).unwrap();
        open(&sealed, &key(1)).unwrap();
        for (backend, vault, word) in [
            (&plain, key(1), "is not encrypted"),
            (&sealed, Vault::new(None), "no key was given"),
            (&sealed, key(2), "not the one"),
        ] {
            let error = open(backend, &vault).unwrap_err();
            assert!(
                matches!(error, Error::Key { .. }) && error.to_string().contains(word),
                "{error}"
            );
        }
    }

    #[test]
    fn every_flipped_bit_of_the_header_is_found() {
        let vault = Vault::new(Some(&StoreKey::new([7; 32])));
        let good = header(SCHEMA, &vault, [9; 16]);
        let backend = MemoryBackend::new();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let error = read(&bad, &backend, &vault, SCHEMA).unwrap_err();
            let named = matches!(error, Error::Damaged { .. } | Error::NotAStore { .. });
            assert!(named, "bit {bit}: {error}");
        }
        for end in 0..good.len() {
            assert!(
                read(&good[..end], &backend, &vault, SCHEMA).is_err(),
                "cut at {end}"
            );
        }
        assert!(read(&good, &backend, &vault, SCHEMA).is_ok());
    }
}
