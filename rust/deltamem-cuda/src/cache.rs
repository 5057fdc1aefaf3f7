//! Compiled images on disk, so that a card's kernels are compiled once for a version of them and not with every process. A file says what it is
//! an image of and what its bytes hash to; one that says something else is no image, and is made anew.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a file begins with: the format's name and version.
const MAGIC: &[u8; 8] = b"DMCUDA\0\x01";
const HASH: usize = blake3::OUT_LEN;
/// The header: magic, the key, the image's length and the image's hash.
const HEADER: usize = MAGIC.len() + HASH + size_of::<u64>() + HASH;
/// Images are some hundred kilobytes; what is larger is none.
const LARGEST: u64 = 64 << 20;

/// What an image is made of: the text, all options, the compiler's version and the target. Its parts are told apart by their lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key([u8; HASH]);

impl Key {
    pub(crate) fn new(parts: &[&str]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self(hasher.finalize().into())
    }

    fn file(&self) -> String {
        let name = blake3::Hash::from_bytes(self.0).to_hex();
        format!("{}.image", &name[..32])
    }
}

/// A folder of images, or none.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// A cache in this folder, which is made when there is something to keep.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
        }
    }

    /// The user's own: `deltamem/kernels` in `$XDG_CACHE_HOME`, else in `~/.cache` (Windows: in `%LOCALAPPDATA%`). None where none of them is
    /// an absolute path.
    pub fn of_user() -> Self {
        let variable = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let base = if cfg!(windows) {
            variable("LOCALAPPDATA")
        } else {
            variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
        };
        Self {
            folder: base.map(|base| base.join("deltamem").join("kernels")),
        }
    }

    /// The image of a key, if there is a file that is one. A file that others may write to is none.
    pub(crate) fn load(&self, key: &Key) -> Option<Vec<u8>> {
        let path = self.folder.as_ref()?.join(key.file());
        let found = fs::symlink_metadata(&path).ok()?;
        if !found.is_file() || found.len() > LARGEST || others_write(&found) {
            return None;
        }
        let bytes = fs::read(path).ok()?;
        let (header, image) = bytes.split_at_checked(HEADER)?;
        (header == Self::header(key, image)).then(|| image.to_vec())
    }

    /// Keeps an image. What fails here is no error: it is compiled again next time.
    pub(crate) fn store(&self, key: &Key, image: &[u8]) {
        if let Some(folder) = &self.folder {
            let _ = Self::write(folder, key, image);
        }
    }

    /// Takes out an image that turned out to be wrong.
    pub(crate) fn forget(&self, key: &Key) {
        if let Some(folder) = &self.folder {
            let _ = fs::remove_file(folder.join(key.file()));
        }
    }

    fn write(folder: &Path, key: &Key, image: &[u8]) -> std::io::Result<()> {
        make_private(folder)?;
        // Each process writes a file of its own and renames it, so that nobody ever sees half of one.
        let own = folder.join(format!("{}.{}", key.file(), std::process::id()));
        let done = private_file(&own).and_then(|mut file| {
            file.write_all(&Self::header(key, image))?;
            file.write_all(image)?;
            file.sync_all()?;
            fs::rename(&own, folder.join(key.file()))
        });
        if done.is_err() {
            let _ = fs::remove_file(&own);
        }
        done
    }

    fn header(key: &Key, image: &[u8]) -> Vec<u8> {
        let length = (image.len() as u64).to_le_bytes();
        [&MAGIC[..], &key.0, &length, blake3::hash(image).as_bytes()].concat()
    }
}

#[cfg(unix)]
fn others_write(found: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    found.mode() & 0o022 != 0
}

#[cfg(not(unix))]
fn others_write(_found: &fs::Metadata) -> bool {
    false
}

#[cfg(unix)]
fn make_private(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

#[cfg(not(unix))]
fn make_private(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)
}

#[cfg(unix)]
fn private_file(path: &Path) -> std::io::Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

#[cfg(not(unix))]
fn private_file(path: &Path) -> std::io::Result<fs::File> {
    fs::File::create(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_image_comes_back_and_a_damaged_or_foreign_file_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::in_folder(folder.path().join("deep").join("er"));
        let (key, other) = (Key::new(&["a", "bc"]), Key::new(&["ab", "c"]));
        assert_ne!(key, other);
        assert_eq!(cache.load(&key), None);
        cache.store(&key, b"an image");
        assert_eq!(cache.load(&key).unwrap(), b"an image");
        assert_eq!(cache.load(&other), None);

        let path = folder.path().join("deep").join("er").join(key.file());
        let whole = fs::read(&path).unwrap();
        // Every byte counts, of the header and of the image, and so does the length.
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.load(&key), None, "byte {at}");
        }
        for damaged in [&whole[..whole.len() - 1], &whole[..HEADER - 1], &[][..]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.load(&key), None);
        }
        // One of another key under this one's name.
        cache.store(&other, b"an image");
        fs::copy(path.with_file_name(other.file()), &path).unwrap();
        assert_eq!(cache.load(&key), None);
        cache.store(&key, b"a new image");
        assert_eq!(cache.load(&key).unwrap(), b"a new image");
        cache.forget(&key);
        assert_eq!(cache.load(&key), None);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_may_write_is_no_image() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::in_folder(folder.path());
        let key = Key::new(&["x"]);
        cache.store(&key, b"an image");
        let path = folder.path().join(key.file());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(cache.load(&key), None);
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache::in_folder(file.path().join("under a file"));
        let key = Key::new(&[]);
        cache.store(&key, b"x");
        assert_eq!(cache.load(&key), None);
        assert_eq!(Cache::default().load(&key), None);
    }
}
