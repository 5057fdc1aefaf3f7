//! How bytes are closed before a backend gets them, and opened again: with a check against damage, or, where the store has a key,
//! encrypted under a key of the memory's own. Knows nothing of what the bytes mean.
//!
//! ```text
//! store's key (32 bytes, the caller's)
//!   ├─ name key        group = keyed BLAKE3 of the memory's name
//!   ├─ wrapping key ── XChaCha20-Poly1305 ── memory's key (32 random bytes, wrapped in the memory's head and nowhere else)
//!   └─ check           tells a wrong key                    ├─ data key     XChaCha20-Poly1305 of heads, commits, states, log
//!                                                           ├─ nonce key    nonce = keyed BLAKE3 of place and plaintext
//!                                                           └─ index key    an object's key in the group, out of its id
//! ```
//!
//! Every value is bound to its place (group, kind, key): it does not open anywhere else. (A state without a key is bound to its key, the
//! hash of its bytes.) Nonces are made of the plaintext, so equal
//! plaintexts at one place give equal bytes and no nonce serves two of them; heads never repeat, since every change counts up.

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use crate::backend::{Group, Key, Kind};
use crate::commit::StateId;
use crate::error::Error;

const PLAIN: u8 = 1;
const SEALED: u8 = 2;
/// A state without a key: its place is named by the hash of its bytes, which is check enough.
const NAMED: u8 = 3;
const CHECK: usize = 16;
const NONCE: usize = 24;
const TAG: usize = 16;
const WRAPPED: usize = NONCE + 32 + TAG;

type Secret = Zeroizing<[u8; 32]>;

/// A store's key: 32 bytes that only the caller keeps. Wiped from memory when dropped.
#[derive(Clone)]
pub struct StoreKey(Secret);

impl StoreKey {
    /// A key of these bytes. They should come from a random source, such as a key management service.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

impl std::fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoreKey(...)")
    }
}

/// Where a value stands: the context that it is bound to.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Head(Group),
    Value(Group, Key),
}

impl Place {
    fn bytes(self) -> [u8; 65] {
        let mut out = [0; 65];
        let (group, kind, id) = match self {
            Self::Head(group) => (group, b'h', [0; 32]),
            Self::Value(group, key) => (group, key.kind as u8, key.id),
        };
        out[..32].copy_from_slice(&group.0);
        out[32] = kind;
        out[33..].copy_from_slice(&id);
        out
    }
}

/// The store's side: names and wrapped keys.
pub(crate) enum Vault {
    Plain,
    Sealed {
        names: Secret,
        wrapping: Secret,
        check: [u8; 32],
    },
}

/// One memory's side: the key of its values.
#[derive(Clone)]
pub(crate) enum Domain {
    Plain,
    Sealed(Box<DomainKeys>),
}

#[derive(Clone)]
pub(crate) struct DomainKeys {
    wrapped: [u8; WRAPPED],
    data: Secret,
    nonce: Secret,
    index: Secret,
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::Io {
        place: "the system's random source".into(),
        doing: "reading it",
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(bytes)
}

fn derived(context: &str, key: &[u8; 32]) -> Secret {
    Zeroizing::new(blake3::derive_key(context, key))
}

fn cipher(key: &Secret) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new((&**key).into())
}

fn encrypt(key: &Secret, nonce: &[u8; NONCE], place: Place, plain: &[u8]) -> Result<Vec<u8>, Error> {
    let aad = place.bytes();
    cipher(key)
        .encrypt(
            &XNonce::from(*nonce),
            Payload {
                msg: plain,
                aad: &aad,
            },
        )
        .map_err(|_| {
            Error::damaged(
                "a value to be written",
                format!("{} bytes are too many to encrypt", plain.len()),
            )
        })
}

fn decrypt(key: &Secret, nonce: &[u8], place: Place, sealed: &[u8]) -> Result<Vec<u8>, String> {
    let nonce: [u8; NONCE] = nonce.try_into().map_err(|_| "its nonce is cut".to_owned())?;
    let aad = place.bytes();
    cipher(key)
        .decrypt(
            &XNonce::from(nonce),
            Payload {
                msg: sealed,
                aad: &aad,
            },
        )
        .map_err(|_| "its authentication tag does not belong to its bytes and place".to_owned())
}

