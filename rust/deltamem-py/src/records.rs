//! What the store says, as the small immutable classes of `deltamem_rt._records` and `deltamem_rt._changes`.

use deltamem_core::edits::diff::{Change, Diff};
use deltamem_store::{
    Commit, Damage, GcReport, Info, Limits, Move, Parts, RefKind, RepairReport, Stats, VerifyReport, WhenFull,
};
use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::history::{Blamed, Case, Merged, Redacted};

type Made<'py> = PyResult<Bound<'py, PyAny>>;

/// Calls a class with keyword arguments.
macro_rules! made {
    ($py:expr, $module:literal, $class:literal, $($name:ident: $value:expr),+ $(,)?) => {{
        let arguments = PyDict::new($py);
        $(arguments.set_item(stringify!($name), $value)?;)+
        $py.import(concat!("deltamem_rt.", $module))?.getattr($class)?.call((), Some(&arguments))
    }};
}

fn when(py: Python<'_>, ms: u64) -> Made<'_> {
    py.import("deltamem_rt._records")?.getattr("when")?.call1((ms,))
}

pub(crate) fn commit<'py>(py: Python<'py>, commit: &Commit) -> Made<'py> {
    let parents: Vec<String> = commit.parents.iter().map(ToString::to_string).collect();
    made!(py, "_records", "Commit",
        id: commit.id.to_string(),
        parents: PyTuple::new(py, parents)?,
        generation: commit.generation,
        branch: &commit.branch,
        state: commit.state.to_string(),
        state_bytes: commit.state_bytes,
        fingerprint: commit.fingerprint.to_string(),
        parts: commit.parts.as_ref().map(|found| parts(py, found)).transpose()?,
        tokens_seen: commit.tokens_seen,
        time: when(py, commit.time_ms)?,
        message: &commit.message,
        meta: py.import("json")?.call_method1("loads", (&commit.meta,))?,
    )
}

pub(crate) fn commits<'py>(py: Python<'py>, found: &[Commit]) -> PyResult<Vec<Bound<'py, PyAny>>> {
    found.iter().map(|found| commit(py, found)).collect()
}

fn parts<'py>(py: Python<'py>, parts: &Parts) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("backbone", parts.backbone.to_string())?;
    found.set_item("adapter", parts.adapter.to_string())?;
    found.set_item("tokenizer", parts.tokenizer.map(|part| part.to_string()))?;
    found.set_item("config", parts.config.to_string())?;
    Ok(found)
}

/// The branches or the tags of a memory: name to commit's id.
pub(crate) fn refs<'py>(py: Python<'py>, info: &Info, kind: RefKind) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for entry in info.refs.iter().filter(|entry| entry.kind == kind) {
        found.set_item(&entry.name, entry.target.to_string())?;
    }
    Ok(found)
}

pub(crate) fn info<'py>(py: Python<'py>, info: &Info) -> Made<'py> {
    let Limits {
        commits,
        bytes,
        when_full,
    } = info.limits;
    made!(py, "_records", "MemoryInfo",
        name: &info.name,
        head: &info.head,
        branches: refs(py, info, RefKind::Branch)?,
        tags: refs(py, info, RefKind::Tag)?,
        commits: info.usage.commits,
        bytes: info.usage.bytes,
        max_commits: commits,
        max_bytes: bytes,
        when_full: if when_full == WhenFull::Prune { "prune" } else { "refuse" },
        created: when(py, info.created_ms)?,
        changed: when(py, info.touched_ms)?,
        expires: info.expires_ms.map(|ms| when(py, ms)).transpose()?,
    )
}

pub(crate) fn moved<'py>(py: Python<'py>, entry: &Move) -> Made<'py> {
    made!(py, "_records", "Move",
        number: entry.number,
        kind: entry.kind.word(),
        name: &entry.name,
        old: entry.old.map(|id| id.to_string()),
        new: entry.new.map(|id| id.to_string()),
        time: when(py, entry.time_ms)?,
        why: &entry.why,
    )
}

pub(crate) fn stats<'py>(py: Python<'py>, stats: &Stats, durability: &str) -> Made<'py> {
    made!(py, "_records", "StoreStats",
        place: &stats.place,
        memories: stats.memories,
        expired: stats.expired,
        commits: stats.commits,
        bytes: stats.bytes,
        size: stats.size,
        encrypted: stats.encrypted,
        durability: durability,
    )
}

pub(crate) fn gc<'py>(py: Python<'py>, report: &GcReport) -> Made<'py> {
    made!(py, "_records", "GcReport",
        memories: report.memories,
        commits: report.commits,
        states: report.states,
        moves: report.moves,
        bytes_before: report.compacted.map(|compacted| compacted.before),
        bytes_after: report.compacted.map(|compacted| compacted.after),
    )
}

