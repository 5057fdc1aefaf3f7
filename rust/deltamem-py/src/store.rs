//! `Store`: memories by name, with their history; what can be done to them without a model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use deltamem_store::backend::redb::{RedbBackend, RedbOptions, SalvageBackend};
use deltamem_store::backend::redis::RedisBackend;
use deltamem_store::{CommitId, GcOptions, Limits, Options, RefKind, StoreKey, WhenFull};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::errors::{problem_to_python, store_to_python};
use crate::history::{self, Memory};
use crate::records;
use crate::snapshot::Snapshot;

const SCHEMES: [&str; 4] = ["redis://", "rediss://", "valkey://", "valkeys://"];

/// Memories by name, with branches, commits and a reflog: in one file, on a Redis or Valkey server, or in this process.
///
/// Any number of sessions and threads may share one store; the GIL is released while it works. ``commit`` and everything else that
/// changes a memory returns when the change is as durable as the place makes it: after fsync for a file.
///
/// Parameters
/// ----------
/// path_or_url : str or os.PathLike
///     A file, made if it is not there; or ``redis://[user:password@]host[:port][/database]``, ``rediss://`` for TLS (``valkey://`` and
///     ``valkeys://`` mean the same).
/// key : bytes or str, optional
///     32 bytes, or 64 hexadecimal digits: everything is encrypted (XChaCha20-Poly1305), each memory under a key of its own that is wrapped
///     by this one. It is fixed when the store is made. Whoever loses it loses everything.
/// read_only : bool
///     Opens a file for reading, beside other readers.
/// shared : bool
///     For a file: lets other processes read while this one writes; a commit takes two fsyncs then, and there is no journal. Every process
///     must say so.
/// ttl : float or datetime.timedelta, optional
///     How long a new memory lives without a change, in seconds.
/// max_commits, max_bytes : int, optional
///     What a new memory may keep.
/// when_full : {"refuse", "prune"}
///     What a commit beyond that does: raise ``QuotaError``, or let the oldest history go.
///
/// Raises
/// ------
/// StoreLockedError
///     Another process has the file open for writing.
/// StoreKeyError
///     The key is missing, not needed, or another one.
/// StoreFormatError, DamagedError
///     The file is no store, is of a newer version, or is damaged.
/// ServerError, UnavailableError
///     The address, the user or the password is wrong; the server does not answer in time.
///
/// Examples
/// --------
/// >>> with deltamem_rt.Store("memories.db") as store:                 # doctest: +SKIP
/// ...     with model.session("ada", store=store, autocommit=True) as session:
/// ...         session.chat("My dog is called Bruno.").read()
/// ...     print(store.log("ada"))
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct Store {
    pub(crate) inner: Arc<deltamem_store::Store>,
    redis: Option<Arc<RedisBackend>>,
    durability: &'static str,
    place: String,
}

impl Store {
    fn over(
        backend: Arc<dyn deltamem_store::backend::Backend>,
        options: Options,
        durability: &'static str,
    ) -> Result<Self, deltamem_store::Error> {
        let place = backend.place();
        Ok(Self {
            inner: Arc::new(deltamem_store::Store::open(backend, options)?),
            redis: None,
            durability,
            place,
        })
    }

    /// Runs store work without the GIL.
    fn work<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&deltamem_store::Store) -> Result<T, deltamem_store::Error> + Send,
    ) -> PyResult<T> {
        py.detach(|| work(&self.inner)).map_err(store_to_python)
    }

    /// The same for work that goes through history.
    fn study<T: Send>(
        &self,
        py: Python<'_>,
        name: &str,
        work: impl FnOnce(Memory<'_>) -> history::Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| {
            work(Memory {
                store: &self.inner,
                name,
            })
        })
        .map_err(problem_to_python)
    }
}

