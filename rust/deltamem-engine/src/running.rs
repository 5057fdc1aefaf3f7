//! Running a model's graph for its sessions: a chunk of one session by itself, or one token of each of several in one step. It puts the
//! rows of a step together and takes its results apart; when anybody runs is decided in [`crate::schedule`], where keys and values lie is
//! known in [`crate::pool`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use crate::device::{Best, DeviceBuffer, Staging};
use crate::error::{EngineError, Result};
use crate::fixed::{FixedRows, FixedSteps, Spot};
use crate::graph::{ChunkSpans, Graph, Measures, Rows, Run, as_trained};
use crate::logits::Logits;
use crate::memory::{Back, Gathered, Numbers, NumbersMut, Resident, State, held};
use crate::model::Model;
use crate::pool::Window;
use crate::sampling::to_bring;
use crate::schedule::Seat;
use crate::slots::Bound;
use crate::turn::{Pooled, TurnCache, TurnKv, TurnTensors};

/// What is used by one run at a time.
#[derive(Debug)]
pub(crate) struct Works {
    pub(crate) graph: Graph,
    /// What captured steps of many sessions read and write, where steps are captured.
    fixed: Option<FixedSteps>,
    steps: Steps,
    comings: Comings,
}

/// Logits of a step that are on a device, and the best of them.
struct Away<'a> {
    buffer: Arc<DeviceBuffer>,
    best: Best,
    /// The rows that they are, where those stay.
    rows: Option<&'a mut FixedRows>,
}

/// Where logits come down from a device.
#[derive(Debug, Default)]
struct Comings {
    /// Whole rows of them.
    rows: Option<Staging>,
    /// The best of them.
    best: Option<Staging>,
}

/// The inputs and outputs of a step of several rows, kept from step to step.
#[derive(Debug, Default)]
struct Steps {
    tokens: Vec<i32>,
    past: Vec<usize>,
    write: Vec<bool>,
    rows: Vec<i64>,
    past_memory: Vec<f32>,
    present_memory: Vec<f32>,
    logits: Vec<f32>,
}

/// How many runs there were, and of what.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Steps: runs of one token of each of their rows.
    steps: AtomicU64,
    /// Rows in them.
    rows: AtomicU64,
    /// Rows of idle slots that rode along.
    idle: AtomicU64,
    /// The most rows in one.
    largest: AtomicU64,
    /// Runs of one session's chunk by itself.
    chunks: AtomicU64,
    /// Rows of logits that stayed on the device, of which the best came down.
    best: AtomicU64,
    /// Runs that were captures or replays.
    captured: AtomicU64,
    /// Captures.
    captures: AtomicU64,
}

/// How many runs a model has made since it was loaded, and of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunStats {
    /// Steps of the decoder, each with one token of every session that was in it.
    pub steps: u64,
    /// Tokens read in those steps.
    pub step_tokens: u64,
    /// Rows of those steps that stood for nobody.
    pub idle_rows: u64,
    /// The most sessions in one step.
    pub largest_step: u64,
    /// Runs of one session by itself: chunks of prompts, and single tokens where the model takes no batches.
    pub chunks: u64,
    /// Rows of logits that stayed on the device, because the next token depends on a few of the largest: only those came down.
    pub best_rows: u64,
    /// Steps that were captured as CUDA graphs, or replayed.
    pub captured_steps: u64,
    /// CUDA graphs that were captured for them.
    pub cuda_graphs: u64,
}

/// One chunk of one session: what it reads and where the results go.
pub(crate) struct Chunk<'a> {
    /// Token ids, checked: at least one, at most [`CHUNK_TOKENS`](crate::model::CHUNK_TOKENS).
    pub(crate) tokens: &'a [i32],
    /// Whether each of these tokens writes the memory.
    pub(crate) write: bool,
    /// The spans that this run gathers for or writes, in a span bundle.
    pub(crate) spans: Option<ChunkSpans<'a>>,
    /// The state before, float32 [layers, heads, r, r].
    pub(crate) past_memory: &'a State,
    /// Where the state after goes.
    pub(crate) present_memory: &'a mut Back,
    /// What the turn carries.
    pub(crate) turn: &'a mut TurnCache,
    /// What the corrections are multiplied by; other than 1 it takes the measured graph.
    pub(crate) strength: f32,
    /// Where the logits go.
    pub(crate) logits: LogitsTo<'a>,
    /// What else is wanted.
    pub(crate) measures: Measures<'a>,
}

