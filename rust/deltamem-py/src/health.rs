//! The watch over a session's memory: what every end of a turn is held against, and what is done about a memory that is not healthy. It
//! knows a session's engine and its place in a store; what figures mean is known in `deltamem_core::health`.

use std::collections::VecDeque;

use deltamem_core::Snapshot;
use deltamem_core::health::{Churn, Figures, Seen, WINDOW, distance, reasons};
use deltamem_engine::EngineError;
use deltamem_engine::health::Measured;
use deltamem_engine::memory::MemoryView;
use deltamem_engine::session::RECENT_TOKENS;
use deltamem_store::{Commit, CommitId, Error as StoreError};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::history::{Problem, Result};
use crate::keeping::Kept;

/// How many commits a rollback looks back through for a healthy one, where the session has seen none itself.
const LOOK_BACK: usize = 256;

/// What is done about a memory that is not healthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnDrift {
    Warn,
    Freeze,
    Rollback,
}

impl OnDrift {
    pub(crate) fn parse(text: Option<&str>) -> PyResult<Option<Self>> {
        match text {
            None => Ok(None),
            Some("warn") => Ok(Some(Self::Warn)),
            Some("freeze") => Ok(Some(Self::Freeze)),
            Some("rollback") => Ok(Some(Self::Rollback)),
            Some(other) => Err(PyValueError::new_err(format!(
                "on_drift is {other:?}, expected \"warn\", \"freeze\", \"rollback\" or None"
            ))),
        }
    }

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Warn => "warn",
            Self::Freeze => "freeze",
            Self::Rollback => "rollback",
        }
    }
}

/// A healthy state, and the commit that the session stood on when it had it.
#[derive(Clone)]
struct Healthy {
    state: Snapshot,
    commit: Option<CommitId>,
}

/// What a watched session remembers from one end of a turn to the next.
pub(crate) struct Watch {
    pub(crate) on_drift: OnDrift,
    /// The state when the last turn ended, or that was taken up since.
    previous: MemoryView,
    /// How far each of the last turns moved the state, in the Frobenius and in the nuclear norm, [L, H] each, at most [`WINDOW`] of them.
    moved: VecDeque<[Vec<f64>; 2]>,
    /// Whether the turn behind them was taken back.
    taken_back: bool,
    /// The figures of `previous`.
    figures: Figures,
    /// How far the last turn collapsed it.
    collapse: Option<Vec<f64>>,
    /// What the turns that were kept add up to, and how much of that came to nothing.
    turns: Churn,
    churn: Option<Vec<f64>>,
    healthy: Option<Healthy>,
    /// Whether the last look found a memory that is not healthy: that is said once.
    drifted: bool,
    /// Whether writes are off since then.
    pub(crate) frozen: bool,
}

impl Watch {
    /// A watch that begins with the state that the session has.
    pub(crate) fn new(
        on_drift: OnDrift,
        engine: &deltamem_engine::Session,
    ) -> std::result::Result<Self, EngineError> {
        Ok(Self {
            on_drift,
            previous: engine.memory()?,
            moved: VecDeque::new(),
            taken_back: false,
            figures: engine.figures()?,
            collapse: None,
            turns: Churn::default(),
            churn: None,
            healthy: None,
            drifted: false,
            frozen: false,
        })
    }

    /// The session has taken up another state, or the one that it has counts as good from here on.
    pub(crate) fn begin(
        &mut self,
        engine: &mut deltamem_engine::Session,
        kept: Option<&Kept>,
    ) -> std::result::Result<(), EngineError> {
        self.previous = engine.memory()?;
        self.moved.clear();
        (self.turns, self.churn) = (Churn::default(), None);
        self.taken_back = false;
        self.drifted = false;
        self.frozen = false;
        engine.set_writable(true);
        let figures = engine.figures()?;
        let found = against(engine, &figures, &Moved::default(), None);
        (self.figures, self.collapse) = (figures, None);
        self.healthy = if found.is_empty() {
            Some(Healthy {
                state: engine.snapshot(&mut || false)?,
                commit: kept.and_then(Kept::head_id),
            })
        } else {
            None
        };
        Ok(())
    }