fn damages<'py>(py: Python<'py>, damages: &[Damage]) -> PyResult<Bound<'py, PyTuple>> {
    let found: Vec<_> = damages
        .iter()
        .map(|damage| {
            made!(py, "_records", "Damage",
                memory: damage.memory.as_deref(),
                place: &damage.place,
                what: &damage.what,
            )
        })
        .collect::<PyResult<_>>()?;
    PyTuple::new(py, found)
}

pub(crate) fn verified<'py>(py: Python<'py>, report: &VerifyReport) -> Made<'py> {
    made!(py, "_records", "VerifyReport",
        memories: report.memories,
        commits: report.commits,
        states: report.states,
        moves: report.moves,
        unreachable: report.unreachable,
        damages: damages(py, &report.damages)?,
    )
}

pub(crate) fn repaired<'py>(py: Python<'py>, report: &RepairReport) -> Made<'py> {
    made!(py, "_records", "RepairReport",
        memories: report.memories,
        commits: report.commits,
        losses: damages(py, &report.losses)?,
    )
}

fn change<'py>(py: Python<'py>, change: &Change) -> Made<'py> {
    made!(py, "_changes", "Change",
        norm_before: change.norm_before,
        norm_after: change.norm_after,
        norm_change: change.norm_change,
        cosine: change.cosine,
        cosine_of_change: change.cosine_of_change,
        effective_rank: change.effective_rank,
    )
}

/// `before` of `None` is the empty memory, `after` of `None` what is not committed yet.
pub(crate) fn diff<'py>(
    py: Python<'py>,
    before: Option<&Commit>,
    after: Option<&Commit>,
    diff: &Diff,
) -> Made<'py> {
    let mut heads = Vec::new();
    for head in &diff.heads {
        let mut directions = Vec::new();
        for direction in &head.directions {
            directions.push(made!(py, "_changes", "Direction",
                size: direction.size,
                value: PyArray1::from_slice(py, &direction.value),
                key: PyArray1::from_slice(py, &direction.key),
            )?);
        }
        heads.push(made!(py, "_changes", "HeadDiff",
            layer: head.layer,
            head: head.head,
            change: change(py, &head.change)?,
            directions: PyTuple::new(py, directions)?,
        )?);
    }
    made!(py, "_changes", "Diff",
        a: before.map(|found| commit(py, found)).transpose()?,
        b: after.map(|found| commit(py, found)).transpose()?,
        total: change(py, &diff.total)?,
        heads: PyTuple::new(py, heads)?,
    )
}

pub(crate) fn merged<'py>(py: Python<'py>, merged: &Merged) -> Made<'py> {
    let case = match merged.case {
        Case::UpToDate => "up-to-date",
        Case::FastForward => "fast-forward",
        Case::ThreeWay => "three-way",
    };
    let bases: Vec<String> = merged.bases.iter().map(ToString::to_string).collect();
    let (overlap, ours, theirs) = merged.conflict.map_or((0.0, 0.0, 0.0), |conflict| {
        (conflict.overlap, conflict.loss_ours, conflict.loss_theirs)
    });
    made!(py, "_changes", "MergeResult",
        case: case,
        commit: merged.head.as_ref().map(|(head, _)| commit(py, head)).transpose()?,
        bases: PyTuple::new(py, bases)?,
        overlap: overlap,
        loss_ours: ours,
        loss_theirs: theirs,
    )
}

pub(crate) fn redacted<'py>(py: Python<'py>, redacted: &Redacted) -> Made<'py> {
    let still_in: Vec<String> = redacted
        .still_in
        .iter()
        .map(|(kind, name)| format!("{} {name}", kind.word()))
        .collect();
    made!(py, "_changes", "Redaction",
        commit: commit(py, &redacted.head)?,
        rewritten: redacted.rewritten,
        survived: redacted.survived,
        unseparated: redacted.unseparated,
        still_in: PyTuple::new(py, still_in)?,
    )
}

pub(crate) fn blamed<'py>(
    py: Python<'py>,
    tokens: usize,
    reply: Option<&str>,
    attribution: &str,
    blamed: &Blamed,
) -> Made<'py> {
    let mut shares = Vec::new();
    for part in &blamed.parts {
        shares.push(made!(py, "_changes", "Share",
            commit: part.commit.as_ref().map(|found| commit(py, found)).transpose()?,
            share: part.share,
            layers: PyTuple::new(py, &part.layers)?,
        )?);
    }
    made!(py, "_changes", "Blame",
        shares: PyTuple::new(py, shares)?,
        rest: blamed.rest,
        energy: blamed.energy,
        layers: PyTuple::new(py, &blamed.layers)?,
        tokens: tokens,
        reply: reply,
        attribution: attribution,
        merges: blamed.merges,
    )
}