#[pymethods]
impl Store {
    #[new]
    #[pyo3(signature = (path_or_url, *, key=None, read_only=false, shared=false, ttl=None, max_commits=None, max_bytes=None,
                        when_full="refuse"))]
    fn new(
        py: Python<'_>,
        path_or_url: Bound<'_, PyAny>,
        key: Option<Bound<'_, PyAny>>,
        read_only: bool,
        shared: bool,
        ttl: Option<Bound<'_, PyAny>>,
        max_commits: Option<u64>,
        max_bytes: Option<u64>,
        when_full: &str,
    ) -> PyResult<Self> {
        let options = options(key, ttl, max_commits, max_bytes, when_full)?;
        let address = match path_or_url.cast::<PyString>() {
            Ok(text) => text.to_str()?,
            Err(_) => "",
        };
        if SCHEMES.iter().any(|scheme| address.starts_with(scheme)) {
            if read_only || shared {
                return Err(PyValueError::new_err(
                    "read_only and shared are for files; give the server's user the rights that it should have (ACL)",
                ));
            }
            let opened = py.detach(|| {
                let backend = Arc::new(RedisBackend::open(address)?);
                let mut store = Self::over(backend.clone(), options, "")?;
                store.redis = Some(backend);
                Ok(store)
            });
            return opened.map_err(store_to_python);
        }
        if let Some((scheme, _)) = address.split_once("://") {
            return Err(PyValueError::new_err(format!(
                "there is no store for {scheme}://; expected a path, redis:// or rediss:// (valkey://, valkeys://)"
            )));
        }
        let path: PathBuf = path_or_url.extract()?;
        py.detach(|| {
            let redb = RedbOptions {
                shared,
                ..RedbOptions::default()
            };
            let backend = if read_only {
                RedbBackend::open_read_only(&path, redb)?
            } else {
                RedbBackend::open(&path, redb)?
            };
            Self::over(
                Arc::new(backend),
                options,
                "a file, fsync before each commit returns",
            )
        })
        .map_err(store_to_python)
    }

    /// A store in this process's memory, gone with it. Takes the options of ``Store``.
    #[staticmethod]
    #[pyo3(signature = (*, key=None, ttl=None, max_commits=None, max_bytes=None, when_full="refuse"))]
    fn in_memory(
        key: Option<Bound<'_, PyAny>>,
        ttl: Option<Bound<'_, PyAny>>,
        max_commits: Option<u64>,
        max_bytes: Option<u64>,
        when_full: &str,
    ) -> PyResult<Self> {
        let options = options(key, ttl, max_commits, max_bytes, when_full)?;
        let backend = Arc::new(deltamem_store::backend::memory::MemoryBackend::new());
        Self::over(backend, options, "none: it is gone with the process").map_err(store_to_python)
    }

    /// Where the store is: a path, or an address without its password.
    #[getter]
    fn place(&self) -> &str {
        &self.place
    }

    /// Whether the store has a key.
    #[getter]
    fn encrypted(&self) -> bool {
        self.inner.encrypted()
    }

    /// The names of all memories that begin with ``prefix``, in the order of their UTF-8 bytes.
    #[pyo3(signature = (prefix=""))]
    fn names(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<String>> {
        self.work(py, |store| store.names(prefix))
    }

    fn __contains__(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        self.work(py, |store| match store.info(name) {
            Ok(_) => Ok(true),
            Err(deltamem_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        })
    }

    /// What a memory is: branches, tags, size, quota, times.
    ///
    /// Raises
    /// ------
    /// NotFoundError
    ///     There is no such memory.
    fn info<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let info = self.work(py, |store| store.info(name))?;
        records::info(py, &info)
    }

    /// A memory's branches: name to the id of its commit.
    fn branches<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let info = self.work(py, |store| store.info(name))?;
        Ok(records::refs(py, &info, RefKind::Branch)?.into_any())
    }

    /// A memory's tags: name to the id of its commit.
    fn tags<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let info = self.work(py, |store| store.info(name))?;
        Ok(records::refs(py, &info, RefKind::Tag)?.into_any())
    }

    /// The last ``n`` commits that ``ref`` reaches, children before parents. ``ref`` may be several: a sequence of texts.
    ///
    /// A ref is ``HEAD`` (the memory's branch in use), a branch, a tag, or at least 4 digits that an id begins with; behind it ``~n``, ``^``,
    /// ``^2``, or ``@{n}`` for where a branch was n moves ago.
    ///
    /// Raises
    /// ------
    /// NotFoundError, RefError
    ///     There is no such memory; the text names no commit of it.
    #[pyo3(signature = (name, r#ref=None, n=20))]
    fn log<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        r#ref: Option<Bound<'py, PyAny>>,
        n: usize,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let refs = match r#ref {
            None => vec!["HEAD".to_owned()],
            Some(one) if one.is_instance_of::<PyString>() => vec![one.extract()?],
            Some(several) => several.extract::<Vec<String>>()?,
        };
        let refs: Vec<&str> = refs.iter().map(String::as_str).collect();
        let found = self.work(py, |store| store.log(name, &refs, n))?;
        records::commits(py, &found)
    }

    /// The commit that ``ref`` means.
    #[pyo3(signature = (name, r#ref="HEAD"))]
    fn show<'py>(&self, py: Python<'py>, name: &str, r#ref: &str) -> PyResult<Bound<'py, PyAny>> {
        let found = self.work(py, |store| store.show(name, r#ref))?;
        records::commit(py, &found)
    }

    /// The state of the commit that ``ref`` means, whatever model it belongs to.
    ///
    /// Raises
    /// ------
    /// DamagedError
    ///     The bytes are not those that were committed.
    #[pyo3(signature = (name, r#ref="HEAD"))]
    fn snapshot(&self, py: Python<'_>, name: &str, r#ref: &str) -> PyResult<Snapshot> {
        let (_, inner) = self.work(py, |store| store.checkout(name, r#ref))?;
        Ok(Snapshot { inner })
    }

    /// What changed from commit ``a`` to commit ``b``; ``a=None`` is the empty memory.
    ///
    /// Parameters
    /// ----------
    /// directions : int
    ///     How many of the directions that moved most are wanted of each head.
    #[pyo3(signature = (name, a=Some("HEAD~1"), b="HEAD", *, directions=3), text_signature = "($self, name, a='HEAD~1', b='HEAD', *, directions=3)")]
    fn diff<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        a: Option<&str>,
        b: &str,
        directions: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (before, after, diff) = self.study(py, name, |memory| {
            let before = a.map(|a| memory.store.checkout(name, a)).transpose()?;
            let after = memory.store.checkout(name, b)?;
            let diff = history::diff(before.as_ref().map(|(_, state)| state), &after.1, directions)?;
            Ok((before, after, diff))
        })?;
        records::diff(
            py,
            before.as_ref().map(|(commit, _)| commit),
            Some(&after.0),
            &diff,
        )
    }

    /// Merge what ``ref`` names into a branch (the one in use, unless ``into`` says which): a fast-forward where the branch has nothing of
    /// its own, else base + (ours − base) + (theirs − base) with the common ancestor that Git would take.
    ///
    /// Warns with ``MergeWarning`` where one side disturbs what the other's facts read by half or more.
    ///
    /// Raises
    /// ------
    /// ConflictError
    ///     The branch moved meanwhile; nothing was changed, try again.
    #[pyo3(signature = (name, r#ref, *, into=None, message="", meta=None))]
    fn merge<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        r#ref: &str,
        into: Option<String>,
        message: &str,
        meta: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let meta = meta_text(meta)?;
        let merged = self.study(py, name, |memory| {
            let branch = match into {
                Some(branch) => branch,
                None => memory.store.info(name)?.head,
            };
            let head = branch_head(memory, &branch)?;
            let theirs = memory.store.resolve(name, r#ref)?;
            history::merge(memory, &branch, head, theirs, r#ref, message, meta.as_deref())
        })?;
        warn_of(py, &merged)?;
        records::merged(py, &merged)
    }

    /// Move a branch (the one in use, unless ``branch`` says which) to the commit that ``ref`` means. The reflog keeps the move:
    /// ``rollback(name, "main@{1}")`` takes it back.
    #[pyo3(signature = (name, r#ref, *, branch=None))]
    fn rollback<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        r#ref: &str,
        branch: Option<String>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let moved = self.work(py, |store| {
            let branch = match branch {
                Some(branch) => branch,
                None => store.info(name)?.head,
            };
            store.rollback(name, &branch, r#ref, None)
        })?;
        records::commit(py, &moved)
    }

    /// Make a branch at the commit that ``at`` means.
    ///
    /// Raises
    /// ------
    /// ExistsError
    ///     There is a branch or a tag of that name.
    #[pyo3(signature = (name, branch, at="HEAD"))]
    fn branch<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        branch: &str,
        at: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let found = self.work(py, |store| store.branch(name, branch, at))?;
        records::commit(py, &found)
    }

    /// Make a tag at the commit that ``at`` means.
    #[pyo3(signature = (name, tag, at="HEAD"))]
    fn tag<'py>(&self, py: Python<'py>, name: &str, tag: &str, at: &str) -> PyResult<Bound<'py, PyAny>> {
        let found = self.work(py, |store| store.tag(name, tag, at))?;
        records::commit(py, &found)
    }

    /// Make ``branch`` the one that ``HEAD`` means.
    fn switch(&self, py: Python<'_>, name: &str, branch: &str) -> PyResult<()> {
        self.work(py, |store| store.use_branch(name, branch))
    }

    /// Delete a branch, not the one in use. Its commits stay as long as another branch, a tag or the reflog names them.
    fn delete_branch(&self, py: Python<'_>, name: &str, branch: &str) -> PyResult<()> {
        self.work(py, |store| store.delete_branch(name, branch))
    }

    /// Delete a tag.
    fn delete_tag(&self, py: Python<'_>, name: &str, tag: &str) -> PyResult<()> {
        self.work(py, |store| store.delete_tag(name, tag))
    }

    /// The last ``n`` moves of the memory's branches and tags, or of the one called ``of``; the newest first.
    #[pyo3(signature = (name, of=None, n=20))]
    fn reflog<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        of: Option<&str>,
        n: usize,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let moves = self.work(py, |store| store.reflog(name, of, n))?;
        moves.iter().map(|entry| records::moved(py, entry)).collect()
    }

    /// Copy a memory to a new name, where it goes its own way: everything, or with ``at`` only that commit's history. Nothing is shared.
    ///
    /// Raises
    /// ------
    /// ExistsError
    ///     There is a memory of the new name.
    #[pyo3(signature = (name, new_name, at=None))]
    fn fork(&self, py: Python<'_>, name: &str, new_name: &str, at: Option<&str>) -> PyResult<()> {
        self.work(py, |store| store.fork(name, new_name, at))
    }

    /// Delete a memory with all its commits and branches. In a store with a key its key is destroyed with it, so that no copy of the bytes
    /// can be read any more; without one the bytes leave the file at the next ``gc()``.
    fn delete(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.work(py, |store| store.delete(name))
    }

    /// Take the change of one commit out of a branch (the one in use, unless ``branch`` says which): every later commit is made again with
    /// its state as it would be without. Exact for the last commit; an estimate with ``unseparated`` as its error where later turns
    /// overwrote part of it. What later turns read of it and wrote again stays: see ``docs/memory-as-git.md``.
    ///
    /// The old commits stay in reach of the reflog until ``gc(reflog=0)``.
    ///
    /// Raises
    /// ------
    /// RefError
    ///     The commit is a merge, is not in the branch's history, or what was before it was pruned.
    /// ConflictError
    ///     The branch moved meanwhile; it stays as it is.
    #[pyo3(signature = (name, commit, *, branch=None))]
    fn redact<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        commit: &str,
        branch: Option<String>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let redacted = self.study(py, name, |memory| {
            let branch = match branch {
                Some(branch) => branch,
                None => memory.store.info(name)?.head,
            };
            let head = branch_head(memory, &branch)?;
            let commit = memory.store.resolve(name, commit)?;
            history::redact(memory, &branch, head, commit)
        })?;
        records::redacted(py, &redacted)
    }

    /// Write a memory to a file: complete, with a checksum, not encrypted, the same from every kind of store. It appears whole or not
    /// at all.
    ///
    /// Raises
    /// ------
    /// FileExistsError
    ///     There is a file already.
    fn export(&self, py: Python<'_>, name: &str, path: PathBuf) -> PyResult<()> {
        self.work(py, |store| store.export(name, &path))
    }

    /// Read a memory from a file that ``export`` wrote, under its own name or another one.
    ///
    /// Returns
    /// -------
    /// str
    ///     The memory's name.
    ///
    /// Raises
    /// ------
    /// ExistsError
    ///     There is a memory of that name.
    /// StoreFormatError, DamagedError
    ///     The file is none of that kind, newer, or damaged.
    #[pyo3(signature = (path, name=None))]
    fn import_(&self, py: Python<'_>, path: PathBuf, name: Option<&str>) -> PyResult<String> {
        self.work(py, |store| store.import(&path, name))
    }

    /// Take away expired memories, old moves, and commits that nothing names any more; then make the bytes of all that is gone leave the
    /// file.
    ///
    /// Parameters
    /// ----------
    /// reflog : float or datetime.timedelta, optional
    ///     Moves older than so many seconds go, and the commits that only they name. 90 days by default; 0 keeps what branches and tags
    ///     reach.
    /// compact : bool
    ///     Whether the file is written anew. Commits wait meanwhile, reads do not.
    #[pyo3(signature = (*, reflog=None, compact=true))]
    fn gc<'py>(
        &self,
        py: Python<'py>,
        reflog: Option<Bound<'py, PyAny>>,
        compact: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut options = GcOptions {
            compact,
            ..GcOptions::default()
        };
        if let Some(reflog) = reflog {
            options.reflog_ms = milliseconds("reflog", &reflog, true)?;
        }
        let report = self.work(py, |store| store.gc(&options))?;
        records::gc(py, &report)
    }

    /// Look at everything: checksums, each commit's id and parents, each state, each branch, tag and move. Changes nothing. What is damaged
    /// stands in the report.
    fn verify<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let report = self.work(py, deltamem_store::Store::verify)?;
        records::verified(py, &report)
    }

    /// Save what is whole into a new file at ``path``, with the same key; this store stays as it is. For a file that does not open any
    /// more there is ``Store.salvage``.
    #[pyo3(signature = (path, *, key=None))]
    fn repair<'py>(
        &self,
        py: Python<'py>,
        path: PathBuf,
        key: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let key = key.map(|key| store_key(&key)).transpose()?;
        let report = self.work(py, |store| {
            if store.encrypted() != key.is_some() {
                return Err(deltamem_store::Error::Key {
                    place: path.display().to_string(),
                    problem: "what is encrypted stays so: give the new file a key exactly when this store has one",
                });
            }
            save_into(store, &path, key)
        })?;
        records::repaired(py, &report)
    }

    /// Save what is whole of a damaged file into a new one at ``into``. The damaged file is not changed.
    ///
    /// Raises
    /// ------
    /// FileExistsError
    ///     ``into`` exists.
    /// StoreFormatError, DamagedError
    ///     Nothing of the file can be read.
    #[staticmethod]
    #[pyo3(signature = (path, into, *, key=None))]
    fn salvage<'py>(
        py: Python<'py>,
        path: PathBuf,
        into: PathBuf,
        key: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let key = key.map(|key| store_key(&key)).transpose()?;
        let report = py.detach(|| {
            let options = Options {
                key: key.clone(),
                ..Options::default()
            };
            let damaged =
                deltamem_store::Store::open_damaged(Arc::new(SalvageBackend::open(&path)?), options)?;
            save_into(&damaged, &into, key)
        });
        records::repaired(py, &report.map_err(store_to_python)?)
    }

    /// What the store holds.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (stats, durability) = self.work(py, |store| {
            let durability = match &self.redis {
                Some(redis) => redis.durability()?,
                None => self.durability.to_owned(),
            };
            Ok((store.stats()?, durability))
        })?;
        records::stats(py, &stats, &durability)
    }

    /// Set how long a memory lives without a change, in seconds or as a timedelta; None: for ever.
    fn set_ttl(&self, py: Python<'_>, name: &str, ttl: Option<Bound<'_, PyAny>>) -> PyResult<()> {
        let ttl = ttl.map(|ttl| milliseconds("ttl", &ttl, false)).transpose()?;
        self.work(py, |store| store.set_ttl(name, ttl))
    }

    /// Set what a memory may keep; it holds from the next commit on.
    #[pyo3(signature = (name, *, max_commits=None, max_bytes=None, when_full="refuse"))]
    fn set_quota(
        &self,
        py: Python<'_>,
        name: &str,
        max_commits: Option<u64>,
        max_bytes: Option<u64>,
        when_full: &str,
    ) -> PyResult<()> {
        let limits = limits(max_commits, max_bytes, when_full)?;
        self.work(py, |store| store.set_limits(name, limits))
    }

    /// Wait for what is under way and release the file or the connections. Sessions on the store cannot commit after it. Closing twice does
    /// nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.work(py, deltamem_store::Store::close)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let encrypted = if self.encrypted() { ", encrypted" } else { "" };
        format!("Store('{}'{encrypted})", self.place)
    }
}