    /// Looks at the memory behind an end of a turn and acts. Returns what the user is to be told.
    pub(crate) fn look(
        &mut self,
        engine: &mut deltamem_engine::Session,
        kept: Option<&mut Kept>,
    ) -> Result<Option<String>> {
        if self.frozen {
            return Ok(None);
        }
        if self.moved.len() == WINDOW {
            self.moved.pop_front();
        }
        let (geometry, before) = (engine.geometry(), self.previous.clone());
        let after = engine.memory().map_err(refused)?;
        let next = self.turns.with(geometry, &before, &after);
        self.moved
            .push_back([distance(geometry, &before, &after), next.turn.clone()]);
        self.taken_back = false;
        let churn_before = self.churn.replace(next.churn.clone());
        let figures = engine.figures().map_err(refused)?;
        self.collapse = Some(figures.collapse_since(&self.figures));
        let found = against(engine, &figures, &self.moved(), None);
        self.figures = figures;
        self.previous = after;
        if found.is_empty() {
            self.turns.take(&next, &before);
            self.healthy = Some(Healthy {
                state: engine.snapshot(&mut || false).map_err(refused)?,
                commit: kept.as_deref().and_then(Kept::head_id),
            });
            self.drifted = false;
            return Ok(None);
        }
        let first = !std::mem::replace(&mut self.drifted, true);
        let turn = engine.turns();
        let done = match self.on_drift {
            OnDrift::Warn => "nothing was done (on_drift=\"warn\")".to_owned(),
            OnDrift::Freeze => self.freeze(engine, ""),
            OnDrift::Rollback => self.go_back(engine, kept)?,
        };
        if self.taken_back {
            self.churn = churn_before;
        } else {
            self.turns.take(&next, &before);
        }
        let said = format!("the memory drifted in turn {turn}: {}; {done}", found.join("; "));
        Ok((first || self.on_drift == OnDrift::Rollback).then_some(said))
    }

    /// The session has committed: if that is its last healthy state, this is where to find it.
    pub(crate) fn committed(&mut self, kept: &Kept) {
        if let Some(healthy) = &mut self.healthy {
            let state = &healthy.state;
            if !kept.differs(state.memory(), state.tokens_seen(), state.turns()) {
                healthy.commit = kept.head_id();
            }
        }
    }

    /// How far the last turn, and the last turns together, moved the state.
    fn moved(&self) -> Moved {
        let added_up = |norm: usize| {
            let lengths = self.moved.iter().map(|turn| turn[norm].clone());
            lengths.reduce(|sum, turn| sum.iter().zip(&turn).map(|(a, b)| a + b).collect())
        };
        let (path, nuclear) = (added_up(0), added_up(1));
        // The nuclear norm is never the smaller one but by rounding.
        let scatter = path.as_ref().zip(nuclear).map(|(path, nuclear)| {
            let apart = nuclear.iter().zip(path).map(|(nuclear, path)| nuclear - path);
            apart.map(|apart| apart.max(0.0)).collect()
        });
        let last = self.moved.back().filter(|_| !self.taken_back);
        Moved {
            change: last.map(|[frobenius, _]| frobenius.clone()),
            path,
            collapse: self.collapse.clone(),
            churn: self.churn.clone(),
            scatter,
        }
    }

    fn freeze(&mut self, engine: &mut deltamem_engine::Session, why: &str) -> String {
        engine.set_writable(false);
        self.frozen = true;
        format!("{why}writes are off from here on, unfreeze() puts them on again")
    }

    /// Puts the session, and with it its branch, back to the last healthy state.
    fn go_back(&mut self, engine: &mut deltamem_engine::Session, kept: Option<&mut Kept>) -> Result<String> {
        if self.healthy.is_none() {
            self.healthy = kept
                .as_deref()
                .map(|kept| look_back(engine, kept))
                .transpose()?
                .flatten();
        }
        let Some(healthy) = self.healthy.clone() else {
            return Ok(self.freeze(engine, "there is no healthy state to go back to, so "));
        };
        engine.restore(&healthy.state).map_err(refused)?;
        (self.previous, self.drifted) = (engine.memory().map_err(refused)?, false);
        self.moved.pop_back();
        self.taken_back = true;
        (self.figures, self.collapse) = (engine.figures().map_err(refused)?, None);
        let to = format!(
            "the session went back to its state after turn {}",
            healthy.state.turns()
        );
        let (Some(kept), Some(commit)) = (kept, healthy.commit) else {
            return Ok(to);
        };
        let Some(branch) = kept.branch.clone().filter(|_| kept.head_id() != Some(commit)) else {
            return Ok(to);
        };
        let target = kept.load(commit)?;
        match kept
            .store
            .rollback(&kept.name, &branch, &commit.to_string(), kept.head_id())
        {
            Ok(_) => {
                kept.stand(Some(target));
                Ok(format!(
                    "{to}, its branch to commit {}; rollback(\"{branch}@{{1}}\") takes that back",
                    short(commit)
                ))
            }
            // What the session holds now is its healthy state on top of the commit that is not: merge() takes that turn back there too.
            Err(StoreError::Conflict { .. }) => Ok(format!(
                "{to}; another worker has moved the branch {branch:?} meanwhile, so it stays: merge() takes the turn back there"
            )),
            Err(error) => Err(error.into()),
        }
    }
}

