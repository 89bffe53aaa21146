//! Every way to compute a block gives the same values up to f32 rounding: the CPU's kernels, and candle's operations on
//! the CPU and on a GPU if there is one.

use candle_core::Tensor;
use lite_decoder::{
    Compute, DecoderError, Head, InputId, InputTransform, KvPart, KvTransform, Role, Rope, Stream, Tap,
};

use crate::fixture::{CASES, Fixture, values};

/// Largest difference of two orders of summation, over the norm of what is compared.
const TOLERANCE: f64 = 1e-5;

#[derive(Default)]
struct Recorder(Vec<(InputId, Vec<f32>)>);

impl Tap for Recorder {
    fn input(&mut self, at: InputId, x: &Tensor) -> Result<(), DecoderError> {
        assert!(x.is_contiguous());
        self.0.push((at, values(x)));
        Ok(())
    }
}

/// Scales each key or value head of a token by its index, so that heads must not be mixed up.
struct ByHead(usize);

impl KvTransform for ByHead {
    fn apply(&self, part: KvPart, heads: &mut [f32], head_dim: usize) {
        let offset = if part == KvPart::Keys { 1 } else { 2 };
        for token in heads.chunks_exact_mut(head_dim * self.0) {
            for (index, head) in token.chunks_exact_mut(head_dim).enumerate() {
                head.iter_mut().for_each(|v| *v *= (index + offset) as f32 * 0.5);
            }
        }
    }
}

/// Coarse rounding of one input.
struct Coarse;

impl InputTransform for Coarse {
    fn apply(&self, at: InputId, x: &mut [f32], _: usize) -> Result<(), DecoderError> {
        if at.stream == Stream::MlpIn {
            x.iter_mut().for_each(|v| *v += 0.25);
        }
        Ok(())
    }
}

fn assert_close(what: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let square = |v: f32| f64::from(v) * f64::from(v);
    let apart: f64 = found.iter().zip(wanted).map(|(a, b)| square(a - b)).sum();
    let size: f64 = wanted.iter().map(|v| square(*v)).sum();
    assert!(apart.sqrt() <= TOLERANCE * size.sqrt(), "{what}: {} of {}", apart.sqrt(), size.sqrt());
}

/// Everything a block can be asked for, by name.
fn all_of(fixture: &Fixture, windows: &[Vec<u32>], compute: &Compute) -> Vec<(String, Vec<f32>)> {
    let rope = Rope::new(&fixture.spec, windows[0].len(), compute.device()).unwrap();
    let mut found = Vec::new();
    let mut x = fixture.embed(windows).to_device(compute.device()).unwrap();
    for index in 0..fixture.spec.blocks.len() {
        let block = fixture.block_on(index, compute);
        assert_eq!(block.compute().is_composed(), compute.is_composed());
        let mut named = |what: &str, y: &Tensor| {
            assert!(y.device().same_device(compute.device()), "{what} left the device");
            found.push((format!("block {index}, {what}"), values(y)));
        };
        let residual = x.flatten(0, 1).unwrap();
        let heads = block.attn_out(&block.attn_in(&residual).unwrap(), &rope).unwrap();
        let middle_residual = block.after_attn(&residual, &heads).unwrap();
        let normed = block.mlp_in(&middle_residual).unwrap();
        if block.spec().moe().is_some() {
            assert!(block.mlp_mid(&normed).unwrap_err().to_string().contains("has experts"));
            named("input of the experts", &normed);
            let scores = block.router_scores(&normed).unwrap();
            found.push((format!("block {index}, scores"), scores));
        } else {
            let middle = block.mlp_mid(&normed).unwrap();
            let (after, output) = block.after_mlp_with_output(&middle_residual, &middle).unwrap();
            named("output of down", &output);
            named("segments", &after);
        }
        let mut named = |what: &str, y: &Tensor| found.push((format!("block {index}, {what}"), values(y)));
        let by_head = fixture.kv_heads(index).map(ByHead);
        let kv = by_head.as_ref().map(|kv| kv as &dyn KvTransform);
        match kv {
            Some(kv) => named("cache", &block.forward_through(&x, &rope, kv).unwrap()),
            None => {
                let error = block.forward_through(&x, &rope, &ByHead(1)).unwrap_err();
                assert_eq!(error.kind(), lite_decoder::ErrorKind::Unsupported);
                assert!(error.to_string().contains("latent attention"), "{error}");
                let error = block.forward_differentiable(&x, &rope).unwrap_err();
                assert_eq!(error.kind(), lite_decoder::ErrorKind::Unsupported, "{error}");
            }
        }
        named("engine", &block.forward_as_engine(&x, &rope, Some(&Coarse), kv).unwrap());
        let (mut forward, mut observed) = (Recorder::default(), Recorder::default());
        let y = block.forward(&x, &rope, &mut forward).unwrap();
        assert!(y.device().same_device(compute.device()), "the output left the device");
        named("forward", &y);
        block.observe(&x, &rope, &mut observed).unwrap();
        assert_eq!(forward.0, observed.0);
        found.extend(forward.0.into_iter().map(|(at, values)| (at.to_string(), values)));
        x = y;
    }
    let head = Head::load(&fixture.spec, &fixture.weights, compute).unwrap();
    let logits = head.logits(&x.flatten(0, 1).unwrap()).unwrap();
    found.push(("logits".to_owned(), values(&logits)));
    let chunk = head.logits_chunk(&head.norm(&x.flatten(0, 1).unwrap()).unwrap(), 3, 20).unwrap();
    found.push(("some logits".to_owned(), values(&chunk)));
    found
}

#[test]
fn every_way_to_compute_agrees() {
    for case in CASES {
        let fixture = Fixture::open(case);
        for batch in &fixture.batches {
            let wanted = all_of(&fixture, &batch.windows, &Compute::cpu());
            for compute in &Compute::every()[1..] {
                let found = all_of(&fixture, &batch.windows, compute);
                assert_eq!(found.len(), wanted.len());
                for ((what, found), (name, wanted)) in found.iter().zip(&wanted) {
                    assert_eq!(what, name);
                    assert_close(&format!("{case} on {:?}, {what}", compute.device()), found, wanted);
                }
            }
        }
    }
}

#[test]
fn changed_weights_are_used_by_every_way() {
    let fixture = Fixture::open("qwen2");
    let windows = &fixture.batches[0].windows;
    let run = |compute: &Compute, factor: f64| {
        let mut block = fixture.block_on(0, compute);
        let weight = (block.weight(Role::Down).unwrap() * factor).unwrap();
        // Comes from the CPU, as a dequantized weight does.
        block.set_weight(Role::Down, weight.to_device(&candle_core::Device::Cpu).unwrap()).unwrap();
        let rope = Rope::new(&fixture.spec, windows[0].len(), compute.device()).unwrap();
        let x = fixture.embed(windows).to_device(compute.device()).unwrap();
        values(&block.forward(&x, &rope, &mut lite_decoder::NoTap).unwrap())
    };
    for compute in &Compute::every() {
        assert_ne!(run(compute, 1.0), run(compute, 3.0));
        assert_close("tripled", &run(compute, 3.0), &run(&Compute::cpu(), 3.0));
    }
}