/// Where a chunk's logits go.
pub(crate) enum LogitsTo<'a> {
    /// Every token's, float32 [tokens, vocab].
    All(&'a mut [f32]),
    /// The last one's. On a device so many of the largest are enough, if it says so.
    Last(&'a mut Logits, Option<usize>),
}

/// One session's token in a step. It owns what the run needs, because the thread of another session may run it.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) token: i32,
    pub(crate) write: bool,
    /// The state before, float32 [layers, heads, r, r].
    pub(crate) past_memory: State,
    /// Where the state after goes; nobody else holds it.
    pub(crate) present_memory: Back,
    /// Where the logits go.
    pub(crate) logits: Logits,
    /// How many of the largest are enough, where they are on a device; none for all.
    pub(crate) enough: Option<usize>,
    pub(crate) place: Pooled,
    /// What became of it.
    pub(crate) outcome: Outcome,
}

/// What became of a row.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Nothing yet. It stays so when a run panics.
    Waiting,
    /// It was run: the state after, the logits and the cache are written.
    Run,
    /// It was not, or failed.
    Failed(EngineError),
}

impl Steps {
    /// The inputs of a window's rows; an idle slot reads anything and writes nothing. Logits are those of the turns, in the window's order; where
    /// it is of a fixed size, one of them comes as often as it takes to have so many rows.
    fn fill(&mut self, window: &Window, at: &[usize], rows: &[Row]) {
        self.tokens.clear();
        self.past.clear();
        self.write.clear();
        self.rows.clear();
        for (number, rider) in window.riders.iter().enumerate() {
            self.past.push(rider.past);
            if let Some(of) = rider.of {
                let row = &rows[at[of]];
                self.tokens.push(row.token);
                self.write.push(row.write);
                self.rows.push(i64::try_from(number).unwrap_or(i64::MAX));
            } else {
                self.tokens.push(0);
                self.write.push(false);
            }
        }
        if window.fixed.is_some() {
            let any = self.rows.first().copied().unwrap_or(0);
            self.rows.resize(window.riders.len(), any);
        }
    }
}

impl Works {
    pub(crate) fn new(graph: Graph) -> Self {
        Self {
            graph,
            fixed: None,
            steps: Steps::default(),
            comings: Comings::default(),
        }
    }
}

