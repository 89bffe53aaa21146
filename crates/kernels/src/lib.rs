//! Weight matrices kept in memory as compactly as their values allow, and their products with a few vectors.
//!
//! Decoding one token reads every weight once, so its speed is the bytes of the weights over the bandwidth of the
//! memory. A [`Matrix`] therefore holds f32, bf16, f16, 8-bit or 4-bit elements and turns them into f32 in registers.
//! [`Matrix::multiply`] serves up to [`MAX_VECTORS`] vectors at once; for longer batches [`Matrix::expand_rows`] gives
//! panels of f32 rows for a matrix product.
//!
//! The kernels exist for AVX-512, AVX2 and plain Rust; [`Kernel::best`] is chosen at run time. Rows are cut into bands by
//! shape alone and each row is summed in one order, so results do not depend on the number of threads. (They do depend,
//! in the last bits, on the kernel.)

mod error;
mod kernel;
mod matrix;
mod portable;
mod rows;
mod simd;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use error::KernelError;
pub use kernel::Kernel;
pub use matrix::{ElementType, MAX_VECTORS, Matrix};
