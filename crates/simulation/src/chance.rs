//! Where randomness comes from: the seed, for everything in this process but cryptography.
//!
//! Hash maps, `tokio::select!` and the random pauses of the code under test all draw on the kernel's `getrandom`, directly
//! or by what they were seeded with. A process of this crate has a function of that name of its own, which the linker
//! prefers to the C library's. Keys and signatures come from elsewhere (AWS-LC asks the kernel itself): they differ from
//! run to run, and nothing that is traced depends on them.

use std::sync::atomic::{AtomicU64, Ordering};

static STATE: AtomicU64 = AtomicU64::new(0);

/// From now on randomness follows from this seed. To be called first, before anything has drawn.
pub fn begin(seed: u64) {
    STATE.store(mixed(seed ^ 0x5eed), Ordering::Relaxed);
}

/// Fills the buffer from the seed, in the place of the kernel.
///
/// # Safety
/// `buffer` points to `length` bytes that may be written, as for the function of the C library.
#[allow(unsafe_code, reason = "a function in the place of one of the C library; this crate is tests only")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    for at in 0..length {
        let next = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        // SAFETY: the caller owns `length` bytes from `buffer` on.
        unsafe { buffer.add(at).write(mixed(next).to_le_bytes()[0]) };
    }
    isize::try_from(length).unwrap_or(isize::MAX)
}

/// A good mixture of the bits (SplitMix64).
fn mixed(seed: u64) -> u64 {
    let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
