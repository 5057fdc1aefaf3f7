//! Callers that want a change made, and who makes it: the first that finds nobody at work takes all that wait and makes them together,
//! while the others wait for their answers. So there is no thread to hand over to, and one fsync serves all that came during the last.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// A caller: its number, and what it waits on. Each has its own, so that only those wake up that have something to do.
#[derive(Clone)]
struct Caller(u64, Arc<Condvar>);

struct State<J, A> {
    /// Jobs that nobody has taken, oldest first.
    waiting: Vec<(Caller, J)>,
    /// Answers that nobody has fetched. `None`: whoever had the job came to grief.
    answers: HashMap<u64, Option<A>>,
    next: u64,
    busy: bool,
    /// Callers that want to be alone: no group begins before them.
    alone: usize,
}

/// Jobs `J` with answers `A`.
pub(super) struct Queue<J, A> {
    state: Mutex<State<J, A>>,
    /// What those wait on who want to be alone.
    free: Condvar,
}

impl<J, A> Default for Queue<J, A> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                waiting: Vec::new(),
                answers: HashMap::new(),
                next: 0,
                busy: false,
                alone: 0,
            }),
            free: Condvar::new(),
        }
    }
}

/// The one at work; when it ends, even by a panic, somebody else may be.
struct Working<'a, J, A> {
    queue: &'a Queue<J, A>,
    /// Whose answers are owed.
    callers: Vec<Caller>,
    answers: Vec<A>,
}

impl<J, A> Drop for Working<'_, J, A> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        let mut answers = std::mem::take(&mut self.answers).into_iter();
        for Caller(number, _) in &self.callers {
            state.answers.insert(*number, answers.next());
        }
        state.busy = false;
        // One of those who wait goes on with the work.
        if state.alone > 0 {
            self.queue.free.notify_one();
        } else if let Some((Caller(_, next), _)) = state.waiting.first() {
            next.notify_one();
        }
        drop(state);
        for Caller(_, answered) in &self.callers {
            answered.notify_one();
        }
    }
}

impl<J, A> Queue<J, A> {
    /// Waits until the job is done, by this caller or another. `work` gives one answer for each job, in their order; a group holds jobs
    /// up to a weight of `most`, and at least one. `None`: the one who had the job panicked.
    pub(super) fn submit(
        &self,
        job: J,
        weight: impl Fn(&J) -> usize,
        most: usize,
        work: impl Fn(Vec<J>) -> Vec<A>,
    ) -> Option<A> {
        let mut state = self.state.lock();
        let caller = Caller(state.next, Arc::default());
        state.next += 1;
        state.waiting.push((caller.clone(), job));
        loop {
            if let Some(answer) = state.answers.remove(&caller.0) {
                return answer;
            }
            if state.busy || state.alone > 0 {
                caller.1.wait(&mut state);
                continue;
            }
            let (mut count, mut sum) = (0, 0);
            for (_, job) in &state.waiting {
                sum += weight(job);
                if count > 0 && sum > most {
                    break;
                }
                count += 1;
            }
            let (callers, jobs) = state.waiting.drain(..count).unzip();
            state.busy = true;
            drop(state);
            let mut working = Working {
                queue: self,
                callers,
                answers: Vec::new(),
            };
            working.answers = work(jobs);
            drop(working);
            state = self.state.lock();
        }
    }

    /// Does something while nobody is at work on jobs.
    pub(super) fn alone<T>(&self, work: impl FnOnce() -> T) -> T {
        let mut state = self.state.lock();
        state.alone += 1;
        while state.busy {
            self.free.wait(&mut state);
        }
        state.alone -= 1;
        state.busy = true;
        drop(state);
        let _working = Working {
            queue: self,
            callers: Vec::new(),
            answers: Vec::new(),
        };
        work()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_job_is_done_once_and_answered_and_groups_form() {
        let queue = Queue::default();
        let (groups, at_work, alone) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let enter = || assert_eq!(at_work.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
        let leave = || at_work.fetch_sub(1, Ordering::SeqCst);
        std::thread::scope(|scope| {
            for worker in 0..8_usize {
                let (queue, groups, enter, leave, alone) = (&queue, &groups, &enter, &leave, &alone);
                scope.spawn(move || {
                    for n in 0..100 {
                        let job = worker * 1_000 + n;
                        let work = |jobs: Vec<usize>| {
                            enter();
                            groups.fetch_add(1, Ordering::SeqCst);
                            assert!(jobs.len() <= 5, "{} jobs, 5 fit", jobs.len());
                            std::thread::sleep(Duration::from_micros(50));
                            leave();
                            jobs.into_iter().map(|job| job + 7).collect()
                        };
                        assert_eq!(queue.submit(job, |_| 2, 10, work), Some(job + 7));
                        if n % 25 == 0 {
                            queue.alone(|| {
                                enter();
                                alone.fetch_add(1, Ordering::SeqCst);
                                leave();
                            });
                        }
                    }
                });
            }
        });
        assert_eq!(alone.into_inner(), 32);
        let groups = groups.into_inner();
        assert!((160..800).contains(&groups), "{groups} groups of 800 jobs");
    }

    #[test]
    fn a_heavy_job_goes_alone_and_a_panic_leaves_the_queue_working() {
        let queue: Queue<usize, usize> = Queue::default();
        assert_eq!(queue.submit(9, |job| *job, 3, |jobs| jobs), Some(9));
        let broken = catch_unwind(AssertUnwindSafe(|| {
            queue.submit(1, |job| *job, 3, |_| panic!("in the work"))
        }));
        assert!(broken.is_err());
        let broken = catch_unwind(AssertUnwindSafe(|| queue.alone(|| panic!("alone"))));
        assert!(broken.is_err());
        assert_eq!(
            queue.submit(2, |job| *job, 3, |_| Vec::new()),
            None,
            "no answer was given"
        );
        assert_eq!(queue.submit(3, |job| *job, 3, |jobs| jobs), Some(3));
    }
}