/// The head of a branch that must be there.
fn branch_head(memory: Memory<'_>, branch: &str) -> history::Result<CommitId> {
    let found = memory.store.head(memory.name, branch)?;
    found.ok_or_else(|| {
        history::Problem::Store(deltamem_store::Error::NotFound {
            what: "branch",
            name: branch.to_owned(),
            in_memory: Some(memory.name.to_owned()),
            hint: "Store.branches() lists what there is".into(),
        })
    })
}

fn save_into(
    store: &deltamem_store::Store,
    path: &Path,
    key: Option<StoreKey>,
) -> Result<deltamem_store::RepairReport, deltamem_store::Error> {
    if path.exists() {
        return Err(deltamem_store::Error::Exists {
            what: "file",
            name: path.display().to_string(),
            hint: "give another path, or remove it first",
        });
    }
    let options = Options {
        key,
        ..Options::default()
    };
    let backend = RedbBackend::open(path, RedbOptions::default())?;
    let into = deltamem_store::Store::open(Arc::new(backend), options)?;
    let report = store.repair(&into)?;
    into.close()?;
    Ok(report)
}

fn options(
    key: Option<Bound<'_, PyAny>>,
    ttl: Option<Bound<'_, PyAny>>,
    max_commits: Option<u64>,
    max_bytes: Option<u64>,
    when_full: &str,
) -> PyResult<Options> {
    Ok(Options {
        key: key.map(|key| store_key(&key)).transpose()?,
        limits: limits(max_commits, max_bytes, when_full)?,
        ttl_ms: ttl.map(|ttl| milliseconds("ttl", &ttl, false)).transpose()?,
        ..Options::default()
    })
}

