//! The allocator, and when it hands memory back to the system.
#![allow(unsafe_code, reason = "the allocator's options are C")]

use std::sync::atomic::{AtomicBool, Ordering};

/// Activations are allocated and freed batch after batch; the system's allocator hands each large block back and
/// pays for its pages again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay`: milliseconds that free memory is kept; its number in version 3, which is built.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
/// The allocator's own.
const USUAL: std::ffi::c_long = 1000;

/// Whether a job of this process asked for a budget.
static WITHIN_BUDGET: AtomicBool = AtomicBool::new(false);

/// Within a budget free memory goes back at once; without one it is kept for a second, which saves a tenth of the time
/// and costs up to a third more memory. Without any budget the allocator's settings are left alone.
pub(crate) fn keep_within_budget(budget: bool) {
    if WITHIN_BUDGET.swap(budget, Ordering::Relaxed) == budget {
        return;
    }
    // SAFETY: stores one aligned number in the allocator's table of options, at an index of the table. Other threads may
    // read it at the same time and see the old or the new delay; both are valid.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, if budget { 0 } else { USUAL }) }
}
