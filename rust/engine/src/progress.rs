//! How far the work is: bytes of memory, told to whoever asked while they are copied.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::stage::Stage;

/// Who is told: the stage, the bytes that are done in it, and those that it has in all.
pub type Listener = Box<dyn Fn(Stage, u64, u64) + Send>;

/// Twenty times a second is enough for a bar.
const EVERY: Duration = Duration::from_millis(50);

/// Bytes done and bytes in all of the stage at work. Told by the threads that copy: nobody polls, and without a listener
/// nothing is done. The listener must not block: a stage may be in a container's pause.
#[derive(Default)]
pub struct Progress(Mutex<Option<State>>);

struct State {
    listener: Listener,
    stage: Option<Stage>,
    done: u64,
    total: u64,
    next: Instant,
}

impl Progress {
    /// From now on `listener` is told.
    pub fn listen(&self, listener: Listener) {
        *self.state() = Some(State {
            listener,
            stage: None,
            done: 0,
            total: 0,
            next: Instant::now(),
        });
    }

    /// So many bytes are to be done in `stage`, beside those that are known of already.
    pub fn expect(&self, stage: Stage, bytes: u64) {
        if let Some(state) = self.state().as_mut() {
            if state.stage != Some(stage) {
                (state.stage, state.done, state.total) = (Some(stage), 0, 0);
            }
            state.total += bytes;
        }
    }

    /// So many bytes more are done.
    pub fn advance(&self, bytes: u64) {
        if let Some(state) = self.state().as_mut() {
            state.done += bytes;
            state.tell();
        }
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The end of a stage is always told.
    fn tell(&mut self) {
        let now = Instant::now();
        let Some(stage) = self.stage.filter(|_| now >= self.next || self.done == self.total) else {
            return;
        };
        self.next = now + EVERY;
        (self.listener)(stage, self.done, self.total);
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.state() {
            Some(state) => write!(f, "{:?}: {} of {} bytes", state.stage, state.done, state.total),
            None => f.write_str("nobody asked"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_end_of_each_stage_is_told_and_little_between() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let progress = Progress::default();
        // nobody listens
        progress.expect(Stage::Read, 5);
        progress.advance(5);
        let list = Arc::clone(&told);
        progress.listen(Box::new(move |stage, done, total| {
            list.lock().unwrap().push((stage, done, total))
        }));
        for stage in [Stage::Read, Stage::Fill] {
            progress.expect(stage, 600);
            progress.expect(stage, 400);
            (0..1000).for_each(|_| progress.advance(1));
        }
        let told = told.lock().unwrap();
        let ends: Vec<_> = told.iter().filter(|t| t.1 == t.2).collect();
        assert_eq!(ends, [&(Stage::Read, 1000, 1000), &(Stage::Fill, 1000, 1000)]);
        assert_eq!(told[0], (Stage::Read, 1, 1000));
        assert!(told.is_sorted_by_key(|t| (t.0 == Stage::Fill, t.1)));
        assert!(told.len() < 1000, "told {} times", told.len());
    }
}
