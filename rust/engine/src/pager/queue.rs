//! What the pager's threads have to do: faults first, then what the last run touched first, then all the rest.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::order::Page;
use super::space::Space;

/// While the working set is recorded, nothing but what is touched is brought until nothing has been touched for so
/// long, or so long at most: a page that is there already makes no fault.
const QUIET: Duration = Duration::from_millis(300);
const LONGEST: Duration = Duration::from_secs(10);

/// One thing to do.
#[derive(Debug)]
pub enum Job {
    /// A thread waits for this page.
    Fault(Arc<Space>, u64),
    /// The block of a page that the last run touched early.
    Early(Arc<Space>, u64),
    /// A block, by number.
    Block(Arc<Space>, usize),
}

#[derive(Debug)]
struct State {
    faults: VecDeque<(Arc<Space>, u64)>,
    early: VecDeque<Page>,
    /// Forks add to the end.
    spaces: Vec<Arc<Space>>,
    /// The next block: space, block.
    next: (usize, usize),
    filling: bool,
    working: usize,
    turns: usize,
    over: bool,
    started: Instant,
    last_fault: Instant,
}

/// The list, and who waits for it to grow.
#[derive(Debug)]
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// The working set is being recorded.
    record: bool,
}

/// A job that is being done: while there is one, the work is not over.
#[derive(Debug)]
pub struct Taken<'q> {
    queue: &'q Queue,
    /// What to do.
    pub job: Job,
    /// How many that are no faults were taken before it.
    pub turn: usize,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.queue.lock().working -= 1;
        self.queue.changed.notify_all();
    }
}

impl Queue {
    /// Nothing is brought yet but what is touched.
    pub fn new(spaces: Vec<Arc<Space>>, early: Vec<Page>, record: bool) -> Queue {
        let now = Instant::now();
        Queue {
            state: Mutex::new(State {
                faults: VecDeque::new(),
                early: early.into(),
                spaces,
                next: (0, 0),
                filling: false,
                working: 0,
                turns: 0,
                over: false,
                started: now,
                last_fault: now,
            }),
            changed: Condvar::new(),
            record,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the rest is brought too.
    pub fn start_filling(&self) {
        let mut state = self.lock();
        state.filling = true;
        state.started = Instant::now();
        state.last_fault = state.started;
        drop(state);
        self.changed.notify_all();
    }

    /// A thread waits.
    pub fn add_fault(&self, space: &Arc<Space>, address: u64) {
        let mut state = self.lock();
        state.faults.push_back((Arc::clone(space), address));
        state.last_fault = Instant::now();
        drop(state);
        self.changed.notify_all();
    }

    /// Another address space.
    pub fn add_space(&self, space: Space) {
        self.lock().spaces.push(Arc::new(space));
        self.changed.notify_all();
    }

    /// All address spaces so far.
    pub fn spaces(&self) -> Vec<Arc<Space>> {
        self.lock().spaces.clone()
    }

    /// The next job; waits for one. `None` when all is done. One who serves `only_faults` is always soon at hand.
    pub fn take(&self, only_faults: bool) -> Option<Taken<'_>> {
        let mut state = self.lock();
        loop {
            if state.over {
                return None;
            }
            let job = match state.faults.pop_front() {
                Some((space, address)) => Some(Job::Fault(space, address)),
                None if only_faults || !state.filling || self.holds_back(&state) => None,
                None => state.next_block(),
            };
            if let Some(job) = job {
                state.working += 1;
                let turn = state.turns;
                state.turns += usize::from(!matches!(job, Job::Fault(..)));
                return Some(Taken { queue: self, job, turn });
            }
            if state.filling && state.working == 0 && state.is_drained() {
                state.over = true;
                self.changed.notify_all();
                return None;
            }
            state = if state.filling && self.holds_back(&state) {
                let waited = self.changed.wait_timeout(state, QUIET);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    fn holds_back(&self, state: &State) -> bool {
        self.record && state.last_fault.elapsed() < QUIET && state.started.elapsed() < LONGEST
    }
}

impl State {
    fn next_block(&mut self) -> Option<Job> {
        while let Some((number, was)) = self.early.pop_front() {
            if let Some(space) = self.spaces.iter().find(|s| s.number == number) {
                return Some(Job::Early(Arc::clone(space), was));
            }
        }
        while let Some(space) = self.spaces.get(self.next.0) {
            if self.next.1 < space.block_count() && !space.is_over() {
                self.next.1 += 1;
                return Some(Job::Block(Arc::clone(space), self.next.1 - 1));
            }
            self.next = (self.next.0 + 1, 0);
        }
        None
    }

    fn is_drained(&self) -> bool {
        let left = |at: usize| {
            let from = if at == self.next.0 { self.next.1 } else { 0 };
            self.spaces
                .get(at)
                .is_some_and(|s| from < s.block_count() && !s.is_over())
        };
        self.faults.is_empty() && self.early.is_empty() && !(self.next.0..self.spaces.len()).any(left)
    }
}
