//! The allocator, and when it hands memory back to the system.
#![allow(unsafe_code, reason = "the allocator's options are C")]

/// Activations are allocated and freed batch after batch; the system's allocator hands each large block back and
/// pays for its pages again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay`: milliseconds that free memory is kept; the same number in every version of `mi_option_t`.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
/// The allocator's own.
const USUAL: std::ffi::c_long = 1000;

/// Within a budget free memory goes back at once; without one it is kept for a second, which saves a tenth of the time
/// and costs up to a third more memory.
pub(crate) fn keep_within_budget(budget: bool) {
    // SAFETY: stores a number in a table of atomic options; the index is one of the table's.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, if budget { 0 } else { USUAL }) }
}
