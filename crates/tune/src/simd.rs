//! One loop, compiled once per instruction set and picked at run time. None of them uses fused multiply-add, so
//! all give the same bits.

/// Declares a function whose body is compiled for AVX-512, AVX2 and the baseline. (A closure would do, but
/// nothing makes the compiler inline it into the functions that may use those instructions.)
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name<$life>($($arg: $ty),*) {
            struct Kernel<$life> { $($arg: $ty),* }
            impl<$life> pulp::WithSimd for Kernel<$life> {
                type Output = ();
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) {
                    let Self { $($arg),* } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Kernel { $($arg),* });
        }
    };
}
pub(crate) use simd_fn;

/// Partial sums of a reduction; a multiple of every vector width.
const LANES: usize = 32;

/// Sum of `f(i)` over `0..len` in one fixed order: lane by lane, then pairwise.
#[inline(always)]
pub(crate) fn sum_by(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = len / LANES * LANES;
    let mut start = 0;
    while start < whole {
        for i in 0..LANES {
            lanes[i] += f(start + i);
        }
        start += LANES;
    }
    for i in whole..len {
        lanes[i - whole] += f(i);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest of `values`, NaN ignored (`exp` brings NaN back).
#[inline(always)]
pub(crate) fn max_of(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    let max = |a: f32, b: f32| if b > a { b } else { a };
    let most = lanes.into_iter().fold(f32::NEG_INFINITY, max);
    tail.iter().copied().fold(most, max)
}