fn limits(commits: Option<u64>, bytes: Option<u64>, when_full: &str) -> PyResult<Limits> {
    for (name, limit) in [("max_commits", commits), ("max_bytes", bytes)] {
        if limit == Some(0) {
            return Err(PyValueError::new_err(format!(
                "{name} is 0, expected at least 1, or None for any number"
            )));
        }
    }
    let when_full = match when_full {
        "refuse" => WhenFull::Refuse,
        "prune" => WhenFull::Prune,
        other => {
            return Err(PyValueError::new_err(format!(
                "when_full is {other:?}, expected \"refuse\" or \"prune\""
            )));
        }
    };
    Ok(Limits {
        commits,
        bytes,
        when_full,
    })
}

/// A store's key: 32 bytes, or 64 hexadecimal digits. What was given never stands in a message.
fn store_key(value: &Bound<'_, PyAny>) -> PyResult<StoreKey> {
    const EXPECTED: &str = "expected 32 bytes or 64 hexadecimal digits, such as secrets.token_bytes(32); a password is no key: derive one from it";
    if let Ok(bytes) = value.cast::<PyBytes>() {
        let bytes = bytes.as_bytes();
        return <[u8; 32]>::try_from(bytes)
            .map(StoreKey::new)
            .map_err(|_| PyValueError::new_err(format!("the key has {} bytes, {EXPECTED}", bytes.len())));
    }
    let Ok(text) = value.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!(
            "the key is {}, {EXPECTED}",
            value.get_type().name()?
        )));
    };
    let digits = text.to_str()?.as_bytes();
    let mut key = [0; 32];
    let digit = |at: usize| digits.get(at).and_then(|digit| (*digit as char).to_digit(16));
    for (index, byte) in key.iter_mut().enumerate() {
        match (digit(2 * index), digit(2 * index + 1)) {
            (Some(high), Some(low)) if digits.len() == 64 => {
                *byte = u8::try_from(high * 16 + low).unwrap_or_default();
            }
            _ => {
                return Err(PyValueError::new_err(format!(
                    "the key is a text of {} bytes, {EXPECTED}",
                    digits.len()
                )));
            }
        }
    }
    Ok(StoreKey::new(key))
}

