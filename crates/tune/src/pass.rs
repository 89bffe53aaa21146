//! Forward and backward through a whole block, for some windows at a time.
//!
//! The block is cut where attention mixes rows: before, attention, after; and back again. Everything else is done
//! row by row in tasks of [`ROWS`] rows, whose intermediate values stay in the cache. Only what the weight
//! gradients `dWᵀ = xᵀ · dy` need is kept. Tasks are cut by shape alone, and each weight gradient is one product in one
//! order, so results do not depend on the number of threads.

use lite_linalg::{Mat, Threads, gemm_into};
use rayon::prelude::*;

use crate::attention::Heads;
use crate::kernels::{
    Softmax, add_rms_norm_gradient, rms_norm, rotate, rotate_gradient, silu_mul, silu_mul_gradient, squared_error,
};
use crate::network::{Network, Norm, Stage};

/// Rows per task: enough for matrix products at full speed.
const ROWS: usize = 256;

/// What of a pass is kept, for up to `rows` rows.
pub(crate) struct Tape {
    rows: usize,
    /// Inputs of the four stages, `(rows, inputs)`.
    inputs: [Vec<f32>; 4],
    /// Gradients towards the outputs of the four stages, `(rows, outputs)`.
    slopes: [Vec<f32>; 4],
    /// Outputs of q, k and v.
    projection: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    notes: Vec<Softmax>,
    /// Gradient towards the heads' outputs.
    d_heads: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// The rows of one task after attention.
struct After<'a> {
    residual: &'a [f32],
    heads: &'a [f32],
    target: &'a [f32],
    mlp_in: &'a mut [f32],
    middle: &'a mut [f32],
    d_o: &'a mut [f32],
    d_gate_up: &'a mut [f32],
    d_down: &'a mut [f32],
    d_heads: &'a mut [f32],
    loss: &'a mut f64,
}

/// Values that live within one task.
#[derive(Default)]
struct Scratch {
    residual: Vec<f32>,
    gate_up: Vec<f32>,
    d_middle: Vec<f32>,
    d_mlp_in: Vec<f32>,
}

impl Tape {
    /// Room for `rows` rows, whole windows.
    pub(crate) fn new(network: &Network, rows: usize) -> Self {
        let room = |width: usize| vec![0f32; rows * width];
        let attn = &network.attn;
        let (q, k) = (attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim);
        Self {
            rows,
            inputs: Stage::ALL.map(|stage| room(network.stage(stage).inputs)),
            slopes: Stage::ALL.map(|stage| room(network.stage(stage).outputs)),
            projection: room(network.stage(Stage::Qkv).outputs),
            q: room(q),
            k: room(k),
            notes: vec![Softmax::default(); rows * attn.heads],
            d_heads: room(q),
            dq: room(q),
            dk: room(k),
            dv: room(k),
        }
    }

    /// Runs the windows in `x` `(rows, hidden)` forward and backward. The loss is `seed/2 · Σ (y − target)²`; what comes
    /// back is `Σ (y − target)²`. `attention` tells whether weights before the feed-forward need gradients.
    pub(crate) fn run(&mut self, network: &Network, x: &[f32], target: &[f32], seed: f32, attention: bool) -> f64 {
        debug_assert_eq!(x.len(), self.rows * network.hidden);
        self.before_attention(network, x);
        let [_, heads, ..] = &mut self.inputs;
        let attend = heads_of(network, &self.q, &self.k, &self.projection);
        attend.forward(heads, &mut self.notes);
        let loss = self.after_attention(network, x, target, seed);
        if attention {
            let attend = heads_of(network, &self.q, &self.k, &self.projection);
            attend.backward(&self.notes, &self.d_heads, &mut self.dq, &mut self.dk, &mut self.dv);
            self.back_to_projection(network);
        }
        loss
    }

    fn before_attention(&mut self, network: &Network, x: &[f32]) {
        let qkv = network.stage(Stage::Qkv);
        let (hidden, dim) = (network.hidden, network.attn.head_dim);
        let [q_columns, k_columns, _] = &network.columns;
        let tasks = x
            .par_chunks(ROWS * hidden)
            .zip(self.inputs[0].par_chunks_mut(ROWS * hidden))
            .zip(self.projection.par_chunks_mut(ROWS * qkv.outputs))
            .zip(self.q.par_chunks_mut(ROWS * q_columns.len() * dim))
            .zip(self.k.par_chunks_mut(ROWS * k_columns.len() * dim));
        tasks.with_max_len(1).enumerate().for_each(|(task, ((((x, normed), projection), q), k))| {
            let (weight, eps) = &network.attn_norm;
            rms_norm(normed, x, weight, *eps);
            qkv.forward(projection, 0.0, normed);
            let (first, rotation) = (task * ROWS, network.rotation());
            rotate(q, projection, qkv.outputs, first, q_columns, dim, rotation, slices(&network.q_norm));
            rotate(k, projection, qkv.outputs, first, k_columns, dim, rotation, slices(&network.k_norm));
        });
    }

