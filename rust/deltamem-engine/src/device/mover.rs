//! What is done to a device's memory beside the runs: a thread that does one job after another, started with the first of them, and fences by
//! which others see that a job is over. Nobody has to wait for a job that is not begun: whoever needs what it does does it himself. It knows
//! jobs; it knows nothing of what they move.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::error::{EngineError, Result};

type Job = Box<dyn FnOnce() + Send>;

/// The thread, once somebody has asked for something.
#[derive(Debug, Default)]
pub(crate) struct Mover {
    thread: OnceLock<Option<JoinHandle<()>>>,
    queue: Arc<Queue>,
}

/// What it is to do.
#[derive(Default)]
struct Queue {
    /// None once there will be no more.
    jobs: Mutex<Option<VecDeque<Job>>>,
    comes: Condvar,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Queue")
    }
}

impl Queue {
    /// The next job; none once there will be no more.
    fn next(&self) -> Option<Job> {
        let mut jobs = self.jobs.lock();
        loop {
            match jobs.as_mut()?.pop_front() {
                Some(job) => return Some(job),
                None => self.comes.wait(&mut jobs),
            }
        }
    }
}

impl Mover {
    /// Has the thread do `job` when those before it are done. Where no thread can be had nothing is done, which costs time and memory and changes
    /// no result.
    pub(crate) fn ask(&self, job: Job) {
        let running = self.thread.get_or_init(|| {
            *self.queue.jobs.lock() = Some(VecDeque::new());
            let queue = Arc::clone(&self.queue);
            let thread = thread::Builder::new()
                .name("deltamem-moves".into())
                .spawn(move || {
                    while let Some(job) = queue.next() {
                        // A panic is a bug of that job; its fence tells of it, and the others are done.
                        let _ = catch_unwind(AssertUnwindSafe(job));
                    }
                });
            thread.ok()
        });
        if running.is_some()
            && let Some(jobs) = &mut *self.queue.jobs.lock()
        {
            jobs.push_back(job);
        }
        self.queue.comes.notify_one();
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // What nobody has begun is nobody's any more: whoever needed it would hold what this is a part of.
        drop(self.queue.jobs.lock().take());
        self.queue.comes.notify_one();
        if let Some(Some(thread)) = self.thread.take()
            // The last holder of the memory may be a job: its thread ends by itself then.
            && thread.thread().id() != thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// Whether something that was begun is over, and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    outcome: Mutex<Option<Result<()>>>,
    over: Condvar,
}

impl Fence {
    pub(crate) fn is_over(&self) -> bool {
        self.outcome.lock().is_some()
    }

    /// Waits until it is over.
    pub(crate) fn wait(&self) {
        let mut outcome = self.outcome.lock();
        while outcome.is_none() {
            self.over.wait(&mut outcome);
        }
    }

    /// What went wrong, if it is over and something did.
    pub(crate) fn error(&self) -> Option<EngineError> {
        let outcome = self.outcome.lock();
        outcome
            .as_ref()
            .and_then(|outcome| outcome.as_ref().err().map(EngineError::again))
    }
}

/// Held by whoever does what a fence stands for. Let go of in a panic, it says that it broke off.
#[derive(Debug)]
pub(crate) struct Doing(pub(crate) Arc<Fence>);

impl Doing {
    /// It is over.
    pub(crate) fn ends(self, outcome: Result<()>) {
        *self.0.outcome.lock() = Some(outcome);
    }
}

impl Drop for Doing {
    fn drop(&mut self) {
        self.0.outcome.lock().get_or_insert_with(|| {
            Err(EngineError::Device(
                "a move on the device broke off; call again, and please report this".into(),
            ))
        });
        self.0.over.notify_all();
    }
}

/// What a test has happen to moves; nothing, unless it says so.
#[derive(Debug, Clone, Copy, Default)]
#[doc(hidden)]
pub struct Disturbance {
    /// Jobs beside the runs are not begun.
    pub hold: bool,
    /// Each is late by as much, at random.
    pub delay: Duration,
    /// So many of them fail.
    pub fail_beside: u32,
    /// So many moves fail, whoever makes them.
    pub fail_moves: u32,
    /// Slots are wiped with bits that are NaN instead of zeros, and looked at before they are used; and where runs and jobs touch the same bytes at
    /// the same time, every move fails from then on.
    pub poison: bool,
}

/// The disturbance, and those who wait for its end.
#[derive(Debug, Default)]
pub(crate) struct Trial {
    on: AtomicBool,
    what: Mutex<Disturbance>,
    changed: Condvar,
    random: Mutex<u64>,
    /// The addresses that runs (true) and jobs touch now.
    touched: Mutex<Vec<(bool, Range<usize>)>>,
    collided: AtomicBool,
}

impl Trial {
    pub(crate) fn set(&self, what: Disturbance) {
        *self.what.lock() = what;
        self.on.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// In front of a job beside the runs.
    pub(crate) fn job_comes(&self) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let mut what = self.what.lock();
        while what.hold {
            self.changed.wait(&mut what);
        }
        drop(what);
        self.late();
    }

