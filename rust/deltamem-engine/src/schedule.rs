//! Who runs next. One run is in flight a model, and whoever holds the baton runs: a prompt's chunk by itself, or the steps of one token
//! that wait, all at once. The thread that brings a step and finds nobody running takes the others' with it and hands them their results; no
//! thread is kept for it, and an idle model has none. It knows rows and threads; it knows nothing of what a row is or does.
//!
//! Fairness: steps and chunks take turns, each in the order of asking, so that a step waits for one chunk and one step of others at most while
//! no more steps wait than fit into one. Whoever has stepped with the others is waited for a little, because a batch that leaves without those
//! that are on their way back falls apart into two.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// The share of the last step's time for which a step waits for those that were in the last one. Whoever takes longer to come back is not
/// waited for the next time.
const PATIENCE: f64 = 0.25;

/// How long after the last step the replies that took part in it still count as being made: so many times its time, and a little for threads that
/// the machine lets wait.
const RECENTLY: (u32, Duration) = (16, Duration::from_millis(100));

/// What a model's sessions share.
#[derive(Debug)]
pub(crate) struct Schedule<R> {
    state: Mutex<State<R>>,
    /// Told when a step comes, or will not come.
    coming: Condvar,
    /// Steps that fit into one run.
    most: usize,
}

#[derive(Debug)]
struct State<R> {
    /// Whether anybody runs, or was told to.
    running: bool,
    /// Who waits to run by itself.
    alone: VecDeque<Arc<Bell<R>>>,
    /// Steps that wait.
    steps: VecDeque<Waiting<R>>,
    /// Seats that step one token after the other at present.
    streaming: usize,
    /// Of the last step: its number, how many of it are waited for, when it ended and how long it took.
    round: u64,
    expected: usize,
    ended: Option<Instant>,
    took: Duration,
}

#[derive(Debug)]
struct Waiting<R> {
    row: R,
    bell: Arc<Bell<R>>,
    /// Whether it is to be waited for next time.
    quick: bool,
}

/// Where one session waits.
#[derive(Debug)]
struct Bell<R> {
    call: Mutex<Option<Summons<R>>>,
    rung: Condvar,
}

/// What a waiting session is woken for.
#[derive(Debug)]
enum Summons<R> {
    /// It holds the baton.
    Lead,
    /// Another has run its step.
    Done(R, Round),
}

/// The step that a row was in.
#[derive(Debug, Clone, Copy)]
struct Round {
    number: u64,
    ended: Instant,
    took: Duration,
    /// Whether the next step waits for this row's next one.
    expected: bool,
}

/// One session's place in the schedule. It asks for one thing at a time.
#[derive(Debug)]
pub(crate) struct Seat<R> {
    bell: Arc<Bell<R>>,
    last: Option<Round>,
    streaming: bool,
}

impl<R> Seat<R> {
    pub(crate) fn new() -> Self {
        Self {
            bell: Arc::new(Bell {
                call: Mutex::new(None),
                rung: Condvar::new(),
            }),
            last: None,
            streaming: false,
        }
    }
}

impl<R> Bell<R> {
    fn ring(&self, summons: Summons<R>) {
        *self.call.lock() = Some(summons);
        self.rung.notify_one();
    }

    fn wait(&self) -> Summons<R> {
        let mut call = self.call.lock();
        loop {
            if let Some(summons) = call.take() {
                return summons;
            }
            self.rung.wait(&mut call);
        }
    }
}

/// The right to run. Letting go of it gives it to whoever is next.
struct Baton<'s, R> {
    schedule: &'s Schedule<R>,
    /// Whether this run was somebody's by itself.
    alone: bool,
}

impl<R> Drop for Baton<'_, R> {
    fn drop(&mut self) {
        let mut state = self.schedule.state.lock();
        let step = state.steps.front().map(|waiting| Arc::clone(&waiting.bell));
        let next = match step {
            Some(step) if self.alone || state.alone.is_empty() => Some(step),
            _ => state.alone.pop_front(),
        };
        state.running = next.is_some();
        drop(state);
        if let Some(next) = next {
            next.ring(Summons::Lead);
        }
    }
}