    fn after_attention(&mut self, network: &Network, x: &[f32], target: &[f32], seed: f32) -> f64 {
        let (hidden, middle) = (network.hidden, network.intermediate);
        let [_, heads, mlp_in, mlp_mid] = &mut self.inputs;
        let [_, d_o, d_gate_up, d_down] = &mut self.slopes;
        let head_width = network.stage(Stage::O).inputs;
        let mut losses = vec![0f64; self.rows.div_ceil(ROWS)];
        let tasks: Vec<After> = x
            .chunks(ROWS * hidden)
            .zip(heads.chunks(ROWS * head_width))
            .zip(target.chunks(ROWS * hidden))
            .zip(mlp_in.chunks_mut(ROWS * hidden))
            .zip(mlp_mid.chunks_mut(ROWS * middle))
            .zip(d_o.chunks_mut(ROWS * hidden))
            .zip(d_gate_up.chunks_mut(ROWS * 2 * middle))
            .zip(d_down.chunks_mut(ROWS * hidden))
            .zip(self.d_heads.chunks_mut(ROWS * head_width))
            .zip(&mut losses)
            .map(|(((((((((residual, heads), target), mlp_in), middle), d_o), d_gate_up), d_down), d_heads), loss)| {
                After { residual, heads, target, mlp_in, middle, d_o, d_gate_up, d_down, d_heads, loss }
            })
            .collect();
        tasks
            .into_par_iter()
            .with_max_len(1)
            .for_each_init(Scratch::default, |scratch, rows| rows.run(network, seed, scratch));
        losses.iter().sum()
    }

    fn back_to_projection(&mut self, network: &Network) {
        let (dim, tokens) = (network.attn.head_dim, network.tokens);
        let stride = network.stage(Stage::Qkv).outputs;
        let [q_columns, k_columns, v_columns] = &network.columns;
        let (dq, dk, dv) = (&self.dq, &self.dk, &self.dv);
        let tasks = self.slopes[0].par_chunks_mut(ROWS * stride).zip(self.projection.par_chunks(ROWS * stride));
        tasks.with_max_len(1).enumerate().for_each(|(task, (slopes, projection))| {
            let (first, rotation) = (task * ROWS, network.rotation());
            rotate_gradient(slopes, dq, projection, stride, first, q_columns, dim, rotation, slices(&network.q_norm));
            rotate_gradient(slopes, dk, projection, stride, first, k_columns, dim, rotation, slices(&network.k_norm));
            for (row, slopes) in slopes.chunks_exact_mut(stride).enumerate() {
                let row = first + row;
                for (head, &column) in v_columns.iter().enumerate() {
                    let from = ((row / tokens * v_columns.len() + head) * tokens + row % tokens) * dim;
                    slopes[column..column + dim].copy_from_slice(&dv[from..from + dim]);
                }
            }
        });
    }

    /// Adds the gradient towards the weights of rows `rows` of a stage to `gradient` `[rows, inputs]`.
    pub(crate) fn add_weight_gradient(
        &self,
        network: &Network,
        stage: Stage,
        rows: std::ops::Range<usize>,
        gradient: &mut [f32],
        beta: f32,
    ) {
        let fused = network.stage(stage);
        let slopes = Mat::window(&self.slopes[stage as usize], rows.start, self.rows, rows.len(), fused.outputs);
        let inputs = Mat::new(&self.inputs[stage as usize], self.rows, fused.inputs);
        gemm_into(gradient, fused.inputs, beta, 1.0, slopes.t(), inputs, Threads::All);
    }
}

impl After<'_> {
    /// From the heads' outputs to the loss, and back.
    fn run(self, network: &Network, seed: f32, scratch: &mut Scratch) {
        let Scratch { residual, gate_up, d_middle, d_mlp_in } = scratch;
        let (hidden, width) = (network.hidden, network.intermediate);
        let rows = self.residual.len() / hidden;
        residual.clear();
        residual.extend_from_slice(self.residual);
        network.stage(Stage::O).forward(residual, 1.0, self.heads);
        let (weight, eps) = &network.mlp_norm;
        rms_norm(self.mlp_in, residual, weight, *eps);
        gate_up.resize(rows * 2 * width, 0.0);
        network.stage(Stage::GateUp).forward(gate_up, 0.0, self.mlp_in);
        silu_mul(self.middle, gate_up, width);
        self.d_down.copy_from_slice(residual);
        network.stage(Stage::Down).forward(self.d_down, 1.0, self.middle);
        squared_error(self.d_down, self.target, hidden, seed, self.loss);

        d_middle.resize(rows * width, 0.0);
        network.stage(Stage::Down).backward(d_middle, self.d_down);
        silu_mul_gradient(self.d_gate_up, d_middle, gate_up, width);
        d_mlp_in.resize(rows * hidden, 0.0);
        network.stage(Stage::GateUp).backward(d_mlp_in, self.d_gate_up);
        self.d_o.copy_from_slice(self.d_down);
        add_rms_norm_gradient(self.d_o, d_mlp_in, residual, weight, *eps);
        network.stage(Stage::O).backward(self.d_heads, self.d_o);
    }
}

fn slices(norm: &Option<Norm>) -> Option<(&[f32], f32)> {
    norm.as_ref().map(|(weight, eps)| (weight.as_slice(), *eps))
}

fn heads_of<'a>(network: &'a Network, q: &'a [f32], k: &'a [f32], projection: &'a [f32]) -> Heads<'a> {
    let attn = &network.attn;
    Heads {
        q,
        k,
        projection,
        stride: network.stage(Stage::Qkv).outputs,
        v_columns: &network.columns[2],
        heads: attn.heads,
        kv_heads: attn.kv_heads,
        dim: attn.head_dim,
        tokens: network.tokens,
        window: attn.window,
        scale: attn.scale,
    }
}