impl Model {
    /// Runs one chunk, when its turn comes. On an error nothing but the chunk's own output buffers was touched.
    pub(crate) fn run_chunk(&self, seat: &mut Seat<Row>, chunk: Chunk<'_>) -> Result<()> {
        let measured = if chunk.measures.any() || !as_trained(chunk.strength) {
            Some(self.measured()?)
        } else {
            None
        };
        // What only this turn needs is done in front of its run, beside those of others.
        if let TurnKv::Pooled(place) = &mut chunk.turn.kv {
            self.slots.ready(place, chunk.tokens.len())?;
        }
        let settled = chunk.past_memory.settled(self.home())?;
        self.schedule.alone(seat, || {
            self.counters.chunks.fetch_add(1, Ordering::Relaxed);
            let mut works = self.works.lock();
            // Where it lies is known from here on: whoever runs may move it and write over its row.
            let state = settled.aligned()?;
            let mut slots = self.slots.bind();
            let Works { graph, comings, .. } = &mut *works;
            let past = chunk.turn.len();
            let turn = chunk.turn.tensors(&mut slots, chunk.tokens.len())?;
            let rows = match chunk.logits {
                LogitsTo::All(_) => Rows::All,
                LogitsTo::Last(..) => Rows::Last,
            };
            chunk
                .present_memory
                .write(self.home(), self.geometry().elements(), |present_memory| {
                    let run = |logits: NumbersMut<'_>| {
                        let run = Run {
                            tokens: chunk.tokens,
                            past: &[past],
                            write: &[chunk.write],
                            spans: chunk.spans,
                            rows,
                            past_memory: state.numbers(),
                            present_memory,
                            turn,
                            strength: chunk.strength,
                            logits,
                            measures: chunk.measures,
                            by_chance: false,
                        };
                        match measured {
                            None => graph.run(self, run),
                            Some(measured) => measured
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .run(self, run),
                        }
                    };
                    match chunk.logits {
                        LogitsTo::All(all) => run(NumbersMut::Host(all)),
                        LogitsTo::Last(last, enough) => self.last_logits(last, enough, comings, run),
                    }
                })
        })
    }

    /// Runs a row, together with those of other sessions that step at the time, and returns it with what became of it. `streaming` says
    /// that more will follow at once, as in a reply.
    pub(crate) fn run_row(&self, seat: &mut Seat<Row>, mut row: Row, streaming: bool) -> Option<Row> {
        let ready = self.slots.ready(&mut row.place, 1).and_then(|()| {
            row.past_memory = row.past_memory.settled(self.home())?;
            Ok(())
        });
        if let Err(error) = ready {
            row.outcome = Outcome::Failed(error);
            return Some(row);
        }
        self.schedule
            .step(seat, row, streaming, |rows| self.run_rows(rows))
    }

    /// Runs the rows of a step.
    fn run_rows(&self, rows: &mut [Row]) {
        let mut works = self.works.lock();
        let fixed = works.graph.captures_steps() && self.unbatched.get().is_none();
        let mut slots = self.slots.bind();
        let (at, windows) = slots.with(|pool| {
            pool.fix(fixed);
            for row in &mut *rows {
                let (room, place) = (row.place.len + 1, &mut row.place);
                let ready = pool.reserve(&mut place.key, room).and_then(|bytes| {
                    place.bytes = bytes;
                    place
                        .key
                        .map_or(Ok(()), |key| pool.finish(key, &mut place.prefix))
                });
                match ready {
                    Ok(()) => place.ready = true,
                    Err(error) => row.outcome = Outcome::Failed(error),
                }
            }
            let (at, turns): (Vec<_>, Vec<_>) = rows
                .iter()
                .enumerate()
                .filter(|(_, row)| matches!(row.outcome, Outcome::Waiting))
                .filter_map(|(index, row)| row.place.key.map(|key| (index, (key, row.place.len))))
                .unzip();
            let together = (at.len() > 1 || fixed) && self.unbatched.get().is_none();
            let windows = together.then(|| pool.windows(&turns));
            (at, windows)
        });
        match windows {
            None => {
                for index in at {
                    self.run_one(&mut works, &mut slots, &mut rows[index]);
                }
            }
            Some(Ok(windows)) => {
                for window in windows {
                    self.run_window(&mut works, &mut slots, &window, &at, rows);
                }
            }
            Some(Err(error)) => {
                for index in at {
                    rows[index].outcome = Outcome::Failed(error.again());
                }
            }
        }
    }

    /// Runs the rows of a window at once. Where that fails each of them runs by itself, so that none pays for another.
    fn run_window(
        &self,
        works: &mut Works,
        slots: &mut Bound<'_>,
        window: &Window,
        at: &[usize],
        rows: &mut [Row],
    ) {
        if window.riders.len() == 1 && window.fixed.is_none() {
            for index in indices(window, at) {
                self.run_one(works, slots, &mut rows[index]);
            }
            return;
        }
        match self.run_together(works, slots, window, at, rows) {
            Ok(()) => {
                for index in indices(window, at) {
                    rows[index].outcome = Outcome::Run;
                }
            }
            Err(error) => {
                let mut some = false;
                for index in indices(window, at) {
                    self.run_one(works, slots, &mut rows[index]);
                    some |= matches!(rows[index].outcome, Outcome::Run);
                }
                if some && window.riders.len() > 1 {
                    // What each can do alone and all together cannot is the graph's limit, not a row's fault.
                    let why = format!(
                        "ONNX Runtime refused a step of several sessions, so they run one after another: {error}"
                    );
                    self.unbatched.get_or_init(|| why);
                }
            }
        }
    }

    fn run_together(
        &self,
        works: &mut Works,
        slots: &mut Bound<'_>,
        window: &Window,
        at: &[usize],
        rows: &mut [Row],
    ) -> Result<()> {
        if let (Some(name), Some(_)) = (window.fixed, self.home()) {
            return self.run_fixed(works, slots, name, window, at, rows);
        }
        let Works {
            graph,
            steps,
            comings,
            ..
        } = works;
        let (numbers, vocab) = (self.geometry().elements(), self.vocab());
        let batch = window.riders.len();
        steps.fill(window, at, rows);
        let states = states(window, at, rows);
        let gathered;
        let mut step = None;
        let (past_memory, present_memory) = match self.home() {
            None => {
                steps.past_memory.clear();
                for state in states {
                    match state {
                        Some(state) => steps.past_memory.extend_from_slice(&state.host()?),
                        None => steps.past_memory.resize(steps.past_memory.len() + numbers, 0.0),
                    }
                }
                steps.present_memory.resize(batch * numbers, 0.0);
                (
                    Numbers::Host(&steps.past_memory),
                    NumbersMut::Host(&mut steps.present_memory),
                )
            }
            Some(memory) => {
                gathered = Gathered::of(memory, &states, numbers)?;
                let buffer = step.insert(memory.allocate(batch * numbers * size_of::<f32>())?);
                (gathered.numbers(), NumbersMut::Device(buffer))
            }
        };
        let enough = most_enough(window, at, rows, vocab)
            .and_then(|count| self.home().as_ref().map(|memory| (memory, count)));
        let mut away = None;
        let count = steps.rows.len() * vocab;
        let logits = match (enough, self.home()) {
            (Some((memory, _)), _) => {
                NumbersMut::Device(away.insert(memory.allocate(count * size_of::<f32>())?))
            }
            (None, Some(memory)) => NumbersMut::Host(
                memory
                    .room(&mut comings.rows, count * size_of::<f32>())?
                    .floats_mut(count),
            ),
            (None, None) => {
                steps.logits.resize(count, 0.0);
                NumbersMut::Host(&mut steps.logits)
            }
        };
        let (kv, shape) = slots.many(window);
        graph.run(
            self,
            Run {
                tokens: &steps.tokens,
                past: &steps.past,
                write: &steps.write,
                spans: None,
                rows: Rows::These(&steps.rows),
                past_memory,
                present_memory,
                turn: TurnTensors {
                    kv,
                    shapes: [shape, shape],
                    states: Vec::new(),
                },
                strength: 1.0,
                logits,
                measures: Measures::default(),
                by_chance: true,
            },
        )?;
        let away = match (away, enough) {
            (Some(buffer), Some((_, count))) => Some(Away {
                best: buffer.best(steps.rows.len(), vocab, count, &mut comings.best)?,
                buffer: Arc::new(buffer),
                rows: None,
            }),
            _ => None,
        };
        // What may fail comes first: a row is as it was, or has all of the step.
        let all = match (&mut comings.rows, self.home()) {
            (Some(staging), Some(_)) if away.is_none() => staging.floats_mut(steps.rows.len() * vocab),
            _ => &mut steps.logits[..],
        };
        self.hand_out(away, all, indices(window, at), rows)?;
        self.counters.count(steps.rows.len(), batch);
        let step = match step {
            Some(buffer) => StepStates::Device(Arc::new(buffer)),
            None => StepStates::Host(&steps.present_memory),
        };
        leave_states(window, at, rows, step, numbers)
    }

    /// The same for a window of a fixed size: everything lies where it lay in the last step of its like.
    fn run_fixed(
        &self,
        works: &mut Works,
        slots: &mut Bound<'_>,
        name: [usize; 2],
        window: &Window,
        at: &[usize],
        rows: &mut [Row],
    ) -> Result<()> {
        let Works {
            graph,
            fixed,
            steps,
            comings,
        } = works;
        let memory = self.home().as_ref().ok_or_else(held)?;
        let (numbers, vocab) = (self.geometry().elements(), self.vocab());
        let (state, logits_row) = (numbers * size_of::<f32>(), vocab * size_of::<f32>());
        let fixed = fixed
            .get_or_insert_with(|| FixedSteps::new(Arc::clone(memory), self.max_batch(), state, logits_row));
        steps.fill(window, at, rows);
        let buffers = fixed.before(name, &states(window, at, rows))?;
        let (kv, shape) = slots.many(window);
        graph.run(
            self,
            Run {
                tokens: &steps.tokens,
                past: &steps.past,
                write: &steps.write,
                spans: None,
                rows: Rows::These(&steps.rows),
                past_memory: Numbers::Device(&buffers.past, 0),
                present_memory: NumbersMut::Rows(&buffers.present),
                turn: TurnTensors {
                    kv,
                    shapes: [shape, shape],
                    states: Vec::new(),
                },
                strength: 1.0,
                logits: NumbersMut::Rows(&buffers.logits),
                measures: Measures::default(),
                by_chance: false,
            },
        )?;
        // The turns' logits are the first ones.
        let asked = indices(window, at).count();
        let mut all: &[f32] = &[];
        let away = if let Some(count) = most_enough(window, at, rows, vocab) {
            Some(Away {
                best: buffers.logits.best(asked, vocab, count, &mut comings.best)?,
                buffer: Arc::clone(&buffers.logits),
                rows: fixed.logits(),
            })
        } else {
            let room = memory
                .room(&mut comings.rows, asked * logits_row)?
                .floats_mut(asked * vocab);
            let logits = &buffers.logits;
            logits.download(0, bytemuck::cast_slice_mut(&mut *room))?;
            all = room;
            None
        };
        self.hand_out(away, all, indices(window, at), rows)?;
        self.counters.count(asked, window.riders.len());
        let step = StepStates::Fixed(fixed.after(name).ok_or_else(held)?);
        leave_states(window, at, rows, step, numbers)
    }

    /// Gives each row of a step its logits: those on the host, or the best of those on the device, or all of them from there.
    fn hand_out(
        &self,
        mut away: Option<Away<'_>>,
        all: &[f32],
        indices: impl Iterator<Item = usize>,
        rows: &mut [Row],
    ) -> Result<()> {
        let vocab = self.vocab();
        for (number, index) in indices.enumerate() {
            let Row { logits, enough, .. } = &mut rows[index];
            let bytes = vocab * size_of::<f32>();
            match (&mut away, enough) {
                (Some(Away { buffer, best, rows }), Some(_)) => {
                    let spot = match rows {
                        Some(rows) => rows.lease(number),
                        None => Arc::new(Spot::new(Arc::clone(buffer), number * bytes, bytes)),
                    };
                    logits.stay(spot, number, vocab, best);
                    self.counters.best.fetch_add(1, Ordering::Relaxed);
                }
                (Some(Away { buffer, .. }), None) => {
                    buffer.download(number * bytes, bytemuck::cast_slice_mut(logits.room(vocab)))?;
                }
                (None, _) => logits.set(&all[number * vocab..][..vocab]),
            }
        }
        Ok(())
    }

    /// Has a run of one session leave its last token's logits, where `enough` says of them: `run` is given the place.
    fn last_logits(
        &self,
        logits: &mut Logits,
        enough: Option<usize>,
        comings: &mut Comings,
        run: impl FnOnce(NumbersMut<'_>) -> Result<()>,
    ) -> Result<()> {
        let vocab = self.vocab();
        let Some(memory) = self.home() else {
            return run(NumbersMut::Host(logits.room(vocab)));
        };
        let Some(most) = enough else {
            let room = memory
                .room(&mut comings.rows, vocab * size_of::<f32>())?
                .floats_mut(vocab);
            run(NumbersMut::Host(room))?;
            logits.set(room);
            return Ok(());
        };
        let bytes = vocab * size_of::<f32>();
        let mut buffer = memory.allocate(bytes)?;
        run(NumbersMut::Device(&mut buffer))?;
        let best = buffer.best(1, vocab, to_bring(most, vocab), &mut comings.best)?;
        logits.stay(Arc::new(Spot::new(Arc::new(buffer), 0, bytes)), 0, vocab, &best);
        self.counters.best.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Runs one row by itself, where it lies.
    fn run_one(&self, works: &mut Works, slots: &mut Bound<'_>, row: &mut Row) {
        self.counters.count(1, 1);
        row.outcome = match self.try_one(works, slots, row) {
            Ok(()) => Outcome::Run,
            Err(error) => Outcome::Failed(error),
        };
    }

    fn try_one(&self, works: &mut Works, slots: &mut Bound<'_>, row: &mut Row) -> Result<()> {
        let Works { graph, comings, .. } = works;
        let by_chance = self.unbatched.get().is_none();
        let past = row.place.len;
        let turn = slots.one(&mut row.place, 1)?;
        let state = row.past_memory.aligned()?;
        row.present_memory
            .write(self.home(), self.geometry().elements(), |present_memory| {
                self.last_logits(&mut row.logits, row.enough, comings, |logits| {
                    graph.run(
                        self,
                        Run {
                            tokens: &[row.token],
                            past: &[past],
                            write: &[row.write],
                            spans: None,
                            rows: Rows::Last,
                            past_memory: state.numbers(),
                            present_memory,
                            turn,
                            strength: 1.0,
                            logits,
                            measures: Measures::default(),
                            // Where others step together, who is by itself once is not so again.
                            by_chance,
                        },
                    )
                })
            })
    }

    /// How many runs there were so far, and of what.
    pub fn run_stats(&self) -> RunStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RunStats {
            steps: of(&self.counters.steps),
            step_tokens: of(&self.counters.rows),
            idle_rows: of(&self.counters.idle),
            largest_step: of(&self.counters.largest),
            chunks: of(&self.counters.chunks),
            best_rows: of(&self.counters.best),
            captured_steps: of(&self.counters.captured),
            cuda_graphs: of(&self.counters.captures),
        }
    }
}