impl<R> Schedule<R> {
    /// A schedule that runs at most `most` steps at once.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            state: Mutex::new(State {
                running: false,
                alone: VecDeque::new(),
                steps: VecDeque::new(),
                streaming: 0,
                round: 0,
                expected: 0,
                ended: None,
                took: Duration::ZERO,
            }),
            coming: Condvar::new(),
            most: most.max(1),
        }
    }

    /// Does `work` when nobody else runs, in the order of asking.
    pub(crate) fn alone<T>(&self, seat: &mut Seat<R>, work: impl FnOnce() -> T) -> T {
        self.leave(seat);
        let mut state = self.state.lock();
        if state.running {
            state.alone.push_back(Arc::clone(&seat.bell));
            drop(state);
            // Whoever waits to run alone has no row that another could bring back.
            while !matches!(seat.bell.wait(), Summons::Lead) {}
        } else {
            state.running = true;
            drop(state);
        }
        let _baton = Baton {
            schedule: self,
            alone: true,
        };
        work()
    }

    /// Has the row run, with those of others, and returns it. `run` is called with them where this thread is the one that runs them; it leaves
    /// in each row what became of it. A row that comes back as it was given was in a run that panicked. `streaming` says that more of them
    /// will follow, as in a reply.
    pub(crate) fn step(
        &self,
        seat: &mut Seat<R>,
        row: R,
        streaming: bool,
        run: impl FnOnce(&mut [R]),
    ) -> Option<R> {
        let mut state = self.state.lock();
        let last = seat.last.take();
        let quick = last.is_none_or(|last| last.ended.elapsed() <= last.took.mul_f64(PATIENCE));
        state.no_longer_expected(last);
        if streaming && !seat.streaming {
            seat.streaming = true;
            state.streaming += 1;
        }
        state.steps.push_back(Waiting {
            row,
            bell: Arc::clone(&seat.bell),
            quick,
        });
        if state.running {
            drop(state);
            self.coming.notify_one();
            if let Summons::Done(row, round) = seat.bell.wait() {
                seat.last = Some(round);
                return Some(row);
            }
        } else {
            state.running = true;
            drop(state);
        }
        self.lead(seat, run)
    }

    /// Runs the steps that wait, this seat's own among them.
    fn lead(&self, seat: &mut Seat<R>, run: impl FnOnce(&mut [R])) -> Option<R> {
        let baton = Baton {
            schedule: self,
            alone: false,
        };
        let (mut rows, mut others) = (Vec::new(), Vec::new());
        {
            let mut state = self.gather();
            // The own step is the oldest that waits: whoever passes the baton on gives it to that one.
            let count = state.steps.len().min(self.most);
            for waiting in state.steps.drain(..count) {
                rows.push(waiting.row);
                others.push((waiting.bell, waiting.quick));
            }
        }
        let began = Instant::now();
        // A panic here is a bug, and must not take the others' threads with it. They see by their rows that nothing ran.
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&mut rows)));
        let ended = Instant::now();
        let number = {
            let mut state = self.state.lock();
            state.round += 1;
            state.expected = others.iter().filter(|(_, quick)| *quick).count();
            state.ended = Some(ended);
            state.took = ended - began;
            state.round
        };
        let mut own = None;
        for (row, (bell, expected)) in rows.into_iter().zip(others) {
            let round = Round {
                number,
                ended,
                took: ended - began,
                expected,
            };
            if Arc::ptr_eq(&bell, &seat.bell) {
                seat.last = Some(round);
                own = Some(row);
            } else {
                bell.ring(Summons::Done(row, round));
            }
        }
        drop(baton);
        drop(outcome);
        own
    }

    /// Waits a little for those of the last step that are on their way back.
    fn gather(&self) -> MutexGuard<'_, State<R>> {
        let mut state = self.state.lock();
        while state.expected > 0 && state.steps.len() < self.most {
            let Some(until) = state.ended.map(|ended| ended + state.took.mul_f64(PATIENCE)) else {
                break;
            };
            if self.coming.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.expected = 0;
        state
    }

    /// The seat will not step again soon: nobody waits for it.
    pub(crate) fn leave(&self, seat: &mut Seat<R>) {
        if seat.last.is_none() && !seat.streaming {
            return;
        }
        let mut state = self.state.lock();
        state.no_longer_expected(seat.last.take());
        if seat.streaming {
            seat.streaming = false;
            state.streaming -= 1;
        }
        drop(state);
        self.coming.notify_one();
    }

    /// Whether replies of other seats are being made at present.
    pub(crate) fn others_stream(&self, seat: &Seat<R>) -> bool {
        let state = self.state.lock();
        state.streaming > usize::from(seat.streaming)
            && state
                .ended
                .is_some_and(|ended| ended.elapsed() < state.took * RECENTLY.0 + RECENTLY.1)
    }
}