fn refused(error: EngineError) -> Problem {
    Problem::Refused(error.to_string())
}

fn short(id: CommitId) -> String {
    id.to_string()[..12].to_owned()
}

/// The newest healthy commit in reach of where the session stands.
fn look_back(engine: &deltamem_engine::Session, kept: &Kept) -> Result<Option<Healthy>> {
    let Some(head) = kept.head_id() else {
        return Ok(None);
    };
    for commit in kept.store.log(&kept.name, &[&head.to_string()], LOOK_BACK)? {
        let (_, state) = kept.load(commit.id)?;
        if against(
            engine,
            &Figures::of(engine.geometry(), state.memory()),
            &Moved::default(),
            None,
        )
        .is_empty()
        {
            return Ok(Some(Healthy {
                state,
                commit: Some(commit.id),
            }));
        }
    }
    Ok(None)
}

/// How far turns moved a state, [L, H]; `None` where nobody looked.
#[derive(Default)]
struct Moved {
    change: Option<Vec<f64>>,
    path: Option<Vec<f64>>,
    collapse: Option<Vec<f64>>,
    churn: Option<Vec<f64>>,
    scatter: Option<Vec<f64>>,
}

/// What speaks against a memory of the session's model.
fn against(
    engine: &deltamem_engine::Session,
    figures: &Figures,
    moved: &Moved,
    measured: Option<&Measured>,
) -> Vec<String> {
    let manifest = engine.model().manifest();
    // What was measured on fewer tokens is shown, and not judged: the bounds were learnt on as many.
    let whole = RECENT_TOKENS.min(engine.model().context_length());
    let measured = measured.filter(|found| found.tokens == whole);
    let seen = Seen {
        figures,
        change: moved.change.as_deref(),
        path: moved.path.as_deref(),
        collapse: moved.collapse.as_deref(),
        churn: moved.churn.as_deref(),
        scatter: moved.scatter.as_deref(),
        delta_ratio: measured.map(|found| &found.delta_ratio[..]),
        beta_mean: measured.and_then(|found| found.gates.first().map(|beta| &beta.mean[..])),
    };
    let bounds = manifest.health.as_ref().map(|health| &health.bounds);
    reasons(
        seen,
        &manifest.memory.layers,
        manifest.memory.heads,
        manifest.memory.delta_heads.len(),
        bounds,
    )
}

/// Tells the user, by Python's own means: a filter may make an error of it.
pub(crate) fn warn(py: Python<'_>, label: &str, said: &str) -> PyResult<()> {
    let category = py.import("deltamem_rt.errors")?.getattr("DriftWarning")?;
    py.import("warnings")?
        .call_method1("warn", (format!("{label}: {said}"), category))?;
    Ok(())
}

/// What `Session.health` returns.
pub(crate) struct Report {
    figures: Figures,
    moved: Moved,
    distance: Option<Vec<f64>>,
    healthy_commit: Option<CommitId>,
    healthy_turns: Option<u64>,
    measured: Option<Measured>,
    reasons: Vec<String>,
}

impl Report {
    /// The memory as it is. Nothing moves.
    pub(crate) fn of(
        engine: &deltamem_engine::Session,
        watch: Option<&Watch>,
        head: Option<&(Commit, Snapshot)>,
        measured: Option<Measured>,
    ) -> std::result::Result<Self, EngineError> {
        let (geometry, memory) = (engine.geometry(), engine.memory()?);
        let figures = Figures::of(geometry, &memory);
        let mut moved = watch.map(Watch::moved).unwrap_or_default();
        if let Some(watch) = watch
            && engine.position() > 0
        {
            moved.change = Some(distance(geometry, &watch.previous, &memory));
        }
        let healthy = watch.and_then(|watch| watch.healthy.clone()).or_else(|| {
            let (commit, state) = head.filter(|_| watch.is_none())?;
            let of_head = Figures::of(geometry, state.memory());
            against(engine, &of_head, &Moved::default(), None)
                .is_empty()
                .then(|| Healthy {
                    state: state.clone(),
                    commit: Some(commit.id),
                })
        });
        Ok(Self {
            reasons: against(engine, &figures, &moved, measured.as_ref()),
            distance: healthy
                .as_ref()
                .map(|healthy| distance(geometry, healthy.state.memory(), &memory)),
            healthy_commit: healthy.as_ref().and_then(|healthy| healthy.commit),
            healthy_turns: healthy.as_ref().map(|healthy| healthy.state.turns()),
            figures,
            moved,
            measured,
        })
    }