fn check_of(place: Place, plain: &[u8]) -> [u8; CHECK] {
    let mut hasher = blake3::Hasher::new_derive_key("deltamem_rt store: check 1");
    hasher.update(&place.bytes()).update(plain);
    let mut check = [0; CHECK];
    hasher.finalize_xof().fill(&mut check);
    check
}

fn close_plain(place: Place, plain: &[u8]) -> Vec<u8> {
    if let Place::Value(_, key) = place
        && key.kind == Kind::State
    {
        return [&[NAMED], plain].concat();
    }
    let mut out = Vec::with_capacity(1 + plain.len() + CHECK);
    out.push(PLAIN);
    out.extend_from_slice(plain);
    out.extend_from_slice(&check_of(place, plain));
    out
}

fn open_plain(place: Place, bytes: &[u8]) -> Result<Vec<u8>, String> {
    let Some((plain, check)) = bytes.split_last_chunk::<CHECK>() else {
        return Err(format!("{} bytes are left of it", bytes.len()));
    };
    if check_of(place, plain) != *check {
        return Err("its check does not belong to its bytes and place".into());
    }
    Ok(plain.to_vec())
}

impl Vault {
    pub(crate) fn new(key: Option<&StoreKey>) -> Self {
        match key {
            None => Self::Plain,
            Some(key) => Self::Sealed {
                names: derived("deltamem_rt store: name key 1", &key.0),
                wrapping: derived("deltamem_rt store: wrapping key 1", &key.0),
                check: blake3::derive_key("deltamem_rt store: key check 1", &*key.0),
            },
        }
    }

    /// What the store's header keeps to tell a wrong key; `None` without one.
    pub(crate) fn check(&self) -> Option<[u8; 32]> {
        match self {
            Self::Plain => None,
            Self::Sealed { check, .. } => Some(*check),
        }
    }

    /// The group of the memory of this name.
    pub(crate) fn group(&self, name: &str) -> Group {
        match self {
            Self::Plain => Group(blake3::derive_key("deltamem_rt store: group 1", name.as_bytes())),
            Self::Sealed { names, .. } => Group(*blake3::keyed_hash(names, name.as_bytes()).as_bytes()),
        }
    }

    /// A new memory's keys.
    pub(crate) fn new_domain(&self, group: Group) -> Result<Domain, Error> {
        let Self::Sealed { wrapping, .. } = self else {
            return Ok(Domain::Plain);
        };
        let key = Zeroizing::new(random::<32>()?);
        let nonce = random::<NONCE>()?;
        let sealed = encrypt(wrapping, &nonce, Place::Head(group), &*key)?;
        let mut wrapped = [0; WRAPPED];
        wrapped[..NONCE].copy_from_slice(&nonce);
        wrapped[NONCE..].copy_from_slice(&sealed);
        Ok(Domain::of(&key, wrapped))
    }

    /// A memory's keys and what its head says.
    pub(crate) fn open_head(&self, group: Group, bytes: &[u8]) -> Result<(Domain, Vec<u8>), String> {
        let place = Place::Head(group);
        match (self, bytes.split_first()) {
            (Self::Plain, Some((&PLAIN, rest))) => Ok((Domain::Plain, open_plain(place, rest)?)),
            (Self::Sealed { wrapping, .. }, Some((&SEALED, rest))) => {
                let Some((wrapped, rest)) = rest.split_first_chunk::<WRAPPED>() else {
                    return Err(format!("{} bytes are left of it", bytes.len()));
                };
                let key = Zeroizing::new(decrypt(wrapping, &wrapped[..NONCE], place, &wrapped[NONCE..])?);
                let key: Secret = Zeroizing::new(
                    key.as_slice()
                        .try_into()
                        .map_err(|_| "its key is cut".to_owned())?,
                );
                let domain = Domain::of(&key, *wrapped);
                let plain = domain.open(place, &[&[SEALED], rest].concat())?;
                Ok((domain, plain))
            }
            (_, found) => Err(wrong_mode(found.map(|(mode, _)| *mode))),
        }
    }
}

impl Domain {
    fn of(key: &Secret, wrapped: [u8; WRAPPED]) -> Self {
        Self::Sealed(Box::new(DomainKeys {
            wrapped,
            data: derived("deltamem_rt store: data key 1", key),
            nonce: derived("deltamem_rt store: nonce key 1", key),
            index: derived("deltamem_rt store: index key 1", key),
        }))
    }

