//! Forward and backward through a whole block, for some windows at a time.
//!
//! The block is cut where attention mixes rows: before, attention, after; and back again. Everything else is done
//! row by row in tasks of [`ROWS`] rows, whose intermediate values stay in the cache. Only what the weight
//! gradients `dWᵀ = xᵀ · dy` need is kept. Tasks are cut by shape alone, and each weight gradient is one product in one
//! order, so results do not depend on the number of threads.

use lite_linalg::{Mat, Threads, gemm_into};
use rayon::prelude::*;

use crate::attention::Heads;
use crate::kernels::{Softmax, add_scaled, squared_error};
use crate::network::{Network, Stage};
use crate::norm::Norm;
use crate::rotate::{rotate, rotate_gradient};

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
    /// What o and down made, where a norm or a factor stands behind them.
    outputs: [Vec<f32>; 2],
    normed: Vec<f32>,
    gate_up: Vec<f32>,
    d_out: Vec<f32>,
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
            normed_or_copied(&network.attn_norm, normed, x);
            qkv.forward(projection, 0.0, normed);
            let (first, rotation) = (task * ROWS, network.rotation());
            let [q_norm, k_norm] = network.head_norms();
            rotate(q, projection, qkv.outputs, first, q_columns, dim, rotation, q_norm);
            rotate(k, projection, qkv.outputs, first, k_columns, dim, rotation, k_norm);
        });
    }

    fn after_attention(&mut self, network: &Network, x: &[f32], target: &[f32], seed: f32) -> f64 {
        let (hidden, middle) = (network.hidden, network.intermediate);
        let gate_up = network.stage(Stage::GateUp).outputs;
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
            .zip(d_gate_up.chunks_mut(ROWS * gate_up))
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
            let [q_norm, k_norm] = network.head_norms();
            rotate_gradient(slopes, dq, projection, stride, first, q_columns, dim, rotation, q_norm);
            rotate_gradient(slopes, dk, projection, stride, first, k_columns, dim, rotation, k_norm);
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
        let Scratch { residual, outputs: [o, down], normed, gate_up, d_out, d_middle, d_mlp_in } = scratch;
        let (hidden, width) = (network.hidden, network.intermediate);
        let rows = self.residual.len() / hidden;
        residual.clear();
        residual.extend_from_slice(self.residual);
        let of_o = Branch { network, stage: Stage::O, norm: &network.attn_out_norm };
        of_o.add(residual, self.heads, o, normed);
        normed_or_copied(&network.mlp_norm, self.mlp_in, residual);
        gate_up.resize(rows * network.stage(Stage::GateUp).outputs, 0.0);
        network.stage(Stage::GateUp).forward(gate_up, 0.0, self.mlp_in);
        network.nonlinearity.forward(self.middle, gate_up, width);
        let of_down = Branch { network, stage: Stage::Down, norm: &network.mlp_out_norm };
        d_out.clear();
        d_out.extend_from_slice(residual);
        of_down.add(d_out, self.middle, down, normed);
        squared_error(d_out, self.target, hidden, seed, self.loss);

        of_down.gradient(self.d_down, d_out, down, normed);
        d_middle.resize(rows * width, 0.0);
        network.stage(Stage::Down).backward(d_middle, self.d_down);
        network.nonlinearity.gradient(self.d_gate_up, d_middle, gate_up, width);
        d_mlp_in.resize(rows * hidden, 0.0);
        network.stage(Stage::GateUp).backward(d_mlp_in, self.d_gate_up);
        match &network.mlp_norm {
            Some(norm) => norm.add_gradient(d_out, d_mlp_in, residual),
            None => add_scaled(d_out, d_mlp_in, 1.0),
        }
        of_o.gradient(self.d_o, d_out, o, normed);
        network.stage(Stage::O).backward(self.d_heads, self.d_o);
    }
}

/// Attention or feed-forward, from its last linear to the residual sum.
struct Branch<'a> {
    network: &'a Network,
    stage: Stage,
    norm: &'a Option<Norm>,
}

impl Branch<'_> {
    /// Whether the linear's output is what is added.
    fn is_bare(&self) -> bool {
        self.norm.is_none() && self.network.residual_scale == 1.0
    }

    /// `residual += scale · norm(linear(x))`; `output` keeps what the linear made, if it is needed.
    fn add(&self, residual: &mut [f32], x: &[f32], output: &mut Vec<f32>, normed: &mut Vec<f32>) {
        let linear = self.network.stage(self.stage);
        if self.is_bare() {
            return linear.forward(residual, 1.0, x);
        }
        output.resize(residual.len(), 0.0);
        linear.forward(output, 0.0, x);
        normed.resize(residual.len(), 0.0);
        normed_or_copied(self.norm, normed, output);
        add_scaled(residual, normed, self.network.residual_scale);
    }

    /// The gradient towards the linear's output, from that towards the sum.
    fn gradient(&self, slopes: &mut [f32], d_sum: &[f32], output: &[f32], scaled: &mut Vec<f32>) {
        if self.is_bare() {
            return slopes.copy_from_slice(d_sum);
        }
        slopes.fill(0.0);
        match self.norm {
            None => add_scaled(slopes, d_sum, self.network.residual_scale),
            Some(norm) => {
                scaled.clear();
                scaled.extend(d_sum.iter().map(|d| d * self.network.residual_scale));
                norm.add_gradient(slopes, scaled, output);
            }
        }
    }
}

fn normed_or_copied(norm: &Option<Norm>, out: &mut [f32], x: &[f32]) {
    match norm {
        Some(norm) => norm.forward(out, x),
        None => out.copy_from_slice(x),
    }
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
        softcap: attn.softcap,
    }
}