    /// As `deltamem_rt.Health`.
    pub(crate) fn to_python<'py>(
        &self,
        py: Python<'py>,
        engine: &deltamem_engine::Session,
        watch: Option<&Watch>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let manifest = engine.model().manifest();
        let (heads, pairs) = (manifest.memory.heads, manifest.memory.delta_heads.len());
        let of_heads = |values: &[f64]| table(py, values, heads);
        let measured = self.measured.as_ref();
        let gate = |kind: usize| measured.and_then(|found| found.gates.get(kind));
        let words: Vec<String> = (manifest.memory.delta_heads.iter())
            .map(|head| format!("{head:?}").to_lowercase())
            .collect();
        let bounds = match &manifest.health {
            Some(health) => Some(bounds_of(py, &health.bounds)?),
            None => None,
        };
        let arguments = PyDict::new(py);
        let set = |name: &str, value: Option<Bound<'py, PyAny>>| arguments.set_item(name, value);
        set("norm", Some(of_heads(&self.figures.norm)?))?;
        set("spectral_norm", Some(of_heads(&self.figures.spectral_norm)?))?;
        set("effective_rank", Some(of_heads(&self.figures.effective_rank)?))?;
        set("concentration", Some(of_heads(&self.figures.concentration)?))?;
        set("change", self.moved.change.as_deref().map(of_heads).transpose()?)?;
        set("path", self.moved.path.as_deref().map(of_heads).transpose()?)?;
        set(
            "collapse",
            self.moved.collapse.as_deref().map(of_heads).transpose()?,
        )?;
        set("churn", self.moved.churn.as_deref().map(of_heads).transpose()?)?;
        set(
            "scatter",
            self.moved.scatter.as_deref().map(of_heads).transpose()?,
        )?;
        set("distance", self.distance.as_deref().map(of_heads).transpose()?)?;
        set(
            "delta_ratio",
            measured
                .map(|found| table(py, &found.delta_ratio, pairs))
                .transpose()?,
        )?;
        for (kind, name) in ["beta", "lambda"].into_iter().enumerate() {
            set(
                &format!("{name}_mean"),
                gate(kind).map(|gate| row(py, &gate.mean)),
            )?;
            set(
                &format!("{name}_saturated"),
                gate(kind).map(|gate| row(py, &gate.saturated)),
            )?;
        }
        arguments.set_item("delta_heads", PyTuple::new(py, words)?)?;
        arguments.set_item("layers", PyTuple::new(py, &manifest.memory.layers)?)?;
        arguments.set_item("measured_tokens", measured.map_or(0, |found| found.tokens))?;
        arguments.set_item("tokens_seen", engine.tokens_seen())?;
        arguments.set_item("turns", engine.turns())?;
        arguments.set_item("healthy_commit", self.healthy_commit.map(|id| id.to_string()))?;
        arguments.set_item("healthy_turns", self.healthy_turns)?;
        arguments.set_item("bounds", bounds)?;
        arguments.set_item("frozen", watch.is_some_and(|watch| watch.frozen))?;
        arguments.set_item("reasons", PyTuple::new(py, &self.reasons)?)?;
        py.import("deltamem_rt._health")?
            .getattr("Health")?
            .call((), Some(&arguments))
    }
}

#[allow(clippy::cast_possible_truncation)]
fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

/// float32 [n / columns, columns].
fn table<'py>(py: Python<'py>, values: &[f64], columns: usize) -> PyResult<Bound<'py, PyAny>> {
    let array: Bound<'py, PyArray2<f32>> =
        PyArray1::from_vec(py, narrow(values)).reshape([values.len() / columns.max(1), columns])?;
    Ok(array.into_any())
}

/// float32 [n].
fn row<'py>(py: Python<'py>, values: &[f64]) -> Bound<'py, PyAny> {
    PyArray1::from_vec(py, narrow(values)).into_any()
}

fn bounds_of<'py>(py: Python<'py>, bounds: &deltamem_core::health::Bounds) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for (name, bound) in bounds.named() {
        let columns = bound.first().map_or(1, Vec::len);
        let flat: Vec<f64> = bound.iter().flatten().copied().collect();
        found.set_item(name, table(py, &flat, columns)?)?;
    }
    Ok(found)
}