    /// Where an object of this id stands.
    pub(crate) fn key(&self, kind: Kind, id: &[u8; 32]) -> Key {
        let id = match self {
            Self::Plain => *id,
            Self::Sealed(keys) => *blake3::Hasher::new_keyed(&keys.index)
                .update(&[kind as u8])
                .update(id)
                .finalize()
                .as_bytes(),
        };
        Key { kind, id }
    }

    /// Bytes to be written at `place`.
    pub(crate) fn close(&self, place: Place, plain: &[u8]) -> Result<Vec<u8>, Error> {
        let Self::Sealed(keys) = self else {
            return Ok(close_plain(place, plain));
        };
        let mut nonce = [0; NONCE];
        blake3::Hasher::new_keyed(&keys.nonce)
            .update(&place.bytes())
            .update(plain)
            .finalize_xof()
            .fill(&mut nonce);
        let mut out = vec![SEALED];
        if let Place::Head(_) = place {
            out.extend_from_slice(&keys.wrapped);
        }
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&encrypt(&keys.data, &nonce, place, plain)?);
        Ok(out)
    }

    /// What bytes found at `place` say. A head's wrapped key must have been taken off already.
    pub(crate) fn open(&self, place: Place, bytes: &[u8]) -> Result<Vec<u8>, String> {
        match (self, bytes.split_first()) {
            (Self::Plain, Some((&PLAIN, rest))) => open_plain(place, rest),
            (Self::Plain, Some((&NAMED, rest))) => match place {
                Place::Value(_, key) if key.kind == Kind::State && StateId::of(rest).0 == key.id => {
                    Ok(rest.to_vec())
                }
                _ => Err("its bytes are not those that its key names".into()),
            },
            (Self::Sealed(keys), Some((&SEALED, rest))) => {
                let Some((nonce, sealed)) = rest.split_at_checked(NONCE) else {
                    return Err(format!("{} bytes are left of it", bytes.len()));
                };
                decrypt(&keys.data, nonce, place, sealed)
            }
            (_, found) => Err(wrong_mode(found.map(|(mode, _)| *mode))),
        }
    }
}

fn wrong_mode(found: Option<u8>) -> String {
    match found {
        None => "it is empty".into(),
        Some(PLAIN | NAMED) => "it is not encrypted, and the store is".into(),
        Some(SEALED) => "it is encrypted, and the store is not".into(),
        Some(other) => format!("it begins with {other}, expected {PLAIN} or {SEALED}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_value_opens_at_its_place_and_as_it_was_written_only() {
        let group = Group([1; 32]);
        let plain = b"what was written".to_vec();
        let named = |kind| Key {
            kind,
            id: StateId::of(&plain).0,
        };
        let vault = Vault::new(Some(&StoreKey::new([7; 32])));
        for domain in [Domain::Plain, vault.new_domain(group).unwrap()] {
            for kind in Kind::ALL {
                let place = Place::Value(group, named(kind));
                let closed = domain.close(place, &plain).unwrap();
                assert_eq!(domain.open(place, &closed).unwrap(), plain);
                for bit in 0..closed.len() * 8 {
                    let mut bad = closed.clone();
                    bad[bit / 8] ^= 1 << (bit % 8);
                    assert!(domain.open(place, &bad).is_err(), "{kind:?}, bit {bit}");
                }
                let other = Key {
                    id: [9; 32],
                    ..named(kind)
                };
                assert!(domain.open(Place::Value(group, other), &closed).is_err());
                assert!(domain.open(Place::Head(group), &closed).is_err());
                for other in Kind::ALL.into_iter().filter(|other| *other != kind) {
                    assert!(
                        domain.open(Place::Value(group, named(other)), &closed).is_err(),
                        "{kind:?} as {other:?}"
                    );
                }
                // A state without a key is what its key says, wherever it stands.
                let elsewhere = domain.open(Place::Value(Group([2; 32]), named(kind)), &closed);
                assert_eq!(
                    elsewhere.is_ok(),
                    kind == Kind::State && matches!(domain, Domain::Plain)
                );
            }
        }
    }
}