    /// In a job, which others wait for now.
    pub(crate) fn job_begins(&self) -> Result<()> {
        if !self.on.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.late();
        failing(&mut self.what.lock().fail_beside)
    }

    /// In front of any move.
    pub(crate) fn moves(&self) -> Result<()> {
        if !self.on.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.collided.load(Ordering::Relaxed) {
            return Err(EngineError::Device(
                "a run and a job have touched the same bytes at the same time; please report this".into(),
            ));
        }
        failing(&mut self.what.lock().fail_moves)
    }

    /// A run, or a job, touches these addresses from here on.
    pub(crate) fn touches(&self, run: bool, addresses: &Range<usize>) {
        if !self.poisons() {
            return;
        }
        let mut touched = self.touched.lock();
        // Runs are made one after another, and may bind what they had before.
        let collides = |(other, range): &(bool, Range<usize>)| {
            !(run && *other) && range.start < addresses.end && addresses.start < range.end
        };
        if touched.iter().any(collides) {
            self.collided.store(true, Ordering::Relaxed);
        }
        touched.push((run, addresses.clone()));
    }

    /// It does no longer; a run all that it did.
    pub(crate) fn leaves(&self, run: bool, addresses: &Range<usize>) {
        if self.on.load(Ordering::Relaxed) {
            self.touched
                .lock()
                .retain(|(other, range)| *other != run || !run && range != addresses);
        }
    }

    /// Whether slots are wiped with what nobody must ever see.
    pub(crate) fn poisons(&self) -> bool {
        self.on.load(Ordering::Relaxed) && self.what.lock().poison
    }

    fn late(&self) {
        let most = self.what.lock().delay;
        if most.is_zero() {
            return;
        }
        let mut random = self.random.lock();
        *random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let share = (*random >> 33) as f64 / f64::from(1_u32 << 31);
        drop(random);
        thread::sleep(most.mul_f64(share));
    }
}

fn failing(left: &mut u32) -> Result<()> {
    if *left == 0 {
        return Ok(());
    }
    *left -= 1;
    Err(EngineError::Device("a test has this move fail".into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn jobs_are_done_in_order() {
        let done = Arc::new(Mutex::new(Vec::new()));
        let mover = Mover::default();
        for number in 0..100 {
            let done = Arc::clone(&done);
            mover.ask(Box::new(move || done.lock().push(number)));
        }
        let all = Arc::new(Fence::default());
        let last = Doing(Arc::clone(&all));
        mover.ask(Box::new(move || last.ends(Ok(()))));
        all.wait();
        drop(mover);
        assert_eq!(*done.lock(), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_job_that_panics_is_told_by_its_fence_and_the_next_is_done() {
        let mover = Mover::default();
        let fences = [(); 2].map(|()| Arc::new(Fence::default()));
        let broken = Doing(Arc::clone(&fences[0]));
        mover.ask(Box::new(move || {
            let _held = broken;
            panic!("a bug in a job");
        }));
        let whole = Doing(Arc::clone(&fences[1]));
        mover.ask(Box::new(move || whole.ends(Ok(()))));
        for fence in &fences {
            fence.wait();
        }
        assert!(matches!(fences[0].error(), Some(EngineError::Device(_))));
        assert!(fences[1].is_over() && fences[1].error().is_none());
    }

    #[test]
    fn a_mover_that_a_job_is_the_last_to_hold_does_not_wait_for_itself() {
        let mover = Arc::new(Mover::default());
        let (begun, over) = (Arc::new(Fence::default()), Arc::new(Fence::default()));
        let (held, wait, done) = (Arc::clone(&mover), Arc::clone(&begun), Doing(Arc::clone(&over)));
        mover.ask(Box::new(move || {
            wait.wait();
            drop(held);
            done.ends(Ok(()));
        }));
        drop(mover);
        Doing(begun).ends(Ok(()));
        over.wait();
    }
}
