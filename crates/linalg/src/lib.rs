//! Dense matrix kernels on `f32` slices: products and Gram updates.
//!
//! Every result is independent of the number of threads: work is cut by shape alone, and each
//! element is summed in one fixed order.

mod cholesky;
mod cross;
mod fold;
mod gram;
mod product;

pub use cholesky::{FactorError, apply_inverse, gptq_factor, gptq_factor_f64, gptq_factor_in_place};
pub use cross::cross_update;
pub use fold::{scale_columns, unscale_gram};
pub use gram::{gram_update, mirror_lower};
pub use product::{Mat, Threads, dot, gemm, gemm_into};
