//! How fast weights are read while one token is decoded: bytes of weights per second of each kernel, beside those of a
//! plain copy of memory. `cargo bench -p lite-runtime --bench decode`

use std::hint::black_box;
use std::time::Instant;

use lite_kernels::{Kernel, Matrix};
use rayon::prelude::*;

const SHAPES: [(usize, usize); 2] = [(4096, 4096), (14336, 4096)];
const COPY_BYTES: usize = 256 << 20;

/// The shortest of several runs that fill about half a second, in seconds.
fn fastest(mut run: impl FnMut()) -> f64 {
    run();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 5 || start.elapsed().as_secs_f64() < 0.5 {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn values(count: usize) -> Vec<f32> {
    (0..count as u32).into_par_iter().map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0).collect()
}

fn matrix(kind: &str, rows: usize, cols: usize) -> Matrix {
    let groups = rows * cols / 128;
    let codes = |bits: u8| -> Vec<u8> {
        (0..rows * cols)
            .into_par_iter()
            .map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> (32 - bits)) as u8)
            .collect()
    };
    let coded = |bits: u8| {
        Matrix::from_codes(bits, rows, cols, &codes(bits), &vec![0.01; groups], &vec![1 << (bits - 1); groups])
    };
    let made = match kind {
        "f32" => Matrix::from_f32(rows, cols, &values(rows * cols)),
        "bf16" => {
            let rounded: Vec<f32> =
                values(rows * cols).into_iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect();
            Matrix::from_f32(rows, cols, &rounded)
        }
        "int8" => coded(8),
        _ => coded(4),
    };
    made.expect("the shapes are whole groups")
}

#[allow(clippy::print_stdout, reason = "a bench prints its table")]
fn main() {
    println!("{} threads", rayon::current_num_threads());
    let from = vec![1u8; COPY_BYTES];
    let mut to = vec![0u8; COPY_BYTES];
    let seconds = fastest(|| {
        to.par_chunks_mut(1 << 20).zip(from.par_chunks(1 << 20)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&to);
    });
    println!("memory copy: {:.1} GB/s read and as much written", COPY_BYTES as f64 / seconds / 1e9);
    println!();
    println!(
        "{:>13} {:>5} {:>9} {:>8} {:>9} {:>10} {:>12}",
        "shape", "type", "kernel", "vectors", "GB/s", "ms", "products/s"
    );
    for (rows, cols) in SHAPES {
        for kind in ["f32", "bf16", "int8", "int4"] {
            let matrix = matrix(kind, rows, cols);
            for kernel in Kernel::available() {
                for vectors in [1, 8] {
                    let (x, mut out) = (values(vectors * cols), vec![0f32; vectors * rows]);
                    let seconds = fastest(|| {
                        matrix.multiply_with(kernel, &x, &mut out);
                        black_box(&out);
                    });
                    let rate = matrix.bytes() as f64 / seconds / 1e9;
                    println!(
                        "{:>13} {kind:>5} {:>9} {vectors:>8} {rate:>9.1} {:>10.3} {:>12.0}",
                        format!("{rows}x{cols}"),
                        kernel.name(),
                        seconds * 1e3,
                        vectors as f64 / seconds
                    );
                }
            }
        }
    }
}