impl<R> State<R> {
    fn no_longer_expected(&mut self, last: Option<Round>) {
        if last.is_some_and(|last| last.expected && last.number == self.round) {
            self.expected = self.expected.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    type Plan = Vec<(u8, u8)>;

    /// Does `work` on a thread of its own; a deadlock fails the test instead of hanging it.
    fn within(seconds: u64, work: impl FnOnce() + Send + 'static) {
        let (done, wait) = mpsc::channel();
        let worker = thread::spawn(move || {
            work();
            done.send(()).unwrap();
        });
        match wait.recv_timeout(Duration::from_secs(seconds)) {
            Ok(()) => worker.join().unwrap(),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                std::panic::resume_unwind(worker.join().unwrap_err());
            }
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("nothing moves any more after {seconds} s"),
        }
    }

    /// A row knows whose it is, what it asks, and how often it was run.
    #[derive(Debug, Clone, PartialEq)]
    struct Ask {
        who: usize,
        number: usize,
        runs: usize,
    }

    /// Every thread plays its plan: steps, runs alone, pauses, leaves, runs that panic.
    fn play(plans: Vec<Plan>, most: usize) {
        let schedule = Arc::new(Schedule::<Ask>::new(most));
        let busy = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = plans
            .into_iter()
            .enumerate()
            .map(|(who, plan)| {
                let (schedule, busy) = (Arc::clone(&schedule), Arc::clone(&busy));
                thread::spawn(move || {
                    let mut seat = Seat::new();
                    let one_at_a_time = |pause: u8| {
                        assert!(!busy.swap(true, Ordering::SeqCst), "two runs at once");
                        if pause > 0 {
                            thread::sleep(Duration::from_micros(u64::from(pause)));
                        }
                        busy.store(false, Ordering::SeqCst);
                    };
                    for (number, (kind, pause)) in plan.into_iter().enumerate() {
                        match kind {
                            0..=5 => {
                                let row = Ask { who, number, runs: 0 };
                                let back = schedule
                                    .step(&mut seat, row, kind < 4, |rows| {
                                        assert!(!rows.is_empty() && rows.len() <= most);
                                        one_at_a_time(pause);
                                        for row in rows {
                                            row.runs += 1;
                                        }
                                    })
                                    .unwrap();
                                assert_eq!((back.who, back.number), (who, number));
                                assert!(back.runs == 1);
                            }
                            6 => schedule.alone(&mut seat, || one_at_a_time(pause)),
                            7 => schedule.leave(&mut seat),
                            _ => thread::sleep(Duration::from_micros(u64::from(pause) * 10)),
                        }
                    }
                    schedule.leave(&mut seat);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let state = schedule.state.lock();
        assert!(!state.running && state.steps.is_empty() && state.alone.is_empty());
        assert_eq!((state.streaming, state.expected), (0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]
        #[test]
        fn everybody_gets_their_own_row_back_run_once_and_nobody_waits_for_ever(
            plans in prop::collection::vec(prop::collection::vec((0..10_u8, 0..60_u8), 0..40), 1..12),
            most in 1..9_usize,
        ) {
            within(60, move || play(plans, most));
        }
    }

    #[test]
    fn threads_that_step_at_the_same_time_step_together() {
        within(60, || {
            let schedule = Arc::new(Schedule::<usize>::new(16));
            let runs = Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    let (schedule, runs) = (Arc::clone(&schedule), Arc::clone(&runs));
                    thread::spawn(move || {
                        let mut seat = Seat::new();
                        for _ in 0..40 {
                            schedule.step(&mut seat, 0, true, |_| {
                                runs.fetch_add(1, Ordering::SeqCst);
                                thread::sleep(Duration::from_millis(5));
                            });
                        }
                        schedule.leave(&mut seat);
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            let runs = runs.load(Ordering::SeqCst);
            // 320 steps; 40 runs at best.
            assert!(runs <= 120, "{runs} runs");
        });
    }

    /// Someone who waits, without a thread of their own.
    fn waiting(schedule: &Schedule<u8>, alone: bool) -> Arc<Bell<u8>> {
        let bell = Seat::new().bell;
        let mut state = schedule.state.lock();
        if alone {
            state.alone.push_back(Arc::clone(&bell));
        } else {
            state.steps.push_back(Waiting {
                row: 0,
                bell: Arc::clone(&bell),
                quick: true,
            });
        }
        bell
    }

    fn leads(bell: &Bell<u8>) -> bool {
        matches!(bell.call.lock().take(), Some(Summons::Lead))
    }

    #[test]
    fn steps_and_chunks_take_turns() {
        let schedule = Schedule::<u8>::new(4);
        let (first, second) = (waiting(&schedule, true), waiting(&schedule, true));
        let step = waiting(&schedule, false);
        schedule.state.lock().running = true;
        let end = |alone| {
            drop(Baton {
                schedule: &schedule,
                alone,
            });
        };
        end(false);
        assert!(leads(&first) && !leads(&second) && !leads(&step));
        end(true);
        assert!(leads(&step) && !leads(&second));
        // The step stays in the queue until its leader takes it out.
        schedule.state.lock().steps.clear();
        end(false);
        assert!(leads(&second));
        end(true);
        assert!(!schedule.state.lock().running);
    }

    #[test]
    fn who_leaves_or_is_slow_is_not_waited_for() {
        let schedule = Schedule::<u8>::new(4);
        let mut seat = Seat::new();
        let run = |seat: &mut Seat<u8>| {
            schedule.step(seat, 0, true, |_| thread::sleep(Duration::from_millis(20)));
            schedule.state.lock().expected
        };
        assert_eq!(run(&mut seat), 1);
        schedule.leave(&mut seat);
        assert_eq!(schedule.state.lock().expected, 0);
        assert_eq!(run(&mut seat), 1);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(run(&mut seat), 0);
        let mut other = Seat::new();
        assert!(schedule.others_stream(&other));
        assert!(!schedule.others_stream(&seat));
        schedule.leave(&mut seat);
        assert!(!schedule.others_stream(&other));
        schedule.leave(&mut other);
    }

    #[test]
    fn a_run_that_panics_gives_every_row_back_and_the_next_one_runs() {
        within(60, || {
            let schedule = Arc::new(Schedule::<u8>::new(4));
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let schedule = Arc::clone(&schedule);
                    thread::spawn(move || {
                        let mut seat = Seat::new();
                        for _ in 0..20 {
                            let back = schedule.step(&mut seat, 7, true, |_| panic!("a bug in a run"));
                            assert_eq!(back, Some(7));
                        }
                        // A row of another thread, which asks for a run with a bug, may be among them, and comes back as it is.
                        let back = schedule.step(&mut seat, 1, true, |rows| {
                            for row in rows.iter_mut().filter(|row| **row == 1) {
                                *row = 2;
                            }
                        });
                        // Another thread's run may have been the one with the bug.
                        assert!(matches!(back, Some(1 | 2)));
                        schedule.leave(&mut seat);
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            let mut seat = Seat::new();
            let broken = std::panic::catch_unwind(AssertUnwindSafe(|| {
                schedule.alone(&mut seat, || panic!("a bug in a chunk"));
            }));
            assert!(broken.is_err());
            assert_eq!(schedule.step(&mut seat, 1, false, |rows| rows.fill(2)), Some(2));
        });
    }
}