/// The states that a step has written, row behind row.
enum StepStates<'a> {
    Host(&'a [f32]),
    /// In a buffer of the step's own.
    Device(Arc<DeviceBuffer>),
    /// In rows that stay.
    Fixed(&'a mut FixedRows),
}

/// Gives each row of a step the state after it: a copy of what is on the host, or its place in the step's buffer on the device, so that where the
/// step has written it is where the next one reads it.
fn leave_states(
    window: &Window,
    at: &[usize],
    rows: &mut [Row],
    mut step: StepStates<'_>,
    numbers: usize,
) -> Result<()> {
    for (number, rider) in window.riders.iter().enumerate() {
        let Some(of) = rider.of else { continue };
        let start = number * numbers;
        match (&mut rows[at[of]].present_memory, &mut step) {
            (Back::Host(view), StepStates::Host(states)) => Arc::get_mut(view)
                .ok_or_else(held)?
                .copy_from_slice(&states[start..][..numbers]),
            (Back::Device(state), StepStates::Device(buffer)) => {
                let first = start * size_of::<f32>();
                *state = Some(Arc::new(Resident::new(Arc::clone(buffer), first, numbers)));
            }
            (Back::Device(state), StepStates::Fixed(rows)) => {
                *state = Some(Arc::new(Resident::at(rows.lease(number), numbers)));
            }
            _ => return Err(held()),
        }
    }
    Ok(())
}

/// The states of a window's rows before a step.
fn states<'a>(window: &Window, at: &[usize], rows: &'a [Row]) -> Vec<Option<&'a State>> {
    let riders = window.riders.iter();
    riders
        .map(|rider| rider.of.map(|of| &rows[at[of]].past_memory))
        .collect()
}

/// How many of the largest logits of each row a window's turns need at most; none if all of them need all.
fn most_enough(window: &Window, at: &[usize], rows: &[Row], vocab: usize) -> Option<usize> {
    let enough = indices(window, at).filter_map(|index| rows[index].enough);
    enough.max().map(|most| to_bring(most, vocab))
}

/// The rows of a step that a window's turns are, in its order.
fn indices<'a>(window: &'a Window, at: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
    window.riders.iter().filter_map(|rider| rider.of).map(|of| at[of])
}

impl Counters {
    /// A step was captured or replayed; there are so many captures.
    pub(crate) fn captured(&self, captures: usize) {
        self.captured.fetch_add(1, Ordering::Relaxed);
        self.captures.fetch_max(captures as u64, Ordering::Relaxed);
    }

    fn count(&self, rows: usize, batch: usize) {
        let (rows, batch) = (rows as u64, batch as u64);
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.idle.fetch_add(batch - rows, Ordering::Relaxed);
        self.largest.fetch_max(rows, Ordering::Relaxed);
    }
}
