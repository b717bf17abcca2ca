//! Counts what is allocated, in builds that measure it (the feature `count-allocations`). What C code asks the system for
//! is not seen.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static TIMES: AtomicU64 = AtomicU64::new(0);
static ALLOCATED: AtomicU64 = AtomicU64::new(0);
static FREED: AtomicU64 = AtomicU64::new(0);

/// An allocator that counts what goes through it.
#[derive(Debug)]
pub struct Counting<A>(pub A);

/// What all threads of this process asked for since it began.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// How often, a change of size among them.
    pub times: u64,
    /// Bytes.
    pub allocated_bytes: u64,
    /// Bytes given back.
    pub freed_bytes: u64,
}

/// What was counted so far.
pub fn counted() -> Counted {
    Counted { times: TIMES.load(Relaxed), allocated_bytes: ALLOCATED.load(Relaxed), freed_bytes: FREED.load(Relaxed) }
}

fn count(allocated: usize, freed: usize) {
    TIMES.fetch_add(u64::from(allocated > 0), Relaxed);
    ALLOCATED.fetch_add(allocated as u64, Relaxed);
    FREED.fetch_add(freed as u64, Relaxed);
}

// SAFETY: Each call is handed on as it came, so what the allocator inside promises holds; counting neither allocates nor
// panics.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: The caller holds to the same contract.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: As above.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: As above.
        unsafe { self.0.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: As above.
        unsafe { self.0.dealloc(pointer, layout) }
    }
}