/// Seconds, or a timedelta, in milliseconds.
fn milliseconds(name: &str, value: &Bound<'_, PyAny>, zero: bool) -> PyResult<u64> {
    let seconds: f64 = match value.call_method0("total_seconds") {
        Ok(seconds) => seconds.extract()?,
        Err(_) => value
            .extract()
            .map_err(|_| PyTypeError::new_err(format!("{name} is no number of seconds and no timedelta")))?,
    };
    let ms = (seconds * 1000.0).round();
    let most = 9e15;
    if !(ms >= 0.0 && ms <= most) || (ms < 1.0 && !zero) {
        return Err(PyValueError::new_err(format!(
            "{name} is {seconds} seconds, expected {} and at most {}",
            if zero { "at least 0" } else { "more than 0" },
            most / 1000.0
        )));
    }
    // Checked to lie in u64's range above.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(ms as u64)
}

/// The text of a commit's meta.
pub(crate) fn meta_text(meta: Option<Bound<'_, PyAny>>) -> PyResult<Option<String>> {
    let Some(meta) = meta else { return Ok(None) };
    let arguments = pyo3::types::PyDict::new(meta.py());
    arguments.set_item("allow_nan", false)?;
    arguments.set_item("ensure_ascii", false)?;
    meta.py()
        .import("json")?
        .call_method("dumps", (meta,), Some(&arguments))?
        .extract()
        .map(Some)
}

/// Says when two sides of a merge are in each other's way.
pub(crate) fn warn_of(py: Python<'_>, merged: &history::Merged) -> PyResult<()> {
    let Some(conflict) = merged.conflict else {
        return Ok(());
    };
    if conflict.loss_ours.max(conflict.loss_theirs) < history::WARN_FROM {
        return Ok(());
    }
    let message = format!(
        "both sides wrote much the same keys (overlap {:.2}): reads of what our side wrote are off by {:.2} of themselves, of what \
         theirs wrote by {:.2}; ask for the facts, and roll back if they are gone",
        conflict.overlap,
        disturbance(conflict.loss_ours),
        disturbance(conflict.loss_theirs),
    );
    let category = py.import("deltamem_rt.errors")?.getattr("MergeWarning")?;
    py.import("warnings")?.call_method1("warn", (message, category))?;
    Ok(())
}

/// e / s of a loss e / √(e² + s²).
fn disturbance(loss: f64) -> f64 {
    loss / (1.0 - loss * loss).max(1e-12).sqrt()
}
