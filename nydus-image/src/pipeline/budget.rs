//! A bound for the chunk data in memory, and the buffers that hold it.
//!
//! A buffer takes its share of the budget when it is handed out and gives it back
//! when it is dropped. Its memory is kept for the next user, so that a long build
//! allocates little. A layer whose sequencer waits for the network keeps its
//! buffers and thereby slows its own source down, which is the intention.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// The budget; shared by all layers that are built at a time.
#[derive(Debug)]
pub struct Budget {
    state: Mutex<State>,
    /// Signalled when a share is given back.
    returned: Condvar,
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of the shares that are handed out.
    used: usize,
    /// Memory of buffers that were given back. It counts as free budget: it is
    /// dropped when a buffer of another size is asked for.
    idle: Vec<Memory>,
}

/// The memory of one buffer.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// What the source put in: chunk after chunk.
    pub(crate) input: Vec<u8>,
    /// What the workers made of it. Compressed data is never longer than the input.
    pub(crate) output: Vec<u8>,
}

/// A buffer with its share of the budget.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Memory,
    share: usize,
    budget: Arc<Budget>,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            state: Mutex::default(),
            returned: Condvar::new(),
            limit,
        }
    }

    /// Waits until there is room, then hands out a buffer whose input is `capacity`
    /// bytes of unspecified content. One buffer is handed out however large it is.
    pub(crate) fn buffer(self: &Arc<Self>, capacity: usize) -> Buffer {
        let share = capacity.saturating_mul(2);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.used > 0 && state.used.saturating_add(share) > self.limit {
            state = self
                .returned
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.used = state.used.saturating_add(share);
        if state
            .idle
            .last()
            .is_some_and(|memory| memory.input.len() != capacity)
        {
            state.idle.clear();
        }
        let memory = state.idle.pop();
        drop(state);
        let mut memory = memory.unwrap_or_default();
        memory.input.resize(capacity, 0);
        memory.output.clear();
        Buffer {
            memory,
            share,
            budget: Arc::clone(self),
        }
    }
}

impl std::ops::Deref for Buffer {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self
            .budget
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.used = state.used.saturating_sub(self.share);
        state.idle.push(std::mem::take(&mut self.memory));
        drop(state);
        self.budget.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_full_budget_makes_the_next_buffer_wait() {
        let budget = Arc::new(Budget::new(100));
        let first = budget.buffer(25);
        let _second = budget.buffer(25);
        let (sender, receiver) = mpsc::channel();
        let waiter = std::thread::spawn({
            let budget = Arc::clone(&budget);
            move || {
                let _third = budget.buffer(25);
                sender.send(()).unwrap();
            }
        });
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop(first);
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        waiter.join().unwrap();
    }

    #[test]
    fn one_buffer_always_fits_and_memory_is_used_again() {
        let budget = Arc::new(Budget::new(1));
        let mut buffer = budget.buffer(64);
        buffer.input[0] = 7;
        drop(buffer);
        assert_eq!(budget.buffer(64).input[0], 7, "the same memory");
        assert_eq!(budget.buffer(32).input.len(), 32);
        assert_eq!(budget.state.lock().unwrap().used, 0);
    }
}
